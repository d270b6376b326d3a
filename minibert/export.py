"""A model as a file that runs without this package: ONNX, or torch's own .pt2. Each file is tried before it is kept.

The program takes input_ids, attention_mask and token_type_ids, each (B, S) int64, and gives the logits (B, S, V), zeros
where the mask is 0. B may be any number and S any length that the model has positions for: it was recorded from the
padded call (masked_lm.py).
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from minibert import checks
from minibert.checkpoint import files
from minibert.masked_lm import BertForMaskedLM

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
FORMATS = (".onnx", ".pt2")
# Of the largest logit. The programs add the same numbers in other orders and with other kernels, as the parity tests of
# another attention do; a program whose lengths are constants is wrong by the logits' own size.
TOLERANCE = 1e-4
Program = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that was written and tried. difference: the largest difference of a logit from the model's, over the
    largest logit, in all of `shapes` (B, S), with padding on the right, on the left, and with holes.
    """

    path: Path
    difference: float
    shapes: tuple[tuple[int, ...], ...]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves and about packages that this model does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Logits(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, token_type_ids, return_dict=True).logits


def export(model: BertForMaskedLM, path: str | PathLike[str], *, device: torch.device | str = "cpu") -> Exported:
    """Write `model` as a program to `path`, which ends in .onnx or .pt2, and run the file on odd shapes, on `device`.
    The file itself is the CPU's: a program takes it elsewhere by torch.export.passes.move_to_device_pass, or by
    onnxruntime's providers.

    Raises ValueError for another ending, for a model that is not in float32 on the CPU, for a package or a device that
    is missing, and for a program that does not give what the model gives; OSError if the file cannot be written. In
    each case, what was at `path` before is still there.
    """
    target = Path(path)
    if target.suffix not in FORMATS:
        raise ValueError(f"{target}: the name must end in {' or '.join(FORMATS)}, which says what is written")
    files.writable_place(target)
    word = model.embeddings.word.weight
    if not word.is_cpu or word.dtype != torch.float32:
        raise ValueError(f"this model is {word.dtype} on {word.device}: load it in float32 on the CPU, and export that")
    for package in ("onnx", "onnxscript", "onnxruntime") if target.suffix == ".onnx" else ():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'{package} is not installed: pip install -c constraints.txt -e ".[export]"')
    place = checks.find_device(device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), files.whole_file(target) as temporary:
            write, load = (_write_onnx, _load_onnx) if target.suffix == ".onnx" else (_write_pt2, _load_pt2)
            with _quiet():
                write(_recorded(model), temporary)
            return _tried(model, load(temporary, place), target)
    finally:
        model.train(training)


def _recorded(model: BertForMaskedLM) -> torch.export.ExportedProgram:
    longest = model.config.max_position_embeddings
    ids = torch.zeros(2, min(8, longest), dtype=torch.int64)  # neither may be 1, which recorders take for a constant
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    both = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=longest)}
    return torch.export.export(_Logits(model), (), example, dynamic_shapes=dict.fromkeys(INPUTS, both), strict=False)


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    written = io.BytesIO()  # with a path, torch ends the whole process when the disk is full
    torch.export.save(program, written)
    path.write_bytes(written.getvalue())


def _load_pt2(path: Path, place: torch.device) -> Program:
    from torch.export.passes import move_to_device_pass  # takes long to import

    recorded = torch.export.load(path)
    program = (recorded if place.type == "cpu" else move_to_device_pass(recorded, place)).module()
    return lambda given: program(**{name: x.to(place) for name, x in given.items()}).cpu()


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["logits"])
    assert onnx is not None
    onnx.save(path)


def _load_onnx(path: Path, place: torch.device) -> Program:
    import onnxruntime

    provider, there = f"{place.type.upper()}ExecutionProvider", onnxruntime.get_available_providers()
    if provider not in there:
        raise ValueError(f"this onnxruntime cannot run on {place}: it has {', '.join(there)}. The CPU is everywhere")
    options = {} if place.index is None else {"device_id": place.index}
    session = onnxruntime.InferenceSession(str(path), providers=[(provider, options)])
    return lambda given: torch.from_numpy(session.run(None, {name: x.numpy() for name, x in given.items()})[0])


def _tried(model: BertForMaskedLM, program: Program, target: Path) -> Exported:
    largest = scale = 0.0
    batches = list(_odd_batches(model))
    for given in batches:
        expected = model(**given, return_dict=True).logits
        largest = max(largest, (program(given) - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
    if not largest <= TOLERANCE * scale:
        raise ValueError(
            f"{target}: the program differs from the model by {largest:.1e}, and the largest logit is {scale:.1e}: "
            f"torch {torch.__version__} recorded it wrongly, and it was not kept"
        )
    return Exported(target, largest / scale, tuple(tuple(given["input_ids"].shape) for given in batches))


def _odd_batches(model: BertForMaskedLM) -> Iterator[dict[str, Tensor]]:
    """Batches of other shapes than the recorded one, with every kind of padding."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    longest = min(config.max_position_embeddings, 67)
    for number, (rows, columns) in enumerate([(1, 1), (1, 67), (3, 5), (5, 3), (2, 67), (7, 11), (4, 2), (2, 8)]):
        shape = (rows, min(columns, longest))
        ids, types = (
            torch.randint(0, size, shape, generator=generator) for size in (config.vocab_size, config.type_vocab_size)
        )
        lengths, column = torch.randint(1, shape[1] + 1, (rows, 1), generator=generator), torch.arange(shape[1])
        masks = (column < lengths, column >= shape[1] - lengths, torch.rand(shape, generator=generator) < 0.7)
        mask = masks[number % 3].long()
        mask[:, 0] |= mask.sum(1) == 0  # a row without a token is warned of
        yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": types * mask}
