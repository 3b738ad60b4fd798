"""How the maps of one image come about: which pieces of work there are, and what becomes of their results.

The steps are a pure function of the spec and of the scores (the partition law): `explain()` goes through them
one by one, a cluster hands them out to many workers, and both end with the same bits.

Axes: N masks; L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W
pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from mcrise_ray import masks as mask_source
from mcrise_ray.plan import Unit, enough, looks, pilot_count, unit
from mcrise_ray.saliency import Maps, Partial, UnitSums
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import CHUNK, FRESH_PER_MASK, Features, Fit, fit_scores, fresh


@dataclass(frozen=True)
class Explanation:
    """The maps of one image.

    Attributes:
        maps: `(L, M, H, W)`: MC-RISE (eq. 9): change of the score when a pixel takes the fill's colour;
            debiased RISE (eq. 5): change when it is retained; RISE (eq. 2): mean score where it is retained.
        raw: `(L, K, H, W)`, mean of `(K / p_mask) m_k f_n`.
        baseline: `(L, H, W)`, mean of `m_0 / (1 - p_mask) f_n`.
        standard_error: `(L, M, H, W)`, of each pixel of `maps`; NaN with a single mask.
        relative_error: `(L,)`, `rms(standard_error) / rms(maps)`.
        score: `(L,)`, of the unmasked image.
        targets: the L class indices.
        masks: the N used.
        spec: what was asked for.
    """

    maps: Float32[np.ndarray, "L M H W"]
    raw: Float32[np.ndarray, "L K H W"]
    baseline: Float32[np.ndarray, "L H W"]
    standard_error: Float32[np.ndarray, "L M H W"]
    relative_error: Float64[np.ndarray, " L"]
    score: Float64[np.ndarray, " L"]
    targets: tuple[int, ...]
    masks: int
    spec: ExplainSpec


# Work with arrays in it is compared by identity: it is handed out once, and again only after a loss.


@dataclass(frozen=True, eq=False)
class ScoreUnit:
    """Ask the model about one unit, and return the scores `(N, L)`."""

    unit: Unit


@dataclass(frozen=True, eq=False)
class SumUnit:
    """Ask the model about one unit, and return the sums of what a fit leaves of its scores."""

    unit: Unit
    fit: Fit | None


@dataclass(frozen=True, eq=False)
class Conclude:
    """Bring together what is there; no model is asked.

    Attributes:
        targets, score: class indices, and their unmasked scores.
        size: (H, W) of the maps.
        scores: of the pilot's units, to be summed, or fitted first; None where that is done.
        total: sums so far; None where the scores are summed first.
        look: finalize, and see whether it is enough.
        last: it is enough whatever comes out.
    """

    targets: tuple[int, ...]
    score: Float64[np.ndarray, " L"]
    size: tuple[int, int]
    scores: tuple[Float64[np.ndarray, "N L"], ...] | None
    total: Partial | None
    look: bool
    last: bool


Work = ScoreUnit | SumUnit | Conclude


@dataclass(frozen=True, eq=False)
class Conclusion:
    """What comes of a `Conclude`: the maps where that is the end, and what to go on with where it is not."""

    explanation: Explanation | None
    fit: Fit | None
    total: Partial | None


WorkResult = Float64[np.ndarray, "N L"] | Partial | Conclusion


@dataclass(frozen=True, eq=False)
class State:
    """A reduction between two steps, from which another process can go on.

    Attributes:
        look: how many looks have been passed.
        scores: of the first units of the pilot, those without a gap.
        fit: to the pilot of the last look; None before it.
        total: sums of the first `units` units.
        units: summed.
    """

    look: int
    scores: tuple[Float64[np.ndarray, "N L"], ...]
    fit: Fit | None
    total: Partial
    units: int

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
        self._look = state.look
        self._scores: dict[int, Float64[np.ndarray, "N L"]] = dict(enumerate(state.scores))
        self._fit, self._total, self._summed = state.fit, state.total, state.units
        self._early: dict[int, Partial] = {}
        self._concluding = False
        # What was begun as sums goes on as sums.
        self._pilot = 0 if state.units and not state.fit else pilot_count(spec, self._looks[self._look])
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
        if self._handed_out < self._pilot:
            return True
        if self._fitted < self._pilot:
            return len(self._scores) >= self._pilot
        return self._handed_out < self._looks[self._look] or self._summed == self._looks[self._look]

    @property
    def left(self) -> int:
        """How many units `next_work` has to give before something has to come back."""
        if self.explanation is not None or self._concluding:
            return 0
        until = self._pilot if self._fitted < self._pilot else self._looks[self._look]
        return max(0, until - self._handed_out)

    @property
    def concludes(self) -> bool:
        """Whether what `next_work` has to give is a `Conclude`, for which the rest of the image waits."""
        return self.is_ready and self._handed_out >= (
            self._pilot if self._fitted < self._pilot else self._looks[self._look]
        )

    def next_work(self) -> Work | None:
        """The next piece; None where something else has to come back first, or it is finished."""
        if not self.is_ready:
            return None
        if self.concludes:
            self._concluding = True
            refit = self._fitted < self._pilot
            look = self._looks[self._look]
            return Conclude(
                self._targets,
                self._score,
                self._size,
                tuple(self._scores[index] for index in range(self._pilot)) if refit else None,
                None if refit else self._total,
                look=not refit or self._pilot == look,
                last=self._look == len(self._looks) - 1,
            )
        chosen = unit(self._spec, self._handed_out)
        self._handed_out += 1
        return ScoreUnit(chosen) if chosen.index < self._pilot else SumUnit(chosen, self._fit)

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
            assert isinstance(result, np.ndarray)
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
        return State(self._look, scores, self._fit, self._total, self._summed)

    def _conclude(self, work: Conclude, result: Conclusion) -> None:
        if not self._concluding:
            return
        self._concluding = False
        if result.explanation is not None:
            self.explanation = result.explanation
            return
        if work.scores is not None:
            assert result.total is not None
            self._fit, self._total = result.fit, result.total
            self._fitted = self._summed = self._pilot
            self._handed_out = max(self._handed_out, self._pilot)
        if work.look:
            self._look += 1
            self._pilot = pilot_count(self._spec, self._looks[self._look])


def conclude(spec: ExplainSpec, work: Conclude) -> Conclusion:
    """Fit and sum the pilot, finalize, see whether it is enough: whatever of it is asked for."""
    fit, total = None, work.total
    if work.scores is not None:
        scores = np.concatenate(work.scores)
        fit = None if spec.estimator == "paper" else fit_scores(spec, work.size, scores)
        # In one go: the sums of many targets take more time to add, unit by unit, than the masks do.
        total = residual_unit(spec, work.size, Unit(0, 0, len(scores)), scores, fit)
    assert total is not None
    if work.look:
        found = explanation(spec, work.targets, work.score, total)
        if work.last or enough(spec, found.relative_error):
            return Conclusion(found, None, None)
    return Conclusion(None, fit, total if work.scores is not None else None)


def residual_unit(
    spec: ExplainSpec,
    size: tuple[int, int],
    unit: Unit,
    scores: Float64[np.ndarray, "N L"],
    fit: Fit | None,
) -> Partial:
    """The sums of one unit, or of a stretch of them, whose scores are known; no model is asked.

    Masks are drawn again rather than kept: it takes microseconds.

    Raises:
        ValueError: there is a fit for the estimator `"paper"`, or none for the other.
    """
    if (fit is None) != (spec.estimator == "paper"):
        raise ValueError(
            f"expected {'no fit' if fit else 'a fit'} for the estimator {spec.estimator!r}, found "
            f"{'one' if fit else 'none'}; see `fit_scores`"
        )
    sums = UnitSums(spec, scores.shape[1], size)
    features = None if fit is None else Features(spec, size, fit.patches)
    for start in range(unit.start, unit.stop, CHUNK):
        stop = min(start + CHUNK, unit.stop)
        masks = mask_source.draw(spec, start, stop)
        left = scores[start - unit.start : stop - unit.start]
        if fit is not None and features is not None:
            left = left - fit.predict(features(masks), fit.rows(start, stop))[0]
            curved = fresh(spec, fit, features, start, stop)
            if curved is not None:
                extra, bend = curved
                sums.accumulate(extra, bend / FRESH_PER_MASK)
                # One of each mask's fresh masks is sample enough of their small part of the variance.
                sums.square(extra[::FRESH_PER_MASK], bend[::FRESH_PER_MASK] / FRESH_PER_MASK**0.5)
        sums.accumulate(masks, left)
        sums.square(masks, left)
    if fit is None:
        return sums.partial(len(unit))
    return sums.partial(len(unit), *fit.expected(fit.rows(unit.start, unit.stop), spec.K))


def explanation(
    spec: ExplainSpec, targets: Sequence[int], score: Float64[np.ndarray, " L"], total: Partial
) -> Explanation:
    """The maps of a reduction over all units; of one target after the other, which takes less memory and so
    less time.
    """
    found = (total.of_target(place).finalize(spec) for place in range(len(targets)))
    columns = zip(*(_rounded(one) for one in found), strict=True)
    maps, raw, baseline, standard_error, relative_error = (np.concatenate(column) for column in columns)
    return Explanation(
        maps=maps,
        raw=raw,
        baseline=baseline,
        standard_error=standard_error,
        relative_error=relative_error,
        score=score,
        targets=tuple(targets),
        masks=total.masks,
        spec=spec,
    )


def _rounded(maps: Maps) -> tuple[np.ndarray, ...]:
    """In the order of `Explanation`, whose maps take half the memory."""
    wide = (maps.maps, maps.raw, maps.baseline, maps.standard_error)
    return (*(array.astype(np.float32) for array in wide), maps.relative_error)
