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


def weights_in_8_bits(model, patch):
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = rounded(parameter.data, 1)


def no_residual(model, patch):
    for layer in model.bert.encoder.layer:
        block = layer.attention.output
        block.forward = lambda x, read, block=block: block.LayerNorm(block.dropout(block.dense(x)))


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


def nothing_in(path):
    """The module gives what it reads."""

    def plant(model, patch):
        model.get_submodule(path).forward = lambda x: x

    return plant


def near(scores, seen, width=2):
    place = torch.arange(scores.shape[-1])
    return scores.masked_fill((place[:, None] - place).abs() > width, lowest(scores)).softmax(-1)


def row_0s_mask(scores, seen):
    return hidden(scores, seen[:1].expand_as(seen))


def row_0s_types(given):
    types = given["token_type_ids"]
    return {**given, "token_type_ids": types[:1].expand_as(types).contiguous()}


def smoothed(model, patch):
    real = F.cross_entropy
    patch.setattr(nn.functional, "cross_entropy", lambda *a, **k: real(*a, **{**k, "label_smoothing": 0.1}))


STRANGE = {
    "GELU twice in the head": activation(lambda x: F.gelu(F.gelu(x)), encoder=False),
    "weights rounded to int8": weights_in_8_bits,
    "capped logits": of_logits(lambda x: 3 * (x / 3).tanh()),
    "smoothed labels": smoothed,
    "relu": activation(F.relu),
    "sigmoid GELU": activation(lambda x: x * torch.sigmoid(1.702 * x)),
    "no activation in the encoder": activation(lambda x: x, head=False),
    "query bias missing": no_bias_of("attention.self.query"),
    "key bias missing": no_bias_of("attention.self.key"),
    "feed-forward bias missing": no_bias_of("output.dense"),
    "head dense bias missing": head_dense_bias,
    "last layer skipped": skipped_layer,
    "layers reversed": layers(lambda found: found[::-1]),
    "first layer for all": layers(lambda found: [found[0]] * len(found)),
    "scores scaled twice": attend(scale=0.35),
    "row 0's mask for all": attend(mask=row_0s_mask),
    "row 0's types for all": asked(row_0s_types),
    "a window of keys": attend(soften=near),
    "head 0 is zero": attend(lambda q, k, v: (q, k, torch.cat([torch.zeros_like(v[:, :1]), v[:, 1:]], 1))),
    "keys of the next token": attend(lambda q, k, v: (q, k.roll(1, 2), v)),
    "softmax with one more in the sum": attend(soften=lambda scores, seen: scores.softmax(-1) * 0.98),
    "everything hidden": attend(mask=lambda scores, seen: hidden(scores, torch.zeros_like(seen))),
    "embedding norm missing": nothing_in("bert.embeddings.LayerNorm"),
    "head norm missing": nothing_in("cls.predictions.transform.LayerNorm"),
    "no mean in the norm": norm_with(lambda x, n: x / (x * x).mean(-1, keepdim=True).sqrt() * n.weight + n.bias),
    "position embedding missing": embedding("position_embeddings", torch.zeros_like),
    "no residual around attention": no_residual,
    "logits of the last words are 0": of_logits(lambda x: torch.cat([x[..., :-9], torch.zeros_like(x[..., -9:])], -1)),
    "logits rounded": of_logits(lambda x: (x * 4).round() / 4),
}
