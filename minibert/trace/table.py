"""What a trace holds: a name, a shape and a meaning for every tensor of one pass through BERT.

`TABLE` lists them in the order in which BERT computes them. The letters of the shapes are those of model.py. All
tensors have the padded layout, (B, S, …). Where attention_mask is 0, a model may compute anything, so those places are
never compared; the traces that we write hold 0 there.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from minibert import checks
from minibert.checkpoint.names import NAMES, hub_names
from minibert.checkpoint.reading import shapes_only
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch

# Name, shape, and how the tensor follows from those above it. Dropout belongs to the tensor that it is applied to: a
# trace holds what the next step reads.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("input_ids", "B S", "the token ids"),
    ("attention_mask", "B S", "1 for a token, 0 for padding; all 1 if it is left out"),
    ("token_type_ids", "B S", "the segment of each token; all 0 if it is left out"),
    ("labels", "B S", "the id to predict, −100 where nothing is asked; needed for loss and gradients"),
    ("embeddings.sum", "B S D", "the word, token type and position embeddings added up, positions counted from 0"),
    ("embeddings.norm", "B S D", "the LayerNorm of embeddings.sum: what layer 0 reads"),
    ("layers.N.query", "B H S K", "the query projection of what the layer reads, split into heads"),
    ("layers.N.key", "B H S K", "the key projection of what the layer reads, split into heads"),
    ("layers.N.value", "B H S K", "the value projection of what the layer reads, split into heads"),
    ("layers.N.scores", "B H S S", "query · keyᵀ / √K, before the softmax; masked keys are not compared"),
    ("layers.N.probabilities", "B H S S", "the scores after the mask and the softmax over the keys"),
    ("layers.N.context", "B S D", "probabilities · value, the heads side by side again"),
    ("layers.N.attention_output", "B S D", "the output projection of the context, before the residual is added"),
    ("layers.N.attention_norm", "B S D", "the LayerNorm of attention_output + what the layer reads"),
    ("layers.N.intermediate", "B S F", "into the feed-forward: its first projection, before the activation"),
    ("layers.N.activation", "B S F", "the activation function (hidden_act) of intermediate"),
    ("layers.N.feed_forward", "B S D", "out of the feed-forward: its second projection, before the residual is added"),
    ("layers.N.feed_forward_norm", "B S D", "the LayerNorm of feed_forward + attention_norm: the layer's result"),
    ("head.dense", "B S D", "the head's projection of the last layer's result, before the activation"),
    ("head.activation", "B S D", "the activation function (hidden_act) of head.dense"),
    ("head.norm", "B S D", "the LayerNorm of head.activation"),
    ("logits", "B S V", "head.norm · word embeddingsᵀ + bias"),
    ("loss", "", "the mean cross-entropy over the labels that are not −100, in float32"),
    ("gradient.NAME", "", "the gradient of the loss by parameter NAME, with its name and shape in the checkpoint"),
)
INPUTS = tuple(name for name, _, _ in TABLE[:4])
SHAPES = {name: shape.split() for name, shape, _ in TABLE}
MEANINGS = {name: meaning for name, _, meaning in TABLE}
GRADIENT = "gradient."


def row_of(name: str) -> str:
    """The name under which TABLE has a tensor: "layers.3.scores" → "layers.N.scores"."""
    if name.startswith(GRADIENT):
        return "gradient.NAME"
    parts = name.split(".")
    return ".".join(["layers", "N", *parts[2:]]) if parts[0] == "layers" and len(parts) > 2 else name


def explain(name: str) -> str:
    """How a tensor follows from those before it, in words."""
    if name.startswith(GRADIENT):
        return f"the backward pass, from the head to the embeddings, as far as {name.removeprefix(GRADIENT)}"
    return MEANINGS[row_of(name)]


def expected_names(config: BertConfig) -> list[str]:
    """The names of all tensors of a trace: the inputs, then the forward pass, then the gradients from the head back
    to the embeddings.
    """
    names = _with_layers([name for name, _, _ in TABLE[:-1]], config)
    return names + [GRADIENT + name for name in reversed(parameter_names(config))]


def _with_layers(names: Iterable[str], config: BertConfig) -> list[str]:
    """The names, with those that have an N once for each layer."""
    result = []
    for of_a_layer, group in groupby(names, lambda name: ".N." in name):
        rows = list(group)
        for number in range(config.num_hidden_layers if of_a_layer else 1):
            result += [name.replace(".N.", f".{number}.") for name in rows]
    return result


def parameter_names(config: BertConfig) -> list[str]:
    """The parameters under their names in a checkpoint, from the embeddings to the head."""
    hubs = [f"{hub}.{kind}" for _, group in NAMES for kind in ("weight", "bias") for hub in group]
    shapes = _parameter_shapes(config)  # a LayerNorm has both, an embedding no bias, the head only that
    return _with_layers([name for name in hubs if name.replace(".N.", ".0.") in shapes], config)


def expected_shape(name: str, config: BertConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one of `expected_names`. shape: (B, S), of the inputs."""
    sizes = {
        **dict(zip("BS", shape, strict=True)),
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.head_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
    }
    if name.startswith(GRADIENT):
        return _parameter_shapes(config)[re.sub(r"\.\d+\.", ".0.", name.removeprefix(GRADIENT))]
    return tuple(sizes[letter] for letter in SHAPES[row_of(name)])


