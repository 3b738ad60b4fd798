"""Shared by all tests: shapes in signatures are checked, and no test leans on the number of cores."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import jaxtyping

# Before anything else imports them: every shape in a signature of the numerics becomes a check.
_NUMERICS = (
    *("masks", "blend", "regression", "variates", "kernel_regression", "kernels", "guide", "learning"),
    *("saliency", "estimators", "explanations", "scores", "models", "pipeline", "explainer"),
    *("preprocess", "decode", "tuning", "reid", "identity", "matching", "embedders"),
)
_hook = jaxtyping.install_import_hook([f"mcrise_ray.{name}" for name in _NUMERICS], "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def shapes_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is done over hundreds of seeds: it takes twice as long where shapes are checked."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on this machine: the query that its URLs need."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"endpoint_override={host}:{port}&scheme=http&allow_bucket_creation=true"
        server.stop()
