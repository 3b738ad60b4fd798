"""Shared by all tests: shapes in signatures are checked, and no test leans on the number of cores."""

from __future__ import annotations

import jaxtyping

# Before anything else imports the package: every jaxtyping annotation becomes a check.
_hook = jaxtyping.install_import_hook("mcrise_ray", "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
