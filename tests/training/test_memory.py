"""Freed memory is kept for the next tensor, unless glibc's own variables say otherwise."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from minibert.training.processes import keep_freed_memory

KEPT = """
import resource, sys
from minibert.training.processes import keep_freed_memory
import torch
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(2):  # a block is found again only once those beside it are free too: the first few are new
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16_000_000)  # 64 MB, freed at once
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc")
def test_freed_memory_is_kept():
    def faults(how):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, env=environment)
        return float(done.stdout)

    assert faults("kept") < 0.1 * faults("as it was")  # for each tensor: on pages of 4 kB 15,625


@pytest.mark.parametrize(
    ("largest", "variables", "expected"),
    [
        (2**40, {}, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, {}, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),  # as before glibc 2.35
        (0, {}, [(-3, 2**30), (-3, 2**25)]),  # no second threshold without the first: it would be slower than neither
        (2**40, {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**40, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}, []),  # the user's own wish stands
        (2**40, {"MALLOC_MMAP_THRESHOLD_": "33554432"}, []),
        (2**40, {"MALLOC_TRIM_THRESHOLD_": "67108864"}, []),
    ],
)
def test_glibc_is_asked_for_what_it_can_and_only_if_nobody_else_has_asked(largest, variables, expected, monkeypatch):
    asked = []

    class Libc:
        def mallopt(self, what, value):
            asked.append((what, value))
            return int(value <= largest or what == -1)

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    keep_freed_memory()
    assert asked == expected
