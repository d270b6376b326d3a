"""What a trace holds: a name, a shape and a meaning for every tensor of one pass through BERT.

`TABLE` lists them in the order in which BERT computes them. The letters of the shapes are those of model.py. All
tensors have the padded layout, (B, S, …). Where attention_mask is 0, a model may compute anything, so those places are
never compared; the traces that we write hold 0 there.
"""

import re
from dataclasses import replace
from functools import cache

import torch

from minibert.checkpoint.names import NAMES, hub_names
from minibert.checkpoint.reading import shapes_only
from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM

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
# The modules of the hub's BERT, "in" or "out", and the trace's name for their input or output. N is a layer's number.
THEIRS = (
    ("bert.embeddings.LayerNorm", "in", "embeddings.sum"),
    ("bert.embeddings.dropout", "out", "embeddings.norm"),
    ("bert.encoder.layer.N.attention.output.dense", "in", "layers.N.context"),
    ("bert.encoder.layer.N.attention.output.dropout", "out", "layers.N.attention_output"),
    ("bert.encoder.layer.N.attention.output.LayerNorm", "out", "layers.N.attention_norm"),
    ("bert.encoder.layer.N.intermediate.dense", "out", "layers.N.intermediate"),
    ("bert.encoder.layer.N.output.dense", "in", "layers.N.activation"),
    ("bert.encoder.layer.N.output.dropout", "out", "layers.N.feed_forward"),
    ("bert.encoder.layer.N.output.LayerNorm", "out", "layers.N.feed_forward_norm"),
    ("cls.predictions.transform.dense", "out", "head.dense"),
    ("cls.predictions.transform.LayerNorm", "in", "head.activation"),
    ("cls.predictions.transform.LayerNorm", "out", "head.norm"),
    ("cls.predictions", "out", "logits"),
)
INPUTS = tuple(name for name, _, _ in TABLE[:4])
SHAPES = {name: shape.split() for name, shape, _ in TABLE}
MEANINGS = {name: meaning for name, _, meaning in TABLE}
GRADIENT = "gradient."


def as_markdown() -> str:
    """TABLE as a table in markdown, for a README, with the hub's module that gives each tensor."""
    modules = {name: f"`{module}`" if side == "out" else f"into `{module}`" for module, side, name in THEIRS}
    # Dropout has no weights, and does nothing in evaluation: the module before it gives the same.
    modules["embeddings.norm"] = "`bert.embeddings.LayerNorm`"
    modules["layers.N.attention_output"] = "`bert.encoder.layer.N.attention.output.dense`"
    modules["layers.N.feed_forward"] = "`bert.encoder.layer.N.output.dense`"
    for part in ("query", "key", "value"):
        modules[f"layers.N.{part}"] = f"`bert.encoder.layer.N.attention.self.{part}`"
    modules["layers.N.scores"] = modules["layers.N.probabilities"] = "in `bert.encoder.layer.N.attention.self`"
    rows = [f"| `{name}` | {shape or '–'} | {meaning} | {modules.get(name, '–')} |" for name, shape, meaning in TABLE]
    return "\n".join(["| tensor | shape | what it is | in the hub's model |", "|---|---|---|---|", *rows])


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
    layer = [name for name, _, _ in TABLE if ".N." in name]
    names = []
    for name, _, _ in TABLE[:-1]:
        if name == layer[0]:
            for number in range(config.num_hidden_layers):
                names += [each.replace(".N.", f".{number}.") for each in layer]
        elif name not in layer:
            names.append(name)
    return names + [GRADIENT + name for name in reversed(parameter_names(config))]


def parameter_names(config: BertConfig) -> list[str]:
    """The parameters under their names in a checkpoint, from the embeddings to the head."""
    sections: dict[str, list[str]] = {"embeddings": [], "layers": [], "head": []}
    shapes = _parameter_shapes(config)
    for ours, hubs in NAMES:  # in order of execution, and each module's weight before its bias
        found = [f"{hub.replace('.N.', '.0.')}.{kind}" for kind in ("weight", "bias") for hub in hubs]
        sections[ours.split(".")[0]] += [name for name in found if name in shapes]
    layers = range(config.num_hidden_layers)
    names = [name.replace(".0.", f".{number}.") for number in layers for name in sections["layers"]]
    return sections["embeddings"] + names + sections["head"]


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
