"""What was measured, as rows, as JSON, and as a table that explains itself."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from minibert.bench.settings import Settings

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
    seconds: list[float] = field(default_factory=list)  # one for each round
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    share_of_matmul: float | None = None  # its rate of arithmetic over the machine's
    share_of_peak: float | None = None  # over what the maker of the card promises
    peak_memory_bytes: int | None = None
    against: str = ""  # which of our rows it is compared with
    ratio: float | None = None  # that row's median over this one


@dataclass
class Report:
    """Everything that was measured. matmul: FLOP/s of this machine in each precision, in int8 operations a second; 0
    where it has no such products.
    """

    machine: dict[str, str]
    settings: Settings
    matmul: dict[str, float]
    workloads: dict[str, dict[str, int]]
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def progress(text: str) -> None:
    """Tell who waits at a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def slower(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(ours, peer) wherever a row of ours loses to a peer of the same or a higher precision. Each of our precisions
    counts by itself: that int8 is fast does not help who wants float32.
    """
    timed = [row for row in rows if row.median is not None]
    return [
        (ours, peer)
        for peer in timed
        if not peer.contender.startswith("minibert")
        for ours in timed
        if (ours.task, ours.shape) == (peer.task, peer.shape)
        and ours.contender in ("minibert prepared", "minibert")
        and ORDER.index(ours.precision) <= ORDER.index(peer.precision)
        and (ours.median or 0.0) > (peer.median or 0.0)
    ]


def table(report: Report) -> str:
    """The report for people."""
    out = [" · ".join(f"{name} {value}" for name, value in report.machine.items())]
    rates = [f"{rate / 1e9:.0f} G{'' if p == 'int8' else 'FL'}OP/s in {p}" for p, rate in report.matmul.items() if rate]
    out.append(f"matmul: {', '.join(rates) or 'no such products here'} (its best, measured now)")
    if report.settings.device == "cpu" and float(report.machine.get("load", 0)) > 1.5 * (os.cpu_count() or 1):
        out.append(f"WARNING: load {report.machine['load']}: other programs run on this machine, the times mean little")
    for heading, work in report.workloads.items():
        task, shape = heading.split()
        rows = [row for row in report.rows if (row.task, row.shape) == (task, shape)]
        if task == "training" and "int8" in report.settings.precisions:
            out += ["", f"{task}, {shape}: nothing is trained in int8"]
        if not rows:
            continue
        out += [
            "",
            f"{task}, {shape}: {work['rows']} rows of {work['shortest']} to {work['longest']} tokens, "
            f"{work['real_tokens']} real ({work['padded_tokens']} padded), asked at {work['asked']}",
            f"  {'contender':<22} {'precision':<9} {'median ms':>10} {'quartiles':>17} {'tokens/s':>9} {'ours/its':>8} "
            f"{'of matmul':>9} {'of peak':>8} {'differs':>8} {'peak MiB':>9}",
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
    peak = "–" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
    memory = "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}"
    line = (
        f"{start}{1e3 * row.median:>10.1f} {spread:>17} {row.tokens_per_second:>9.0f} {ratio:>8} {share:>9} "
        f"{peak:>8} {row.difference:>8.0e} {memory:>9}"
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
15 % of the tokens. There the peers' own forward computes them everywhere all the same; sdpa-asked calls the head of
transformers by hand, at the asked positions only.
ours/its is our median over that row's, below 1 where ours is faster: minibert prepared (in training: minibert) in the
same precision; beside int8, where there is no int8 of ours, in bfloat16, or else in float32. "of matmul" is the
arithmetic that was asked for (products only, no padding), a second, over this machine's measured matmul rate in that
precision; "of peak" is over what the maker of the card promises, where the card is known. int8 stands for products of
8-bit numbers; attention, norms and sums are in a higher precision, and each contender rounds in its own way. Training
is forward, loss at the asked positions, backward and AdamW, on float32 weights, in bfloat16 under autocast, with the
dropout of the configuration; int8 is for inference, and ONNX Runtime and OpenVINO do not train here. peak MiB
(--memory) is the whole process's resident memory on the CPU, torch's allocations on CUDA, up to that workload, with
loading and preparing the model. Every contender has the number of threads printed above. The command lets glibc keep
freed memory, for all of them alike, unless MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ is set; in a process of
your own, 1073741824 and 2147483647 in these variables do the same."""
