"""Models on KServe v2 servers: a scripted server for every fault, and MLServer for the real thing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import mcrise_ray as mr
from mcrise_ray import engine
from mcrise_ray.errors import ModelError, ServerError, SpecError
from mcrise_ray.models import facts
from mcrise_ray.progress import Quiet
from mcrise_ray.servers import TOKEN_VARIABLE, ServerModel, ServerUrl

SIZE = (8, 12)
METADATA = {
    "name": "means",
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, *SIZE]}],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 3]}],
}
NONE = {"activation": "none"}

Reply = tuple[int, dict[str, str], bytes]


def reply(content: Any, status: int = 200) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class Script:
    """Answers `infer` with channel means unless `faults` says otherwise, and counts requests."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = METADATA
        self.extensions: list[str] = []
        self.faults: list[Callable[[], Reply]] = []
        self.requests: list[tuple[str, str]] = []
        self.batches: list[int] = []
        self.tokens: list[str | None] = []
        self.in_flight = self.most_in_flight = 0
        self.meeting: threading.Barrier | None = None
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply:
        with self._lock:
            self.requests.append((method, path))
            self.tokens.append(headers.get("Authorization"))
            fault = self.faults.pop(0) if self.faults and path.endswith("/infer") else None
        if fault is not None:
            return fault()
        if path == "/v2":
            return reply({"name": "script", "extensions": self.extensions})
        if method == "GET":
            return reply(self.metadata)
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.meeting is not None:
            self.meeting.wait(10)
        with self._lock:
            self.in_flight -= 1
        return self._infer(headers, body)

    def _infer(self, headers: Any, body: bytes) -> Reply:
        length = headers.get("Inference-Header-Content-Length")
        request = json.loads(body[: int(length)] if length else body)
        (tensor,) = request["inputs"]
        assert tensor["name"] == "image"
        kind = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8}[tensor["datatype"]]
        raw = body[int(length) :] if length else b""
        flat = np.frombuffer(raw, kind) if length else np.array(tensor["data"], kind)
        images = flat.reshape(tensor["shape"]).astype(np.float32)
        self.batches.append(len(images))
        scores = images.mean(axis=(1, 2) if images.shape[3] == 3 else (2, 3)).astype(np.float32)
        output = {"name": "scores", "datatype": "FP32", "shape": list(scores.shape)}
        if not length:
            return reply({"model_name": "means", "outputs": [{**output, "data": scores.ravel().tolist()}]})
        assert request["parameters"]["binary_data_output"]
        other = {"name": "other", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}
        output["parameters"] = {"binary_data_size": scores.nbytes}
        head = json.dumps({"outputs": [other, output]}).encode()
        return 200, {"Inference-Header-Content-Length": str(len(head))}, head + b"\0\0\0\0" + scores.tobytes()


@contextmanager
def serving(script: Script) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(b"")

        def do_POST(self) -> None:
            self._reply(self.rfile.read(int(self.headers["Content-Length"])))

        def _reply(self, body: bytes) -> None:
            status, headers, content = script.answer(self.command, self.path, self.headers, body)
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}/v2/models/means"
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    with serving(script):
        yield script


def connect(script: Script, options: str = "") -> tuple[ServerModel, list[float]]:
    """A client, and the pauses it makes, without making them."""
    pauses: list[float] = []
    return ServerModel(ServerUrl.parse(script.url + options), sleep=pauses.append), pauses


def noise(count: int) -> torch.Tensor:
    return torch.rand((count, 3, *SIZE), generator=torch.Generator().manual_seed(1))


def infers(script: Script) -> int:
    return sum(path.endswith("/infer") for _, path in script.requests)


@pytest.mark.parametrize("extensions", [[], ["binary_tensor_data"]], ids=["json", "binary"])
def test_scores_come_in_order_in_requests_of_bounded_size(script: Script, extensions: list[str]) -> None:
    script.extensions = extensions
    model, _ = connect(script, "?max_batch=4")
    assert script.requests == [("GET", "/v2/models/means"), ("GET", "/v2")]
    images = noise(11)
    torch.testing.assert_close(model(images), images.mean((2, 3)), atol=1e-5, rtol=0)
    assert sorted(script.batches) == [3, 4, 4]


