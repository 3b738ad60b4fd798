"""Ray's job server as a client finds it: is it there, does it let us in, and what went wrong on one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from mcrise_ray.access import token_for
from mcrise_ray.errors import ClusterError

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"


def connect(address: str | None, insecure: bool) -> tuple[Any, str]:
    """A client of a job server that answers and lets us in, and the server's URL."""
    url = _url(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    token = token_for(url, insecure=insecure)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    try:
        answer = requests.get(f"{url}/api/version", headers=headers, verify=verify, timeout=20)
    except requests.RequestException as error:
        raise ClusterError(
            f"expected a cluster at {url}, cannot reach it: {type(error).__name__}; is there a tunnel to its "
            "dashboard, and is --address right?"
        ) from error
    if answer.status_code == 401:
        raise ClusterError(f"{url} expects a token, found none (401); see: mcrise token --help")
    if answer.status_code == 403:
        raise ClusterError(
            f"{url} expects another token than the one that was sent (403); copy the cluster's"
        )
    if answer.status_code != 200:
        raise ClusterError(f"expected Ray's job server at {url}, found HTTP status {answer.status_code}")

    from ray.job_submission import JobSubmissionClient

    # It tells how each connection ends, in between the lines of the job.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    with errors_of(url):
        return JobSubmissionClient(url, headers=headers, verify=verify), url


def _url(address: str) -> str:
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ClusterError(
            f"expected the address of a dashboard such as {DEFAULT_ADDRESS}, found {address}; jobs are not "
            "submitted through ray://"
        )
    if parts.username or parts.password:
        raise ClusterError("expected an address without user and password; a token goes into RAY_AUTH_TOKEN")
    return url


@contextmanager
def errors_of(url: str) -> Iterator[None]:
    """What Ray's client raises, as one line of ours."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # requests' errors are OSErrors
        text = " ".join(str(error).split())
        raise ClusterError(f"{url}: {text[:500] or type(error).__name__}") from error
