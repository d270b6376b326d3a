"""The measurement: parity gate, and interleaved rounds."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep

import torch
from torch import Tensor

from minibert.bench.contenders import build, lineup, random_model
from minibert.bench.machine import describe_machine, matmul_rate, measure_memory, peak_rate, synchronize
from minibert.bench.report import Report, Row, progress
from minibert.bench.settings import Settings
from minibert.bench.workloads import SHAPES, Absent, Contender, Workload, make_workload
from minibert.devices import computing_device
from minibert.masked_lm import BertForMaskedLM

TRAINING_SHAPES = ("8x128", "mixed")
# The largest difference of a logit from minibert's in float32, over the largest logit. float32: the same sums in
# another order; bfloat16: some tens of roundings of 2^-8. int8 is reported and has no gate.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": None}
SHORT = 0.3  # seconds: a call that is shorter is preceded by one that is not timed, in every round
SETTLE = 0.01  # seconds between two contenders, in which the threads of the last one go to sleep


def run(settings: Settings) -> Report:
    """Measure. Raises ValueError or OSError for a model or a shape that cannot be had."""
    settings = replace(settings, device=str(computing_device(settings.device)))
    if settings.model is None:
        model = random_model(settings.layers)
    else:
        model = BertForMaskedLM.from_pretrained(settings.model, revision=settings.revision)
    config = model.config
    plans = []
    for task in settings.tasks:
        shapes = settings.shapes or (SHAPES if task == "inference" else TRAINING_SHAPES)
        works = [make_workload(name, config, settings.device, everywhere=task == "inference") for name in shapes]
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
            measure_memory(rows, folder, settings)
    machine = describe_machine(settings.device)
    for row in rows:
        rate, peak = matmul.get(row.precision), peak_rate(machine.get("gpu", ""), row.precision)
        if row.median and rate:
            work = next(w for task, works in plans if task == row.task for w in works if w.name == row.shape)
            flops = work.flops(config) * (3 if row.task == "training" else 1)  # backward: two products for each one
            row.share_of_matmul = flops / row.median / rate
            row.share_of_peak = peak and flops / row.median / peak
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
    return Report(machine, settings, matmul, described, rows)


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
        progress(f"{task} {work.name}: done")
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
    synchronize(device)
    began = perf_counter()
    contender.run(work)
    synchronize(device)
    return perf_counter() - began


def _ratios(rows: list[Row]) -> None:
    """Each row beside our fast form in its own precision; int8, if none of ours ran, beside our bfloat16 or float32."""
    ours = {row.precision: row for row in rows if row.contender in ("minibert prepared", "minibert") and row.median}
    for row in rows:
        mine = ours.get(row.precision) or (row.precision == "int8" and (ours.get("bfloat16") or ours.get("float32")))
        if mine and row.median and mine.median:
            row.against, row.ratio = f"{mine.contender} {mine.precision}", mine.median / row.median


def _one_line(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".split("\n")
    return lines[0][:160]
