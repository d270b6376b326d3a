"""Faults that are not in the catalogue, planted in transformers' own model by patching it. None may be given a name."""

import torch
import torch.nn.functional as F
import transformers.models.bert.modeling_bert as hub
from planted import norms
from torch import nn


def attend(change=None, scale=1.0, soften=lambda scores: scores.softmax(-1), seen=lambda mask: mask == 0):
    """transformers' written-out attention with something else about it. change: of query, key, value."""

    def plant(model, patch):
        def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **rest):
            if change is not None:
                query, key, value = change(query, key, value)
            scores = torch.matmul(query, key.transpose(2, 3)) * scaling * scale
            scores = scores.masked_fill(~seen(attention_mask), torch.finfo(scores.dtype).min)
            probabilities = soften(scores)
            return torch.matmul(probabilities, value).transpose(1, 2), probabilities

        patch.setattr(hub, "eager_attention_forward", forward)

    return plant


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


def no_bias_of(path):
    def plant(model, patch):
        for layer in model.bert.encoder.layer:
            nn.init.zeros_(layer.get_submodule(path).bias)

    return plant


def norm_with(change):
    def plant(model, patch):
        for norm in norms(model):
            norm.forward = lambda x, norm=norm: change(x, norm)

    return plant


def of_logits(change):
    return lambda model, patch: model.cls.predictions.decoder.register_forward_hook(lambda m, i, x: change(x))


def weights(change):
    def plant(model, patch):
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.data = change(name, parameter.data)

    return plant


def int8(name, x):
    step = x.abs().amax(1, keepdim=True) / 127
    return (x / step).round() * step


def noise(name, x):
    return x + 0.01 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def asked(change):
    def plant(model, patch):
        real = model.forward
        model.forward = lambda **given: real(**change(given))

    return plant


def row_0_for_all(name):
    return asked(lambda given: {**given, name: given[name][:1].expand_as(given[name]).contiguous()})


def no_residual(which):
    def plant(model, patch):
        for layer in model.bert.encoder.layer:
            block = layer.attention.output if which == "attention" else layer.output
            block.forward = lambda x, read, block=block: block.LayerNorm(block.dropout(block.dense(x)))

    return plant


def norms_swapped(model, patch):
    for layer in model.bert.encoder.layer:
        one, two = layer.attention.output, layer.output
        one.LayerNorm, two.LayerNorm = two.LayerNorm, one.LayerNorm


def embedding(name, change):
    def plant(model, patch):
        table = getattr(model.bert.embeddings, name).weight
        table.data = change(table.data.clone())

    return plant


def sinusoids(table):
    angle = torch.arange(len(table))[:, None] / 10000 ** (torch.arange(table.shape[1]) / table.shape[1])
    return angle.sin().to(table.dtype) * 0.02


def skipped_layer(model, patch):
    model.bert.encoder.layer[-1].forward = lambda x, *rest, **more: x


def layers(change):
    """The weights of each layer exchanged for another layer's."""

    def plant(model, patch):
        found = [{name: x.clone() for name, x in layer.state_dict().items()} for layer in model.bert.encoder.layer]
        for layer, weights in zip(model.bert.encoder.layer, change(found), strict=True):
            layer.load_state_dict(weights)

    return plant


def head_dense_bias(model, patch):
    nn.init.zeros_(model.cls.predictions.transform.dense.bias)


def bias_rolled(model, patch):
    model.cls.predictions.bias.data = model.cls.predictions.bias.data.roll(1)
    model.cls.predictions.decoder.bias = model.cls.predictions.bias


def norm_gone(path):
    def plant(model, patch):
        model.get_submodule(path).forward = lambda x: x

    return plant


def near(scores, width=2):
    place = torch.arange(scores.shape[-1])
    return scores.masked_fill((place[:, None] - place).abs() > width, torch.finfo(scores.dtype).min).softmax(-1)


def first_keys(scores, count=4):
    return scores.masked_fill(torch.arange(scores.shape[-1]) >= count, torch.finfo(scores.dtype).min).softmax(-1)


def zero_head(query, key, value):
    return query, key, torch.cat([torch.zeros_like(value[:, :1]), value[:, 1:]], 1)


def half_hidden(model, patch):
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, i, x: x.to(torch.float8_e4m3fn).to(x.dtype))


