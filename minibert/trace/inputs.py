"""What a model was asked: the inputs of a trace, checked, and the padding in what follows from them."""

from typing import NamedTuple

import torch
from torch import Tensor

from minibert import checks
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.packing import PackedBatch
from minibert.trace.table import INPUTS, SHAPES

MASKED = -1e4  # A score below this belongs to a masked key. Which number stands there does not matter.


class Inputs(NamedTuple):
    """What a model was asked, each (B, S) int64. labels may be None: then there is no loss."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor | None

    def to(self, device: torch.device | str) -> "Inputs":
        return Inputs(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


def check_inputs(
    config: BertConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Inputs, PackedBatch]:
    """The inputs with nothing left out, and packed. Raises ValueError if a model of this size cannot run on them."""
    if input_ids.dim() == 2 and attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    batch = PackedBatch.from_padded(input_ids, attention_mask, token_type_ids)
    assert attention_mask is not None  # from_padded refuses input_ids of another dimension
    if batch.num_tokens == 0:
        raise ValueError(f"there is no token to trace: input_ids is {tuple(input_ids.shape)}, and no mask is 1")
    checks.require_embeddings(batch.largest, config)
    if bool(((input_ids < 0) | (input_ids > config.vocab_size - 1)).any()):
        raise ValueError(
            f"an id in the padding is not an id below {config.vocab_size}: transformers looks it up too, so give the "
            "padding an id that exists"
        )
    if labels is not None:
        _check_labels(config, input_ids, attention_mask, labels)
    return Inputs(input_ids.long(), attention_mask.long(), token_type_ids.long(), labels), batch


def _check_labels(config: BertConfig, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
    if labels.shape != input_ids.shape or labels.dtype != torch.int64:
        raise ValueError(f"labels must be {tuple(input_ids.shape)} int64, not {tuple(labels.shape)} {labels.dtype}")
    asked = labels != IGNORE
    if not bool(asked.any()):
        raise ValueError(f"all labels are {IGNORE}, so there is no mean to take. Leave labels out")
    if bool((asked & (attention_mask == 0)).any()):
        raise ValueError(f"there is a label where attention_mask is 0: make it {IGNORE}")
    outside = (asked & ((labels < 0) | (labels >= config.vocab_size))).nonzero()
    if len(outside):
        place = tuple(outside[0].tolist())
        raise ValueError(
            f"the label at {place} is {int(labels[place])}: neither {IGNORE} nor an id below {config.vocab_size}"
        )


def standard_inputs(config: BertConfig) -> dict[str, Tensor]:
    """Rows of random ids, always the same, with all that ports get wrong. In every row the length, the padding and the
    place where the second segment begins are different, so that one row's mask or types for all rows shows:

        row 0   padded on the right, a little       row 1   padded on the right       row 2   padded on the left

    There are labels at about a third of the tokens. 16 columns and 3 rows, or a few more: neither is a size of the
    model, so that a shape tells which axis is which.
    """
    generator = torch.Generator().manual_seed(0)
    heads, hidden = config.num_attention_heads, config.hidden_size
    sizes = {heads, hidden // heads, hidden, config.intermediate_size}
    longest = min(16, config.max_position_embeddings)
    lengths = (*range(longest, min(longest + 8, config.max_position_embeddings + 1)), *range(longest - 1, 3, -1))
    length = next((each for each in lengths if each not in sizes), longest)
    rows = next(each for each in range(3, 9) if each not in sizes | {length})
    shape = (rows, length)
    column = torch.arange(length)
    tokens = [max(1, length * part // 16) for part in (14, 9, 11, 16, 7, 12, 5, 10)[:rows]]
    mask = (column < torch.tensor(tokens)[:, None]).long()
    mask[2] = mask[2].flip(0)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.where((torch.rand(shape, generator=generator) < 0.3) & (mask == 1), ids, IGNORE)
    labels[0, 0] = ids[0, 0]  # at least one, whatever was drawn
    second = torch.tensor([[5], [3], [12], [8], [2], [10], [4], [7]][:rows]) * length // 16  # the second segment begins
    types = ((column >= second) * mask).clamp(max=config.type_vocab_size - 1)
    return dict(zip(INPUTS, (ids, mask, types, labels), strict=True))


def covered(inputs: Inputs, config: BertConfig) -> str:
    """What a batch can show, and what it cannot: positions, segments and lengths."""
    tokens = inputs.attention_mask.bool()
    last = int(tokens.any(0).nonzero().max())
    lengths, types = tokens.sum(1), inputs.token_type_ids[tokens].unique().tolist()
    said = (
        f"covered: positions 0 to {last} of {config.max_position_embeddings}, token types "
        f"{', '.join(map(str, types))} of {config.type_vocab_size}, rows of {int(lengths.min())} to "
        f"{int(lengths.max())} tokens"
    )
    if last + 1 < config.max_position_embeddings:
        said += f". A fault at positions from {last + 1} on would not show: trace a longer row too (--ids or --text)"
    return said


def hide_padding(row: str, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros wherever it belongs to padding. row: its name in TABLE. mask: (B, S) bool, of the same rows."""
    if row == "layers.N.scores":
        x = x.clamp(min=MASKED)
    shape = SHAPES.get(row, [])
    if "S" not in shape or x.dim() != len(shape) or bool(mask.all()):
        return x
    for axis, letter in enumerate(shape):
        if letter == "S":
            view = [mask.shape[0]] + [1] * (len(shape) - 1)
            view[axis] = mask.shape[1]
            x = x.masked_fill(~mask.view(view), 0)
    return x
