"""How the maps of one image come about: which pieces of work there are, and what becomes of their results.

The steps are a pure function of the spec and of the scores (the partition law): `explain()` goes through them
one by one, a cluster hands them out to many workers, and both end with the same bits.

An image whose masks are picked goes through stages (`plan.stages`); any other through a pilot, whose scores
are fitted, and sums of what that leaves of the rest.

Axes: N masks; L targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from mcrise_ray.estimators import Scored, masks_of, opening_unit, picked_unit, residual_unit, scores_of
from mcrise_ray.explanations import Explanation, explanation
from mcrise_ray.guide import Guide, Picked
from mcrise_ray.learning import find_rivals, learn, learn_by_fold
from mcrise_ray.masks import Masks
from mcrise_ray.plan import MOST_LEARNT, Unit, enough, looks, pilot_count, stages, unit
from mcrise_ray.saliency import Partial
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.threads import one_blas_thread
from mcrise_ray.variates import Features, Fit, fit_scores

# Work with arrays in it is compared by identity: it is handed out once, and again only after a loss.


@dataclass(frozen=True, eq=False)
class ScoreUnit:
    """Ask the model about one unit, and return the scores; where there is a guide, of masks that it picks,
    with what it made of the others.

    Attributes:
        also: classes whose scores are wanted after those of the targets; None for all.
    """

    unit: Unit
    guide: Guide | None = None
    also: tuple[int, ...] | None = ()


@dataclass(frozen=True, eq=False)
class SumUnit:
    """Ask the model about one unit, and return the sums of what a fit or a guide leaves of its scores."""

    unit: Unit
    fit: Fit | None
    guide: Guide | None = None


@dataclass(frozen=True, eq=False)
class Conclude:
    """Bring together what is there; no model is asked.

    Attributes:
        targets, score: class indices, and their unmasked scores.
        size: (H, W) of the maps.
        scores: of units that are to be summed, and fitted first where there is no guide; None where there are
            none.
        total: sums of the units before those; None where there are none.
        look: finalize, and see whether it is enough.
        last: it is enough whatever comes out.
        guide: that picked the masks of `scores`.
        first: index of the first unit of `scores`.
        known: scores of the units before that one, from which a guide can learn too.
        learn: whether a guide of the next units is asked for.
    """

    targets: tuple[int, ...]
    score: Float64[np.ndarray, " L"]
    size: tuple[int, int]
    scores: tuple[Scored, ...] | None
    total: Partial | None
    look: bool
    last: bool
    guide: Guide | None = None
    first: int = 0
    known: tuple[Scored, ...] = ()
    learn: bool = False


Work = ScoreUnit | SumUnit | Conclude


@dataclass(frozen=True, eq=False)
class Conclusion:
    """What comes of a `Conclude`: the maps where that is the end, and what to go on with where it is not."""

    explanation: Explanation | None
    fit: Fit | None
    total: Partial | None
    guide: Guide | None = None


WorkResult = Scored | Partial | Conclusion


@dataclass(frozen=True, eq=False)
class State:
    """A reduction between two steps, from which another process can go on.

    Attributes:
        look: how many looks have been passed.
        scores: of the first units, those without a gap.
        fit: to the pilot of the last look; None before it.
        total: sums of the first `units` units.
        units: summed.
        stage: how many stages have been passed.
        guide: of the units to come; None before the first stage has been passed, and where none are picked.
    """

    look: int
    scores: tuple[Scored, ...]
    fit: Fit | None
    total: Partial
    units: int
    stage: int = 0
    guide: Guide | None = None

    def masks(self, spec: ExplainSpec) -> int:
        """How many have been scored."""
        units = max(len(self.scores), self.units)
        return unit(spec, units - 1).stop if units else 0

    @property
    def is_empty(self) -> bool:
        """Nothing has been done yet."""
        return not (self.scores or self.units)


class Reduction:
    """The steps of one image.

    Args:
        spec: decides them.
        targets: class indices.
        score: `(L,)`, unmasked.
        size: (H, W) of the maps.
        state: to go on from.

    Attributes:
        explanation: once it is finished.
    """

    def __init__(
        self,
        spec: ExplainSpec,
        targets: Sequence[int],
        score: Float64[np.ndarray, " L"],
        size: tuple[int, int],
        state: State | None = None,
    ) -> None:
        self.explanation: Explanation | None = None
        self._spec, self._targets, self._score, self._size = spec, tuple(targets), score, size
        self._looks = tuple(looks(spec))
        if state is None:
            state = State(0, (), None, Partial.zero(spec, len(self._targets), size), 0)
        self._look, self._stage, self._guide = state.look, state.stage, state.guide
        self._scores: dict[int, Scored] = dict(enumerate(state.scores))
        self._fit, self._total, self._summed = state.fit, state.total, state.units
        self._early: dict[int, Partial] = {}
        self._concluding = False
        # Without a guide after the first stage, the image goes on as if there were no stages.
        self._stages = () if state.stage and not state.guide else stages(spec, len(self._targets))
        # What was begun as sums goes on as sums.
        summing = state.units and not (state.fit or state.guide)
        self._pilot = 0 if summing else self._pilot_count()
        # The sums of a fitted pilot begin with those of its units; the next look's pilot is fitted anew.
        self._fitted = min(self._pilot, state.units) if state.fit is not None else 0
        self._handed_out = max(len(state.scores), state.units)

    @property
    def waiting(self) -> int:
        """Sums that wait for one before them: they take memory."""
        return len(self._early)

    @property
    def nbytes(self) -> int:
        """Memory that the sums of one unit take."""
        return self._total.nbytes

    @property
    def is_ready(self) -> bool:
        """Whether `next_work` has something to give."""
        if self.explanation is not None or self._concluding:
            return False
        if self._handed_out < self._until:
            return True
        return len(self._scores) >= self._until if self._scoring else self._summed == self._until

    @property
    def left(self) -> int:
        """How many units `next_work` has to give before something has to come back."""
        if self.explanation is not None or self._concluding:
            return 0
        return max(0, self._until - self._handed_out)

    @property
    def concludes(self) -> bool:
        """Whether what `next_work` has to give is a `Conclude`, for which the rest of the image waits."""
        return self.is_ready and self._handed_out >= self._until

    def next_work(self) -> Work | None:
        """The next piece; None where something else has to come back first, or it is finished."""
        if not self.is_ready:
            return None
        if self.concludes:
            self._concluding = True
            return self._stage_end() if self._stages else self._pilot_end()
        chosen = unit(self._spec, self._handed_out)
        self._handed_out += 1
        if chosen.index < self._pilot:
            also = self._guide.rivals if self._guide else None if self._stages else ()
            return ScoreUnit(chosen, self._guide, also)
        return SumUnit(chosen, self._fit, self._guide)

    def works(self) -> Iterator[Work]:
        """All the work there is until something has to come back."""
        while (work := self.next_work()) is not None:
            yield work

    def take(self, work: Work, result: WorkResult) -> None:
        """Take in what a piece of work returned; what is there already is dropped (the once law)."""
        if isinstance(work, Conclude):
            assert isinstance(result, Conclusion)
            self._conclude(work, result)
        elif isinstance(work, ScoreUnit):
            assert isinstance(result, np.ndarray | Picked)
            self._scores.setdefault(work.unit.index, result)
        elif work.unit.index >= self._summed:
            assert isinstance(result, Partial)
            self._early.setdefault(work.unit.index, result)
            while self._summed in self._early:
                self._total = self._total.combine(self._early.pop(self._summed))
                self._summed += 1

    def state(self) -> State:
        """What is done, without what waits for something before it."""
        whole = next(n for n in range(len(self._scores) + 1) if n not in self._scores)
        scores = tuple(self._scores[index] for index in range(whole))
        return State(self._look, scores, self._fit, self._total, self._summed, self._stage, self._guide)

    @property
    def _until(self) -> int:
        """Units before the next `Conclude`."""
        if self._stages:
            return self._stages[self._stage]
        return self._pilot if self._fitted < self._pilot else self._looks[self._look]

    @property
    def _scoring(self) -> bool:
        """Whether those that come next return scores."""
        return self._until <= self._pilot if self._stages else self._fitted < self._pilot

    def _pilot_count(self) -> int:
        """Units that return scores."""
        if self._stages:
            return max(self._stages[0], pilot_count(self._spec, self._stages[-1]))
        return pilot_count(self._spec, self._looks[self._look])

    def _pilot_end(self) -> Conclude:
        """Fit and sum a pilot from its first unit on, or look at the sums."""
        look = self._looks[self._look]
        return Conclude(
            self._targets,
            self._score,
            self._size,
            self._scores_of(0, self._pilot) if self._scoring else None,
            None if self._scoring else self._total,
            look=not self._scoring or self._pilot == look,
            last=self._look == len(self._looks) - 1,
        )

    def _stage_end(self) -> Conclude:
        """Sum the scores of a stage, and learn from them while there is something to learn."""
        last = self._stage == len(self._stages) - 1
        before = self._stages[self._stage - 1] if self._stage else 0
        learning = not last and (not self._stage or unit(self._spec, before - 1).stop < MOST_LEARNT)
        return Conclude(
            self._targets,
            self._score,
            self._size,
            self._scores_of(self._summed, self._until) if self._scoring else None,
            self._total if self._stage else None,
            look=self._until in self._looks,
            last=last,
            guide=self._guide,
            first=self._summed,
            known=self._scores_of(0, self._summed) if learning else (),
            learn=learning,
        )

    def _scores_of(self, start: int, stop: int) -> tuple[Scored, ...]:
        return tuple(self._scores[index] for index in range(start, stop))

    def _conclude(self, work: Conclude, result: Conclusion) -> None:
        if not self._concluding:
            return
        self._concluding = False
        if result.explanation is not None:
            self.explanation = result.explanation
            return
        if self._stages:
            self._pass_stage(work, result)
            return
        if work.scores is not None:
            assert result.total is not None
            self._fit, self._total = result.fit, result.total
            self._fitted = self._summed = self._pilot
            self._handed_out = max(self._handed_out, self._pilot)
        if work.look:
            self._look += 1
            self._pilot = self._pilot_count()

    def _pass_stage(self, work: Conclude, result: Conclusion) -> None:
        self._guide = result.guide or self._guide
        if not self._stage:  # of the scores of all classes, these were wanted
            first = len(self._targets)
            wanted = [
                *range(first),
                *(first + rival for rival in (self._guide.rivals if self._guide else ())),
            ]
            self._scores = {
                index: np.ascontiguousarray(scores_of(scored)[:, wanted])
                for index, scored in self._scores.items()
            }
        if self._guide is None:
            self._stages, self._stage = (), 1
            self._pilot = self._pilot_count()
            return
        if work.scores is not None:
            assert result.total is not None
            self._total, self._summed = result.total, self._until
        self._stage += 1
        self._look += work.look


@one_blas_thread
def conclude(spec: ExplainSpec, work: Conclude, device: torch.device | str = "cpu") -> Conclusion:
    """Fit, sum, finalize, learn, see whether it is enough: whatever of it is asked for.

    Args:
        spec: what was asked for.
        work: what there is.
        device: where the model is, which can help to learn.
    """
    fit, guide, total = None, None, work.total
    if work.scores is not None and work.guide is not None:
        assert total is not None
        for index, picked in enumerate(work.scores, start=work.first):
            assert isinstance(picked, Picked)
            total = total.combine(picked_unit(spec, work.size, unit(spec, index), picked, work.guide))
    elif work.scores is not None:
        everything = np.concatenate([scores_of(scored) for scored in work.scores])
        scores, guides = everything[:, : len(work.targets)], None
        fit = None if spec.estimator == "paper" else fit_scores(spec, work.size, scores)
        if work.learn:
            guide = _learn(spec, work, fit, device)
            if guide is None:
                return Conclusion(None, None, None)
            guides = learn_by_fold(spec, work.size, everything, work.targets, device)
            if guides is None:  # then a fit predicts, with the patches of all sums to come
                fit = fit_scores(spec, work.size, scores, guide.patches)
        # In one go: the sums of many targets take more time to add, unit by unit, than the masks do.
        if guides is not None:
            total = opening_unit(spec, work.size, scores, guides, device)
        else:
            total = residual_unit(spec, work.size, Unit(0, 0, len(scores)), scores, fit)
    assert total is not None
    if work.look:
        found = explanation(spec, work.targets, work.score, total, picked=work.guide is not None)
        if work.last or enough(spec, found.relative_error, found.masks):
            return Conclusion(found, None, None)
    if work.learn and guide is None:
        guide = _learn(spec, work, None, device)
    return Conclusion(None, fit, total if work.scores is not None else None, guide)


def _learn(spec: ExplainSpec, work: Conclude, fit: Fit | None, device: torch.device | str) -> Guide | None:
    """A guide from all scores there are; with a fit to them, only where it promises less noise than that."""
    assert work.scores is not None
    everything = (*work.known, *work.scores)
    parts = [masks_of(spec, unit(spec, index), scored) for index, scored in enumerate(everything)]
    masks, scores = Masks.concatenate(parts), np.concatenate([scores_of(scored) for scored in everything])
    if work.guide is not None:
        return learn(spec, work.size, masks, scores, work.guide.rivals, device=device)
    assert fit is not None
    own, all_classes = scores[:, : len(work.targets)], scores[:, len(work.targets) :]
    rivals = find_rivals(all_classes, work.targets)
    features = Features(spec, work.size, fit.patches)(masks)
    left = own - fit.predict(features, fit.rows(0, len(own)))[0]
    wanted = np.concatenate([own, all_classes[:, list(rivals)]], axis=1)
    return learn(spec, work.size, masks, wanted, rivals, left, device)
