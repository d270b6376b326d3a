"""Traces: every named intermediate of one pass through BERT, in memory and as files. record.py makes them from models.

A trace is a safetensors file that a port in any language can write. TABLE says which tensors it holds. They are
in the padded layout, (B, S, …). Where attention_mask is 0 a model may compute anything, so nobody compares
those places; the traces written here hold 0 there. Only `input_ids` has to be in a file: what else is missing
is said, and the rest is compared.

The file's metadata are strings: `format` and `version` (below), `config` (config.json's keys, as JSON), `dtype`
(of the weights: float32, …), and, to be read by people, `backend`, `device`, `torch` and `settings`."""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibert import checks
from minibert.checkpoint import DTYPES, read_header, shapes_only
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.names import NAMES, hub_names
from minibert.packing import PackedBatch

FORMAT, VERSION = "minibert-trace", "1"

# Name, shape (the letters of model.py), meaning: how it comes from what stands above it. In order of execution.
# Dropout belongs to the tensor it is applied to: a trace holds what the next step reads.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("input_ids", "B S", "the token ids"),
    ("attention_mask", "B S", "1 for a token, 0 for padding; all 1 if it is left out"),
    ("token_type_ids", "B S", "the segment of each token; all 0 if it is left out"),
    ("labels", "B S", "the id to predict, −100 where nothing is asked; needed for loss and gradients"),
    ("embeddings.sum", "B S D", "word + token type + position, the position counted from 0"),
    ("embeddings.norm", "B S D", "the LayerNorm of that sum: what layer 0 reads"),
    ("layers.N.query", "B H S K", "the query projection of what the layer reads, split into heads"),
    ("layers.N.key", "B H S K", "the key projection, split into heads"),
    ("layers.N.value", "B H S K", "the value projection, split into heads"),
    ("layers.N.scores", "B H S S", "query · keyᵀ / √K, before the softmax; masked keys are not compared"),
    ("layers.N.probabilities", "B H S S", "the mask and the softmax over the keys"),
    ("layers.N.context", "B S D", "probabilities · value, the heads side by side again"),
    ("layers.N.attention_output", "B S D", "the output projection of the context, before the residual is added"),
    ("layers.N.attention_norm", "B S D", "the LayerNorm of attention_output + what the layer reads"),
    ("layers.N.intermediate", "B S F", "into the feed-forward: its first projection, before the activation"),
    ("layers.N.activation", "B S F", "the activation function (hidden_act) of that"),
    ("layers.N.feed_forward", "B S D", "out of the feed-forward: its second projection, before the residual is added"),
    (
        "layers.N.feed_forward_norm",
        "B S D",
        "the LayerNorm of feed_forward + attention_norm: what the next layer reads",
    ),
    ("head.dense", "B S D", "the head's projection, before the activation"),
    ("head.activation", "B S D", "the activation function of that"),
    ("head.norm", "B S D", "the LayerNorm of that"),
    ("logits", "B S V", "head.norm · word embeddingsᵀ + bias"),
    ("loss", "", "the mean cross-entropy over the labels that are not −100, in float32"),
    (
        "gradient.NAME",
        "",
        "the gradient of the loss by parameter NAME, name and shape as in the checkpoint; from head to embeddings",
    ),
)
MASKED = -1e4  # a score below this is masked, whatever number was used for it: compared as this one
INPUTS = tuple(name for name, _, _ in TABLE[:4])
# A file may claim anything. What is read stays within these, which BERT-large on 32 rows of 512 tokens does.
MOST_HEADER, MOST_LAYERS, MOST_NUMBERS, MOST_IN_A_ROW = 2**24, 1000, 2**30, 2**26
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
    """How a tensor comes from those before it, in words."""
    if name.startswith(GRADIENT):
        return f"the backward pass, from the head to the embeddings, as far as {name.removeprefix(GRADIENT)}"
    return MEANINGS[row_of(name)]


