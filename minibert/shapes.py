"""A model that has shapes and no memory yet: before its weights are read, each straight into its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this block modules have shapes, but no memory and no initial values. In this thread only: torch's own
    `with torch.device("meta")` also writes a variable that all threads share.
    """
    with _NoMemory():
        yield


class _NoMemory(TorchFunctionMode):
    """Makes tensors on the meta device, and leaves out what would fill one. That would change nothing there, but torch
    does some of it in Python, and imports sympy and torch.compile for that: a second, and twice the memory of the
    bundled weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        # Which of torch.nn.init's functions come here whole, and which as the steps that they take, depends on torch.
        if in_place or getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **{**kwargs, "device": "meta"} if func in (torch.empty, torch.zeros, torch.ones) else kwargs)
