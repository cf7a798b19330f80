"""Memory of the process: how it is kept for the next tensors, and what else takes it."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Names of `mallopt`'s parameters (malloc.h of the GNU C library)."""
NEVER = -1
"""As a threshold; the largest number there is means 2 GB, and a large model's update frees more."""
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""Variable that limits how many kernels torch's library for matrix products keeps ready."""
KEPT_KERNELS = 128
"""Those of one iteration. Its own limit is 1024, which takes far more memory, since batches of
every length have kernels of their own."""


def reuse_memory() -> bool:
    """Keep the memory of freed tensors for the next ones, and few kernels.

    By itself the C library hands every large tensor's memory back to the system, which must clear
    it page by page for the next one, which takes long in virtual machines most of all. The peak is
    about the same, but what was taken stays taken. What the environment says about either comes
    first, and other C libraries are left alone. To be called before torch computes.

    Returns:
        Whether freed memory is kept.
    """
    os.environ.setdefault(KERNELS, str(KEPT_KERNELS))
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, NEVER))
