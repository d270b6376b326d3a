"""What was measured, on which machine, as rows, as JSON, and as a table that explains itself."""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from minibert.bench.settings import PEERS, BenchSettings
from minibert.inference.int8 import to_int8
from minibert.inference.onednn import multiply_int8, order_int8
from minibert.inference.prepare import WAYS, has_int8_products, working_ways

ORDER = ("int8", "bfloat16", "float32")


@dataclass
class Row:
    """One contender on one workload. Times are seconds."""

    task: str
    shape: str
    key: str  # its name in the options
    contender: str  # its name for people
    precision: str
    status: str = "timed"  # or refused (by the parity gate), absent, failed
    reason: str = ""  # of that status; of a timed one, a note on how it was built
    difference: float | None = None  # of its logits from ours in float32, over the largest
    tolerance: float | None = None  # of that difference; None: it has no gate
    tokens: int = 0  # real ones
    first_answer: float | None = None  # seconds from the folder of weights to the first answer
    seconds: list[float] = field(default_factory=list)  # one for each round
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    share_of_matmul: float | None = None  # its rate of arithmetic over the machine's
    peak_memory_bytes: int | None = None
    against: str = ""  # which of our rows it is compared with
    ratio: float | None = None  # that row's median over this one


@dataclass
class BenchReport:
    """Everything that was measured. matmul: FLOP/s of this machine in each precision, in int8 operations a second; 0
    where it has no such products.
    """

    machine: dict[str, str]
    settings: BenchSettings
    matmul: dict[str, float]
    workloads: dict[str, dict[str, int]]
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def slower(rows: Sequence[Row]) -> list[tuple[Row, Row, float]]:
    """(ours, peer, our median over its) wherever a row of ours loses to a peer of the same or a higher precision. Each
    of our precisions counts by itself: that int8 is fast does not help who wants float32.
    """
    return [
        (ours, peer, ours.median / peer.median)
        for peer in rows
        if peer.median and not peer.contender.startswith("minibert")
        for ours in rows
        if ours.median and ours.contender in ("minibert prepared", "minibert")
        if (ours.task, ours.shape) == (peer.task, peer.shape)
        and ORDER.index(ours.precision) <= ORDER.index(peer.precision)
        and ours.median > peer.median
    ]


# ---------------------------------------------------------------------------------------------------------- for people


def table(report: BenchReport) -> str:
    """The report for people."""
    out = [" · ".join(f"{name} {value}" for name, value in report.machine.items())]
    rates = [f"{rate / 1e9:.0f} G{'' if p == 'int8' else 'FL'}OP/s in {p}" for p, rate in report.matmul.items() if rate]
    out.append(f"matmul: {', '.join(rates) or 'no such products here'} (its best, measured now)")
    if report.settings.device == "cpu" and float(report.machine.get("load", 0)) > 1.5 * (os.cpu_count() or 1):
        out.append(f"WARNING: load {report.machine['load']}: other programs run on this machine, the times mean little")
    for heading, work in report.workloads.items():
        task, shape = heading.split()
        if task == "training" and "int8" in report.settings.precisions:
            out += ["", f"{task}, {shape}: nothing is trained in int8"]
        if rows := [row for row in report.rows if (row.task, row.shape) == (task, shape)]:
            out += [
                "",
                f"{task}, {shape}: {work['rows']} rows of {work['shortest']} to {work['longest']} tokens, "
                f"{work['real_tokens']} real ({work['padded_tokens']} padded), asked at {work['asked']}",
                f"  {'contender':<22} {'precision':<9} {'first s':>8} {'median ms':>10} {'quartiles':>17} "
                f"{'tokens/s':>9} {'ours/its':>8} {'of matmul':>9} {'differs':>8} {'peak MiB':>9}",
                *map(_line, rows),
            ]
    if lost := slower(report.rows):
        out += ["", "Slower than a peer of the same or a higher precision:"]
        out += [
            f"  {peer.task}, {peer.shape}: {ours.contender} {ours.precision} takes {ratio:.2f} of {peer.contender} "
            f"{peer.precision}"
            for ours, peer, ratio in lost
        ]
    return "\n".join([*out, "", EXPLANATION])


