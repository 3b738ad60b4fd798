"""Shared by all tests: shapes in signatures are checked, and no test leans on the number of cores."""

from __future__ import annotations

import jaxtyping

# Before anything else imports them: every shape in a signature of the numerics becomes a check.
_NUMERICS = (
    *("masks", "blend", "saliency", "scores", "models", "explainer"),
    *("reid", "identity", "matching", "embedders"),
)
_hook = jaxtyping.install_import_hook([f"mcrise_ray.{name}" for name in _NUMERICS], "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
