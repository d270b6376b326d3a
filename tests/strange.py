"""Faults that are not in the catalogue, planted in transformers' own model by patching it. None may be given a name."""

import torch
import torch.nn.functional as F
from independent import rounded
from planted import activation, asked, attend, decoder, embedding, hidden, lowest, norm_with
from torch import nn


def no_bias_of(path):
    def plant(model, patch):
        for layer in model.bert.encoder.layer:
            nn.init.zeros_(layer.get_submodule(path).bias)

    return plant


def of_logits(change):
    return decoder(lambda module, read, x: change(x))


def weights(change):
    def plant(model, patch):
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = change(parameter.data)

    return plant


def noise(x):
    return x + 0.01 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def no_residual(block_of):
    def plant(model, patch):
        for block in map(block_of, model.bert.encoder.layer):
            block.forward = lambda x, read, block=block: block.LayerNorm(block.dropout(block.dense(x)))

    return plant


def norms_swapped(model, patch):
    for layer in model.bert.encoder.layer:
        one, two = layer.attention.output, layer.output
        one.LayerNorm, two.LayerNorm = two.LayerNorm, one.LayerNorm


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


def nothing_in(path):
    """The module gives what it reads."""

    def plant(model, patch):
        model.get_submodule(path).forward = lambda x: x

    return plant


def soften(change):
    """Another function of the scores, whose padding is hidden, than the softmax."""
    return attend(soften=lambda scores, seen: change(scores))


def near(scores, width=2):
    place = torch.arange(scores.shape[-1])
    return scores.masked_fill((place[:, None] - place).abs() > width, lowest(scores)).softmax(-1)


def first_keys(scores, count=4):
    return scores.masked_fill(torch.arange(scores.shape[-1]) >= count, lowest(scores)).softmax(-1)


def row_0s_mask(scores, seen):
    return hidden(scores, seen[:1].expand_as(seen))


def row_0s_types(given):
    types = given["token_type_ids"]
    return {**given, "token_type_ids": types[:1].expand_as(types).contiguous()}


def half_hidden(model, patch):
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, i, x: x.to(torch.float8_e4m3fn).to(x.dtype))


def smoothed(model, patch):
    real = F.cross_entropy
    patch.setattr(nn.functional, "cross_entropy", lambda *a, **k: real(*a, **{**k, "label_smoothing": 0.1}))


STRANGE = {
    "GELU twice in the head": activation(lambda x: F.gelu(F.gelu(x)), encoder=False),
    "weights rounded to int8": weights(lambda x: rounded(x, 1)),
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
    "row 0's mask for all": attend(mask=row_0s_mask),
    "row 0's types for all": asked(row_0s_types),
    "types flipped": asked(lambda given: {**given, "token_type_ids": 1 - given["token_type_ids"]}),
    "a window of keys": soften(near),
    "the first four keys": soften(first_keys),
    "head 0 is zero": attend(lambda q, k, v: (q, k, torch.cat([torch.zeros_like(v[:, :1]), v[:, 1:]], 1))),
    "heads rolled": attend(lambda q, k, v: (q, k, v.roll(1, 1))),
    "keys of the next token": attend(lambda q, k, v: (q, k.roll(1, 2), v)),
    "query normalised": attend(lambda q, k, v: (F.normalize(q, dim=-1) * q.shape[-1] ** 0.5, k, v)),
    "softmax with one more in the sum": soften(lambda scores: scores.softmax(-1) * 0.98),
    "everything hidden": attend(mask=lambda scores, seen: hidden(scores, torch.zeros_like(seen))),
    "embedding norm missing": nothing_in("bert.embeddings.LayerNorm"),
    "head norm missing": nothing_in("cls.predictions.transform.LayerNorm"),
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
    "no residual around attention": no_residual(lambda layer: layer.attention.output),
    "no residual around the feed-forward": no_residual(lambda layer: layer.output),
    "MLM bias rolled": bias_rolled,
    "logits of the last words are 0": of_logits(lambda x: torch.cat([x[..., :-9], torch.zeros_like(x[..., -9:])], -1)),
    "logits rounded": of_logits(lambda x: (x * 4).round() / 4),
    "noise in the weights": weights(noise),
    "hidden states in float8": half_hidden,
}
