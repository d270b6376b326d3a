"""What each precision costs in answers: minibert in float32, bfloat16 and int8, and its peers in int8, on one model's
masked tokens. Run by hand:

    python tests/measure/quality.py TEXT... --lines 300

A TEXT is what `minibert train` takes. Of each, the first --lines held-out lines are taken, one line a row, masked by
BERT's recipe. All contenders see the same rows, a few at a time: for a peer that has one step for a whole tensor, what
stands beside a line matters. OpenVINO is calibrated on other lines of the same texts.
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minibert.bench import contenders
from minibert.bench.contenders import Absent, Contender
from minibert.bench.workloads import Workload
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.masking import example_generator
from minibert.tokenizer import load_tokenizer
from minibert.training.data import Example, masked_rows
from minibert.training.step import masked_lines
from minibert.training.tokens import TokenFile, token_files

LINEUP = (
    *(("minibert prepared", precision) for precision in ("float32", "bfloat16", "int8")),
    ("onnxruntime-int8", "int8"),
    ("openvino-int8", "int8"),
)
ROWS = 8  # at a time: the peers compute logits everywhere
CALIBRATION = 300  # lines, about: nncf's own default


def as_workload(example: Example) -> Workload:
    """The rows as the contenders take them."""
    batch, positions = example.batch, example.positions
    asked = torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, positions, True)
    labels = torch.full((batch.num_tokens,), IGNORE).index_copy(0, positions, example.targets)
    ids, mask, asked, labels = (
        batch.unpack(x) for x in (batch.input_ids, torch.ones_like(batch.input_ids), asked, labels)
    )
    return Workload("held-out lines", ids, mask, asked, labels, batch.lengths, everywhere=False)


def held_out(files: Sequence[TokenFile], tokenizer: Tokenizer, lines: int, max_length: int) -> list[Workload]:
    """The first held-out lines of each file, a few at a time."""
    works = []
    for file in files:
        numbers = range(min(lines, len(file.held_out)))
        for at in range(0, len(numbers), ROWS):
            example = masked_lines(file, numbers[at : at + ROWS], tokenizer, max_length=max_length)
            if len(example.positions):
                works.append(as_workload(example))
    return works


def calibration(files: Sequence[TokenFile], tokenizer: Tokenizer, max_length: int) -> list[Workload]:
    """As many lines of each file that are not held out, masked in the same way. One at a time: the range of what is
    seen beside padding would be that of the mask.
    """
    works = []
    for file in files:
        for number in range(min(-(-CALIBRATION // len(files)), len(file))):
            row = file.line(number)[: max_length - 2]
            works.append(as_workload(masked_rows([row], [example_generator(0, 1, number)], tokenizer)))
    return works


def build(name: str, precision: str, folder: Path, calibrating: Sequence[Workload]) -> Contender | Absent:
    try:
        if name == "openvino-int8":
            contenders.quantise_for_openvino(folder, [(work.input_ids, work.attention_mask) for work in calibrating])
        return contenders.build(name, precision, "inference", folder, "cpu")
    except Absent as reason:
        return reason


@torch.inference_mode()
def measure(contender: Contender, works: Sequence[Workload]) -> Tensor:
    """(2, M) float64: the loss of each masked token in nats, and 1 where the guess is right."""
    found = []
    for work in works:
        logits, targets = contender.run(work).float(), work.labels[work.asked]
        logits = logits if logits.dim() == 2 else logits[work.asked]  # (M, V)
        found.append(
            torch.stack([F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).float()])
        )
    return torch.cat(found, dim=1).double()


def print_table(results: Sequence[tuple[str, Tensor | Absent]]) -> None:
    """The first is what the others are compared with. ±: the standard error of the difference over the tokens."""
    first = results[0][1]
    assert isinstance(first, Tensor)
    print(f"{'':<30} {'loss':>8} {'more than float32':>20} {'top-1':>8} {'points more':>16}")
    for name, result in results:
        if isinstance(result, Absent):
            print(f"{name:<30} absent: {result}")
            continue
        loss, right = result.mean(1).tolist()
        cells = [f"{name:<30} {loss:>8.4f}", f"{'':>20}", f"{right:>8.2%}", ""]
        if result is not first:
            difference = result - first
            more, points = difference.mean(1).tolist()
            error, points_error = (difference.std(1) / difference.shape[1] ** 0.5).tolist()
            cells[1] = f"{f'{more:+.4f} ± {error:.4f}':>20}"
            cells[3] = f"{f'{100 * points:+.2f} ± {100 * points_error:.2f}':>16}"
        print(" ".join(cells).rstrip())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--model", default="minibert-uncased")
    parser.add_argument("--lines", type=int, default=300, help="of each text")
    options = parser.parse_args(arguments)
    model, tokenizer = BertForMaskedLM.from_pretrained(options.model), load_tokenizer(options.model)
    max_length = min(128, model.config.max_position_embeddings)
    results: list[tuple[str, Tensor | Absent]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        files = token_files(options.texts, tokenizer, Path(scratch) / "tokens")
        works = held_out(files, tokenizer, options.lines, max_length)
        calibrating = calibration(files, tokenizer, max_length)
        model.save_pretrained(folder)
        for name, precision in LINEUP:
            built = build(name, precision, folder, calibrating)
            found = built if isinstance(built, Absent) else measure(built, works)
            results.append((f"{name.removesuffix(' prepared')} {precision}", found))
    asked, rows = sum(int(work.asked.sum()) for work in works), sum(len(work.lengths) for work in works)
    packages = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino", "nncf") if find_spec(name)]
    print(f"{options.model}: {rows} held-out lines, {asked} masked tokens; {', '.join(packages)}")
    print_table(results)


if __name__ == "__main__":  # tokenizing starts processes, and they import this file
    main()