def test_requests_in_flight_are_as_many_as_asked_for(script: Script) -> None:
    model, _ = connect(script, "?max_batch=1&concurrency=3")
    script.meeting = threading.Barrier(3)  # nobody is answered before three are there
    assert model(noise(6)).shape == (6, 3)
    assert (script.most_in_flight, infers(script)) == (3, 6)


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "UINT8"])
@pytest.mark.parametrize("shape", [[-1, 3, *SIZE], [-1, *SIZE, 3], [4, 3, *SIZE]])
@pytest.mark.parametrize("extensions", [[], ["binary_tensor_data"]], ids=["json", "binary"])
def test_every_layout_and_number(script: Script, datatype: str, shape: list, extensions: list[str]) -> None:
    script.extensions = extensions
    script.metadata = {**METADATA, "inputs": [{"name": "image", "datatype": datatype, "shape": shape}]}
    model = mr.load_model(script.url, preprocessing=NONE)
    white = 255 if datatype == "UINT8" else 1
    assert (model.preprocessing.size, model.classes) == (SIZE, 3)
    images = noise(5)
    torch.testing.assert_close(
        model(images), images.mean((2, 3)) * white, rtol=2e-3, atol=0.2 if datatype == "UINT8" else 1e-3
    )
    assert set(script.batches) == ({4} if shape[0] == 4 else {1, 2, 5})


def test_explanation_through_a_server_is_that_of_the_function(script: Script) -> None:
    model = mr.load_model(f"{script.url}?max_batch=16", preprocessing=NONE)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    spec = mr.ExplainSpec(masks=64)
    ours = mr.explain(lambda images: images.mean((2, 3)), image, 1, spec)
    np.testing.assert_allclose(mr.explain(model, image, 1, spec).maps, ours.maps, atol=1e-5)


@pytest.mark.parametrize(
    "fault",
    [
        lambda: reply({"error": "loading"}, 503),
        lambda: reply({"error": "slow down"}, 429),
        lambda: reply({"error": "oops"}, 500),
        lambda: (0, {}, b""),
    ],
    ids=["503", "429", "500", "closed connection"],
)
def test_passing_faults_are_tried_again(script: Script, fault: Callable[[], Reply]) -> None:
    model, pauses = connect(script)
    script.faults = [fault, fault]
    torch.testing.assert_close(model(noise(2)), noise(2).mean((2, 3)), atol=1e-5, rtol=0)
    assert infers(script) == 3
    assert pauses == [0.25, 0.5]


@pytest.mark.parametrize("lasting", [False, True], ids=["passing", "lasting"])
def test_an_outage_costs_no_image(
    script: Script, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        Image.new("RGB", (12, 8), (ord(name), 200, 30)).save(tmp_path / f"{name}.png")
    infer, asked = script._infer, 0

    def out_for_a_while(headers: Any, body: bytes) -> Reply:
        nonlocal asked
        asked += 1
        return (
            reply({"error": "restarting"}, 503)
            if asked > 20 and (lasting or asked < 24)
            else infer(headers, body)
        )

    monkeypatch.setattr(script, "_infer", out_for_a_while)
    monkeypatch.setattr(engine, "_LONGEST_PAUSE", 0.1)
    job = mr.JobSpec(
        images=(str(tmp_path),),
        model={"model": f"{script.url}?retries=0", "preprocessing": NONE},
        output=str(tmp_path / "out"),
        actors=0,
        explain={"masks": 256, "estimator": "paper"},
        figures=0,
    )
    if lasting:
        with pytest.raises(ModelError, match=r"answered 503 .*: restarting; tried 1 times"):
            mr.run_job(job, Quiet())
        monkeypatch.setattr(script, "_infer", infer)
    summary = mr.run_job(job, Quiet())
    assert (summary.images, summary.errors, len(list(mr.read_results(job.output)))) == (3, 0, 3)


def test_patience_has_an_end(script: Script) -> None:
    model, pauses = connect(script, "?retries=7")
    script.faults = [lambda: reply({"error": "loading"}, 503)] * 20
    with pytest.raises(ServerError, match=r"answered 503 .*: loading; tried 8 times \(\?retries=\)"):
        model(noise(1))
    assert infers(script) == 8
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 8]


@pytest.mark.parametrize("load", [mr.load_model, mr.load_embedder])
def test_a_server_that_does_not_answer_is_told_as_such(script: Script, load: Callable[..., object]) -> None:
    """It says nothing about `--size` and `--weights`, of which the check of a model warns."""
    script.faults = [lambda: reply({"error": "loading"}, 503)] * 3
    with pytest.raises(ServerError, match=r"answered 503 .*: loading; tried 1 times \(\?retries=\)$"):
        load(f"{script.url}?retries=0")


