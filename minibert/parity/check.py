"""One call for a test: does another model compute what ours does?"""

import torch
from torch import Tensor, nn

from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.model import BertForMaskedLM
from minibert.parity.diff import diff
from minibert.parity.trace import INPUTS, trace


def assert_parity(model: BertForMaskedLM, other: nn.Module, inputs: dict[str, Tensor] | None = None) -> None:
    """Forward, loss and gradients of `other` (transformers' BertForMaskedLM, or one of ours) against `model`, whose
    weights are the right ones. inputs: for `trace`, labels included (default: `standard_inputs`).

    Raises AssertionError with the report of `minibert diff` up to the first wrong tensor."""
    asked = standard_inputs(model.config) if inputs is None else inputs
    mine, theirs = trace(model, **asked, grad=True), trace(other, **asked, grad=True)
    mine.name, theirs.name = "model", "other"
    report = diff(mine, theirs, model)
    if not report.ok:
        raise AssertionError("\n".join(report.lines()))


def standard_inputs(config: BertConfig) -> dict[str, Tensor]:
    """Three rows of random ids, always the same, with all that ports get wrong: padding on the right and on the
    left, two segments, and labels at a few places."""
    generator = torch.Generator().manual_seed(0)
    length = min(16, config.max_position_embeddings)
    shape = (3, length)
    column = torch.arange(length)
    short = max(1, 2 * length // 3)
    mask = torch.stack([column < length, column < short, column >= length - short]).long()
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.where((torch.rand(shape, generator=generator) < 0.3) & (mask == 1), ids, IGNORE)
    labels[0, 0] = ids[0, 0]  # at least one, whatever was drawn
    types = (column >= length // 2).long().clamp(max=config.type_vocab_size - 1).expand(shape).contiguous()
    return dict(zip(INPUTS, (ids, mask, types, labels), strict=True))