def expected_names(config: BertConfig) -> list[str]:
    """The names of all tensors of a trace, inputs first, then in order of execution."""
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
    rooms: dict[str, list[str]] = {"embeddings": [], "layers": [], "head": []}
    shapes = _parameter_shapes(config)
    for ours, hubs in NAMES:  # in order of execution, and each module's weight before its bias
        found = [f"{hub.replace('.N.', '.0.')}.{kind}" for kind in ("weight", "bias") for hub in hubs]
        rooms[ours.split(".")[0]] += [name for name in found if name in shapes]
    layers = range(config.num_hidden_layers)
    names = [name.replace(".0.", f".{number}.") for number in layers for name in rooms["layers"]]
    return rooms["embeddings"] + names + rooms["head"]


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
    """The two axes that make `wanted` of `shape` when they are exchanged."""
    apart = [axis for axis, (one, two) in enumerate(zip(shape, wanted, strict=False)) if one != two]
    if len(shape) != len(wanted) or len(apart) != 2 or sorted(shape) != sorted(wanted):
        return None
    return apart[0], apart[1]


@cache
def _parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Of a model of one layer, by the names in a checkpoint. All layers are alike."""
    with shapes_only():
        model = BertForMaskedLM(replace(config, num_hidden_layers=1))
    shapes = {}
    for name, parameter in model.named_parameters():
        hubs = hub_names(name)
        shapes.update({hub: tuple(part.shape) for hub, part in zip(hubs, parameter.chunk(len(hubs)), strict=True)})
    return shapes


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
    """The inputs with nothing left out, and packed. Raises ValueError unless a model of this size can run on them."""
    if input_ids.dim() == 2 and attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    batch = PackedBatch.from_padded(input_ids, attention_mask, token_type_ids)
    assert attention_mask is not None  # from_padded refuses input_ids of another dimension
    if batch.num_tokens == 0:
        raise ValueError(f"there is no token to trace: input_ids is {tuple(input_ids.shape)}, and no mask is 1")
    checks.require_embeddings(batch.largest, config)
    inside = input_ids.new_zeros(1), input_ids.new_full((1,), config.vocab_size - 1)
    if bool(((input_ids < inside[0]) | (input_ids > inside[1])).any()):
        raise ValueError(f"an id in the padding is not an id below {config.vocab_size}: transformers looks it up too")
    if labels is not None:
        if labels.shape != input_ids.shape or labels.dtype != torch.int64:
            raise ValueError(f"labels must be {tuple(input_ids.shape)} int64, not {tuple(labels.shape)} {labels.dtype}")
        asked = labels != IGNORE
        if not bool(asked.any()):
            raise ValueError(f"all labels are {IGNORE}: a mean over no position is no number. Leave labels out")
        if bool((asked & (attention_mask == 0)).any()):
            raise ValueError(f"a label stands where attention_mask is 0: make it {IGNORE}")
        outside = (asked & ((labels < 0) | (labels >= config.vocab_size))).nonzero()
        if len(outside):
            place = tuple(outside[0].tolist())
            raise ValueError(
                f"the label at {place} is {int(labels[place])}: neither {IGNORE} nor an id below {config.vocab_size}"
            )
    return Inputs(input_ids.long(), attention_mask.long(), token_type_ids.long(), labels), batch


def hide_padding(row: str, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros wherever it belongs to padding. mask: (B, S) bool, of the same rows."""
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


# --------------------------------------------------------------------------------------------------- a trace, in memory


