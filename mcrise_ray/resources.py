"""What a job may use of a machine or a cluster: everything about a job that never changes its maps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mcrise_ray.errors import SpecError
from mcrise_ray.spec import StrictModel


class ActorRange(StrictModel):
    """As many actors as fit, within bounds: work begins with `min` of them, the rest join as nodes come.

    Args:
        min: fewer are not enough to begin.
        max: more are not asked for.
    """

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> ActorRange:
        if self.min > self.max:
            raise ValueError(f"expected min <= max, found min {self.min} and max {self.max}")
        return self


class Resources(StrictModel):
    """What a job may use. None of it changes the maps, only how soon they are there.

    Args:
        actors: Ray actors that each hold the model: `auto` takes as many as fit now, a number exactly so
            many, `{min: 2, max: 16}` grows with an autoscaling cluster; 0 runs in this process without Ray.
        gpus_per_actor: may be a fraction below 1, so that actors share a GPU; null takes one where there is
            any.
        cpus_per_actor: cores, and threads of torch, per actor.
        label_selector: Ray node labels that an actor's node must have, such as
            `{ray.io/accelerator-type: A100}`.
        max_retries: how often a unit of work is tried again after its actor or node died.
        deadline: seconds that a unit may take before its actor counts as stuck; ten times the slowest pace
            seen so far counts where that is longer.
    """

    actors: Literal["auto"] | int | ActorRange = "auto"
    gpus_per_actor: float | None = Field(default=None, ge=0)
    cpus_per_actor: int = Field(default=1, ge=1)
    label_selector: dict[str, str] = Field(default_factory=dict)
    max_retries: int = Field(default=3, ge=0)
    deadline: float = Field(default=60.0, gt=0)

    @field_validator("actors", mode="before")
    @classmethod
    def _check_actors(cls, actors: object) -> object:
        # Before the union is tried, whose message would list the failure of each of its members.
        count = isinstance(actors, int) and not isinstance(actors, bool) and actors >= 0
        if actors != "auto" and not count and not isinstance(actors, dict | ActorRange):
            raise ValueError(f"expected auto, a whole number or {{min: .., max: ..}}, found {actors!r}")
        try:
            return ActorRange(**actors) if isinstance(actors, dict) else actors
        except SpecError as error:
            raise ValueError(str(error)) from None

    @field_validator("gpus_per_actor")
    @classmethod
    def _check_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"expected a fraction below 1 or a whole number, as Ray shares GPUs, found {gpus}"
            )
        return gpus

    @property
    def fewest(self) -> int:
        """Actors without which work does not begin; 0 for this process."""
        if isinstance(self.actors, ActorRange):
            return self.actors.min
        return 1 if self.actors == "auto" else self.actors

    @property
    def most(self) -> int | None:
        """Actors that are asked for at most; None for as many as fit."""
        if isinstance(self.actors, ActorRange):
            return self.actors.max
        return None if self.actors == "auto" else self.actors