def shown(text: object) -> str:
    """A text from a file, with what is not printable escaped: a line feed could look like a verdict of ours."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def between(
    config: BertConfig, good: str, wrong: str, present: Iterable[str], where: str = "the trace"
) -> Iterator[str]:
    """What the first wrong tensor is, and what stands between it and the last good one but is not `present`: then the
    fault may be in any of these. where: from which trace they are absent, in words.
    """
    yield f"{wrong} is {explain(wrong)}"
    names = [name for name in expected_names(config) if name not in INPUTS]
    start = names.index(good) + 1 if good in names else 0
    absent = [name for name in names[start : names.index(wrong)] if name not in set(present)]
    if wrong.startswith(GRADIENT) or not absent:
        return
    listed = ", ".join(absent) if len(absent) <= 14 else f"from {absent[0]} to {absent[-1]}"
    yield f"between {good} and {wrong}, {count(len(absent))} are not in {where}: {listed}"
    # What all later tensors depend on divides the stretch; one of three parallel projections does not.
    passed = [name for name in absent if not name.endswith((".query", ".key", ".value", ".scores"))] or absent
    middle = names.index(absent[len(absent) // 2])
    following = min(passed, key=lambda name: abs(names.index(name) - middle))
    yield f"write {following} into {where} next: it halves the stretch in which the fault can be"


def count(tensors: int) -> str:
    return f"{tensors} tensor{'s' * (tensors != 1)}"


def exchanged_axes(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, int] | None:
    """The two axes whose exchange turns `shape` into `wanted`, or None if there is no such pair."""
    apart = [axis for axis, (one, two) in enumerate(zip(shape, wanted, strict=False)) if one != two]
    if len(shape) != len(wanted) or len(apart) != 2 or sorted(shape) != sorted(wanted):
        return None
    return apart[0], apart[1]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 → "float32"."""
    return str(dtype).removeprefix("torch.")


@cache
def _parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shapes in a model of one layer, by the names in a checkpoint. All layers are alike."""
    with shapes_only():
        model = BertForMaskedLM(replace(config, num_hidden_layers=1))
    shapes = {}
    for name, parameter in model.state_dict().items():
        hubs = hub_names(name)
        shapes.update({hub: tuple(part.shape) for hub, part in zip(hubs, parameter.chunk(len(hubs)), strict=True)})
    return shapes


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
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    if attention_mask is None and input_ids.dim() == 2:
        attention_mask = torch.ones_like(input_ids)
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
        checks.require_labels(labels, attention_mask, input_ids)
        asked = labels != IGNORE
        if not bool(asked.any()):
            raise ValueError(f"all labels are {IGNORE}, so there is no mean to take. Leave labels out")
        for place in (asked & ((labels < 0) | (labels >= config.vocab_size))).nonzero().tolist():
            raise ValueError(
                f"the label at {tuple(place)} is {int(labels[tuple(place)])}: neither {IGNORE} nor an id below "
                f"{config.vocab_size}"
            )
    return Inputs(input_ids.long(), attention_mask.long(), token_type_ids.long(), labels), batch


def standard_inputs(config: BertConfig) -> dict[str, Tensor]:
    """Rows of random ids, always the same, with all that ports get wrong. In every row the length, the padding and the
    place where the second segment begins are different, so that one row's mask or types for all rows shows:

        row 0   padded on the right, a little       row 1   padded on the right       row 2   padded on the left

    There are labels at about a third of the tokens. 16 columns and 3 rows, or a few more: neither is a size of the
    model, so that a shape tells which axis is which.
    """
    generator = torch.Generator().manual_seed(0)
    most = config.max_position_embeddings
    heads, hidden = config.num_attention_heads, config.hidden_size
    sizes = {heads, hidden // heads, hidden, config.intermediate_size}
    longest = min(16, most)
    lengths = (*range(longest, min(longest + 8, most + 1)), *range(longest - 1, 3, -1))
    length = next((each for each in lengths if each not in sizes), longest)
    rows = next(each for each in range(3, 9) if each not in sizes | {length})
    shape, column = (rows, length), torch.arange(length)
    tokens = torch.tensor([14, 9, 11, 16, 7, 12, 5, 10][:rows]) * length // 16
    mask = (column < tokens.clamp(min=1)[:, None]).long()
    mask[2] = mask[2].flip(0)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.where((torch.rand(shape, generator=generator) < 0.3) & (mask == 1), ids, IGNORE)
    labels[0, 0] = ids[0, 0]  # at least one, whatever was drawn
    second = torch.tensor([5, 3, 12, 8, 2, 10, 4, 7][:rows]) * length // 16  # where the second segment begins
    types = ((column >= second[:, None]) * mask).clamp(max=config.type_vocab_size - 1)
    return dict(zip(INPUTS, (ids, mask, types, labels), strict=True))


def covered(inputs: Inputs, config: BertConfig) -> str:
    """What a batch can show, and what it cannot: positions, segments and lengths."""
    tokens, most = inputs.attention_mask.bool(), config.max_position_embeddings
    last, lengths = int(tokens.any(0).nonzero().max()), tokens.sum(1)
    types = ", ".join(map(str, inputs.token_type_ids[tokens].unique().tolist()))
    said = (
        f"covered: positions 0 to {last} of {most}, token types {types} of {config.type_vocab_size}, rows of "
        f"{int(lengths.min())} to {int(lengths.max())} tokens"
    )
    if last + 1 < most:
        said += f". A fault at positions from {last + 1} on would not show: trace a longer row too (--ids or --text)"
    return said


def hide_padding(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """A tensor with zeros wherever it belongs to padding. mask: (B, S) bool, of the same rows."""
    row = row_of(name)
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