def _line(row: Row) -> str:
    start = f"  {row.contender:<22} {row.precision:<9} "
    if row.median is None or row.quartiles is None:
        return f"{start}{row.status}: {row.reason}"

    def shown(number: float | None, form: str) -> str:
        return "–" if number is None else format(number, form)

    spread = f"{1e3 * row.quartiles[0]:.1f}–{1e3 * row.quartiles[1]:.1f}"
    memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20
    line = (
        f"{start}{shown(row.first_answer, '.2f'):>8} {1e3 * row.median:>10.1f} {spread:>17} "
        f"{row.tokens_per_second:>9.0f} {shown(row.ratio, '.2f'):>8} {shown(row.share_of_matmul, '.0%'):>9} "
        f"{row.difference:>8.0e} {shown(memory, '.0f'):>9}"
    )
    return f"{line}  {row.reason}".rstrip()


EXPLANATION = """\
What this says. All contenders read one folder of weights and get the same padded ids; packing is part of minibert's
time. "first s": from the folder to the first answer, once the libraries are loaded. "differs": the largest difference
of a logit, at the asked positions, from minibert's in float32, over the largest logit. Who differs by more than 1e-4 in
float32 or 5e-2 in bfloat16 is not timed; int8 has no gate. Dense shapes ask for logits everywhere, the others (and
training) at 15 % of the tokens. There the peers compute them everywhere all the same, but for sdpa-asked, which calls
the head of transformers where it is asked.
ours/its: our median over that row's, below 1 where ours is faster (minibert prepared, in training minibert, in the same
precision; beside int8, where there is none of ours, in bfloat16 or else float32). tokens/s: of real tokens. "of
matmul": the arithmetic that was asked for (products only, no padding), a second, over the rate above. Training is
forward, loss, backward and AdamW on float32 weights, in bfloat16 under autocast, with dropout. peak MiB (--memory): the
whole process on the CPU, torch's allocations on CUDA."""


# ---------------------------------------------------------------------------------------------------------- the machine


SIZES = (1024, 768, 3072)  # rows, from, to: BERT-base's largest product for 8 × 128 tokens


@torch.inference_mode()
def matmul_rate(precision: str, device: str) -> float:
    """FLOP/s of this machine, in int8 operations a second: the best of up to 16 products of SIZES, or half a second of
    them, by torch and, on the CPU, in each way that `prepare_for_inference` knows. 0 where there are no such products.
    """
    rows, d, f = SIZES
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, weight = torch.randn(rows, d, device=device).to(dtype), torch.randn(f, d, device=device).to(dtype)
    bias = torch.zeros(f, device=device, dtype=dtype)
    ways: list[Callable[[Tensor], Tensor]] = []
    if precision != "int8":
        kinds = [WAYS[name] for name in working_ways(dtype)] if device == "cpu" else [None]
        torchs = torch.nn.Linear(d, f, device=device, dtype=dtype)
        ways += [torchs if kind is None else kind(weight, bias) for kind in kinds]
    elif device == "cpu" and has_int8_products():
        x, weight, zeros = to_int8(x)[0], order_int8(to_int8(weight)[0]), torch.zeros(f, dtype=torch.int32)
        ways.append(lambda x: multiply_int8(x, weight, bias, zeros))
    best = float("inf")
    for way in ways:
        end = perf_counter() + 0.5
        for _ in range(16):
            best = min(best, seconds(partial(way, x), device))
            if perf_counter() > end:
                break
    return 2 * rows * d * f / best


def seconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes, until the device has done what it was given."""
    synchronize(device)
    began = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - began


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(device)


def describe_machine(device: str) -> dict[str, str]:
    processor = _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    facts = {"processor": processor, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__  # it names the build too (2.14.1+cu130), which the package's version may not
    for package in dict.fromkeys(peer.package for peer in PEERS.values()):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def peak_resident() -> int:
    """The peak resident memory of this process, in bytes: Python and libraries included."""
    if peak := _proc("/proc/self/status", "VmHWM"):
        return 1024 * int(peak.split()[0])
    import resource  # on Linux it may give the peak of the process that started this one

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc(path: str, name: str) -> str:
    """What stands beside a name in one of Linux's lists; "" where there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
