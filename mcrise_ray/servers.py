"""Models behind an inference server that speaks the KServe v2 protocol over HTTP: black boxes in earnest.

The protocol is also called Open Inference Protocol; Triton, MLServer, KServe, OpenVINO and others speak it.
Tensors travel as JSON, or as bytes where the server advertises the extension `binary_tensor_data`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import requests
import torch
from jaxtyping import Float
from torch import Tensor

from mcrise_ray.errors import ModelError, ServerError
from mcrise_ray.layout import Layout

TOKEN_VARIABLE: Final = "MCRISE_MODEL_TOKEN"
"""Environment variable whose value, where set, goes with every request as `Authorization: Bearer VALUE`."""

_DTYPES = {
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}
_NAMES = {np.dtype(_DTYPES[name]): name for name in ("FP16", "FP32", "FP64", "UINT8")}

_TRY_AGAIN = frozenset({429, *range(500, 600)} - {501, 505})
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0  # seconds
_DECIMALS = 6  # of numbers in JSON: finer than float32 resolves the pixels of an image, half as long

Answer = tuple[dict[str, Any], bytes]


@dataclass(frozen=True)
class ServerUrl:
    """`http(s)://HOST[:PORT]/[PREFIX/]v2/models/NAME[/versions/V][?OPTION=VALUE&...]`, taken apart.

    Attributes:
        base: up to `/v2`.
        model: the rest, `/models/NAME[/versions/V]`.
        timeout: seconds to wait for the server to connect, and then for each answer.
        max_batch: images per request.
        concurrency: requests in flight from one worker.
        retries: further tries after connection errors, time-outs, 429 and 5xx, with growing pauses.
        input, output: names of the tensors; needed where the server lists none or several.
    """

    base: str
    model: str
    timeout: float = 30.0
    max_batch: int = 16
    concurrency: int = 4
    retries: int = 4
    input: str | None = None
    output: str | None = None

    @classmethod
    def parse(cls, text: str) -> ServerUrl:
        """Take a URL apart.

        Raises:
            ValueError: it is none, or carries a user, a password or an unknown option. The message shows no
                more of it than is harmless.
        """
        url = urlsplit(text)
        if "@" in url.netloc:
            raise ValueError(
                "expected a URL without user and password, found both in it; "
                f"put a token into the environment variable {TOKEN_VARIABLE} instead"
            )
        found = re.fullmatch(r"(.*/v2)(/models/[^/]+(?:/versions/[^/]+)?)/?", url.path)
        if not url.hostname or found is None or url.fragment:
            raise ValueError(
                f"expected http(s)://HOST/v2/models/NAME[/versions/V], found path {url.path!r} "
                f"on host {url.hostname!r}"
            )
        kinds: dict[str, Callable[[str], Any]] = {
            "timeout": float,
            "max_batch": int,
            "concurrency": int,
            "retries": int,
            "input": str,
            "output": str,
        }
        options: dict[str, Any] = {}
        for name, value in parse_qsl(url.query, keep_blank_values=True):
            if name not in kinds:
                raise ValueError(f"expected the options {', '.join(kinds)} after '?', found {name}")
            try:
                options[name] = kinds[name](value)
            except ValueError:
                raise ValueError(f"expected a number for ?{name}=, found {value!r}") from None
        parsed = cls(f"{url.scheme}://{url.netloc}{found[1]}", found[2], **options)
        lowest = {"timeout": 1e-3, "max_batch": 1, "concurrency": 1, "retries": 0}
        for name, least in lowest.items():
            if not least <= getattr(parsed, name) < float("inf"):
                raise ValueError(f"expected ?{name}= of at least {least:g}, found {getattr(parsed, name)}")
        return parsed


def is_server(model: str) -> bool:
    """Whether a model string is a URL."""
    return model.startswith(("http://", "https://"))


class ServerModel:
    """A model on a server, as a callable from batches in its own space to its output.

    Args:
        url: of the model, with the options of `ServerUrl`.
        sleep: takes the seconds to pause before trying again.

    Raises:
        ServerError: the server cannot be reached.
        ModelError: its model does not take images.
    """

    def __init__(self, url: ServerUrl, sleep: Callable[[float], None] = time.sleep) -> None:
        self._url, self._sleep = url, sleep
        self._session = requests.Session()
        # The hook also keeps `requests` from sending what ~/.netrc holds for this host.
        self._session.auth = _authorize
        pool = requests.adapters.HTTPAdapter(pool_maxsize=url.concurrency)
        self._session.mount("http://", pool)
        self._session.mount("https://", pool)
        self._threads = ThreadPoolExecutor(url.concurrency, thread_name_prefix="kserve")
        metadata = self._get(url.model)
        try:
            self.input, self.layout = self._choose_input(metadata)
            self.output = self._choose_output(metadata)
        except (KeyError, TypeError) as error:
            raise self._broken("name, datatype and shape of every tensor", f"{metadata}"[:200]) from error
        self.binary = self._has_binary()
        self.most = self.layout.batch or url.max_batch

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """The model's output, in requests of at most `most` images, several of them at a time.

        Raises:
            ServerError: it did not answer, however often it was asked.
            ModelError: it refused a request, or its answer is not what the protocol says.
        """
        futures = [self._threads.submit(self._infer, part) for part in torch.split(images, self.most)]
        try:
            return torch.cat([future.result() for future in futures])
        finally:
            # The caller overwrites its batch next, so no request may still read from it.
            for future in futures:
                future.cancel()
            wait(futures)

    def _infer(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        packed = self.layout.pack(images)
        kind = _NAMES[packed.dtype]
        tensor: dict[str, Any] = {"name": self.input, "shape": list(packed.shape), "datatype": kind}
        request: dict[str, Any] = {"inputs": [tensor]}
        if self.output is not None:
            request["outputs"] = [{"name": self.output}]
        headers = {"Content-Type": "application/json"}
        if self.binary:
            raw = packed.tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            request["parameters"] = {"binary_data_output": True}
            head = json.dumps(request).encode()
            headers = {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(head)),
            }
            body = head + raw
        else:
            numbers = packed.ravel()
            if kind != "UINT8":
                numbers = np.round(numbers.astype(np.float64), _DECIMALS)
            tensor["data"] = numbers.tolist()
            body = json.dumps(request).encode()
        where = f"{self._url.model}/infer"
        head_of_answer, rest = self._answer(self._send("POST", where, body, headers), where)
        return self._scores(head_of_answer, rest, len(packed))[: len(images)]

    def _scores(self, answer: dict[str, Any], rest: bytes, images: int) -> Float[Tensor, "B C"]:
        """The wanted output of an answer; `rest` holds tensors that came as bytes."""
        outputs = answer.get("outputs")
        if not isinstance(outputs, list) or not outputs:
            raise self._broken("an answer with outputs", f"the keys {sorted(answer)}")
        have = [output.get("name") for output in outputs if isinstance(output, dict)]
        if len(have) < len(outputs) or (self.output is None and len(have) > 1):
            raise self._broken("one output", f"{have or outputs}"[:200] + "; choose with ?output=")
        at = 0
        for output in outputs:
            # Many servers write null for what they leave out.
            size = int((output.get("parameters") or {}).get("binary_data_size") or 0)
            raw, at = rest[at : at + size], at + size
            if self.output not in {None, output.get("name")}:
                continue
            kind, shape = output.get("datatype"), output.get("shape")
            if kind not in _DTYPES:
                raise self._broken(f"an output of type {', '.join(_DTYPES)}", f"{kind}; choose with ?output=")
            try:
                data = np.frombuffer(raw, _DTYPES[kind]) if size else np.array(output["data"], _DTYPES[kind])
                scores = data.reshape(shape)
            except (KeyError, TypeError, ValueError) as error:
                raise self._broken(f"the numbers of an output of shape {shape}", str(error)) from error
            if scores.ndim != 2 or len(scores) != images:
                raise self._broken(
                    f"scores of shape ({images}, classes)",
                    f"{scores.shape} for a request of {images} images; check ?max_batch= and ?output=",
                )
            return torch.from_numpy(scores.astype(np.float32))
        raise self._broken(f"an output named {self.output!r}", f"{have}; choose with ?output=")

    def _choose_input(self, metadata: dict[str, Any]) -> tuple[str, Layout]:
        listed = {tensor["name"]: tensor for tensor in metadata.get("inputs") or []}
        name = self._url.input or (next(iter(listed)) if len(listed) == 1 else None)
        if name is None or (listed and name not in listed):
            raise ModelError(
                f"expected the model's input by name, because {self._where} lists {list(listed) or 'none'}; "
                "choose with ?input=NAME"
            )
        if name not in listed:
            return name, Layout(np.dtype(np.float32))
        tensor = listed[name]
        return name, Layout.of(tensor["shape"], tensor["datatype"], f"input {name!r} of {self._where}")

    def _choose_output(self, metadata: dict[str, Any]) -> str | None:
        listed = [tensor["name"] for tensor in metadata.get("outputs") or []]
        chosen = self._url.output
        if (chosen is None and len(listed) > 1) or (chosen is not None and listed and chosen not in listed):
            raise ModelError(
                f"expected one output of {self._where}, found {listed}; choose with ?output=NAME"
            )
        return chosen or (listed[0] if listed else None)

    def _has_binary(self) -> bool:
        try:
            return "binary_tensor_data" in (self._get("").get("extensions") or [])
        except ModelError:
            # A gateway may pass requests for the model alone; JSON always works.
            return False

    def _get(self, path: str) -> dict[str, Any]:
        return self._answer(self._send("GET", path, None, {}), path)[0]

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> requests.Response:
        """One request, tried again for as long as that can help."""
        for tried in range(self._url.retries + 1):
            try:
                response = self._session.request(
                    method,
                    self._url.base + path,
                    data=body,
                    headers=headers,
                    timeout=self._url.timeout,
                    allow_redirects=False,
                )
            except requests.Timeout:
                problem = f"no answer within {self._url.timeout:g} s; raise ?timeout= or lower ?max_batch="
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"cannot reach it ({_cause(error)}); check the URL of --model, and that it runs"
            except requests.RequestException as error:
                raise ModelError(f"{self._where}: {_cause(error)}; check --model") from error
            else:
                if response.ok and not response.is_redirect:
                    return response
                problem = f"{method} {path or '/v2'} answered {_status(response)}"
                if response.status_code not in _TRY_AGAIN:
                    raise ModelError(f"{self._where}: {problem}{_advice(response.status_code)}")
            if tried < self._url.retries:
                self._sleep(min(_FIRST_WAIT * 2**tried, _LONGEST_WAIT))
        raise ServerError(f"{self._where}: {problem}; tried {self._url.retries + 1} times (?retries=)")

    def _answer(self, response: requests.Response, path: str) -> Answer:
        """The JSON of an answer, and the bytes after it."""
        content, length = response.content, response.headers.get("Inference-Header-Content-Length")
        end = int(length) if length is not None and length.isdigit() else len(content)
        try:
            answer = json.loads(content[:end])
        except ValueError as error:
            raise self._broken(f"JSON from {path or '/v2'}", f"{content[:60]!r}") from error
        if not isinstance(answer, dict):
            raise self._broken(f"a JSON object from {path or '/v2'}", f"{content[:60]!r}")
        return answer, content[end:]

    @property
    def _where(self) -> str:
        return f"server {self._url.base}{self._url.model}"

    def _broken(self, expected: str, found: str) -> ModelError:
        return ModelError(f"{self._where}: expected {expected}, found {found}")


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    token = os.environ.get(TOKEN_VARIABLE)
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _status(response: requests.Response) -> str:
    """Status and reason of a refusal, with what the server says about it."""
    if response.is_redirect:
        to = urlsplit(response.headers["Location"])  # of which the query may hold a secret
        return (
            f"{response.status_code} {response.reason}: {to.scheme}://{to.netloc.rpartition('@')[2]}{to.path}"
        )
    said = response.text[:200].strip()
    try:
        said = str(json.loads(response.content).get("error", said))[:200]
    except (ValueError, AttributeError):
        said = " ".join(said.split())
    return f"{response.status_code} {response.reason}" + (f": {said}" if said else "")


def _advice(status: int) -> str:
    if status in {401, 403}:
        return f"; put a token into the environment variable {TOKEN_VARIABLE}"
    if status == 404:
        return "; check the model's name and version in --model"
    if status in range(300, 400):
        return "; where that is its right address, name it in --model"
    return "; check --model, --size and ?max_batch="


def _cause(error: BaseException) -> str:
    """The innermost reason of a connection error, without the layers of addresses around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0]
