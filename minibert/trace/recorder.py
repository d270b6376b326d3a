"""Recording a trace: our model, or transformers', runs once, and hooks keep the tensors that pass by. The inputs may
come from texts or from a JSON file of ids.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from minibert.attention import use_kernel
from minibert.checkpoint.files import read_json
from minibert.checkpoint.names import FIXED_KEYS, WRAPPERS, hub_names
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.tokenizer import as_tokenizer, encode
from minibert.trace.stores import require_file
from minibert.trace.table import GRADIENT, INPUTS, SHAPES, check_inputs, dtype_name, hide_padding, row_of
from minibert.trace.tracefile import FORMAT, HOW_TO_WRITE, VERSION, Trace

# The trace's name for what goes into or comes out of a module of ours, and of the hub's BERT. N is a layer's number.
# Our layer calls one dropout module in two places, in the order of the two rows.
PLACES = (
    ("embeddings.sum", "in", "embeddings.LayerNorm", "bert.embeddings.LayerNorm"),
    ("embeddings.norm", "out", "embeddings.dropout", "bert.embeddings.dropout"),
    ("layers.N.context", "in", "layers.N.attention.output", "bert.encoder.layer.N.attention.output.dense"),
    ("layers.N.attention_output", "out", "layers.N.dropout", "bert.encoder.layer.N.attention.output.dropout"),
    (
        "layers.N.attention_norm",
        "out",
        "layers.N.attention_LayerNorm",
        "bert.encoder.layer.N.attention.output.LayerNorm",
    ),
    ("layers.N.intermediate", "out", "layers.N.feed_forward.intermediate", "bert.encoder.layer.N.intermediate.dense"),
    ("layers.N.activation", "in", "layers.N.feed_forward.output", "bert.encoder.layer.N.output.dense"),
    ("layers.N.feed_forward", "out", "layers.N.dropout", "bert.encoder.layer.N.output.dropout"),
    ("layers.N.feed_forward_norm", "out", "layers.N.feed_forward_LayerNorm", "bert.encoder.layer.N.output.LayerNorm"),
    ("head.dense", "out", "head.dense", "cls.predictions.transform.dense"),
    ("head.activation", "in", "head.LayerNorm", "cls.predictions.transform.LayerNorm"),
    ("head.norm", "out", "head.LayerNorm", "cls.predictions.transform.LayerNorm"),
    ("logits", "out", "head", "cls.predictions"),
)
# The hub's module that gives a tensor. Its dropout does nothing where a trace is right.
GIVEN_BY = {name: hub.replace(".dropout", ".dense") for name, side, _, hub in PLACES if side == "out"}
GIVEN_BY["embeddings.norm"] = "bert.embeddings.LayerNorm"
GIVEN_BY |= {f"layers.N.{part}": f"bert.encoder.layer.N.attention.self.{part}" for part in ("query", "key", "value")}


class _Attention(TorchFunctionMode):
    """Watches the written-out attention of a layer: its two matrix products, and the softmax between them.

    Query, key and value are taken from the products, not from the projections. So heads that are split wrongly show.
    """

    def __init__(self, keep: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.keep = keep
        self.layer: int | None = None  # that is computing its attention
        self.products = 0

    def enter(self, layer: int | None) -> None:
        self.layer, self.products = layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, layer = getattr(func, "__name__", ""), f"layers.{self.layer}."
        if self.layer is not None and name == "softmax":
            self.keep(layer + "scores", args[0])
        elif self.layer is not None and name in ("matmul", "__matmul__"):
            pair = ("query", "key") if self.products == 0 else ("probabilities", "value")
            self.keep(layer + pair[0], args[0])
            self.keep(layer + pair[1], args[1] if self.products else args[1].transpose(-1, -2))
            self.products += 1
        return func(*args, **(kwargs or {}))


def trace(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    grad: bool = False,
) -> Trace:
    """Run our BertForMaskedLM, or transformers', or the one inside a wrapper (DataParallel, a compiled model, PEFT's),
    and keep every tensor of TABLE. The inputs are (B, S), as for the model's own call. With `grad`, the trace also has
    the gradient of the loss by every parameter; no parameter's .grad changes.

    The model stays in its mode: in training mode, dropout is on. Attention is the written-out form. Raises ValueError
    for inputs that a BERT of this size cannot take.
    """
    model = bert_inside(model)
    ours = isinstance(model, BertForMaskedLM)
    config = model.config if isinstance(model, BertForMaskedLM) else _our_config(model)
    device = next(model.parameters()).device
    given = (x if x is None else x.to(device) for x in (input_ids, attention_mask, token_type_ids, labels))
    inputs, batch = check_inputs(config, *given)  # type: ignore[arg-type]
    if grad and inputs.labels is None:
        raise ValueError("without labels there is no loss, and so no gradient: give labels too")
    tensors = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
    mask = inputs.attention_mask.bool()

    def keep(name: str, tensor: Tensor) -> None:
        padded = _from_packed(batch, mask, name, tensor.detach()) if ours else tensor.detach()
        tensors[name] = hide_padding(name, padded, mask)

    with ExitStack() as stack:
        settings = stack.enter_context(exact_arithmetic(device.type))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(use_kernel("formula") if ours else _eager(model))
        stack.enter_context(_hooks(model, config.num_hidden_layers, keep))
        loss = model(**{name: x for name, x in tensors.items() if name in INPUTS}).loss
        if loss is not None:
            tensors["loss"] = loss.detach()
        if grad:
            tensors.update(gradients(model, loss))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(asdict(config)),
        "dtype": dtype_name(next(model.parameters()).dtype),
        "backend": "minibert" if ours else f"transformers {version('transformers')}",
        "device": str(device) if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}",
        "torch": torch.__version__,
        "settings": json.dumps(settings),
    }
    return Trace({name: tensor.cpu() for name, tensor in tensors.items()}, config, metadata)


def bert_inside(module: nn.Module) -> nn.Module:
    """`module` itself if it is minibert's or transformers' BertForMaskedLM, or the one that it holds. Raises ValueError
    if there is none, or more than one.
    """

    def is_bert(each: nn.Module) -> bool:
        theirs = any(kind.__module__.startswith("transformers.") for kind in type(each).__mro__)
        parts = {name for name, _ in each.named_children()}  # PEFT's wrapper passes on other attributes of the model
        return isinstance(each, BertForMaskedLM) or (theirs and {"bert", "cls"} <= parts)

    berts = [each for each in module.modules() if is_bert(each)]
    if len(berts) == 1:
        return berts[0]
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if berts:
        raise ValueError(f"there are {len(berts)} models of the kind BertForMaskedLM in {kind}: give one of them")
    raise ValueError(
        f"trace reads minibert's or transformers' BertForMaskedLM, not {kind}: write the trace from your port; "
        f"{HOW_TO_WRITE}"
    )


def _our_config(model: nn.Module) -> BertConfig:
    theirs: Any = model.config
    for key, value in FIXED_KEYS.items():
        if getattr(theirs, key, value) not in (value, None):
            raise ValueError(f"{key} is {getattr(theirs, key)!r}, and a trace is of a BERT with {value!r}")
    return BertConfig(**{field.name: getattr(theirs, field.name) for field in fields(BertConfig)})


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss by every parameter, under its name in a trace. No parameter's .grad changes."""
    named = [(name, parameter) for name, parameter in nn.Module.named_parameters(model) if parameter.requires_grad]
    if not named:
        raise ValueError("no parameter of this model requires a gradient: call model.requires_grad_(True) first")
    found = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    result = {}
    for (name, parameter), gradient in zip(named, found, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        bare = WRAPPERS.sub("", name).replace(".base_layer.", ".")  # of PEFT: what stands under an adapter
        hubs = hub_names(bare) if isinstance(model, BertForMaskedLM) else [bare]
        for hub, part in zip(hubs, gradient.chunk(len(hubs)), strict=True):
            result[GRADIENT + hub] = part.detach().clone()  # a part would keep, and save, the whole
    return result


def _from_packed(batch: PackedBatch, mask: Tensor, name: str, x: Tensor) -> Tensor:
    """Our model computes no padding: tokens are (T, …), and attention's rows are (B, H, longest sequence, …)."""
    if x.dim() == 2:  # (T, …)
        return batch.unpack(x)
    column = (mask.long().cumsum(1) - 1).clamp(min=0)  # (B, S): where each token stands in a row without holes
    x = x.take_along_dim(column[:, None, :, None], 2)  # (B, H, S, …)
    return x.take_along_dim(column[:, None, None, :], 3) if SHAPES[row_of(name)][-1] == "S" else x


@contextmanager
def _hooks(model: nn.Module, layers: int, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    ours = isinstance(model, BertForMaskedLM)
    handles = []

    def add(path: str, side: str, names: list[str]) -> None:
        in_turn, module = iter(names), model.get_submodule(path)
        if side == "in":
            handles.append(module.register_forward_pre_hook(lambda module, inputs: keep(next(in_turn), inputs[0])))
        else:
            handles.append(module.register_forward_hook(lambda module, inputs, x: keep(next(in_turn), x)))

    attention = _Attention(keep)
    attention_path = "layers.{}.attention" if ours else "bert.encoder.layer.{}.attention.self"
    places: dict[tuple[str, str], list[str]] = {}
    for name, side, path, their_path in PLACES:
        places.setdefault((path if ours else their_path, side), []).append(name)
    try:
        for (path, side), names in places.items():
            for number in range(layers) if ".N." in path else [0]:
                add(path.replace(".N.", f".{number}."), side, [name.replace(".N.", f".{number}.") for name in names])
        for number in range(layers):
            module = model.get_submodule(attention_path.format(number))
            handles.append(module.register_forward_pre_hook(lambda *_, number=number: attention.enter(number)))
            handles.append(module.register_forward_hook(lambda *_: attention.enter(None)))
        with attention:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager(theirs: Any) -> Iterator[None]:
    """transformers' written-out attention: the fused kernels do not give the probabilities."""
    before = theirs.config._attn_implementation
    theirs.set_attn_implementation("eager")
    try:
        yield
    finally:
        theirs.set_attn_implementation(before)


@contextmanager
def exact_arithmetic(device: str) -> Iterator[dict[str, Any]]:
    """No TF32, no sums in half precision, no autocast. Yields these settings, for the trace's metadata."""
    matmul = torch.backends.cuda.matmul
    half = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before, before_half = torch.get_float32_matmul_precision(), [getattr(matmul, name) for name in half]
    torch.set_float32_matmul_precision("highest")
    for name in half:
        setattr(matmul, name, False)
    try:
        with torch.autocast(device, enabled=False):
            yield {"float32_matmul_precision": "highest", "autocast": False, **dict.fromkeys(half, False)}
    finally:
        torch.set_float32_matmul_precision(before)
        for name, value in zip(half, before_half, strict=True):
            setattr(matmul, name, value)


def tokenized(texts: list[str], tokenizer: Tokenizer, config: BertConfig) -> dict[str, Tensor]:
    """The texts as rows, padded on the right. Every token is its own label, so that there is a loss."""
    tokenizer = as_tokenizer(tokenizer)
    rows = [torch.tensor(encode(tokenizer, text, config.max_position_embeddings).ids) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) <= tokenizer.num_special_tokens_to_add(False):
            raise ValueError(f"there is no token in the text {text!r}: give a text with at least one word")
    ids = pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id or 0)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def read_ids(path: Path) -> dict[str, Tensor]:
    """A JSON object of lists of rows: input_ids, and if wanted attention_mask, token_type_ids, labels."""
    require_file(path, "a JSON file of ids")
    values = read_json(path)
    if "input_ids" not in values or (unknown := values.keys() - set(INPUTS)):
        said = f"the key {sorted(unknown)[0]!r} is not known" if "input_ids" in values else "there is no input_ids"
        raise ValueError(f"{path}: {said}; it holds {', '.join(INPUTS)}, each a list of rows")
    for name, rows in values.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            raise ValueError(f"{path}: {name} must be a list of rows, [[…], […]], none of them empty")
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"{path}: row {number} of {name} has {len(row)} entries, row 0 {len(rows[0])}: fill up with "
                    "padding, and give an attention_mask"
                )
            for column, entry in enumerate(row):
                if type(entry) is not int or not -(2**63) <= entry < 2**63:  # true and false are no ids
                    said = json.dumps(entry)[:40]
                    raise ValueError(f"{path}: {name} at {(number, column)} is {said}, and must be a whole number")
    return {name: torch.tensor(rows) for name, rows in values.items()}
