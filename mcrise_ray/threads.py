"""Keeps threads out of each other's way.

After a product of matrices, the threads of numpy's OpenBLAS wait for the next one by spinning. Torch and ONNX
Runtime, whose turn it is then, have to share the cores with them: learning took twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from threading import Lock
from typing import ParamSpec, TypeVar

import numpy  # noqa: F401  # whose OpenBLAS must be there to be found
from threadpoolctl import OpenBLASController, ThreadpoolController

P = ParamSpec("P")
R = TypeVar("R")

# Other builds of BLAS share their threads with torch, or have none.
_spinning = ThreadpoolController().select(internal_api="openblas").select(threading_layer="pthreads")


class _Alone(ContextDecorator):
    """The limit holds while anybody is inside: each on its own would put back what it found, which may be the
    limit of another.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit = _spinning.limit(limits=1)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                # Who set a limit is alone in changing it, and may be another thread, which has left.
                OpenBLASController.clear_controlling_thread(force=True)
                self._limit.restore_original_limits()
                OpenBLASController.clear_controlling_thread()


_alone = _Alone()


def one_blas_thread(function: Callable[P, R]) -> Callable[P, R]:
    """The function, during which numpy's OpenBLAS has no threads beside those that call it.

    For functions in which torch does what takes long; not for those that ask models, which may be numpy's.
    """
    return _alone(function)
