"""The fault policy: a table."""

from __future__ import annotations

import pickle

import pytest

from mcrise_ray.errors import ModelError
from mcrise_ray.faults import ACTOR_GONE, Decision, Fault, FaultKind, History, Limits, Then, decide

GONE = [FaultKind.DIED, FaultKind.UNAVAILABLE, FaultKind.STALLED]


def judge(kind: FaultKind, **history: object) -> Decision:
    return decide(Fault(kind, "text"), History(**history), Limits(max_retries=3, max_lost_starts=8))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", GONE)
def test_the_task_of_a_lost_actor_is_requeued_three_times(kind: FaultKind) -> None:
    assert [judge(kind, attempts=n).then for n in range(5)] == [Then.REQUEUE] * 3 + [Then.SKIP] * 2
    assert judge(kind).strike


@pytest.mark.parametrize("kind", [*GONE, FaultKind.HOST_MEMORY, FaultKind.BUILD])
def test_actors_that_finish_nothing_stop_the_job(kind: FaultKind) -> None:
    assert judge(kind, lost_starts=8).then is Then.STOP
    assert judge(kind, lost_starts=7).then is not Then.STOP


def test_preemption_is_nobodys_fault() -> None:
    assert judge(FaultKind.PREEMPTED, attempts=99, lost_starts=99) == Decision(Then.REQUEUE, strike=False)


@pytest.mark.parametrize("kind", [FaultKind.HOST_MEMORY, FaultKind.DEVICE_MEMORY])
def test_out_of_memory_halves_the_batch_down_to_one(kind: FaultKind) -> None:
    assert judge(kind, batch_size=2, attempts=99) == Decision(Then.HALVE, strike=False)
    assert judge(kind, batch_size=1, attempts=0) == Decision(Then.REQUEUE)
    assert judge(kind, batch_size=1, attempts=3) == Decision(Then.SKIP)


def test_only_an_actor_that_answers_is_kept() -> None:
    assert set(FaultKind) - ACTOR_GONE == {FaultKind.LOST, FaultKind.DEVICE_MEMORY, FaultKind.BROKEN}


def test_a_lost_result_is_asked_for_again() -> None:
    assert judge(FaultKind.LOST) == Decision(Then.REQUEUE)
    assert judge(FaultKind.LOST, attempts=3).then is Then.SKIP


def test_an_unexpected_error_skips_the_image_at_once() -> None:
    assert judge(FaultKind.BROKEN) == Decision(Then.SKIP)


def test_a_model_that_was_never_built_stops_the_job_and_one_that_was_is_tried_elsewhere() -> None:
    assert judge(FaultKind.BUILD, built=False).then is Then.STOP
    assert judge(FaultKind.BUILD, built=True) == Decision(Then.REQUEUE, strike=False)


def test_a_fault_travels() -> None:
    fault = Fault(FaultKind.BUILD, "no such file", ModelError("no such file"))
    copy = pickle.loads(pickle.dumps(fault))
    assert (copy.kind, copy.message, str(copy.error)) == (fault.kind, fault.message, "no such file")
