"""One writer per output: a second driver is refused, a dead one's claim lapses.

On a file system the claim is a lock of the operating system, which ends with its process. An object store has
no locks: there the claim is a small file that its owner keeps renewing, in a thread, because the loop of a
driver may be busy with something else for a while, such as a large gallery.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import IO, Any

from mcrise_ray import files
from mcrise_ray.errors import StoreError
from mcrise_ray.store import Store

_NAME = files.LOCK
_RENEW_EVERY = 20.0  # seconds
_LAPSES_AFTER = 120.0  # seconds; clocks of two machines may differ a little


class Lease:
    """The right to write to an output; taken by the constructor.

    Raises:
        StoreError: another driver holds it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._file: IO[str] | None = None
        self._renewed = 0.0
        self._one_at_a_time = threading.Lock()
        self._released = threading.Event()
        if store.local_path(_NAME) is not None:
            self._lock()
        else:
            self._claim()
            threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def renew(self) -> None:
        """Say that the owner lives; cheap enough for every turn of a loop.

        Raises:
            StoreError: another driver has taken over meanwhile, or the output is gone.
        """
        with self._one_at_a_time:
            is_fresh = abs(time.time() - self._renewed) < _RENEW_EVERY  # clocks are set back, too
            if is_fresh or self._released.is_set():
                return
            holder = self._store.read_json(_NAME)
            if holder is not None and holder["owner"] != self._owner["owner"]:
                raise StoreError(f"lost {self._store.location} to another job{_describe(holder)}")
            if self._file is None:
                self._write()
                return
            if holder is None:  # nobody else deletes it, so it is not all that was deleted
                raise StoreError(
                    f"expected {_NAME} in {self._store.location} while this job writes there, found none: "
                    "was the output removed? Remove what is left of it, and run the job again"
                )
            self._renewed = time.time()

    def release(self) -> None:
        """Let the next driver in."""
        if self._file is not None:
            self._file.close()
            self._file = None
            return
        self._released.set()
        with self._one_at_a_time:
            holder = self._store.read_json(_NAME)
            if holder is not None and holder["owner"] == self._owner["owner"]:
                self._store.delete(_NAME)

    def _keep(self) -> None:
        while not self._released.wait(_RENEW_EVERY):
            with suppress(StoreError):  # the loop's own call meets it again, and raises it
                self.renew()

    def _lock(self) -> None:
        path = self._store.local_path(_NAME)
        assert path is not None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the job runs
        except OSError as error:
            raise StoreError(f"cannot write to {self._store.location}: {error}; check --output") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read()
            file.close()
            raise self._refusal(json.loads(holder) if holder else {}) from None
        file.truncate(0)
        file.write(json.dumps(self._owner))
        file.flush()
        self._file, self._renewed = file, time.time()

    def _claim(self) -> None:
        holder = self._store.read_json(_NAME)
        if holder is not None:
            age = time.time() - holder["renewed"]
            if age < _LAPSES_AFTER:
                raise self._refusal(holder, f", or {_LAPSES_AFTER - age:.0f} s if it is dead")
        self._write()
        if self._store.read_json(_NAME)["owner"] != self._owner["owner"]:
            raise self._refusal({})

    def _write(self) -> None:
        self._renewed = time.time()
        self._store.write_json(_NAME, {**self._owner, "renewed": self._renewed})

    def _refusal(self, holder: dict[str, Any], lapse: str = "") -> StoreError:
        return StoreError(
            f"another job is writing to {self._store.location}{_describe(holder)}; "
            f"wait for it{lapse}, stop it, or choose another --output"
        )


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
