"""Debug mode: stop at the first NaN or infinite input instead of carrying it through a computation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["debug", "debugging", "check_finite"]

_ON: ContextVar[bool] = ContextVar("kernelbook_debug", default=os.environ.get("KERNELBOOK_DEBUG", "0") not in ("", "0"))


@contextmanager
def debug(on: bool = True) -> Iterator[None]:
    """Check the inputs of attention for NaN and infinity within the block.

    ``KERNELBOOK_DEBUG=1`` in the environment does the same for a whole process.  It is off by default because it
    makes a GPU wait for each answer.

    Parameters
    ----------
    on : bool
        Whether to check.
    """
    token = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(token)


def debugging() -> bool:
    """Whether debug mode is on; never in code that torch compiles, which could not stop there."""
    return not torch.compiler.is_compiling() and _ON.get()


def check_finite(**tensors: Tensor) -> None:
    """In debug mode, raise if a tensor holds NaN or infinity.

    Parameters
    ----------
    **tensors : Tensor
        By the names that the message should use.

    Raises
    ------
    FloatingPointError
        Naming the tensor, how many of its elements are not finite, and where the first one is.
    """
    if not debugging():
        return
    for name, x in tensors.items():
        bad = ~x.isfinite()
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            raise FloatingPointError(
                f"{name} {tuple(x.shape)} holds {int(bad.sum())} elements that are NaN or infinite, the first at "
                f"{first}: {x[first].item()}; look upstream of this call for where they arise")
