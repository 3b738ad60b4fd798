"""Colour-wise saliency of black-box image models: RISE, debiased RISE and MC-RISE, sharded over Ray.

Names are loaded on first use, so that `import mcrise_ray` and `mcrise --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcrise_ray import masks as masks
    from mcrise_ray.decode import DecodeOptions as DecodeOptions
    from mcrise_ray.embedders import Embedder as Embedder
    from mcrise_ray.embedders import load_embedder as load_embedder
    from mcrise_ray.errors import MCRiseError as MCRiseError
    from mcrise_ray.explainer import explain as explain
    from mcrise_ray.explanations import Explanation as Explanation
    from mcrise_ray.images import ImageSource as ImageSource
    from mcrise_ray.images import read_image as read_image
    from mcrise_ray.jobfiles import load_job as load_job
    from mcrise_ray.jobs import run_job as run_job
    from mcrise_ray.jobspec import JobSpec as JobSpec
    from mcrise_ray.loading import ModelSpec as ModelSpec
    from mcrise_ray.models import Model as Model
    from mcrise_ray.models import load_model as load_model
    from mcrise_ray.preprocess import Preprocessing as Preprocessing
    from mcrise_ray.reid import Similarity as Similarity
    from mcrise_ray.reid import embeddings_of as embeddings_of
    from mcrise_ray.reid import reid_spec as reid_spec
    from mcrise_ray.reid import similarity as similarity
    from mcrise_ray.results import read_results as read_results
    from mcrise_ray.scores import Classifier as Classifier
    from mcrise_ray.spec import ExplainSpec as ExplainSpec
    from mcrise_ray.submission import find_job as find_job
    from mcrise_ray.submission import list_jobs as list_jobs
    from mcrise_ray.submission import submit_job as submit_job

__version__ = "0.1.0"

_HOMES = {
    "Classifier": "scores",
    "DecodeOptions": "decode",
    "Embedder": "embedders",
    "ExplainSpec": "spec",
    "Explanation": "explanations",
    "ImageSource": "images",
    "JobSpec": "jobspec",
    "MCRiseError": "errors",
    "Model": "models",
    "ModelSpec": "loading",
    "Preprocessing": "preprocess",
    "Similarity": "reid",
    "embeddings_of": "reid",
    "explain": "explainer",
    "find_job": "submission",
    "list_jobs": "submission",
    "load_embedder": "embedders",
    "load_job": "jobfiles",
    "load_model": "models",
    "read_image": "images",
    "read_results": "results",
    "reid_spec": "reid",
    "run_job": "jobs",
    "similarity": "reid",
    "submit_job": "submission",
}

__all__ = sorted([*_HOMES, "masks"])  # noqa: PLE0605 - the names are the table's keys


def __getattr__(name: str) -> Any:
    if name == "masks":
        return import_module("mcrise_ray.masks")
    if name not in _HOMES:
        raise AttributeError(f"module 'mcrise_ray' has no attribute {name!r}")
    value = getattr(import_module(f"mcrise_ray.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What completion in a notebook and `help()` look for, before it is loaded."""
    return sorted({*globals(), *__all__})
