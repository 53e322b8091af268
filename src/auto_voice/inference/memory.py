"""What to do about memory that is full, and about what allocators keep of it."""

from __future__ import annotations


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is what numpy or torch raise when memory, of whichever device, is full."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(s in str(error).lower() for s in ("out of memory", "can't allocate memory"))
    )


def release_memory() -> None:
    """Give back what the C library keeps for later.

    Pieces differ in length, so what one leaves free is not what the next one wants, and over hours
    the holes would add up.
    """
    import ctypes
    import gc
    import sys

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
