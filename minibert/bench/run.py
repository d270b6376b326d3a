"""The measurement: parity gate, interleaved rounds, and memory."""

import gc
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep

import torch
from torch import Tensor
from tqdm import tqdm

from minibert.bench.contenders import Absent, Contender, build, lineup, load_library, random_model
from minibert.bench.report import (
    BenchReport,
    Row,
    describe_machine,
    matmul_rate,
    peak_resident,
    seconds,
    synchronize,
)
from minibert.bench.settings import BenchSettings
from minibert.bench.workloads import SHAPES, TRAINING_SHAPES, Workload, make_workload
from minibert.checks import find_device
from minibert.config import BertConfig
from minibert.inference import prepare_for_inference
from minibert.masked_lm import BertForMaskedLM
from minibert.training.processes import keep_freed_memory

# The largest difference of a logit from minibert's in float32, over the largest logit. float32: the same sums in
# another order; bfloat16: some tens of roundings of 2^-8. int8 is reported and has no gate.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": None}
SHORT = 0.3  # seconds: a call that is shorter is preceded by one that is not timed, in every round
SETTLE = 0.01  # seconds between two contenders, in which the threads of the last one go to sleep


def run(settings: BenchSettings) -> BenchReport:
    """Measure. Raises ValueError or OSError for a model or a shape that cannot be had."""
    settings = replace(settings, device=str(find_device(settings.device)))
    if settings.model is None:
        model = random_model(settings.layers)
    else:
        model = BertForMaskedLM.from_pretrained(settings.model, revision=settings.revision)
    config, plans = model.config, {}
    for task in settings.tasks:
        shapes = settings.shapes or (SHAPES if task == "inference" else TRAINING_SHAPES)
        plans[task] = [make_workload(name, config, settings.device, everywhere=task == "inference") for name in shapes]
    matmul = {precision: matmul_rate(precision, settings.device) for precision in settings.precisions}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="minibert-bench-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        reference = model.to(settings.device).eval()
        for precision in settings.precisions if settings.compile_layers else ():
            prepare_for_inference(reference, getattr(torch, precision), linear="compiled")  # "auto" takes it then
        for task, works in plans.items():
            rows += _run_task(task, works, reference, folder, settings)
            gc.collect()
        if settings.memory:
            measure_memory(rows, folder, settings)
    machine, described = describe_machine(settings.device), {}
    for task, work in ((task, work) for task, works in plans.items() for work in works):
        flops = work.flops(config) * (3 if task == "training" else 1)  # backward: two products for each one
        for row in rows:
            if (row.task, row.shape) == (task, work.name) and row.median and (rate := matmul[row.precision]):
                row.share_of_matmul = flops / row.median / rate
        described[f"{task} {work.name}"] = {
            "rows": len(work.lengths),
            "shortest": min(work.lengths),
            "longest": max(work.lengths),
            "real_tokens": work.tokens,
            "padded_tokens": work.input_ids.numel(),
            "asked": int(work.asked.sum()),
        }
    return BenchReport(machine, settings, matmul, described, rows)


def _run_task(
    task: str, works: Sequence[Workload], reference: BertForMaskedLM, folder: Path, settings: BenchSettings
) -> list[Row]:
    expected = {work.name: _expected(reference, work) for work in works}  # before any training step
    rows, running = [], []
    for name, precision in lineup(task, settings.peers, settings.precisions):
        mine = [Row(task, work.name, name, name, precision, tokens=work.tokens) for work in works]
        rows += mine
        try:
            load_library(name)
            began = perf_counter()
            contender = build(name, precision, task, folder, settings.device)
        except Exception as error:
            for row in mine:
                _fail(row, error)
            continue
        loading = perf_counter() - began
        for row, work in zip(mine, works, strict=True):
            began = perf_counter()
            row.contender = contender.name
            _gate(row, contender, work, expected[work.name])
            row.first_answer = loading + perf_counter() - began
            running.append((row, contender))
    for work in tqdm(works, desc=task, unit=" shapes", disable=None):  # None: only who waits at a terminal sees it
        _time([(row, one) for row, one in running if row.shape == work.name], work, settings)
        _ratios([row for row in rows if row.shape == work.name])
    return rows


