"""The loop, over actors in virtual time: faults are scripted, and calls are counted exactly."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import ORPHAN, STALL, Script, Simulation, Sums, true_value

from mcrise_ray.dispatch import Ledger
from mcrise_ray.engine import Engine, Event
from mcrise_ray.errors import ClusterError, ModelError
from mcrise_ray.faults import Fault, FaultKind, Limits
from mcrise_ray.images import ImageRef
from mcrise_ray.plan import unit, unit_count
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tasks import Call, Ended, Reply

SPEC = ExplainSpec(masks=8 * 64, colors="black", estimator="paper")  # eight units
NAMES = [f"image {n}" for n in range(6)]
LIMITS = Limits(deadline=30.0)


def expected(name: str, spec: ExplainSpec = SPEC) -> float:
    """The oracle: one after the other, in index order."""
    total = 0.0
    for index in range(unit_count(spec)):
        total += true_value(name, unit(spec, index))
    return total


EXPECTED = {name: expected(name) for name in NAMES}
EVERY_UNIT = {(name, index) for name in NAMES for index in range(8)}


def run(simulation: Simulation, names: list[str] = NAMES, spec: ExplainSpec = SPEC) -> tuple[Engine, Sums]:
    sink = Sums()
    ledger = Ledger((ImageRef(name, name) for name in names), spec, batch_size=64)
    engine = Engine(ledger, simulation, sink, LIMITS)
    engine.run()
    return engine, sink


def once(happens: object, of: Callable[[Call], bool] = lambda call: True, actor: int = 0) -> Script:
    """Something happens to the third call, or the first such call from there on, of one actor."""
    done: list[Call] = []

    def script(number: int, nth: int, call: Call) -> object:
        if number == actor and nth >= 3 and of(call) and not done:
            done.append(call)
            return happens
        return None

    return script  # type: ignore[return-value]


def is_unit(call: Call) -> bool:
    return call.masks > 0


@pytest.mark.parametrize("actors", [1, 2, 3, 40])
def test_an_undisturbed_run_does_every_unit_exactly_once(actors: int) -> None:
    simulation = Simulation(actors)
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert simulation.units_run == dict.fromkeys(EVERY_UNIT, 1)
    assert len(simulation.started) == actors
    assert simulation.ended == simulation.started
    assert not engine.tally.retries
    assert sink.built_models == ["facts"] * actors
    assert sink.notes == []


def test_images_finish_roughly_in_the_order_given() -> None:
    names = [str(n) for n in range(100)]
    _, sink = run(Simulation(4), names)
    late = max(abs(place - names.index(name)) for place, name in enumerate(sink.order))
    assert late <= 4


@pytest.mark.parametrize(
    "kind", [FaultKind.DIED, FaultKind.UNAVAILABLE, FaultKind.PREEMPTED, FaultKind.HOST_MEMORY]
)
@pytest.mark.parametrize("of", [is_unit, lambda call: not is_unit(call)], ids=["unit", "inspection"])
def test_an_actor_that_is_lost_costs_its_calls_and_no_bits(
    kind: FaultKind, of: Callable[[Call], bool]
) -> None:
    simulation = Simulation(2, once(Fault(kind, "gone"), of))
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert sink.failures == {}
    assert simulation.units_run == dict.fromkeys(EVERY_UNIT, 1)  # what was lost had not been finished
    assert simulation.started == [0, 1, 2]
    assert engine.tally.replaced == 1
    assert engine.tally.retries == sink.retries == {kind.value: 1}
    assert sink.alive == [1, 2, 1, 0], "the third has no time to build its model"
    assert sum(note.startswith(f"{kind.value}: gone") for note in sink.notes) == 1


def test_a_late_result_of_an_unreachable_actor_counts_once() -> None:
    simulation = Simulation(2, once(ORPHAN, is_unit))
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    counts = sorted(simulation.units_run.values())
    assert counts[:44] == [1] * 44
    assert counts[-1] == 2  # computed twice, counted once
    assert engine.tally.replaced == 1


def test_a_lost_result_is_computed_again_by_an_actor_that_stays() -> None:
    simulation = Simulation(2, once(Fault(FaultKind.LOST, "its node died"), is_unit))
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert simulation.started == [0, 1]
    assert engine.tally.retries == {"result lost": 1}
    assert engine.tally.replaced == 0


@pytest.mark.parametrize("actors", [1, 2])
def test_a_conclusion_that_ends_its_actors_is_not_blamed_on_the_units_beside_it(actors: int) -> None:
    def script(actor: int, nth: int, call: Call) -> Fault | None:
        ends = call.concludes and call.tasks[0].image.image_id == NAMES[2]
        return Fault(FaultKind.DIED, "gone") if ends else None

    simulation = Simulation(actors, script)
    engine, sink = run(simulation)
    assert sink.failures.keys() == {NAMES[2]}
    assert "after 3 retries: gone" in sink.failures[NAMES[2]].message
    assert sink.values == {name: value for name, value in EXPECTED.items() if name != NAMES[2]}
    assert len(simulation.started) == actors + 4
    assert engine.tally.replaced == 4


def test_what_waits_while_the_driver_is_busy_has_not_stalled() -> None:
    """A store that hangs for longer than the deadline, with the results of others unread meanwhile."""
    simulation = Simulation(3, seconds=0.5)
    sink = Sums()
    ended = sink.ended

    def slowly(image: Ended) -> None:
        ended(image)
        simulation.clock += 2 * LIMITS.deadline

    sink.ended = slowly  # type: ignore[method-assign]
    ledger = Ledger((ImageRef(name, name) for name in NAMES), SPEC, batch_size=64)
    engine = Engine(ledger, simulation, sink, LIMITS)
    engine.run()
    assert sink.values == EXPECTED
    assert not engine.tally.retries
    assert simulation.started == [0, 1, 2]


def test_a_driver_that_was_stopped_takes_nobody_for_stalled() -> None:
    """By Ctrl-Z, while it waited; what came back meanwhile is read a moment later."""
    simulation = Simulation(3, seconds=0.5)
    wait = simulation.wait
    stopped: list[bool] = []

    def stop(seconds: float) -> list[Event]:
        if simulation.clock < 21 or stopped:
            return wait(seconds)
        stopped.append(True)
        simulation.clock += 2 * LIMITS.deadline
        return []

    simulation.wait = stop  # type: ignore[method-assign]
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert stopped
    assert not engine.tally.retries


def test_a_stalled_call_is_given_to_another_actor_after_its_deadline() -> None:
    simulation = Simulation(2, once(STALL, is_unit), seconds=0.01)
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert engine.tally.retries == {"call stalled": 1}
    assert simulation.started == [0, 1, 2]
    assert 20 + 30 <= simulation.clock <= 20 + 30 + 5
    assert any("no answer within 3" in note for note in sink.notes)


def test_a_slow_unit_is_no_stalled_one() -> None:
    """The deadline grows with the slowest pace seen."""
    simulation = Simulation(1, seconds=100.0, spread=0.0)
    engine, sink = run(simulation, NAMES[:1])
    assert sink.values == {NAMES[0]: EXPECTED[NAMES[0]]}
    assert not engine.tally.retries


def test_running_out_of_memory_halves_the_batch_of_that_call() -> None:
    full = Reply((), Fault(FaultKind.DEVICE_MEMORY, "CUDA out of memory"))
    simulation = Simulation(1, once(full, is_unit), seconds=1.0)
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert simulation.started == [0]
    assert engine.tally.halved == 1
    sizes = sorted(size for sizes in simulation.batch_sizes.values() for size in sizes)
    assert sizes == [32] + [64] * 47


def test_calls_that_keep_running_out_of_memory_teach_all_others() -> None:
    def script(actor: int, nth: int, call: Call) -> Reply | None:
        too_much = is_unit(call) and call.batch_size > 16
        return Reply((), Fault(FaultKind.DEVICE_MEMORY, "CUDA out of memory")) if too_much else None

    simulation = Simulation(2, script)
    engine, sink = run(simulation)
    assert sink.values == EXPECTED
    assert {size for sizes in simulation.batch_sizes.values() for size in sizes} <= {16, 8}
    assert engine.tally.halved <= 16
    assert "batch size 16 from here on" in sink.notes


def test_a_fault_in_the_midst_of_a_call_keeps_what_came_before() -> None:
    spec = ExplainSpec(masks=32 * 64, colors="black", estimator="paper")

    def script(actor: int, nth: int, call: Call) -> Reply | None:
        if len(call.tasks) >= 3 and not broken:
            broken.append(call)
            return Reply((None,) * 2, Fault(FaultKind.DEVICE_MEMORY, "full"))  # type: ignore[arg-type]
        return None

    broken: list[Call] = []
    simulation = Simulation(1, script, seconds=0.02)
    _, sink = run(simulation, NAMES[:1], spec)
    assert sink.values == {NAMES[0]: expected(NAMES[0], spec)}
    assert len(broken) == 1
    assert set(simulation.units_run.values()) == {1}


@pytest.mark.parametrize("of", [is_unit, lambda call: not is_unit(call)], ids=["unit", "inspection"])
@pytest.mark.parametrize(("actors", "max_retries"), [(1, 3), (2, 3), (1, 9)])
def test_an_image_that_kills_its_actors_gets_an_error_row_and_the_others_their_maps(
    actors: int, max_retries: int, of: Callable[[Call], bool]
) -> None:
    """Also where a call is of many units: of these the same one is tried again each time."""

    def script(actor: int, nth: int, call: Call) -> Fault | None:
        is_poison = call.tasks[0].image.image_id == NAMES[2] and of(call)
        return Fault(FaultKind.DIED, "segmentation fault") if is_poison else None

    simulation, sink = Simulation(actors, script, seconds=0.01), Sums()
    ledger = Ledger((ImageRef(name, name) for name in NAMES), SPEC, batch_size=64)
    engine = Engine(ledger, simulation, sink, Limits(max_retries=max_retries))
    engine.run()
    assert sink.failures.keys() == {NAMES[2]}
    assert sink.failures[NAMES[2]].message == f"actor died, after {max_retries} retries: segmentation fault"
    assert sink.values == {name: value for name, value in EXPECTED.items() if name != NAMES[2]}
    assert engine.tally.replaced == max_retries + 1
    assert engine.tally.retries == {"actor died": max_retries}


def test_an_unexpected_error_fails_its_image_alone_and_at_once() -> None:
    simulation = Simulation(2, once(Reply((), Fault(FaultKind.BROKEN, "KeyError: 'x'")), is_unit))
    engine, sink = run(simulation)
    assert len(sink.failures) == 1
    assert next(iter(sink.failures.values())).message == "unexpected error: KeyError: 'x'"
    assert len(sink.values) == 5
    assert simulation.started == [0, 1]
    assert not engine.tally.retries


def test_an_image_that_cannot_be_read_fails_alone() -> None:
    _, sink = run(Simulation(2, bad=frozenset({NAMES[0], NAMES[5]})))
    assert sink.failures.keys() == {NAMES[0], NAMES[5]}
    assert sink.values == {name: EXPECTED[name] for name in NAMES[1:5]}


def test_a_model_that_cannot_be_built_stops_the_job_with_the_real_error() -> None:
    simulation = Simulation(3)
    simulation.builds = lambda actor: Fault(FaultKind.BUILD, "text", ModelError("no such checkpoint"))
    with pytest.raises(ModelError, match=r"^no such checkpoint$"):
        run(simulation)
    assert simulation.started == [0, 1, 2]
    assert sorted(simulation.ended) == [0, 1, 2]


def test_one_node_where_the_model_cannot_be_built_is_done_without() -> None:
    simulation = Simulation(3)
    simulation.builds = lambda actor: (
        Fault(FaultKind.BUILD, "no file", ModelError("no file")) if actor in {3, 4} else None
    )
    simulation.script = once(Fault(FaultKind.DIED, "gone"))
    _, sink = run(simulation, [str(n) for n in range(600)])
    assert len(sink.values) == 600
    assert simulation.started == [0, 1, 2, 3, 4, 5]


def test_actors_that_die_one_after_the_other_stop_the_job() -> None:
    simulation = Simulation(2, lambda actor, nth, call: Fault(FaultKind.DIED, "no CUDA driver"))
    with pytest.raises(ClusterError, match=r"6 times in a row, actors .* actor died: no CUDA driver"):
        run(simulation, [str(n) for n in range(100)])
    assert len(simulation.started) == 12


def test_a_whole_cluster_that_is_out_of_memory_for_a_minute_is_waited_for() -> None:
    simulation = Simulation(40, start_seconds=3.0)
    simulation.builds = lambda actor: (
        Fault(FaultKind.HOST_MEMORY, "a neighbour took it") if simulation.clock < 60 else None
    )
    _, sink = run(simulation)
    assert sink.values == EXPECTED
    assert len(simulation.started) == 40 * 5


def test_added_actors_are_used_at_once() -> None:
    simulation = Simulation(1, seconds=1.0)

    def grow(actor: int, nth: int, call: Call) -> None:
        if simulation.clock > 60:
            simulation.actors = 4

    simulation.script = grow  # type: ignore[assignment]
    _, sink = run(simulation, [str(n) for n in range(100)])
    assert len(sink.values) == 100
    assert [simulation.calls[actor] > 150 for actor in range(4)] == [True] * 4


def test_a_cluster_that_shrinks_to_one_actor_goes_on() -> None:
    def script(actor: int, nth: int, call: Call) -> Fault | None:
        if actor in {1, 2, 3} and nth == 20:
            simulation.actors -= 1
            return Fault(FaultKind.PREEMPTED, "spot")
        return None

    simulation = Simulation(4, script)
    _, sink = run(simulation, [str(n) for n in range(60)])
    assert len(sink.values) == 60
    assert simulation.started == [0, 1, 2, 3]


def test_one_image_with_many_units_keeps_all_actors_busy() -> None:
    spec = ExplainSpec(masks=3000 * 4096, colors="black", estimator="paper")
    simulation = Simulation(20, seconds=1.0, exact=False)
    run(simulation, ["one"], spec)
    busy = simulation.busy / (20 * (simulation.clock - 20))
    assert unit_count(spec) == 3000
    assert busy > 0.98


def test_actors_that_do_not_start_are_talked_about() -> None:
    simulation = Simulation(2, start_seconds=100.0)
    _, sink = run(simulation, NAMES[:1])
    waiting = [note for note in sink.notes if note.startswith("waiting for 2 actors to start")]
    assert 2 <= len(waiting) <= 4


def test_actors_that_have_no_place_beside_others_are_told_of_once() -> None:
    simulation = Simulation(8, seconds=30.0)
    start = simulation.start

    def full(actor: int) -> None:
        start(actor)
        if actor >= 4:
            simulation.events = [entry for entry in simulation.events if entry[2].actor != actor]

    simulation.start = full  # type: ignore[method-assign]
    _, sink = run(simulation)
    assert sink.values == EXPECTED
    assert simulation.clock > 300
    waiting = [note for note in sink.notes if note.startswith("waiting for")]
    assert waiting == ["waiting for 4 of 8 actors to start: the simulation is slow to start"]


@settings(max_examples=40, deadline=None)
@given(
    actors=st.integers(1, 12),
    deaths=st.sampled_from([0.0, 60.0, 600.0]),
    spread=st.floats(0, 0.9),
    seed=st.integers(0, 10**6),
    seconds=st.sampled_from([0.001, 0.05, 3.0]),
    spec=st.sampled_from(
        [
            SPEC,
            ExplainSpec(masks=8 * 64, colors="black"),
            ExplainSpec(masks=20_000, colors="black"),  # more than are fitted
            ExplainSpec(masks=20_000, colors="black", estimator="paper"),  # whose scores are not kept
            ExplainSpec(masks=40_000, colors="black", relative_error=0.1),
        ]
    ),
)
def test_whatever_happens_the_bits_are_the_same(
    actors: int, deaths: float, spread: float, seed: int, seconds: float, spec: ExplainSpec
) -> None:
    """The partition law and the once law, with deaths at any time."""

    def run_on(simulation: Simulation) -> Sums:
        sink = Sums()
        ledger = Ledger((ImageRef(name, name) for name in NAMES), spec, batch_size=64)
        Engine(ledger, simulation, sink, Limits(max_retries=1000, max_lost_starts=1000)).run()
        return sink

    simulation = Simulation(
        actors,
        seconds=seconds,
        spread=spread,
        deaths_per_hour=deaths,
        start_seconds=2.0,
        seed=seed,
        enough=9000,
    )
    disturbed, alone = run_on(simulation), run_on(Simulation(1, enough=9000))
    assert disturbed.values == alone.values
    assert disturbed.masks == alone.masks
    (masks,) = set(disturbed.masks.values())
    assert masks == spec.masks if spec.relative_error is None else 9000 <= masks < 15_000
    if spec is SPEC:
        assert disturbed.values == EXPECTED


def simulate(actors: int, images: int, masks: int, seconds: float) -> tuple[Simulation, float]:
    """A large undisturbed-but-for-deaths run; returns it with the driver's seconds per unit."""
    spec = ExplainSpec(masks=masks, colors="black", estimator="paper")
    simulation = Simulation(actors, seconds=seconds, deaths_per_hour=0.01, exact=False)
    sink = Sums()
    sink.keep = False
    ledger = Ledger((ImageRef(str(n), str(n)) for n in range(images)), spec, batch_size=64)
    began = time.perf_counter()
    Engine(ledger, simulation, sink, Limits()).run()
    took = time.perf_counter() - began - simulation.own_time
    assert sink.finished == images
    return simulation, took / (images * unit_count(spec))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_hundred_actors_are_kept_busy() -> None:
    simulation, _ = simulate(100, 1500, 8000, 1.0)
    assert simulation.busy / (100 * simulation.clock) > 0.94  # start and end of a short job are in it


