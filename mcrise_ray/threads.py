"""Keeps numpy's threads out of the way of torch's.

After a product of matrices, the threads of numpy's OpenBLAS wait for the next one by spinning. Torch and ONNX
Runtime, whose turn it is then, have to share the cores with them: learning took twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy  # noqa: F401  # whose OpenBLAS must be there to be found
from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
R = TypeVar("R")

# Other builds of BLAS share their threads with torch, or have none.
_spinning = ThreadpoolController().select(internal_api="openblas").select(threading_layer="pthreads")


def one_blas_thread(function: Callable[P, R]) -> Callable[P, R]:
    """The function, during which numpy's OpenBLAS has no threads beside the one that calls it.

    For functions in which torch does what takes long; not for those that ask models, which may be numpy's.
    Where several threads call such functions at once, the limit is that of the first.
    """
    alone: Callable[P, R] = _spinning.wrap(limits=1)(function)
    return alone
