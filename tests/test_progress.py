"""How a job shows itself: lines for people, objects for machines, and the file beside the results."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from mcrise_ray import progress
from mcrise_ray.cli import app
from mcrise_ray.errors import SpecError
from mcrise_ray.progress import ConsoleReporter, JsonReporter, Reporter, log_format


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def tell_all(reporter: Reporter, clock: Clock) -> None:
    """Half of a job of four images with 100 masks each, of which one was done before."""
    reporter.start(4, 100, 1)
    reporter.actors_alive(3)
    clock.seconds += 2
    reporter.masks_done(50)
    reporter.retried("actor died", "actor died: gone; a.png requeued")
    reporter.relative_error(0.125)
    reporter.image_done(100)
    clock.seconds += 5
    reporter.masks_done(50)
    reporter.image_failed("b.png", "read", "b.png: damaged")
    reporter.note("batch size 32 from here on")
    reporter.job_ended("stopped", {"images": 2, "errors": 1})


def test_a_log_has_plain_lines_every_few_seconds(clock: Clock) -> None:
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200)) as reporter:
        assert isinstance(reporter, Reporter)
        tell_all(reporter, clock)
    lines = text.getvalue().splitlines()
    until = lines[1].rpartition(" (until ")[2]
    assert lines == [
        "actor died: gone; a.png requeued",
        "2/4 images, 100 masks, 10 masks/s, 3 actors, relative error 0.12, 1 retries, 33.3%, 20 s left "
        f"(until {until}",
        "error: b.png: damaged",
        "batch size 32 from here on",
    ]


@pytest.mark.parametrize(
    ("image_id", "message", "told"),
    [
        ("a.png", "/data/a.png: damaged", "error: /data/a.png: damaged"),
        ("a.png", "expected a label", "error: a.png: expected a label"),
        ("4", "expected a target from 0 to 42", "error: 4: expected a target from 0 to 42"),
        ("a\n\x1b[2J.png", r"/data/a\n\x1b[2J.png: damaged", r"error: /data/a\n\x1b[2J.png: damaged"),
        ("a\nb.png", "expected a label", r"error: a\nb.png: expected a label"),
    ],
)
def test_errors_name_their_image_once(clock: Clock, image_id: str, message: str, told: str) -> None:
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200)) as reporter:
        reporter.image_failed(image_id, "explain", message)
    assert text.getvalue().splitlines() == [told]


def test_what_earlier_runs_had_scored_is_not_left_to_do(clock: Clock) -> None:
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200)) as reporter:
        reporter.start(1, 1000)
        reporter.masks_kept(900)
        reporter.masks_done(10)
        clock.seconds += 10
        reporter.masks_done(40)
        assert reporter.outlook() == {"images_total": 1, "seconds_left": 12.5}
    assert "50 masks" in text.getvalue()
    assert "95.0%, 12 s left" in text.getvalue()


def test_errors_of_a_gallery_are_no_images(clock: Clock) -> None:
    text = io.StringIO()
    reporter = JsonReporter(text)
    reporter.start(4, 100)
    for number in range(10):
        reporter.image_failed(f"gallery:{number}.png", "gallery", "damaged")
    reporter.masks_done(100)
    clock.seconds += 10
    reporter.masks_done(100)
    assert reporter.outlook() == {"images_total": 4, "seconds_left": 20.0}
    last = json.loads(text.getvalue().splitlines()[-1])
    assert (last["event"], last["images_done"], last["errors"]) == ("progress", 0, 10)


def test_nothing_is_foretold_before_there_is_a_pace(clock: Clock) -> None:
    """The first masks come after a minute of building models, which says nothing of the rest."""
    text = io.StringIO()
    reporter = JsonReporter(text)
    reporter.start(10, 100)
    clock.seconds += 60
    reporter.masks_done(100)
    assert reporter.outlook() == {"images_total": 10, "seconds_left": None}
    clock.seconds += 10
    reporter.masks_done(100)
    assert reporter.outlook() == {"images_total": 10, "seconds_left": 80.0}
    assert json.loads(text.getvalue().splitlines()[-1])["masks_per_second"] == 10.0, "nor of the pace"


def test_where_images_end_early_those_that_ended_foretell_the_rest(clock: Clock) -> None:
    reporter = JsonReporter(io.StringIO())
    reporter.start(11, None, 1)
    reporter.masks_done(100)
    clock.seconds += 10
    reporter.masks_done(100)
    assert reporter.outlook()["seconds_left"] is None  # of images that may take any number of masks
    reporter.image_done(120)
    assert reporter.outlook()["seconds_left"] == 100.0  # ten of 120 masks, less 200, at 10 a second
    reporter.image_done(60)
    reporter.image_failed("b.png", "read", "b.png: damaged")
    assert reporter.outlook()["seconds_left"] == 61.0  # nine of 90


def test_a_bar_has_no_end_before_an_image_has(clock: Clock) -> None:
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200, force_terminal=True)) as reporter:
        reporter.start(4, None)
        reporter.masks_done(50)
        assert reporter._bar is not None
        assert reporter._bar.tasks[0].total is None
        reporter.image_done(50)
        assert (reporter._bar.tasks[0].completed, reporter._bar.tasks[0].total) == (50, 200)


def test_a_terminal_has_a_bar(clock: Clock) -> None:
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200, force_terminal=True)) as reporter:
        tell_all(reporter, clock)
    assert "3/4 images, 100 masks, 10 masks/s, 3 actors" in text.getvalue()
    assert "error: b.png: damaged" in text.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_on_a_narrow_terminal_the_time_left_is_there_too(clock: Clock, width: int) -> None:
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=width, force_terminal=True)) as reporter:
        tell_all(reporter, clock)
    words = " ".join(re.sub(r"\x1b\[[0-9;?]*\w|[━╺╸]", "", text.getvalue()).split())
    assert "66.7%, 10 s left (until" in words


def test_a_structured_log_has_one_object_per_line(clock: Clock) -> None:
    text = io.StringIO()
    with JsonReporter(text) as reporter:
        assert isinstance(reporter, Reporter)
        tell_all(reporter, clock)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    for line in lines:
        time.strptime(line.pop("time"), "%Y-%m-%dT%H:%M:%S%z")
    assert [line["event"] for line in lines] == ["start", "retry", "progress", "error_row", "note", "stopped"]
    start, retry, shown, error, note, stopped = lines
    assert start == {
        "level": "info", "event": "start", "images_total": 4, "images_done": 1, "masks_per_image": 100,
    }  # fmt: skip
    assert (retry["level"], retry["reason"]) == ("warning", "actor died")
    assert shown == {
        "level": "info",
        "event": "progress",
        "images_total": 4,
        "images_done": 2,
        "errors": 0,
        "masks_done": 100,
        "masks_per_second": 10.0,
        "seconds_left": 20.0,
        "actors": 3,
        "retries": 1,
        "relative_error": 0.125,
    }
    assert error == {
        "level": "error",
        "event": "error_row",
        "message": "error: b.png: damaged",
        "image_id": "b.png",
        "stage": "read",
    }
    assert note["message"] == "batch size 32 from here on"
    assert stopped == {"level": "warning", "event": "stopped", "seconds": 7.0, "images": 2, "errors": 1}


def test_formats_of_the_log() -> None:
    assert (log_format("plain"), log_format("json")) == ("plain", "json")
    with pytest.raises(SpecError, match=r"^--log, MCRISE_LOG: expected plain or json, found 'xml'$"):
        log_format("xml")


# The command line.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.fromarray(np.full((20, 24, 3), 9, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not a picture")
    (tmp_path / "job.yaml").write_text(
        "images: [a.png, b.png]\noutput: out\nfigures: 0\nactors: 0\nexplain: {masks: 128}\n"
        "model: {model: 'blackboxes:small_network', preprocessing: {size: [20, 24]}}\n"
    )
    return tmp_path / "job.yaml"


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_run_with_a_structured_log_prints_nothing_else(
    file: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = ("--log", "json") if how == "option" else ()
    if how == "variable":
        monkeypatch.setenv("MCRISE_LOG", "json")
    done = mcrise("run", file, *option)
    assert done.exit_code == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["start", "note", "error_row", "done"]
    assert (lines[-1]["images"], lines[-1]["errors"], lines[-1]["masks"]) == (1, 1, 128)


def test_what_a_model_prints_is_not_among_the_objects_of_a_structured_log(file: Path) -> None:
    file.write_text(file.read_text().replace("small_network", "talking_network"))
    done = mcrise("run", file, "--log", "json")
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "done"
    assert all(line.startswith("{") for line in done.stdout.splitlines())
    assert done.stderr == "loading\n"


def test_a_structured_log_ends_with_the_end(file: Path) -> None:
    """Who reads until then hears of figures, too."""
    file.write_text(file.read_text().replace("figures: 0", "figures: 1"))
    mcrise("run", file)
    shutil.rmtree(file.parent / "out/figures")
    (file.parent / "a.png").unlink()
    lines = [json.loads(line) for line in mcrise("run", file, "--log", "json").stdout.splitlines()]
    assert [line["event"] for line in lines] == ["note", "note", "done"]
    assert lines[1]["message"].startswith("no figure of")


def test_an_unknown_format_is_one_line(file: Path) -> None:
    done = mcrise("run", file, "--log", "xml")
    assert done.exit_code == 2
    assert done.stderr.strip() == "error: --log, MCRISE_LOG: expected plain or json, found 'xml'"
