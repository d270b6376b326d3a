"""A right port whose rounding is its own: every operation computed in float64, and rounded once to the dtype."""

import torch
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
