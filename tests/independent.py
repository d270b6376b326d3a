"""Right ports whose rounding is their own: every operation computed in float64 and rounded once, or 8 bits."""

from copy import deepcopy

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

OPERATIONS = ("linear", "matmul", "__matmul__", "softmax", "layer_norm", "gelu", "relu", "add", "__add__")


class RoundedOnce(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in OPERATIONS:
            return func(*args, **kwargs)
        dtype = next((x.dtype for x in (*args, *kwargs.values()) if _is_number(x)), None)
        if dtype is None:
            return func(*args, **kwargs)
        finer = [x.double() if _is_number(x) else x for x in args]
        return func(*finer, **{name: x.double() if _is_number(x) else x for name, x in kwargs.items()}).to(dtype)


def _is_number(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def rounded(x, axis=-1, levels=127):
    step = (x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)).clamp(min=1e-30) / levels
    return (x / step).round() * step


def eight_bits(model, weights=rounded, read=None, embeddings=False):
    """A copy of ours or of transformers' model. read: what its products make of what they read."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if len(module.weight) != model.config.vocab_size:  # the decoder is the word embeddings
                module.weight.data = weights(module.weight.data)
            if read:
                module.register_forward_pre_hook(lambda module, inputs: (read(inputs[0]),))
        elif isinstance(module, nn.Embedding) and embeddings:
            module.weight.data = weights(module.weight.data)
    return model


def of_tensor(x):
    return rounded(x, None)


RIGHT = {
    "weights by channel": {},
    "weights by tensor": dict(weights=of_tensor),
    "everything by tensor": dict(weights=of_tensor, read=of_tensor, embeddings=True),
    "7 bits read": dict(read=lambda x: rounded(x, None, 63)),
    "by token": dict(read=rounded),
}
