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
from minibert.trace.table import INPUTS, expected_names, hide_padding

SIZES = [
    {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 1},
    {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3},
]


def lowest(scores):
    return torch.finfo(scores.dtype).min


def hidden(scores, seen):
    return scores.masked_fill(~seen, lowest(scores))


def merged(context):
    return context.transpose(1, 2)


def attend(
    change=lambda *parts: parts, scale=1.0, mask=hidden, soften=lambda scores, seen: scores.softmax(-1), merge=merged
):
    """transformers' written-out attention with something else about it. change: of query, key, value."""

    def plant(model, patch):
        def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **rest):
            query, key, value = change(query, key, value)
            seen = attention_mask == 0
            scores = torch.matmul(query, key.transpose(2, 3)) * scaling * scale
            probabilities = F.dropout(soften(mask(scores, seen), seen), dropout, module.training)
            return merge(torch.matmul(probabilities, value)), probabilities

        patch.setattr(hub, "eager_attention_forward", forward)

    return plant


def causal(scores, seen):
    return hidden(scores, seen & ~torch.ones(scores.shape[-2:]).triu(1).bool())


def largest_not_subtracted(scores, seen):
    powers = scores.exp()  # above 11.1 infinite in float16
    return powers / powers.sum(-1, keepdim=True)


def unscaled(by):
    return lambda model, patch: attend(scale=by(model.config))(model, patch)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def norm_with(change):
    def plant(model, patch):
        for norm in norms(model):
            norm.forward = lambda x, norm=norm: change(x, norm)

    return plant


def eps(value):
    return norm_with(lambda x, norm: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, value))


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def activation(function, encoder=True, head=True):
    def plant(model, patch):
        for layer in model.bert.encoder.layer if encoder else []:
            layer.intermediate.intermediate_act_fn = Activation(function)
        if head:
            model.cls.predictions.transform.transform_act_fn = Activation(function)

    return plant


def tanh(x):
    return F.gelu(x, approximate="tanh")


def embedding(name, change):
    def plant(model, patch):
        table = getattr(model.bert.embeddings, name).weight
        table.data = change(table.data.clone())

    return plant


def asked(change):
    """The model asked something else than what it is given."""

    def plant(model, patch):
        real = model.forward
        model.forward = lambda **given: real(**change(given))

    return plant


def positions(count):
    return asked(lambda given: {**given, "position_ids": count(given["attention_mask"])})


def decoder(change):
    return lambda model, patch: model.cls.predictions.decoder.register_forward_hook(lambda m, i, x: change(m, i[0], x))


def no_transform(model, patch):
    model.cls.predictions.transform.forward = lambda x: x


def untied(model, patch):
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())


def transposed(model, patch):
    for dense in model.modules():
        if isinstance(dense, nn.Linear) and dense.in_features == dense.out_features:
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


def split_without_transpose(query, key, value):
    """(B, H, S, K), made by a view of (B, S, D)."""
    return [x.transpose(1, 2).reshape(x.shape) for x in (query, key, value)]


