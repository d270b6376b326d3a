"""Which matrices were multiplied in which type."""

from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """The types in which linear layers are multiplied while the block lasts."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.__name__.split(".")[0]) in ("mm", "addmm", "linear"):
            self.dtypes.add(args[2 if name == "addmm" else 1].dtype)
        return function(*args, **(kwargs or {}))
