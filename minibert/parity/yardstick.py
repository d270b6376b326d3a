"""A tolerance with a reason: the same computation in float64, and the error that a dtype alone makes.

The weights are rounded to the trace's dtype first. Then our model computes twice from the trace's own inputs: in
float64, which is the truth here, and in that dtype, which shows what rounding alone does. A tensor is wrong when

    max |x − truth| / scale   >   K · max(own error of this tensor and of those before it, FLOOR · eps of the dtype)

with the same K and FLOOR for every dtype. The scale of a tensor is the largest entry of its truth. "And of those
before it", because errors are handed on, and a single number such as the loss can be right by luck. Gradients
that are 0 but for rounding (the key biases': a softmax does not see a shift) have no scale of their own: a
gradient's scale is at least QUIET of the largest gradient's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.checkpoint import shapes_only
from minibert.model import BertForMaskedLM
from minibert.parity.trace import GRADIENT, INPUTS, Trace, trace

K = 8.0
FLOOR = 4.0
QUIET = 1e-3

# What must agree before a model and a trace can be compared at all. The rest of a config may be the fault.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass
class Yardstick:
    """The truth in float64, and by tensor name: its scale, the dtype's own error, and the error that is allowed,
    both relative to the scale."""

    truth: Trace
    dtype: torch.dtype
    scale: dict[str, float]
    own: dict[str, float]
    allowed: dict[str, float]


def yardstick(model: BertForMaskedLM, given: Trace) -> Yardstick:
    """What `given` is measured with. Raises ValueError if it is a trace of a model of another size."""
    require_same_size(model, given)
    inputs, _ = given.inputs()
    grad = inputs.labels is not None and any(name.startswith(GRADIENT) for name in given.shapes())
    rounded = converted(model, given.dtype)
    truth = trace(converted(rounded, torch.float64), *inputs, grad=grad)
    return measure(truth, trace(rounded, *inputs, grad=grad), given.dtype)


def require_same_size(model: BertForMaskedLM, given: Trace) -> None:
    for key in SIZES:
        mine, other = getattr(model.config, key), getattr(given.config, key)
        if mine != other:
            raise ValueError(
                f"{given.name} is of a model with {key} {other}, and --model has {mine}: give its own model"
            )


def converted(model: BertForMaskedLM, dtype: torch.dtype) -> BertForMaskedLM:
    """The model in evaluation mode with its weights in `dtype`; weights that need no conversion are shared."""
    with shapes_only():
        result = BertForMaskedLM(model.config)
    result.load_state_dict({name: x.detach().to(dtype) for name, x in model.state_dict().items()}, assign=True)
    return result.eval().requires_grad_(True)


def measure(truth: Trace, own: Trace, dtype: torch.dtype) -> Yardstick:
    """The yardstick from the truth and from what a run in `dtype` makes of it."""
    names = [name for name in truth.names if name not in INPUTS]
    scale = scales({name: largest(truth.tensors[name]) for name in names})
    errors = {name: distance(own.tensors[name], truth.tensors[name]) / scale[name] for name in names}
    allowed, before = {}, FLOOR * torch.finfo(dtype).eps
    for name in names:
        if errors[name] < float("inf"):  # where rounding alone overflows, nothing finite can be right either
            before = max(before, errors[name])
        allowed[name] = K * before
    return Yardstick(truth, dtype, scale, errors, allowed)


def scales(magnitudes: dict[str, float]) -> dict[str, float]:
    """What errors are relative to: the largest entry, and for gradients at least QUIET of the largest gradient's."""
    quiet = QUIET * max((size for name, size in magnitudes.items() if name.startswith(GRADIENT)), default=0.0)
    return {name: max(size, quiet if name.startswith(GRADIENT) else 0.0) or 1.0 for name, size in magnitudes.items()}


def largest(x: Tensor) -> float:
    """max |x|, over the finite entries."""
    x = x.double().abs()
    x = x[x.isfinite()]
    return x.max().item() if x.numel() else 0.0


def distance(x: Tensor, y: Tensor) -> float:
    """max |x − y|; infinite if either has a NaN or an infinity that the other has not."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    gap = torch.where(same, 0.0, (x - y).abs())
    return float("inf") if bool(gap.isnan().any()) else gap.max().item()
