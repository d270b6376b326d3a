"""The machine that a measurement was made on: what it is, how fast it multiplies, how much memory a contender takes."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from minibert.bench.contenders import build, lineup
from minibert.bench.report import Row, progress
from minibert.bench.settings import Settings
from minibert.bench.workloads import make_workload
from minibert.config import BertConfig
from minibert.inference.int8 import to_int8
from minibert.inference.onednn import ConvolvedLinear, PrepackedLinear, multiply_int8, order_int8
from minibert.inference.ways import has_int8_products
from minibert.training.processes import keep_freed_memory

SIZES = (1024, 768, 3072)  # rows, from, to: BERT-base's largest product for 8 × 128 tokens


@torch.inference_mode()
def matmul_rate(precision: str, device: str) -> float:
    """FLOP/s of this machine, in int8 operations a second: the best of up to 16 products of SIZES, or half a second of
    them, by torch and, on the CPU, by oneDNN on prepacked weights, as product and as convolution. 0 where there are no
    such products.
    """
    rows, d, f = SIZES
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, weight = torch.randn(rows, d, device=device).to(dtype), torch.randn(f, d, device=device).to(dtype)
    bias = torch.zeros(f, device=device, dtype=dtype)
    ways: list[Callable[[Tensor], Tensor]] = []
    if precision == "int8":
        if device == "cpu" and has_int8_products():
            x, weight = to_int8(x)[0], order_int8(to_int8(weight)[0])
            zeros = torch.zeros(f, dtype=torch.int32)
            ways.append(lambda x: multiply_int8(x, weight, bias, zeros))
    else:
        ways.append(torch.nn.Linear(d, f, device=device, dtype=dtype))
    for kind in (PrepackedLinear, ConvolvedLinear) if device == "cpu" and precision != "int8" else ():
        with suppress(AttributeError, RuntimeError, NotImplementedError):  # not in this torch, or not in this dtype
            ways.append(kind(weight, bias))
    best = float("inf")
    for way in ways:
        spent = 0.0
        for _ in range(16):
            synchronize(device)
            began = perf_counter()
            way(x)
            synchronize(device)
            took = perf_counter() - began
            best, spent = min(best, took), spent + took
            if spent > 0.5:
                break
    return 2 * rows * d * f / best


# FLOP/s of dense products, from NVIDIA's data sheets: bfloat16 with tensor cores, float32 without.
CARDS = {
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float32": 30.3e12},
    "RTX 4090": {"bfloat16": 165e12, "float32": 82.6e12},
}


def peak_rate(card: str, precision: str) -> float | None:
    """FLOP/s that the maker promises for this card; None for a card or a precision that is not in the table."""
    found = [name for name in CARDS if set(name.split()) <= set(card.split())]
    return CARDS[found[0]].get(precision) if found else None


def describe_machine(device: str) -> dict[str, str]:
    facts = {"processor": _processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__  # it names the build too (2.14.1+cu130), which the package's version may not
    for package in ("transformers", "onnxruntime", "openvino"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_resident() -> int:
    """The peak resident memory of this process, in bytes: Python and libraries included."""
    try:  # not getrusage: what it gives may be the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize(device)


# ---------------------------------------------------------------------------------------------------- memory


def measure_memory(rows: list[Row], folder: Path, settings: Settings) -> None:
    """Peak memory of each contender, in a process of its own that loads it and runs the workloads once, the smaller
    ones first: what stands beside a workload is the peak up to it."""
    for task in settings.tasks:
        for name, precision in lineup(task, settings.peers, settings.precisions):
            mine = [
                row
                for row in rows
                if (row.task, row.key, row.precision) == (task, name, precision) and row.median is not None
            ]
            if not mine:
                continue
            shapes = ",".join(row.shape for row in mine)
            code = "import sys; from minibert.bench.machine import print_peaks; print_peaks(*sys.argv[1:])"
            command = [sys.executable, "-c", code, str(folder), name, precision, task, settings.device, shapes]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
            peaks = json.loads(done.stdout.splitlines()[-1])
            for row in mine:
                row.peak_memory_bytes = peaks[row.shape]
            progress(f"memory of {name} {precision}: done")


def print_peaks(folder: str, name: str, precision: str, task: str, device: str, shapes: str) -> None:
    """Run in a process of its own: prints {shape: bytes}. On the CPU the peak resident memory of the whole process,
    Python and libraries included; on CUDA what torch allocated at most."""
    keep_freed_memory()  # as the command that started this one does
    config = BertConfig.from_dict(json.loads((Path(folder) / "config.json").read_text()))
    works = [make_workload(shape, config, device, everywhere=task == "inference") for shape in shapes.split(",")]
    contender = build(name, precision, task, Path(folder), device)
    peaks = {}
    for work in sorted(works, key=lambda work: work.input_ids.numel()):
        contender.run(work)
        synchronize(device)
        peaks[work.name] = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_resident()
    print(json.dumps(peaks))
