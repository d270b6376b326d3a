"""The machine that a measurement was made on: what it is, how fast it multiplies, and how much memory was used."""

import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from minibert.inference.int8 import to_int8
from minibert.inference.onednn import ConvolvedLinear, PrepackedLinear, multiply_int8, order_int8
from minibert.inference.ways import has_int8_products


@torch.inference_mode()
def matmul_rate(precision: str, device: str) -> float:
    """FLOP/s of this machine, in int8 operations a second: the best of up to 16 products, or half a second of them, of
    (1024, 768) with (768, 3072), BERT-base's largest, by torch and, on the CPU, by oneDNN on prepacked weights, as
    product and as convolution. 0 where there are no such products.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, weight = torch.randn(1024, 768, device=device).to(dtype), torch.randn(3072, 768, device=device).to(dtype)
    bias = torch.zeros(3072, device=device, dtype=dtype)
    ways: list[Callable[[Tensor], Tensor]] = []
    if precision == "int8":
        if device == "cpu" and has_int8_products():
            x, weight = to_int8(x)[0], order_int8(to_int8(weight)[0])
            zeros = torch.zeros(3072, dtype=torch.int32)
            ways.append(lambda x: multiply_int8(x, weight, bias, zeros))
    else:
        ways.append(torch.nn.Linear(768, 3072, device=device, dtype=dtype))
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
    return 2 * 1024 * 768 * 3072 / best


def describe_machine(device: str) -> dict[str, str]:
    facts = {"processor": _processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__  # it names the build too (2.14.1+cu130), which the package's version may not
    for package in ("transformers", "onnxruntime", "openvino", "ctranslate2"):
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