def smoothed(model, patch):
    real = F.cross_entropy
    patch.setattr(nn.functional, "cross_entropy", lambda *a, **k: real(*a, **{**k, "label_smoothing": 0.1}))


STRANGE = {
    "GELU twice in the head": activation(lambda x: F.gelu(F.gelu(x)), encoder=False),
    "weights rounded to int8": weights(int8),
    "capped logits": of_logits(lambda x: 3 * (x / 3).tanh()),
    "smoothed labels": smoothed,
    "relu": activation(F.relu),
    "relu in the head": activation(F.relu, encoder=False),
    "silu": activation(F.silu),
    "sigmoid GELU": activation(lambda x: x * torch.sigmoid(1.702 * x)),
    "no activation in the encoder": activation(lambda x: x, head=False),
    "leaky relu": activation(F.leaky_relu),
    "query bias missing": no_bias_of("attention.self.query"),
    "key bias missing": no_bias_of("attention.self.key"),
    "value bias missing": no_bias_of("attention.self.value"),
    "attention output bias missing": no_bias_of("attention.output.dense"),
    "intermediate bias missing": no_bias_of("intermediate.dense"),
    "feed-forward bias missing": no_bias_of("output.dense"),
    "head dense bias missing": head_dense_bias,
    "last layer skipped": skipped_layer,
    "layers reversed": layers(lambda found: found[::-1]),
    "first layer for all": layers(lambda found: [found[0]] * len(found)),
    "scores scaled twice": attend(scale=0.35),
    "temperature 0.9": attend(scale=1 / 0.9),
    "row 0's mask for all": attend(seen=lambda mask: (mask == 0)[:1].expand_as(mask)),
    "row 0's types for all": row_0_for_all("token_type_ids"),
    "types flipped": asked(lambda given: {**given, "token_type_ids": 1 - given["token_type_ids"]}),
    "a window of keys": attend(soften=near),
    "the first four keys": attend(soften=first_keys),
    "head 0 is zero": attend(change=zero_head),
    "heads rolled": attend(change=lambda q, k, v: (q, k, v.roll(1, 1))),
    "keys of the next token": attend(change=lambda q, k, v: (q, k.roll(1, 2), v)),
    "query normalised": attend(change=lambda q, k, v: (F.normalize(q, dim=-1) * q.shape[-1] ** 0.5, k, v)),
    "softmax with one more in the sum": attend(soften=lambda s: s.softmax(-1) * 0.98),
    "masked with -10": attend(seen=lambda mask: mask > 1, soften=lambda s: s.softmax(-1)),
    "embedding norm missing": norm_gone("bert.embeddings.LayerNorm"),
    "head norm missing": norm_gone("cls.predictions.transform.LayerNorm"),
    "norms of a layer swapped": norms_swapped,
    "no mean in the norm": norm_with(lambda x, n: x / (x * x).mean(-1, keepdim=True).sqrt() * n.weight + n.bias),
    "norm bias missing": norm_with(lambda x, n: F.layer_norm(x, n.normalized_shape, n.weight, None, n.eps)),
    "norm weight missing": norm_with(lambda x, n: F.layer_norm(x, n.normalized_shape, None, n.bias, n.eps)),
    "norm weight plus one": norm_with(lambda x, n: F.layer_norm(x, n.normalized_shape, n.weight + 1, n.bias, n.eps)),
    "words times √D": embedding("word_embeddings", lambda x: x * x.shape[1] ** 0.5),
    "position embedding missing": embedding("position_embeddings", torch.zeros_like),
    "sinusoids": embedding("position_embeddings", sinusoids),
    "positions from two": embedding("position_embeddings", lambda x: x.roll(-2, 0)),
    "positions reversed": embedding("position_embeddings", lambda x: x[:8].flip(0)[torch.arange(len(x)) % 8]),
    "no residual around attention": no_residual("attention"),
    "no residual around the feed-forward": no_residual("feed-forward"),
    "MLM bias rolled": bias_rolled,
    "logits of the last words are 0": of_logits(lambda x: torch.cat([x[..., :-9], torch.zeros_like(x[..., -9:])], -1)),
    "logits rounded": of_logits(lambda x: (x * 4).round() / 4),
    "noise in the weights": weights(noise),
    "hidden states in float8": half_hidden,
}  # fmt: skip