def test_actors_do_not_wait_for_the_driver_between_images_of_a_second() -> None:
    spec = ExplainSpec(masks=64, colors="black", estimator="paper")  # one unit
    simulation = Simulation(2, seconds=1.0, spread=0.0, start_seconds=0.0, latency=0.1)
    names = [str(n) for n in range(100)]
    sink = Sums()
    Engine(Ledger((ImageRef(name, name) for name in names), spec, batch_size=64), simulation, sink).run()
    assert sink.finished == 100
    assert simulation.busy / (2 * simulation.clock) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "masks", "seconds"),
    [(1_000_000, 64, 1.0), (20_000, 8000, 10.0), (1, 10**9, 60.0)],
    ids=["a million images", "images of 32 units", "one image of 10^9 masks"],
)
def test_a_thousand_actors_are_kept_busy(images: int, masks: int, seconds: float) -> None:
    before = psutil.Process().memory_info().rss
    simulation, per_unit = simulate(1000, images, masks, seconds)
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    efficiency = simulation.busy / (1000 * simulation.clock)
    print(
        f"\n1,000 actors, {images:,} images, {masks:,} masks: efficiency {efficiency:.4f}, driver "
        f"{per_unit * 1e6:.0f} us per unit, memory +{grown:.0f} MiB, {simulation.clock / 3600:.1f} h, "
        f"{len(simulation.started) - 1000} actors replaced"
    )
    assert efficiency >= 0.98
    assert grown < 200
