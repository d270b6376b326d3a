"""The faults of the catalogue, planted in transformers' own model by patching it. A fault that is not planted here
is tested with its own steps.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers.models.bert.modeling_bert as hub
from independent import eight_bits
from torch import nn
from twins import CONFIGS, make_batch, twins

from minibert.parity import Trace, trace
from minibert.parity.faults import CATALOGUE
from minibert.parity.steps import Steps
from minibert.parity.yardstick import converted
from minibert.trace.table import expected_names, hide_padding

SIZES = [
    {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 1},
    {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3},
]


def eager(monkeypatch, scale=1.0, swap=False, mask="before", merge=True, largest_subtracted=True):
    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **rest):
        if swap:
            query, key = key, query
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling * scale
        seen, lowest = attention_mask == 0, torch.finfo(scores.dtype).min
        if mask == "before":
            scores = scores.masked_fill(~seen, float("-inf"))
        elif mask == "inverted":
            scores = scores.masked_fill(seen, lowest)
        elif mask == "raw":
            scores = scores + seen
        elif mask == "causal":
            scores = scores.masked_fill(~seen | torch.ones(scores.shape[-2:]).triu(1).bool(), lowest)
        probabilities = scores.softmax(-1)
        if not largest_subtracted:
            powers = scores.exp()  # above 11.1 infinite in float16
            probabilities = powers / powers.sum(-1, keepdim=True)
        if mask == "after":
            probabilities = probabilities * seen
        probabilities = F.dropout(probabilities, dropout, module.training)
        context = torch.matmul(probabilities, value)
        return context.transpose(1, 2) if merge else context.reshape(len(context), context.shape[2], -1), probabilities

    monkeypatch.setattr(hub, "eager_attention_forward", forward)


def unscaled(model, patch):
    eager(patch, scale=(model.config.hidden_size / model.config.num_attention_heads) ** 0.5)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def tanh_gelu(model, patch):
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU("tanh")
    model.cls.predictions.transform.transform_act_fn = nn.GELU("tanh")


def eps(value):
    def plant(model, patch):
        for norm in norms(model):
            norm.eps = value

    return plant


def not_loaded(model, patch):
    for norm in norms(model):
        norm.reset_parameters()


def sample_variance(model, patch):
    for norm in norms(model):
        norm.forward = lambda x, n=norm: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * n.weight + n.bias


def no_types(model, patch):
    nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)


def constant_types(model, patch):
    table = model.bert.embeddings.token_type_embeddings.weight
    table.data[1:] = table.data[0]


def off_by_one(model, patch):
    table = model.bert.embeddings.position_embeddings.weight
    table.data = torch.cat([table.data[1:], table.data[-1:]])


def double_bias(model, patch):
    model.cls.predictions.decoder.register_forward_hook(lambda m, i, output: output + model.cls.predictions.bias)


def no_bias(model, patch):
    model.cls.predictions.decoder.register_forward_hook(lambda m, i, output: F.linear(i[0], m.weight))


def no_transform(model, patch):
    model.cls.predictions.transform.forward = lambda x: x


def untied(model, patch):
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())


def dropout_on(model, patch):
    model.train()


def transposed(model, patch):
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        for dense in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
            dense.weight.data = dense.weight.data.T.contiguous()
    dense = model.cls.predictions.transform.dense
    dense.weight.data = dense.weight.data.T.contiguous()


def pre_norm(model, patch):
    def forward(self, x, attention_mask=None, *rest, **more):
        attention, output = self.attention, self.output
        update = attention.output.dense(attention.self(attention.output.LayerNorm(x), attention_mask)[0])
        x = x + attention.output.dropout(update)
        return x + output.dropout(output.dense(self.intermediate(output.LayerNorm(x))))

    patch.setattr(hub.BertLayer, "forward", forward)


def key_as_value(model, patch):
    for layer in model.bert.encoder.layer:
        inner = layer.attention.self
        inner.key, inner.value = inner.value, inner.key


def interleaved(model, patch):
    """The three projections are split, and the context is put together, in (head size, heads) order."""
    heads = model.config.num_attention_heads
    order = torch.arange(model.config.hidden_size).view(-1, heads).T.flatten()
    for layer in model.bert.encoder.layer:
        inner, dense = layer.attention.self, layer.attention.output.dense
        for part in (inner.query, inner.key, inner.value):
            part.weight.data, part.bias.data = part.weight.data[order], part.bias.data[order]
        dense.register_forward_pre_hook(lambda module, inputs: inputs[0][..., order.argsort()])


def residual_after(model, patch):
    def forward(self, hidden_states, input_tensor):
        self.read = input_tensor
        return self.LayerNorm(self.dropout(self.dense(hidden_states)))

    for layer in model.bert.encoder.layer:
        for block in (layer.attention.output, layer.output):
            block.LayerNorm.register_forward_hook(lambda module, inputs, x, block=block: block.read + x)
    patch.setattr(hub.BertSelfOutput, "forward", forward)
    patch.setattr(hub.BertOutput, "forward", forward)


def no_head_activation(model, patch):
    model.cls.predictions.transform.transform_act_fn = nn.Identity()


def positions(count):
    def plant(model, patch):
        real = model.forward
        model.forward = lambda **asked: real(**asked, position_ids=count(asked["attention_mask"]))

    return plant


def split_without_transpose(model, patch):
    """view(B, S, H, K) and transpose(1, 2), which is what transformers does next, then give a view to (B, H, S, K)."""
    heads = model.config.num_attention_heads

    def hook(module, inputs, x):
        rows, length, hidden = x.shape
        return x.reshape(rows, heads, length, -1).transpose(1, 2).reshape(rows, length, hidden)

    for layer in model.bert.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            part.register_forward_hook(hook)


def erf_gelu(model, patch):
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()
    model.cls.predictions.transform.transform_act_fn = nn.GELU()


PLANTED = {
    "pre-LayerNorm": pre_norm,
    "key and value swapped": key_as_value,
    "heads split in the wrong order": interleaved,
    "heads put together without the transpose": lambda m, p: eager(p, merge=False),
    "attention mask added as 0 and 1": lambda m, p: eager(p, mask="raw"),
    "causal mask": lambda m, p: eager(p, mask="causal"),
    "tanh-GELU": tanh_gelu,
    "LayerNorm eps 1e-5": eps(1e-5),
    "LayerNorm eps 1e-6": eps(1e-6),
    "LayerNorm eps 1e-3": eps(1e-3),
    "residual added after the LayerNorm": residual_after,
    "head activation missing": no_head_activation,
    "LayerNorm weight and bias not loaded": not_loaded,
    "LayerNorm divides by n - 1": sample_variance,
    "token type embedding missing": no_types,
    "token types ignored": constant_types,
    "positions off by one": off_by_one,
    "scores not scaled": unscaled,
    "scores scaled by √D": lambda m, p: eager(p, scale=m.config.num_attention_heads**-0.5),
    "query and key swapped": lambda m, p: eager(p, swap=True),
    "attention mask ignored": lambda m, p: eager(p, mask="ignored"),
    "attention mask inverted": lambda m, p: eager(p, mask="inverted"),
    "attention mask after the softmax": lambda m, p: eager(p, mask="after"),
    "square weights transposed": transposed,
    "head transform skipped": no_transform,
    "MLM bias missing": no_bias,
    "MLM bias doubled": double_bias,
    "decoder untied": untied,
    "dropout left on": dropout_on,
    "positions count tokens, not columns": positions(lambda m: (m.cumsum(1) - 1).clamp(min=0)),
    "positions off by the padding id (RoBERTa's)": positions(lambda m: m.cumsum(1) * m + 1),
    "heads split by a view, without the transpose": split_without_transpose,
    "erf-GELU": erf_gelu,
    "fp16 softmax overflow": lambda m, p: eager(p, largest_subtracted=False),
}  # fmt: skip


# Faults that do not show in every batch and model: those of positions need padding, on the left for one of them.
MASKS = {"positions count tokens, not columns": "left"}
ACTIVATIONS = {"erf-GELU": "gelu_new"}


def port(sizes, title=""):
    half = title == "fp16 softmax overflow"
    sizes = {**sizes, "hidden_act": ACTIVATIONS.get(title, "gelu")}
    ours, theirs = twins(sizes, dtype=torch.float16 if half else torch.float32)
    if half:  # scores above 11.1, as large models have them
        for layer, other in zip(ours.layers, theirs.bert.encoder.layer, strict=True):
            query = other.attention.self.query.weight
            query.data *= 30
            layer.attention.qkv.weight.data[: len(query)] = query.data
    return ours, theirs, make_batch(sizes, MASKS.get(title, "right"), (5, 7), two_segments=True)


KNOWN = {fault.title: fault for fault in CATALOGUE}


def given_by(title, column="float32", sizes=SIZES[1]):
    """Our model, and the trace of a port with a known fault: transformers' model with the fault planted by hand, if
    planted.py does; otherwise the steps of the fault itself.
    """
    ours, theirs, batch = port(sizes, title)
    if column == "bfloat16" and ours.dtype == torch.float32:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    if column == "8 bits":
        ours, theirs = ours.float(), eight_bits(theirs.float())
    if title in PLANTED:
        with pytest.MonkeyPatch.context() as patch:
            PLANTED[title](theirs, patch)
            return ours, trace(theirs, **batch, grad=title == "decoder untied" and column != "8 bits")
    right = trace(ours, **batch)
    model = eight_bits(ours) if column == "8 bits" else ours
    steps = KNOWN[title](converted(model, model.dtype), right.inputs()[0], right)
    found = {name: hide_padding(name, x, batch["attention_mask"].bool()) for name, x in steps.run()}
    return ours, Trace({**right.tensors, **found}, right.config, right.metadata)


@cache
def place_of(title):
    """The first tensor that a known fault changes, in float64."""
    ours, given = given_by(title, "float32")
    exact, inputs = converted(ours, torch.float64), given.inputs()[0]
    mask, found = inputs.attention_mask.bool(), []
    for kind in (Steps, KNOWN[title]):
        steps = kind(exact, inputs, given)
        found.append({name: hide_padding(name, x, mask) for name, x in steps.run()} | dict(steps.gradients()))
    right, wrong = found
    apart = [name for name in right if name in wrong and not torch.allclose(right[name], wrong[name], 1e-9, 1e-9)]
    return min(apart, key=expected_names(ours.config).index)