@dataclass
class Trace:
    """A trace in memory: tensors by name, and the file's metadata."""

    tensors: dict[str, Tensor]
    config: BertConfig
    metadata: dict[str, str]
    name: str = "the trace"

    @property
    def dtype(self) -> torch.dtype:
        return next(dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{self.metadata['dtype']}")

    @property
    def names(self) -> list[str]:
        """In order of execution; names that TABLE does not have come last."""
        known = expected_names(self.config)
        found = set(self.shapes())
        return [name for name in known if name in found] + sorted(found - set(known))

    @property
    def title(self) -> str:
        return f"{self.name} ({self.metadata.get('backend') or 'backend not said'}, {self.metadata['dtype']})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the first axis of a tensor, or the number itself if it has no axis."""
        return self.tensors[name][start:stop] if self.tensors[name].dim() else self.tensors[name]

    def inputs(self) -> tuple[Inputs, PackedBatch]:
        """What the model was asked. Raises ValueError, naming the trace, if no model could run on it."""
        if "input_ids" not in self.shapes():
            raise ValueError(f"{self.name}: there is no input_ids in it, so nobody can compute the same again")
        found = self.shapes()
        try:
            inputs = (self.read(name).long() if name in found else None for name in INPUTS)
            return check_inputs(self.config, *inputs)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as a safetensors file: the whole file or none. Raises OSError if it cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            save_file(tensors, path, metadata=self.metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


class TraceFile(Trace):
    """A trace in a file, of which only what is asked for is read.

    Raises OSError if it is not there, ValueError if it is no trace: each names the file."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        require_file(self.path, "a trace, one safetensors file")
        with open(self.path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MOST_HEADER < length <= self.path.stat().st_size:
            raise ValueError(f"{path}: a header of {length} bytes: no trace has so many tensors")
        header = read_header(self.path)
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path}: its metadata say format {metadata.get('format')!r}, and a trace says {FORMAT!r}. Write one "
                "with `minibert trace`, or from your port as the README's section Traces has it"
            )
        if metadata.get("version") != VERSION:
            raise ValueError(f"{path}: a trace of version {metadata.get('version')!r}; this minibert reads {VERSION!r}")
        if absent := [key for key in ("config", "dtype") if key not in metadata]:
            raise ValueError(
                f"{path}: there is no {absent[0]} in its metadata: the README's section Traces says what it is"
            )
        try:
            config = BertConfig.from_dict(_json_object(metadata["config"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: the config in its metadata: {error}") from error
        known = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
        if metadata["dtype"] not in known:
            raise ValueError(f"{path}: dtype in its metadata is {metadata['dtype']!r}, and must be {', '.join(known)}")
        if config.num_hidden_layers > MOST_LAYERS:
            raise ValueError(
                f"{path}: num_hidden_layers {config.num_hidden_layers}, and a trace has {MOST_LAYERS} at most"
            )
        for name, entry in header.items():
            if row_of(name) not in MEANINGS:
                continue  # nobody reads it; `diff` says so
            wanted = ("I64", "I32", "I16", "I8", "U8", "BOOL") if name in INPUTS else tuple(DTYPES)
            if entry["dtype"] not in wanted:
                raise ValueError(f"{path}: {name} is {entry['dtype']}, and must be one of {', '.join(wanted)}")
            if 0 in entry["shape"]:
                raise ValueError(f"{path}: {name} is empty, {tuple(entry['shape'])}: there is nothing to compare")
        shape = tuple(header["input_ids"]["shape"]) if "input_ids" in header else ()
        for name in [name for name, _, _ in TABLE[:-1]] if len(shape) == 2 else []:
            size = expected_shape(name, config, shape)
            if prod(size) > MOST_NUMBERS or prod(size[1:]) > MOST_IN_A_ROW:
                raise ValueError(
                    f"{path}: with this config and {shape[0]} × {shape[1]} tokens {name} has the shape {size}: at most "
                    f"{MOST_NUMBERS:,} numbers are compared, {MOST_IN_A_ROW:,} of a row. Trace fewer or shorter rows"
                )
        self.header = header
        super().__init__({}, config, dict(metadata), str(path))
        self.inputs()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.header.items()}

    def read(self, name: str) -> Tensor:
        # Opened anew each time: the pages of a memory-mapped file count as ours until it is closed.
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not self.header[name]["shape"]:
            return self.read(name)
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[start:stop]
        return tensor


def require_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and should be {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; it should be {what}")


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    return values
