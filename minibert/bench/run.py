"""The measurement: parity gate, interleaved rounds, and the table that explains itself."""

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep

import torch
from torch import Tensor

from minibert.bench.contenders import PEERS, SHAPES, Absent, Contender, Workload, build, lineup, random_model
from minibert.bench.contenders import make_workload as make
from minibert.config import BertConfig
from minibert.inference import ConvolvedLinear, PrepackedLinear
from minibert.masked_lm import BertForMaskedLM
from minibert.memory import keep_freed_memory

TASKS = ("inference", "training")
TRAINING_SHAPES = ("8x128", "mixed")
# The largest difference of a logit from minibert's in float32, over the largest logit. float32: the same sums in
# another order; bfloat16: some tens of roundings of 2^-8. int8 is reported and has no gate.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
SHORT = 0.3  # seconds: a call that is shorter is preceded by one that is not timed, in every round
SETTLE = 0.01  # seconds between two contenders, in which the threads of the last one go to sleep
ORDER = ("int8", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """model: a name for from_pretrained, or None for BERT-base's sizes with `layers` layers and random weights.
    rounds: how often each contender is timed. shapes: None is all of them for inference, and TRAINING_SHAPES for
    training. memory: run each contender once more, in a process of its own, for its peak memory."""

    model: str | None = None
    revision: str | None = None  # of the model, if it is on the hub
    layers: int = 12
    device: str = "cpu"
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    tasks: tuple[str, ...] = TASKS
    shapes: tuple[str, ...] | None = None
    rounds: int = 9
    peers: tuple[str, ...] = PEERS
    memory: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda, and torch sees no GPU here: use --device cpu")
        for name, least in (("rounds", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        for name, given, known in (
            ("--peers", self.peers, PEERS),
            ("--dtype", self.precisions, tuple(TOLERANCE)),
            ("--task", self.tasks, TASKS),
        ):
            if wrong := [one for one in given if one not in known]:
                raise ValueError(f"{name} does not know {wrong[0]!r}: choose among {', '.join(known)}")
            if not given and name != "--peers":
                raise ValueError(f"{name} is empty: choose among {', '.join(known)}")


@dataclass
class Row:
    """One contender on one workload. key: its name in the options. status: timed, refused (by the parity gate),
    absent or failed; reason: why. Times are seconds; quartiles are those of the rounds. ratio: our median over this
    one; ours is `against`.
    """

    task: str
    shape: str
    key: str
    contender: str
    precision: str
    status: str = "timed"
    reason: str = ""
    difference: float | None = None
    tolerance: float | None = None
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    share_of_matmul: float | None = None
    peak_memory_bytes: int | None = None
    against: str = ""
    ratio: float | None = None


@dataclass
class Report:
    """Everything that was measured. matmul: FLOP/s of this machine in each precision."""

    machine: dict[str, str]
    settings: Settings
    matmul: dict[str, float]
    workloads: dict[str, dict[str, int]]
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def run(settings: Settings) -> Report:
    """Measure. Raises ValueError or OSError for a model or a shape that cannot be had."""
    if settings.model is None:
        model = random_model(settings.layers)
    else:
        model = BertForMaskedLM.from_pretrained(settings.model, revision=settings.revision)
    config = model.config
    plans = []
    for task in settings.tasks:
        shapes = settings.shapes or (SHAPES if task == "inference" else TRAINING_SHAPES)
        works = [make(name, config, settings.device, everywhere=task == "inference") for name in shapes]
        plans.append((task, works))
    matmul = {precision: matmul_rate(precision, settings.device) for precision in settings.precisions}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="minibert-bench-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        reference = model.to(settings.device).eval()
        for task, works in plans:
            rows += _run_task(task, works, reference, folder, settings)
            gc.collect()
        if settings.memory:
            _measure_memory(rows, folder, settings)
    for row in rows:
        rate = matmul.get(row.precision)
        if row.median and rate:
            work = next(w for task, works in plans if task == row.task for w in works if w.name == row.shape)
            flops = work.flops(config) * (3 if row.task == "training" else 1)  # backward: two products for each one
            row.share_of_matmul = flops / row.median / rate
    described = {
        f"{task} {work.name}": {
            "rows": len(work.lengths),
            "shortest": min(work.lengths),
            "longest": max(work.lengths),
            "real_tokens": work.tokens,
            "padded_tokens": work.input_ids.numel(),
            "asked": int(work.asked.sum()),
        }
        for task, works in plans
        for work in works
    }
    return Report(_machine(settings), settings, matmul, described, rows)


def _run_task(
    task: str, works: Sequence[Workload], reference: BertForMaskedLM, folder: Path, settings: Settings
) -> list[Row]:
    contenders: dict[tuple[str, str], Contender | tuple[str, str]] = {}
    for name, precision in lineup(task, settings.peers, settings.precisions):
        try:
            contenders[name, precision] = build(name, precision, task, folder, settings.device)
        except Absent as reason:
            contenders[name, precision] = ("absent", str(reason))
        except Exception as error:  # a peer that breaks is a row of the table, not the end of it
            if name.startswith("minibert"):
                raise
            contenders[name, precision] = ("failed", _one_line(error))
    rows = []
    expected = {work.name: _expected(reference, work) for work in works}  # before any training step
    gated = {}
    for work in works:
        for key, contender in contenders.items():
            row = gated[work.name, key] = Row(task, work.name, key[0], *_label(key, contender), tokens=work.tokens)
            if isinstance(contender, tuple):
                row.status, row.reason = contender
            else:
                _gate(row, contender, work, expected[work.name])
    for work in works:
        here = [(gated[work.name, key], contender) for key, contender in contenders.items()]
        running = [(row, c) for row, c in here if isinstance(c, Contender) and row.status == "timed"]
        _time(running, work, settings)
        mine = [row for row, _ in here]
        _ratios(mine)
        rows += mine
        _progress(f"{task} {work.name}: done")
    return rows


def _label(key: tuple[str, str], contender: object) -> tuple[str, str]:
    return (contender.name, contender.precision) if isinstance(contender, Contender) else key


@torch.inference_mode()
def _expected(reference: BertForMaskedLM, work: Workload) -> Tensor:
    return reference(work.input_ids, work.attention_mask).logits[work.asked].float()  # (M, V)


def _gate(row: Row, contender: Contender, work: Workload, expected: Tensor) -> None:
    """Refuse a contender whose logits, where they are asked, are not ours."""
    try:
        logits = contender.check(work)
    except Exception as error:
        if contender.name.startswith("minibert"):
            raise
        row.status, row.reason = "failed", _one_line(error)
        return
    logits = (logits[work.asked] if logits.dim() == 3 else logits).float()  # (M, V)
    row.difference = float((logits - expected).abs().max() / expected.abs().max())
    row.tolerance = TOLERANCE.get(contender.precision)
    if row.tolerance is not None and not row.difference <= row.tolerance:  # NaN is refused too
        row.status = "refused"
        row.reason = f"its logits differ by {row.difference:.1e} of the largest, more than {row.tolerance:.0e}"


def _time(running: list[tuple[Row, Contender]], work: Workload, settings: Settings) -> None:
    """A B C, A B C, …: what else the machine does hits all alike. The first calls, which compile and allocate, do not
    count."""
    usual = {}
    for row, contender in running:
        try:
            for _ in range(2):
                usual[row.contender, row.precision] = _seconds(contender, work, settings.device)
        except Exception as error:
            if contender.name.startswith("minibert"):
                raise
            row.status, row.reason = "failed", _one_line(error)
    running = [(row, contender) for row, contender in running if row.status == "timed"]
    for _ in range(settings.rounds):
        for row, contender in running:
            sleep(SETTLE)
            if usual[row.contender, row.precision] < SHORT:
                _seconds(contender, work, settings.device)
            row.seconds.append(_seconds(contender, work, settings.device))
    for row, contender in running:
        row.median = median(row.seconds)
        low, _, high = quantiles(row.seconds, method="inclusive") if len(row.seconds) > 1 else [row.median] * 3
        row.quartiles = (low, high)
        row.tokens_per_second = row.tokens / row.median
        row.reason = contender.note


def _seconds(contender: Contender, work: Workload, device: str) -> float:
    _synchronize(device)
    began = perf_counter()
    contender.run(work)
    _synchronize(device)
    return perf_counter() - began


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _ratios(rows: list[Row]) -> None:
    """Each row beside our fast form in its own precision; int8 beside our bfloat16, or our float32 without it."""
    ours = {row.precision: row for row in rows if row.contender in ("minibert prepared", "minibert") and row.median}
    for row in rows:
        mine = ours.get(row.precision) or (row.precision == "int8" and (ours.get("bfloat16") or ours.get("float32")))
        if mine and row.median and mine.median:
            row.against, row.ratio = f"{mine.contender} {mine.precision}", mine.median / row.median


def slower(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(ours, peer) wherever our best time loses to a peer of the same or a higher precision."""
    found = []
    for peer in rows:
        if peer.median is None or peer.contender.startswith("minibert"):
            continue
        mine = [
            row
            for row in rows
            if (row.task, row.shape) == (peer.task, peer.shape)
            and row.contender in ("minibert prepared", "minibert")
            and row.median is not None
            and ORDER.index(row.precision) <= ORDER.index(peer.precision)
        ]
        if mine and (best := min(mine, key=lambda row: row.median or 0.0)).median > peer.median:  # type: ignore[operator]
            found.append((best, peer))
    return found


# -------------------------------------------------------------------------------------------------------- the machine


@torch.inference_mode()
def matmul_rate(precision: str, device: str) -> float:
    """FLOP/s of this machine: the best of up to 16 products, or half a second of them, of (1024, 768) with
    (768, 3072), BERT-base's largest, by torch and, on the CPU, by oneDNN on prepacked weights, as product and as
    convolution.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    x, weight = torch.randn(1024, 768, device=device).to(dtype), torch.randn(3072, 768, device=device).to(dtype)
    bias = torch.zeros(3072, device=device, dtype=dtype)
    ways: list[torch.nn.Module] = [torch.nn.Linear(768, 3072, device=device, dtype=dtype)]
    if device == "cpu":
        for kind in (PrepackedLinear, ConvolvedLinear):
            with suppress(AttributeError, RuntimeError, NotImplementedError):  # not in this torch, or not in this dtype
                ways.append(kind(weight, bias))
    best = float("inf")
    for way in ways:
        spent = 0.0
        for _ in range(16):
            _synchronize(device)
            began = perf_counter()
            way(x)
            _synchronize(device)
            took = perf_counter() - began
            best, spent = min(best, took), spent + took
            if spent > 0.5:
                break
    return 2 * 1024 * 768 * 3072 / best


def _machine(settings: Settings) -> dict[str, str]:
    facts = {"processor": _processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if settings.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    facts["python"] = platform.python_version()
    for package in ("torch", "transformers", "onnxruntime", "openvino"):
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


def _measure_memory(rows: list[Row], folder: Path, settings: Settings) -> None:
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
            code = "import sys; from minibert.bench.run import peak_memory; peak_memory(*sys.argv[1:])"
            command = [sys.executable, "-c", code, str(folder), name, precision, task, settings.device, shapes]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
            peaks = json.loads(done.stdout.splitlines()[-1])
            for row in mine:
                row.peak_memory_bytes = peaks[row.shape]
            _progress(f"memory of {name} {precision}: done")


def peak_memory(folder: str, name: str, precision: str, task: str, device: str, shapes: str) -> None:
    """Run in a process of its own: prints {shape: bytes}. On the CPU the peak resident memory of the whole process,
    Python and libraries included; on CUDA what torch allocated at most."""
    keep_freed_memory()  # as the command that started this one does
    config = BertConfig.from_dict(json.loads((Path(folder) / "config.json").read_text()))
    works = [make(shape, config, device, everywhere=task == "inference") for shape in shapes.split(",")]
    contender = build(name, precision, task, Path(folder), device)
    peaks = {}
    for work in sorted(works, key=lambda work: work.input_ids.numel()):
        contender.run(work)
        _synchronize(device)
        peaks[work.name] = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident()
    print(json.dumps(peaks))


def _peak_resident() -> int:
    try:  # not getrusage: what it gives may be the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _one_line(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".split("\n")
    return lines[0][:160]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- the table


def table(report: Report) -> str:
    """The report for people."""
    out = [" · ".join(f"{name} {value}" for name, value in report.machine.items())]
    rates = [f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in report.matmul.items()]
    out.append(f"matmul: {', '.join(rates)} (its best, measured now)")
    if report.settings.device == "cpu" and float(report.machine.get("load", 0)) > 1.5 * (os.cpu_count() or 1):
        out.append(f"WARNING: load {report.machine['load']}: other programs run on this machine, the times mean little")
    for heading, work in report.workloads.items():
        task, shape = heading.split()
        rows = [row for row in report.rows if (row.task, row.shape) == (task, shape)]
        if not rows:
            continue
        out += [
            "",
            f"{task}, {shape}: {work['rows']} rows of {work['shortest']} to {work['longest']} tokens, "
            f"{work['real_tokens']} real ({work['padded_tokens']} padded), asked at {work['asked']}",
            f"  {'contender':<22} {'precision':<9} {'median ms':>10} {'quartiles':>17} {'tokens/s':>9} {'ours/its':>8} "
            f"{'of matmul':>9} {'differs':>8} {'peak MiB':>9}",
        ]
        for row in rows:
            out.append(_line(row))
    lost = slower(report.rows)
    if lost:
        out += ["", "Slower than a peer of the same or a higher precision:"]
        for ours, peer in lost:
            assert ours.median is not None
            assert peer.median is not None
            out.append(
                f"  {peer.task}, {peer.shape}: {ours.contender} {ours.precision} takes {ours.median / peer.median:.2f} "
                f"of {peer.contender} {peer.precision}"
            )
    return "\n".join([*out, "", EXPLANATION])


def _line(row: Row) -> str:
    start = f"  {row.contender:<22} {row.precision:<9} "
    if row.median is None or row.quartiles is None or row.tokens_per_second is None:
        return f"{start}{row.status}: {row.reason}"
    spread = f"{1e3 * row.quartiles[0]:.1f}–{1e3 * row.quartiles[1]:.1f}"
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
    share = "–" if row.share_of_matmul is None else f"{row.share_of_matmul:.0%}"
    memory = "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}"
    line = (
        f"{start}{1e3 * row.median:>10.1f} {spread:>17} {row.tokens_per_second:>9.0f} {ratio:>8} {share:>9} "
        f"{row.difference:>8.0e} {memory:>9}"
    )
    return line + (f"  {row.reason}" if row.reason else "")


EXPLANATION = """\
What this says. All contenders read one folder of weights and get the same padded ids and mask; packing is part of
minibert's time. First each one's logits at the asked real positions must agree with minibert's in float32: "differs" is
the largest difference over the largest logit, at most 1e-4 in float32 and 5e-2 in bfloat16; int8 has no gate. Who fails
is refused, not timed. Then all are timed in turn, A B C, A B C, so that whatever else the machine does hits all alike;
first calls, which compile and allocate, do not count, and a call under 0.3 s is preceded by one that is not timed.
The median is printed because one disturbed round does not move it; the quartiles show how much the rounds differ.
tokens/s counts real tokens: padding earns nothing. Dense shapes ask for logits everywhere, the others (and training) at
15 % of the tokens, where the peers' own forward computes them everywhere all the same.
ours/its is our median over that row's, below 1 where ours is faster: minibert prepared (in training: minibert) in the
same precision, and in bfloat16 beside int8. "of matmul" is the arithmetic that was asked for (products only, no
padding), a second, over this machine's measured matmul rate in that precision. Training is forward, loss at the asked
positions, backward and AdamW, on float32 weights, in bfloat16 under autocast, with the dropout of the configuration;
ONNX Runtime and OpenVINO do not train here. peak MiB (--memory) is the whole process's resident memory on the CPU,
torch's allocations on CUDA, up to that workload. Every contender has the number of threads printed above. The
command lets glibc keep freed memory, for all of them alike, unless MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ is
set; in a process of your own, 1073741824 and 2147483647 in these variables do the same."""
