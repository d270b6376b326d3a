"""What a prepared model refuses, so that nothing it is asked to do has no effect, or half of one."""

from functools import cache
from typing import Any, NoReturn, Self

from torch import Tensor, nn

PREPARED = "a model prepared for inference"


class Fixed(nn.Module):
    """What a prepared model and its parts refuse, because it would have no effect, or half of one. On the CPU, matrices
    are copies in oneDNN's own order, which torch does not know as parameters. On CUDA, kernels are recorded together
    with the addresses of the tensors that they read.
    """

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError(f"{PREPARED} cannot be trained: train the one it was made from")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        return self.train(requires_grad)

    def _apply(self, *arguments: Any, **settings: Any) -> NoReturn:
        """What .to(), .half(), .cpu(), .share_memory() and the like go through."""
        raise ValueError(
            f"{PREPARED} stays as it is and where it is: move or convert the one it was made from, and prepare that"
        )

    def compile(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(f"{PREPARED} is compiled already, where that pays: compile the one it was made from")

    def _forward_rectangle(self, *arguments: Any, **settings: Any) -> NoReturn:
        """What the padded call goes through while a program is recorded."""
        raise ValueError(f"{PREPARED} cannot be recorded: export or trace the one it was made from")

    def _looked_into(self, asked: bool) -> bool:
        """Whether the padded call keeps its padding: there are no hooks here, and no gradients."""
        return False

    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(f"{PREPARED} keeps its size: resize the one it was made from, and prepare that")

    def gradient_checkpointing_enable(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(f"{PREPARED} cannot be trained: train the one it was made from")

    def save_pretrained(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(f"{PREPARED} cannot be saved: save the one it was made from")

    def load_state_dict(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(
            f"{PREPARED} takes no other weights: load them into the one it was made from, and prepare that"
        )

    def state_dict(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(
            f"{PREPARED} has no list of its tensors, since some are in an order that only oneDNN knows: ask the one it "
            "was made from. Its device is that of model.embeddings.word.weight"
        )

    parameters = named_parameters = state_dict

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """What copy, deepcopy, pickle and torch.save go through."""
        raise ValueError(
            f"{PREPARED} can be neither copied nor pickled: copy or save the one it was made from, and prepare that"
        )

    def add_module(self, name: str, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(f"{PREPARED} stays as it is: change {name!r} of the one it was made from, and prepare that")

    register_module = register_parameter = register_buffer = add_module

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, nn.Module | Tensor) or name in self._modules or name in self._parameters:
            self.add_module(name)
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def __delattr__(self, name: str) -> None:
        self.add_module(name)


class FixedPart(Fixed):
    """A part of a prepared model. It is not run as a whole, or not always; the model as a whole may have hooks."""

    def register_forward_hook(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(
            f"{PREPARED} does not run its parts one by one, so a hook on one of them would not be called: register it "
            "on the one it was made from"
        )

    register_forward_pre_hook = register_full_backward_hook = register_full_backward_pre_hook = register_forward_hook


class FixedList(FixedPart, nn.ModuleList):
    def insert(self, index: int, module: nn.Module) -> NoReturn:
        self.add_module(str(index))

    def __getitem__(self, index: Any) -> Any:  # a slice of it is a new list
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def fix(model: nn.Module) -> None:
    """From now on, `model` and its parts refuse. Dropout is off, whatever happens to the mode of a part."""
    for part in list(model.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        part.__class__ = _fixed(type(part), Fixed if part is model else FixedPart)  # type: ignore[arg-type]


@cache
def _fixed(kind: type[nn.Module], fixed: type[Fixed]) -> type[nn.Module]:
    """`kind`, but with the refusals of `fixed`."""
    return FixedList if kind is nn.ModuleList else type(kind.__name__, (fixed, kind), {})
