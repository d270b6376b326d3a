"""A tolerance with a reason: the same computation in float64, and the error that a dtype alone makes.

The weights are rounded to the trace's dtype first. Then the model computes twice from the trace's own inputs: in
float64, which is the truth here, and in that dtype, which shows what rounding alone does. A tensor is wrong when

    max |x − truth| / scale   >   K · max(own error of this tensor and of the one before it, FLOOR · eps of the dtype)

with the same K and FLOOR for every dtype. The scale of a tensor is the largest entry of its truth. "And of the one
before it", because a single number such as the loss can be right by luck; for gradients it is all gradients before.
Gradients that are 0 but for rounding (the key biases': a softmax does not see a shift) have no scale of their own: a
gradient's scale is at least QUIET of the largest gradient before it.

In float64 the truth is no more exact than what it measures. What rounding does there is what it does in float32, times
the quotient of their eps.

Measured with K = 1 over 450 models like those of tests/test_false_alarms.py, ours against transformers' in float32,
bfloat16 and float16: the median of a model's largest quotient of the two sides is 1.0 (1.2 in gradients), the largest
of all 2.5 (3.0 in gradients). K = 8 leaves room for other kernels and deeper models.

The two computations go side by side, tensor by tensor, so that memory holds one layer of them and no whole trace.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.checkpoint import shapes_only
from minibert.config_keys import SIZES
from minibert.masked_lm import BertForMaskedLM
from minibert.parity.steps import Steps
from minibert.trace.files import Trace
from minibert.trace.inputs import check_inputs, hide_padding
from minibert.trace.table import GRADIENT, row_of

K = 8.0
FLOOR = 1.0
QUIET = 0.1
PIECE = 2**20  # entries that are looked at together


class Measure(NamedTuple):
    """What a tensor is measured with: its truth in float64, its scale, and the error that rounding explains and the
    one that is allowed, both relative to the scale."""

    name: str
    truth: Tensor
    scale: float
    explained: float

    @property
    def allowed(self) -> float:
        return K * self.explained

    def error(self, x: Tensor) -> float:
        """How far `x` is from the truth, relative to the scale."""
        return distance(x.to(self.truth.device), self.truth) / self.scale


def measures(pairs: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype) -> Iterator[Measure]:
    """The measures from (name, the tensor in float64, the same computed in `rounding_dtype(dtype)`), in order of
    execution."""
    eps = torch.finfo(dtype).eps
    floor = FLOOR * eps
    finer = eps / torch.finfo(rounding_dtype(dtype)).eps
    before = loudest = 0.0
    for name, truth, own in pairs:
        size = largest(truth)
        if name.startswith(GRADIENT):
            loudest = max(loudest, size)
            size = max(size, QUIET * loudest)
        measure = Measure(name, truth, size or 1.0, 0.0)
        error = finer * measure.error(own)
        if error == float("inf"):  # where rounding alone overflows, nothing finite can be right either
            error = 0.0
        yield measure._replace(explained=max(floor, error, before))
        before = max(before, error) if name.startswith(GRADIENT) else error


def rounding_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for the error that rounding makes in `dtype`."""
    return torch.float32 if dtype == torch.float64 else dtype


class Yardstick:
    """What a trace is measured with. Raises ValueError if it is a trace of a model of another size."""

    def __init__(self, model: BertForMaskedLM, given: Trace, *, grad: bool) -> None:
        require_same_size(model, given)
        self.given = given
        own = converted(model, given.dtype)
        self.exact = converted(own, torch.float64)
        self.rounded = converted(own, rounding_dtype(given.dtype))
        self.inputs = given.inputs()[0].to(next(model.parameters()).device)
        try:
            check_inputs(model.config, *self.inputs)
        except ValueError as error:
            raise ValueError(f"{given.name}: --model does not take its inputs: {error}") from error
        self.grad = grad and self.inputs.labels is not None

    def measures(self, kind: type[Steps] = Steps) -> Iterator[Measure]:
        """In order of execution, zeros in the padding. `kind` may be a fault: both computations then have it, for what
        rounding does to a faulty model is not what it does to a right one."""
        return measures(self._pairs(kind), self.given.dtype)

    def _pairs(self, kind: type[Steps]) -> Iterator[tuple[str, Tensor, Tensor]]:
        exact, rounded = (kind(model, self.inputs, self.given) for model in (self.exact, self.rounded))
        mask = self.inputs.attention_mask.bool()
        for (name, truth), (_, own) in zip(exact.run(), rounded.run(), strict=True):
            yield name, hide_padding(row_of(name), truth, mask), hide_padding(row_of(name), own, mask)
        if self.grad:
            for (name, truth), (_, own) in zip(exact.gradients(), rounded.gradients(), strict=True):
                yield name, truth, own


def require_same_size(model: BertForMaskedLM, given: Trace) -> None:
    """Raise ValueError if the sizes differ. The rest of a configuration may be the very fault that is sought."""
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


def largest(x: Tensor) -> float:
    """max |x|, over the finite entries."""
    found = 0.0
    for (piece,) in _pieces(x):
        size = span(piece)
        if not size < float("inf"):
            size = span(torch.where(piece.isfinite(), piece, 0.0))
        found = max(found, size)
    return found


def distance(x: Tensor, y: Tensor) -> float:
    """max |x − y|, in the wider of their dtypes; infinite if either has a NaN or an infinity that the other has not."""
    found = 0.0
    for one, two in _pieces(x, y):
        gap = span(one - two)
        if not gap < float("inf"):
            same = (one == two) | (one.isnan() & two.isnan())
            gap = span(torch.where(same, 0.0, one - two).nan_to_num(float("inf"), float("inf"), -float("inf")))
        found = max(found, gap)
    return found


def span(x: Tensor) -> float:
    """max |x|; NaN if there is one."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).item()


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].numel() <= PIECE:
        yield tensors
    else:
        yield from zip(*(x.reshape(-1).split(PIECE) for x in tensors), strict=True)