PLANTED = {
    "pre-LayerNorm": pre_norm,
    "key and value swapped": key_as_value,
    "heads split in the wrong order": interleaved,
    "heads split by a view, without the transpose": attend(split_without_transpose),
    "heads put together without the transpose": attend(merge=lambda x: x.reshape(len(x), x.shape[2], -1)),
    "attention mask ignored": attend(mask=lambda scores, seen: scores),
    "attention mask inverted": attend(mask=lambda scores, seen: scores.masked_fill(seen, lowest(scores))),
    "attention mask added as 0 and 1": attend(mask=lambda scores, seen: scores + seen),
    "attention mask after the softmax": attend(
        mask=lambda scores, seen: scores, soften=lambda scores, seen: scores.softmax(-1) * seen
    ),
    "causal mask": attend(mask=causal),
    "fp16 softmax overflow": attend(
        mask=lambda scores, seen: scores.masked_fill(~seen, float("-inf")), soften=largest_not_subtracted
    ),
    "tanh-GELU": activation(tanh),
    "erf-GELU": activation(F.gelu),
    "head activation missing": activation(lambda x: x, encoder=False),
    "LayerNorm eps 1e-5": eps(1e-5),
    "LayerNorm eps 1e-6": eps(1e-6),
    "LayerNorm eps 1e-3": eps(1e-3),
    "LayerNorm weight and bias not loaded": norm_with(lambda x, n: F.layer_norm(x, n.normalized_shape, eps=n.eps)),
    "LayerNorm divides by n - 1": norm_with(
        lambda x, n: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * n.weight + n.bias
    ),
    "residual added after the LayerNorm": residual_after,
    "token type embedding missing": embedding("token_type_embeddings", torch.zeros_like),
    "token types ignored": embedding("token_type_embeddings", lambda x: x[:1].expand_as(x).clone()),
    "positions off by one": embedding("position_embeddings", lambda x: torch.cat([x[1:], x[-1:]])),
    "positions count tokens, not columns": positions(lambda m: (m.cumsum(1) - 1).clamp(min=0)),
    "positions off by the padding id (RoBERTa's)": positions(lambda m: m.cumsum(1) * m + 1),
    "scores not scaled": unscaled(lambda config: (config.hidden_size / config.num_attention_heads) ** 0.5),
    "scores scaled by √D": unscaled(lambda config: config.num_attention_heads**-0.5),
    "query and key swapped": attend(lambda query, key, value: (key, query, value)),
    "square weights transposed": transposed,
    "head transform skipped": no_transform,
    "MLM bias missing": decoder(lambda module, read, x: F.linear(read, module.weight)),
    "MLM bias doubled": decoder(lambda module, read, x: x + module.bias),
    "decoder untied": untied,
    "dropout left on": lambda model, patch: model.train(),
}

# Faults that do not show in every batch and model: those of positions need padding, on the left for one of them.
MASKS = {"positions count tokens, not columns": "left"}
ACTIVATIONS = {"erf-GELU": "gelu_new"}
KNOWN = {fault.title: fault for fault in CATALOGUE}


def port(sizes=SIZES[1], title=""):
    """Ours, transformers' model, and a batch on which the fault of this title shows."""
    half = title == "fp16 softmax overflow"
    sizes = {**sizes, "hidden_act": ACTIVATIONS.get(title, "gelu")}
    ours, theirs = twins(sizes, dtype=torch.float16 if half else torch.float32)
    if half:  # scores above 11.1, as large models have them
        for layer, other in zip(ours.layers, theirs.bert.encoder.layer, strict=True):
            query = other.attention.self.query.weight
            query.data *= 30
            layer.attention.qkv.weight.data[: len(query)] = query.data
    return ours, theirs, make_batch(sizes, MASKS.get(title, "right"), (5, 7), two_segments=True)


def planted(plant, model, batch, **more):
    """The trace of a model with a fault, and nothing of the fault remains outside it."""
    with pytest.MonkeyPatch.context() as patch:
        plant(model, patch)
        return trace(model, **batch, **more)


def given_by(title, column="float32", sizes=SIZES[1]):
    """Our model, and the trace of a port with a known fault: transformers' model with the fault planted by hand, if
    it stands above; otherwise the steps of the fault itself.
    """
    ours, theirs, batch = port(sizes, title)
    if column == "bfloat16" and ours.dtype == torch.float32:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    if column == "8 bits":
        ours, theirs = ours.float(), eight_bits(theirs.float())
    if title in PLANTED:
        return ours, planted(PLANTED[title], theirs, batch, grad=title == "decoder untied" and column != "8 bits")
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


def only(given, *names):
    """The trace with its inputs and these tensors alone."""
    return Trace(
        {name: x for name, x in given.tensors.items() if name in (*INPUTS, *names)}, given.config, given.metadata
    )
