"""What the C library does with memory that is freed. For the commands that train and measure; no model needs it."""

import ctypes
import os
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers for M_MMAP_THRESHOLD and M_TRIM_THRESHOLD


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor. By default it gives large blocks back to Linux, and each new
    one begins with page faults: a sixth of a training step in bfloat16, a twentieth of 8 × 128 logits in float32. The
    peak is up to a tenth higher. Whoever sets glibc's own variables knows better; other C libraries are left alone.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ or "glibc.malloc." in tunables:
        return
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Smaller blocks come from the heap, whose end stays. An older glibc refuses more than 32 MB; and only once the
        # first is accepted may the second be set, for either ends glibc's own adapting of both.
        if libc.mallopt(MMAP_THRESHOLD, 2**30) or libc.mallopt(MMAP_THRESHOLD, 2**25):
            libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
