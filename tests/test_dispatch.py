"""The ledger: what is handed out, in which order, and what counts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from simulation import partial

from mcrise_ray.dispatch import Ledger
from mcrise_ray.images import ImageRef
from mcrise_ray.plan import unit
from mcrise_ray.reduction import Conclude, Conclusion, ScoreUnit, State, SumUnit
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tasks import (
    Call,
    Done,
    Ended,
    Failed,
    Failure,
    Finished,
    Inspection,
    InspectTask,
    Saved,
    Target,
    WorkTask,
)

SPEC = ExplainSpec(masks=192, colors="black", estimator="paper")  # three units
SUMMED = SPEC.model_copy(update={"relative_error": 1e-9})  # whose scores are not kept
INSPECTION = Inspection((Target(0, None, "predicted", 0.5),), (1, 1), 0.1, (1, 1))


def refs(*names: str) -> list[ImageRef]:
    return [ImageRef(name, name) for name in names]


def sums(value: float, masks: int = 64, seconds: float = 10.0) -> Done:
    return Done(partial(masks, value), seconds)


def scores(masks: int = 64, seconds: float = 10.0) -> Done:
    return Done(np.zeros((masks, 1)), seconds)


def inspect(ledger: Ledger, worker: int = 0) -> ImageRef:
    """Let a worker begin with an image."""
    call = ledger.next_call(worker)
    assert call is not None
    (task,) = call.tasks
    assert isinstance(task, InspectTask)
    assert ledger.returned(call, [INSPECTION]) == []
    return task.image


def unit_call(ledger: Ledger, worker: int = 0) -> Call:
    call = ledger.next_call(worker)
    assert call is not None
    assert call.masks
    return call


def conclude(ledger: Ledger, worker: int = 0) -> list[Ended]:
    """Let a worker bring an image to its end."""
    call = ledger.next_call(worker)
    assert call is not None
    (task,) = call.tasks
    assert isinstance(task, WorkTask)
    assert isinstance(task.work, Conclude)
    explanation = SimpleNamespace(total=task.work.total)
    return ledger.returned(call, [Done(Conclusion(explanation, None, None), 1.0)])  # type: ignore[arg-type]


def places(call: Call) -> list[tuple[str, int]]:
    return [
        (task.image.image_id, task.work.unit.index)
        for task in call.tasks
        if isinstance(task, WorkTask) and not isinstance(task.work, Conclude)
    ]


def test_sums_are_combined_in_index_order_and_each_counts_once() -> None:
    ledger = Ledger(refs("a"), SUMMED, 64)
    assert not ledger.finished
    inspect(ledger)
    calls = [unit_call(ledger) for _ in range(3)]
    assert ledger.next_call(0) is None
    values = [1e16, 1.0, -1e16]  # in floating point the order shows
    assert ledger.returned(calls[2], [sums(values[2])]) == []
    assert ledger.returned(calls[2], [sums(5.0)]) == []  # twice
    assert ledger.returned(calls[0], [sums(values[0])]) == []
    assert ledger.returned(calls[0], [sums(5.0)]) == []
    assert ledger.returned(calls[1], [sums(values[1])]) == []
    (ended,) = conclude(ledger)
    assert isinstance(ended, Finished)
    total = ended.explanation.total  # type: ignore[attr-defined]
    assert (total.scores[0], total.masks) == ((1e16 + 1.0) - 1e16, 192)
    assert ended.seconds == pytest.approx(0.1 + 5 * 10.0 + 1.0)  # two of them twice, and paid for twice
    assert ledger.finished
    assert ledger.returned(calls[0], [sums(5.0)]) == []


def test_the_rest_of_an_image_that_failed_is_dropped() -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    inspect(ledger)
    first, second = unit_call(ledger), unit_call(ledger)
    (failed,) = ledger.returned(first, [Failure("explain", "NaN")])
    assert isinstance(failed, Failed)
    assert failed.image.image_id == "a"
    assert ledger.returned(second, [sums(1.0)]) == []
    ledger.requeue(second, strike=True)
    call = ledger.next_call(0)  # not the requeued unit: nobody wants it any more
    assert call is not None
    assert ledger.returned(call, [Failure("read", "gone")]) == [Failed(refs("b")[0], Failure("read", "gone"))]
    assert ledger.next_call(0) is None
    assert ledger.finished


def test_a_worker_stays_with_its_image_and_then_helps_with_the_oldest() -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    assert [inspect(ledger, 0).image_id, inspect(ledger, 1).image_id] == ["a", "b"]
    assert places(unit_call(ledger, 1)) == [("b", 0)]
    assert places(unit_call(ledger, 0)) == [("a", 0)]
    assert places(unit_call(ledger, 1)) == [("b", 1)]
    assert places(unit_call(ledger, 1)) == [("b", 2)]
    assert places(unit_call(ledger, 1)) == [("a", 1)]
    assert places(unit_call(ledger, 2)) == [("a", 2)]


def test_the_next_image_is_read_and_inspected_while_the_last_units_run() -> None:
    ledger = Ledger(refs("a", "b", "c"), SPEC, 64)
    inspect(ledger, 0)
    calls = [unit_call(ledger, 0) for _ in range(2)]
    assert [call.upcoming and call.upcoming.image_id for call in calls] == [None, "b"]
    assert inspect(ledger, 1).image_id == "c"  # the one kept for the first worker is not taken
    assert inspect(ledger, 0).image_id == "b"
    assert places(unit_call(ledger, 0)) == [("a", 2)]
    assert places(unit_call(ledger, 0)) == [("b", 0)]


def test_an_image_that_is_inspected_ahead_waits_for_nobody() -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    inspect(ledger, 0)
    for _ in range(2):
        unit_call(ledger, 0)
    inspect(ledger, 0)
    assert places(unit_call(ledger, 1)) == [("a", 2)]
    assert places(unit_call(ledger, 1)) == [("b", 0)]
    assert places(unit_call(ledger, 0)) == [("b", 1)]


def test_an_image_that_fails_ahead_of_its_turn_costs_nothing() -> None:
    ledger = Ledger(refs("a", "b", "c"), SPEC, 64)
    inspect(ledger, 0)
    for _ in range(2):
        unit_call(ledger, 0)
    ahead = ledger.next_call(0)
    assert ahead is not None
    assert ledger.returned(ahead, [Failure("read", "damaged")]) == [
        Failed(refs("b")[0], Failure("read", "damaged"))
    ]
    assert inspect(ledger, 0).image_id == "c"
    assert places(unit_call(ledger, 0)) == [("a", 2)]
    assert places(unit_call(ledger, 0)) == [("c", 0)]


def test_an_image_kept_for_a_worker_that_ends_is_given_to_another() -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    inspect(ledger, 0)
    calls = [unit_call(ledger, 0) for _ in range(2)]
    ledger.forget(0)
    assert not ledger.finished
    for call in calls:
        ledger.requeue(call, strike=False)
    assert [places(unit_call(ledger, 1)) for _ in range(2)] == [[("a", index)] for index in range(2)]
    assert inspect(ledger, 1).image_id == "b"
    assert places(unit_call(ledger, 1)) == [("a", 2)]


@pytest.mark.parametrize("inspected", [True, False])
def test_an_image_ahead_of_its_turn_outlives_its_worker(inspected: bool) -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    inspect(ledger, 0)
    for _ in range(2):
        unit_call(ledger, 0)
    ahead = ledger.next_call(0)
    assert ahead is not None
    if inspected:
        ledger.returned(ahead, [INSPECTION])
    assert places(unit_call(ledger, 0)) == [("a", 2)]
    ledger.forget(0)
    if not inspected:
        ledger.requeue(ahead, strike=False)
        assert inspect(ledger, 1).image_id == "b"
    assert places(unit_call(ledger, 1)) == [("b", 0)]


def test_an_image_whose_worker_ended_comes_before_new_ones() -> None:
    ledger = Ledger(refs("a", "b", "c"), SPEC, 64)
    inspect(ledger, 0)
    inspect(ledger, 1)
    ledger.forget(0)
    assert places(unit_call(ledger, 2)) == [("a", 0)]
    ledger.forget(2)
    lost = ledger.next_call(3)
    assert lost is not None
    assert places(lost) == [("a", 1)]


def test_the_inspection_of_a_worker_that_ended_is_done_by_another() -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    call = ledger.next_call(0)
    assert call is not None
    assert ledger.next_call(0) is None  # it waits for its inspection
    ledger.forget(0)
    ledger.requeue(call, strike=True)
    assert ledger.attempts(call) == 1
    again = ledger.next_call(1)
    assert again == call
    assert ledger.returned(call, [INSPECTION]) == []
    assert ledger.attempts(call) == 0
    assert places(unit_call(ledger, 1)) == [("a", 0)]


def test_quick_units_share_a_call_and_slow_ones_do_not() -> None:
    spec = ExplainSpec(masks=6400, colors="black", estimator="paper")
    ledger = Ledger(refs("a"), spec, 64)
    inspect(ledger)
    first = unit_call(ledger)
    assert len(first.tasks) == 1
    masks = len(unit(spec, 0))
    ledger.returned(first, [scores(masks, seconds=0.021)])
    assert len(unit_call(ledger).tasks) == 10  # 0.2 s, rounded up
    slow = unit_call(ledger)
    for task in slow.tasks:  # the pace of late is what counts
        ledger.returned(Call((task,), 64), [scores(masks, seconds=1.0)])
    assert len(unit_call(ledger).tasks) == 1


def test_the_pace_is_that_of_whole_calls() -> None:
    """The model is asked for the next unit before one is given out, so the last seems to take no time."""
    spec = ExplainSpec(masks=6400, colors="black", estimator="paper")
    ledger = Ledger(refs("a"), spec, 64)
    inspect(ledger)
    masks = len(unit(spec, 0))
    ledger.returned(unit_call(ledger), [scores(masks, seconds=0.04)])
    call = unit_call(ledger)
    assert len(call.tasks) == 5
    times = (0.08, 0.04, 0.04, 0.04, 0.0)
    ledger.returned(call, [scores(masks, seconds=time) for time in times])
    assert ledger.seconds_per_unit == pytest.approx(0.04)


def test_lost_tasks_come_back_one_by_one_with_half_the_batch_where_asked() -> None:
    ledger = Ledger(refs("a"), SPEC, 64)
    inspect(ledger)
    calls = [unit_call(ledger) for _ in range(3)]
    both = Call(calls[0].tasks + calls[1].tasks, 64)
    ledger.requeue(both, strike=True, halve=True)
    again = [unit_call(ledger) for _ in range(2)]
    assert [places(call) for call in again] == [[("a", 0)], [("a", 1)]]
    assert [call.batch_size for call in again] == [32, 32]
    assert [ledger.attempts(call) for call in again] == [1, 0]


def test_giving_up_a_task_fails_its_image_and_keeps_the_others_of_the_call() -> None:
    ledger = Ledger(refs("a"), SPEC, 64)
    inspect(ledger)
    (ended,) = ledger.give_up(unit_call(ledger), Failure("explain", "its actors died"))
    assert isinstance(ended, Failed)
    assert ledger.next_call(0) is None
    assert ledger.finished


@pytest.mark.parametrize("spec", [SUMMED, SPEC])  # an earlier version summed both
def test_an_image_goes_on_from_saved_sums(spec: ExplainSpec) -> None:
    saved = {"b": Saved(INSPECTION, State(0, (), None, partial(128, 7.0), 2), 20.0)}
    ledger = Ledger(refs("b"), spec, 64, saved.get)
    call = unit_call(ledger)
    assert places(call) == [("b", 2)]
    ((image, kept),) = ledger.unfinished()
    assert (image.image_id, kept.state.units, kept.seconds) == ("b", 2, 20.0)
    ledger.returned(call, [sums(1.0)])
    (ended,) = conclude(ledger)
    assert isinstance(ended, Finished)
    total = ended.explanation.total  # type: ignore[attr-defined]
    assert (total.scores[0], total.masks, ended.seconds) == (8.0, 192, 31.0)


def test_only_sums_without_a_gap_are_saved() -> None:
    ledger = Ledger(refs("a"), SUMMED, 64)
    inspect(ledger)
    calls = [unit_call(ledger) for _ in range(3)]
    assert list(ledger.unfinished()) == []
    ledger.returned(calls[0], [sums(1.0)])
    ledger.returned(calls[2], [sums(4.0)])
    ((image, saved),) = ledger.unfinished()
    assert (image.image_id, saved.state.units, saved.state.total.scores[0]) == ("a", 1, 1.0)


def test_what_an_image_waits_for_goes_before_everything_else() -> None:
    ledger = Ledger(refs("a", "b"), SPEC, 64)
    inspect(ledger, 0)
    inspect(ledger, 1)
    for _ in range(3):
        ledger.returned(unit_call(ledger, 0), [scores()])
    (ended,) = conclude(ledger, 1)
    assert ended.image.image_id == "a"
    assert places(unit_call(ledger, 1)) == [("b", 0)]


def test_scores_are_fitted_before_sums_are_asked_for() -> None:
    spec = ExplainSpec(masks=20000, colors="black", estimator="control-variate")
    ledger = Ledger(refs("a"), spec, 64)
    inspect(ledger)
    scored, works = [], []
    while (call := ledger.next_call(0)) is not None:
        (task,) = call.tasks
        assert isinstance(task, WorkTask)
        works.append(type(task.work))
        if isinstance(task.work, Conclude):
            done = Conclusion(None, None, partial(16000, 1.0))
            if task.work.look:
                done = Conclusion(SimpleNamespace(total=task.work.total), None, None)  # type: ignore[arg-type]
            else:
                assert task.work.scores is not None
                assert [len(scores) for scores in task.work.scores] == scored
            ended = ledger.returned(call, [Done(done, 1.0)])
        elif isinstance(task.work, ScoreUnit):
            scored.append(call.masks)
            ledger.returned(call, [Done(np.zeros((call.masks, 1)), 10.0)])
        else:
            ledger.returned(call, [sums(1.0, call.masks)])
    assert works == [ScoreUnit] * len(scored) + [Conclude] + [SumUnit] * (32 - len(scored)) + [Conclude]
    assert sum(scored) <= 16384
    (finished,) = ended
    assert isinstance(finished, Finished)
    assert finished.explanation.total.scores[0] == 1.0 + (32 - len(scored))  # type: ignore[attr-defined]


def test_an_image_offers_no_more_units_while_too_many_sums_wait_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mcrise_ray.dispatch._EARLY_BYTES", 0)
    spec = ExplainSpec(masks=100 * 4096, colors="black", estimator="paper")
    ledger = Ledger(refs("a"), spec, 64)
    inspect(ledger)
    missing = unit_call(ledger)
    given = 0
    while (call := ledger.next_call(0)) is not None:
        ledger.returned(call, [sums(1.0, 4096)])
        given += 1
    assert given == 9
    ledger.returned(missing, [sums(1.0, 4096)])
    assert places(unit_call(ledger)) == [("a", 10)]


def test_a_lazy_listing_is_not_drained() -> None:
    taken: list[int] = []

    def images() -> Iterator[ImageRef]:
        for n in range(10**9):
            taken.append(n)
            yield ImageRef(str(n), str(n))

    ledger = Ledger(images(), SPEC, 64)
    for worker in range(2):
        while (call := ledger.next_call(worker)) is not None:
            if isinstance(call.tasks[0], InspectTask):
                if len(taken) > 4:
                    break
                ledger.returned(call, [INSPECTION])
    assert len(taken) <= 6