def _fail(row: Row, error: Exception) -> None:
    """A peer that breaks is a row of the table and not the end of it; of ours, only what cannot be had here."""
    if isinstance(error, Absent):
        row.status, row.reason = "absent", str(error)
    elif row.key.startswith("minibert"):
        raise error
    else:
        row.status, row.reason = "failed", f"{type(error).__name__}: {error}".split("\n")[0][:160]


@torch.inference_mode()
def _expected(reference: BertForMaskedLM, work: Workload) -> Tensor:
    return reference(work.input_ids, work.attention_mask).logits[work.asked].float()  # (M, V)


def _gate(row: Row, contender: Contender, work: Workload, expected: Tensor) -> None:
    """Refuse a contender whose logits, where they are asked, are not ours."""
    try:
        logits = contender.check(work)
    except Exception as error:
        _fail(row, error)
        return
    logits = (logits[work.asked] if logits.dim() == 3 else logits).float()  # (M, V)
    row.difference = float((logits - expected).abs().max() / expected.abs().max())
    row.tolerance = TOLERANCE.get(contender.precision)
    if row.tolerance is not None and not row.difference <= row.tolerance:  # NaN is refused too
        row.status = "refused"
        row.reason = f"its logits differ by {row.difference:.1e} of the largest, more than {row.tolerance:.0e}"


def _time(running: list[tuple[Row, Contender]], work: Workload, settings: BenchSettings) -> None:
    """A B C, A B C, …: what else the machine does hits all alike. The first calls, which compile and allocate, do not
    count."""
    calls = []
    for row, contender in running:
        if row.status == "timed":
            call = partial(contender.run, work)
            try:
                usual = [seconds(call, settings.device) for _ in range(2)]
                calls.append((row, contender, call, usual[1] < SHORT))
            except Exception as error:
                _fail(row, error)
    for _ in range(settings.rounds):
        for row, _, call, short in calls:
            sleep(SETTLE)
            if short:
                seconds(call, settings.device)
            row.seconds.append(seconds(call, settings.device))
    for row, contender, _, _ in calls:
        row.median = median(row.seconds)
        low, _, high = quantiles(row.seconds, method="inclusive") if len(row.seconds) > 1 else [row.median] * 3
        row.quartiles = (low, high)
        row.tokens_per_second = row.tokens / row.median
        row.reason = contender.note


def _ratios(rows: list[Row]) -> None:
    """Each row beside our fast form in its own precision; int8, if none of ours ran, beside our bfloat16 or float32."""
    ours = {row.precision: row for row in rows if row.contender in ("minibert prepared", "minibert") and row.median}
    for row in rows:
        mine = ours.get(row.precision) or (row.precision == "int8" and (ours.get("bfloat16") or ours.get("float32")))
        if mine and row.median and mine.median:
            row.against, row.ratio = f"{mine.contender} {mine.precision}", mine.median / row.median


# --------------------------------------------------------------------------------------------------------------- memory


def measure_memory(rows: list[Row], folder: Path, settings: BenchSettings) -> None:
    """Peak memory of each contender, in a process of its own. Raises OSError if that fails."""
    for task, name, precision in dict.fromkeys((row.task, row.key, row.precision) for row in rows if row.median):
        mine = [row for row in rows if (row.task, row.key, row.precision) == (task, name, precision) and row.median]
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            try:
                shapes = [row.shape for row in mine]
                peaks = alone.submit(peaks_of, name, precision, task, folder, settings.device, shapes).result()
            except Exception as error:
                raise OSError(f"measuring the memory of {name} {precision} failed: {error}") from error
        for row in mine:
            row.peak_memory_bytes = peaks[row.shape]


def peaks_of(name: str, precision: str, task: str, folder: Path, device: str, shapes: Sequence[str]) -> dict[str, int]:
    """Bytes by shape, the smaller ones first: the peak up to each. On the CPU the resident memory of the whole process,
    Python and libraries included; on CUDA what torch allocated.
    """
    keep_freed_memory()  # as the command that started this process does
    config = BertConfig.from_json_file(folder / "config.json")
    works = [make_workload(shape, config, device, everywhere=task == "inference") for shape in shapes]
    contender = build(name, precision, task, folder, device)
    peaks = {}
    for work in sorted(works, key=lambda work: work.input_ids.numel()):
        contender.run(work)
        synchronize(device)
        peaks[work.name] = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_resident()
    return peaks