def test_a_silent_server_is_a_time_out(script: Script) -> None:
    model, pauses = connect(script, "?timeout=0.5&retries=1")
    over = threading.Event()

    def silent() -> Reply:
        over.wait(10)
        return 0, {}, b""

    script.faults = [silent] * 2
    try:
        with pytest.raises(ModelError, match=r"no answer within 0.5 s; raise \?timeout= .*; tried 2 times"):
            model(noise(1))
    finally:
        over.set()
    assert (infers(script), len(pauses)) == (2, 1)


def outputs(**changes: Any) -> Callable[[], Reply]:
    return lambda: reply(
        {"outputs": [{"name": "scores", "datatype": "FP32", "shape": [2, 1], "data": [0, 1]} | changes]}
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: (200, {}, b"<html>"), r"expected JSON from /models/means/infer, found b'<html>'"),
        (lambda: reply([1]), r"expected a JSON object"),
        (lambda: reply({"result": 1}), r"expected an answer with outputs, found the keys \['result'\]"),
        (outputs(shape=[2, 2]), r"expected the numbers of an output of shape \[2, 2\]"),
        (
            outputs(shape=[2]),
            r"expected scores of shape \(2, classes\), found \(2,\) for a request of 2 images",
        ),
        (outputs(shape=[1, 2]), r"expected scores of shape \(2, classes\), found \(1, 2\).*max_batch="),
        (outputs(datatype="BYTES"), r"expected an output of type FP16, .*, found BYTES"),
        (
            outputs(name="other"),
            r"expected an output named 'scores', found \['other'\]; choose with \?output=",
        ),
        (lambda: reply({"error": "bad shape"}, 400), r"answered 400 .*: bad shape; check --model, --size"),
        (lambda: reply({"error": "who"}, 401), rf"answered 401 .*: who; put a token .* {TOKEN_VARIABLE}"),
        (
            lambda: (308, {"Location": "https://u:p@there/v2?key=s"}, b""),
            r"answered 308 Permanent Redirect: https://there/v2; where that is its right address, name it",
        ),
        (
            lambda: reply({"outputs": [{"name": "scores"}, ["scores"]]}),
            r"expected one output, found \['scores'\]; choose with \?output=",
        ),
    ],
)
def test_lasting_faults_are_told_at_once(script: Script, fault: Callable[[], Reply], message: str) -> None:
    model, pauses = connect(script)
    script.faults = [fault]
    with pytest.raises(ModelError, match=rf"server {script.url}: .*{message}") as caught:
        model(noise(2))
    assert "\n" not in str(caught.value)
    assert (infers(script), pauses) == (1, [])


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        (
            {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]},
            "",
            r"expected numbers of type FP32, ",
        ),
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]},
            "",
            r"expected shape \(B, 3, H, W\) or",
        ),
        ({"inputs": []}, "", r"expected the model's input by name, .* lists none; choose with \?input=NAME"),
        ({}, "?input=picture", r"lists \['image'\]; choose with \?input=NAME"),
        (
            {"outputs": [{"name": "a"}, {"name": "b"}]},
            "",
            r"expected one output .* found \['a', 'b'\]; choose with",
        ),
        ({}, "?output=c", r"expected one output .* found \['scores'\]; choose with \?output=NAME"),
        (
            {"inputs": [{"name": "image"}]},
            "",
            r"expected name, datatype and shape of .*, found \{'name': 'means'",
        ),
        ({"outputs": {"scores": {}}}, "", r"expected name, datatype and shape of every tensor, found"),
    ],
)
def test_metadata_that_does_not_fit(script: Script, metadata: dict, options: str, message: str) -> None:
    script.metadata = METADATA | metadata
    with pytest.raises(ModelError, match=message):
        mr.load_model(script.url + options)


def test_an_answer_may_hold_null_where_the_protocol_leaves_out(script: Script) -> None:
    model, _ = connect(script)
    script.faults = [outputs(parameters=None)]
    torch.testing.assert_close(model(noise(2)), torch.tensor([[0.0], [1.0]]))


def test_of_several_outputs_that_no_metadata_told_none_is_guessed(script: Script) -> None:
    script.metadata = METADATA | {"outputs": None}
    script.extensions = ["binary_tensor_data"]  # which answers with another output first
    with pytest.raises(ModelError, match=r"expected one output, found \['other', 'scores'\]; choose with"):
        mr.load_model(script.url)
    assert mr.load_model(f"{script.url}?output=scores", preprocessing=NONE).classes == 3


