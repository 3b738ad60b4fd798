"""Everything that a job is, and which part of it decides what comes out."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from mcrise_ray.decode import DecodeOptions
from mcrise_ray.errors import SpecError
from mcrise_ray.loading import ModelSpec
from mcrise_ray.reid import P_MASK
from mcrise_ray.reidspec import ReidSpec, Sources
from mcrise_ray.spec import ExplainSpec, StrictModel
from mcrise_ray.targets import TargetChoice
from mcrise_ray.tuning import BatchSizeChoice, PrecisionChoice

_FREE_TO_CHANGE = frozenset(
    {"output", "actors", "gpus_per_actor", "label_selector", "figures", "deadline", "max_retries"}
)

_PREDICTED: Final = ("predicted",)

_LEAST_GPU: Final = 0.0001  # as finely as Ray counts


class ActorRange(StrictModel):
    """How many actors a job works with on a cluster that grows.

    Args:
        min: asked for from the start.
        max: asked for at most; null leaves the limit to the cluster.
    """

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> ActorRange:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"expected min to be at most max, found {self.min} and {self.max}")
        return self


class JobSpec(StrictModel):
    """Everything that a job is.

    Args:
        images: files, folders, manifests, shards, datasets: see `ImageSource`.
        model: which model; for `reid` one that embeds, see `load_embedder`.
        output: folder or URL of the results.
        kind: `"explain"`: classes of each image; `"reid"`: why each image, a query, is like its matches in a
            gallery, which then has to be given below.
        targets: `"predicted"`, `"top5"`, `"truth"`, `"predicted+truth"`, `"manifest"`, or class indices and
            names; see `parse_targets`. Several targets share one pass. Not for `reid`.
        reid: the gallery and which matches, for `reid` alone.
        decode: what is decoded and what is refused.
        explain: method, masks, fills. For `reid`, p_mask is 0.1 where nothing is said.
        actors: Ray actors that each hold the model. `auto`: as many as fit, also while the cluster grows or
            shrinks; one is asked for where none does. A number: asked for in any case, which makes a cluster
            grow that can; work begins with those that are there. `{min: 2, max: 8}`: two are asked for in
            any case, more taken as they fit, and in a job that goes on twice as many as fit are asked for
            again and again, so that a cluster grows that can. 0: in this process, without Ray.
        cpus_per_actor: cores, and threads of torch, per actor.
        gpus_per_actor: may be a fraction below 1, so that actors share a GPU; null takes one where the
            cluster has any when the job begins, so say 1 where it starts from none.
        label_selector: labels of Ray that an actor's node must have, such as
            `{ray.io/accelerator-type: A100}`.
        precision: `"auto"` asks the model in the fastest way that keeps its scores, see `mcrise_ray.tuning`;
            `"float32"` asks it as it is. What was chosen is stored, and kept on resuming; but two runs of one
            job may choose differently, because trials are timed. `"channels_last+bfloat16"` and the like,
            with a batch_size, name what `mcrise job check` or an earlier run has found: then the bits are
            the same too.
        batch_size: masked images per call of the model; `"auto"` tries several.
        standard_error: store the standard error of every pixel too, at the price of twice the space.
        original_size: store maps at the size of each image instead of the model's input: bilinear, NaN where
            a centre crop cut the image off.
        figures: draw the first so many images.
        deadline: seconds after which a call counts as stalled, and its actor is replaced; ten times the
            slowest pace seen so far counts where that is longer.
        max_retries: of a unit of masks whose actor died under it, before its image gets an error row.
    """

    images: Sources
    model: ModelSpec
    output: str = Field(min_length=1)
    kind: Literal["explain", "reid"] = "explain"
    targets: TargetChoice = _PREDICTED
    reid: ReidSpec | None = None
    decode: DecodeOptions = Field(default_factory=DecodeOptions)
    explain: ExplainSpec = Field(default_factory=ExplainSpec)
    actors: Literal["auto"] | int | ActorRange = "auto"
    cpus_per_actor: int = Field(default=1, ge=1)
    gpus_per_actor: float | None = Field(default=None, ge=0)
    label_selector: dict[str, str] = Field(default_factory=dict)
    precision: PrecisionChoice = "auto"
    batch_size: BatchSizeChoice = "auto"
    standard_error: bool = False
    original_size: bool = False
    figures: int = Field(default=100, ge=0)
    deadline: float = Field(default=60.0, gt=0)
    max_retries: int = Field(default=3, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _p_mask_of_reid(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("kind") != "reid":
            return values
        said = values.get("explain") or {}
        if isinstance(said, ExplainSpec):
            said = said.model_dump(exclude_unset=True)
        if not isinstance(said, dict):
            return values
        return {**values, "explain": ExplainSpec(**{"p_mask": P_MASK, **said})}

    @model_validator(mode="after")
    def _check_kind(self) -> JobSpec:
        if self.kind == "explain":
            if self.reid is not None:
                raise ValueError("reid: expected kind reid with a gallery, found kind explain")
            return self
        if self.reid is None:
            raise ValueError("reid: expected a gallery for kind reid, found none; give reid.gallery")
        for name, is_said, instead in (
            ("targets", self.targets != _PREDICTED, "say reid.matches (--match)"),
            ("model.classes", self.model.classes is not None, "leave it out"),
            ("model.preprocessing.activation", "activation" in self.model.preprocessing, "leave it out"),
        ):
            if is_said:
                raise ValueError(f"{name}: expected none for kind reid, which explains matches; {instead}")
        return self

    @field_validator("actors", mode="before")
    @classmethod
    def _check_actors(cls, actors: Any) -> Any:
        # Before the union is tried, whose message would list the failure of each of its members.
        count = isinstance(actors, int) and not isinstance(actors, bool) and actors >= 0
        if actors != "auto" and not count and not isinstance(actors, ActorRange | dict):
            raise ValueError(f"expected auto, a whole number, or min and max, found {actors!r}")
        try:
            return ActorRange(**actors) if isinstance(actors, dict) else actors
        except SpecError as error:
            raise ValueError(str(error)) from error

    @field_validator("gpus_per_actor")
    @classmethod
    def _check_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and (0 < gpus < _LEAST_GPU or (gpus > 1 and gpus != int(gpus))):
            raise ValueError(
                "expected a fraction below 1 or a whole number, as Ray shares GPUs, and nothing between 0 "
                f"and {_LEAST_GPU}, found {gpus}"
            )
        return gpus

    @model_validator(mode="after")
    def _check_precision(self) -> JobSpec:
        if self.precision not in ("auto", "float32") and self.batch_size == "auto":
            raise ValueError(
                f"batch_size: expected a number beside precision {self.precision}, because both are chosen "
                "together, found auto"
            )
        return self

    @property
    def fewest_actors(self) -> int:
        """How many actors are asked for, whether they fit or not."""
        if isinstance(self.actors, ActorRange):
            return self.actors.min
        return 1 if self.actors == "auto" else self.actors

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the results: two runs that share them may share one output.

        Threads belong to them, because a sum's rounding depends on how it is split.
        """
        content = {
            name: value for name, value in self.model_dump(mode="json").items() if name not in _FREE_TO_CHANGE
        }
        if self.actors == 0:
            content["cpus_per_actor"] = None  # this process takes torch's own choice
        return content

    @property
    def hash(self) -> str:
        """Sixteen hex digits of the `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Settings in which two identities differ, in words: `explain.masks: 8000 there, 4000 asked`."""
    left, right = _flat(there), _flat(asked)
    return [
        f"{name}: {left.get(name, 'nothing')} there, {right.get(name, 'nothing')} asked"
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
