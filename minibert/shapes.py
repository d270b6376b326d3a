"""A model that has shapes and no memory yet: before its weights are read, each straight into its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this block modules have shapes, but no memory and no initial values."""
    with torch.device("meta"), _NoInitialValues():
        yield


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what would fill a tensor. It would change nothing on the meta device, but torch does some of it there
    in Python, and imports sympy and torch.compile for that: a second, and twice the memory of the bundled weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        # Which of torch.nn.init's functions come here whole, and which as the steps that they take, depends on torch.
        if in_place or getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