def test_a_server_that_tells_nothing_needs_names_and_size(script: Script) -> None:
    script.metadata = {"name": "means"}
    model = mr.load_model(f"{script.url}?input=image", preprocessing={**NONE, "size": SIZE})
    assert model.classes == 3


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v2/models/m?retries=0"
    with pytest.raises(ModelError, match=r"cannot reach it \(.*refused\); check the URL of --model"):
        mr.load_model(url)


def test_token_comes_from_the_environment_and_stays_out_of_results(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password geheim\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    mr.load_model(script.url, preprocessing=NONE)
    assert set(script.tokens) == {None}
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    script.tokens.clear()
    spec = mr.ModelSpec(model=script.url, preprocessing=NONE)
    model = mr.load_model(spec)
    assert set(script.tokens) == {"Bearer s3cret"}
    assert "s3cret" not in spec.model_dump_json() + repr(facts(spec, model))
    assert facts(spec, model).device == "server"


def test_url_is_taken_apart() -> None:
    url = ServerUrl.parse(
        "https://host:81/pre/v2/models/a.b/versions/3?timeout=1.5&max_batch=8&concurrency=2&retries=0"
    )
    assert url == ServerUrl("https://host:81/pre/v2", "/models/a.b/versions/3", 1.5, 8, 2, 0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/models/x", r"expected http\(s\)://HOST/v2/models/NAME"),
        ("http:///v2/models/x", r"expected http\(s\)://HOST/v2/models/NAME"),
        ("http://host/v2/models/x/infer", r"found path '/v2/models/x/infer' on host 'host'"),
        ("http://me:geheim@host/v2/models/x", "without user and password"),
        ("http://host/v2/models/x?token=geheim", "expected the options timeout, .* after '.', found token"),
        ("http://host/v2/models/x?timeout=soon", r"expected a number for \?timeout=, found 'soon'"),
        ("http://host/v2/models/x?timeout=0", r"expected \?timeout= of at least 0.001, found 0.0"),
        ("http://host/v2/models/x?timeout=nan", r"expected \?timeout= of at least 0.001, found nan"),
        ("http://host/v2/models/x?concurrency=0", r"expected \?concurrency= of at least 1, found 0"),
    ],
)
def test_wrong_urls_are_refused_in_the_spec(url: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        mr.ModelSpec(model=url)
    assert "geheim" not in str(caught.value)


RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Means(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        images = NumpyCodec.decode_input(payload.inputs[0])
        scores = images.mean(axis=(2, 3)).astype(np.float32)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])
"""


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the channel means on a real server, in an environment of its own: its pins clash with ours."""
    program = os.environ.get("MLSERVER") or shutil.which("mlserver")
    if program is None:
        home = tmp_path_factory.mktemp("mlserver-env")
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([home / "bin/pip", "install", "--quiet", "mlserver>=1.6"], check=True)
        program = str(home / "bin/mlserver")
    folder = tmp_path_factory.mktemp("mlserver")
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "metrics_endpoint": None}
    settings |= dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps({**METADATA, "implementation": "runtime.Means"}))
    (folder / "runtime.py").write_text(RUNTIME)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([program, "start", folder], stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 60
        url = f"http://127.0.0.1:{ports[0]}/v2"
        while not _is_ready(f"{url}/health/ready"):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"MLServer did not start: {(folder / 'log').read_text()[-1000:]}")
            time.sleep(0.1)
        yield f"{url}/models/means"
    finally:
        server.terminate()
        server.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).ok
    except requests.RequestException:
        return False


@pytest.mark.slow
def test_a_real_server(mlserver: str) -> None:
    model = mr.load_model(f"{mlserver}?max_batch=16&concurrency=2", preprocessing=NONE)
    assert (model.classes, model.preprocessing.size) == (3, SIZE)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    spec = mr.ExplainSpec(masks=256)
    ours = mr.explain(lambda images: images.mean((2, 3)), image, 1, spec)
    np.testing.assert_allclose(mr.explain(model, image, 1, spec).maps, ours.maps, atol=1e-5)
    with pytest.raises(ModelError, match=r"answered 404 .*; check the model's name and version"):
        mr.load_model(mlserver.replace("means", "medians"))
