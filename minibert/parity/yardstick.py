"""A tolerance with a reason: the same computation in float64, and the error that a dtype makes by itself.

The weights are first rounded to the trace's dtype. Then the model computes twice from the trace's own inputs: in
float64, which is the truth here, and in that dtype, which shows what rounding alone does. The error of a tensor x is
taken in two ways, both relative to the tensor's scale, the largest entry of its truth:

    largest    max |x − truth| / scale                        sees one wrong entry
    rms        root of the mean of (x − truth)², / scale      sees what is slightly wrong everywhere

A tensor is wrong when one of the two exceeds its limit:

    largest  >  K     · max(the dtype's own largest error, eps)
    rms      >  K_RMS · max(the dtype's own rms error, eps · the truth's own rms / scale)

"The dtype's own error" is the largest of three. The error here. The error in the tensor before, because a small tensor
can be right by luck (for gradients, in all gradients before). The error in the same tensor of an earlier layer (for the
head, of the layers' results), because errors come and go from layer to layer.

In half precision, the model computes SHAKEN times more, with other roundings, before a tensor is called wrong. A tensor
of fewer than FEW entries, such as the loss, has no rms of its own. Gradients that are 0 but for rounding have no scale
of their own (the key biases': a softmax does not see a shift), so a gradient's scale is at least QUIET of the largest
gradient before it. In float64 the truth is no more exact than what it measures: there, rounding is taken to do what it
does in float32, times the quotient of the two eps.

The two computations go side by side, tensor by tensor. So memory holds one layer of each, and no whole trace; but all
gradients, where the trace has some.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minibert.checkpoint.names import SIZES
from minibert.checkpoint.reading import shapes_only
from minibert.masked_lm import BertForMaskedLM
from minibert.parity.steps import Steps
from minibert.trace.table import GRADIENT, Inputs, check_inputs, exchanged_axes, hide_padding, row_of
from minibert.trace.tracefile import Trace

K = 8.0
K_RMS = 5.0
FEW = 32
QUIET = 0.1
SHAKEN = 4  # times that a model computes with other roundings before a trace in half precision is called wrong
PIECE = 2**20  # entries that are looked at together


class Error(NamedTuple):
    """How far a tensor is from the truth, relative to the scale: its worst entry, and all of them together."""

    largest: float
    rms: float


class Measure(NamedTuple):
    """What a tensor is measured with: its truth in float64, its scale, and the error that rounding explains."""

    name: str
    truth: Tensor
    scale: float
    explained: Error

    @property
    def allowed(self) -> Error:
        return Error(K * self.explained.largest, K_RMS * self.explained.rms)

    @property
    def limits(self) -> Error:
        """What is allowed, not relative to the scale."""
        return Error(*(each * self.scale for each in self.allowed))

    def error(self, x: Tensor) -> Error:
        """How far `x` is from the truth."""
        return error_of(x.to(self.truth.device), self.truth, self.scale)

    def stored_in(self, dtype: torch.dtype | None, own: torch.dtype) -> "Measure":
        """The same for a tensor that is stored in a coarser dtype than the trace's own, as a loss often is."""
        if dtype is None or torch.finfo(dtype).eps <= torch.finfo(own).eps:
            return self
        return self._replace(explained=Error(*(max(each, torch.finfo(dtype).eps) for each in self.explained)))

    def accepts(self, error: Error) -> bool:
        return error.largest <= self.allowed.largest and error.rms <= self.allowed.rms

    def share(self, error: Error) -> float:
        """The error as a share of what is allowed: 1 is the limit."""
        return max(error.largest / self.allowed.largest, error.rms / self.allowed.rms)

    def kind(self, error: Error) -> str:
        """Which of the two errors is nearer to its limit."""
        return "largest" if error.largest / self.allowed.largest >= error.rms / self.allowed.rms else "rms"

    def times(self, error: Error) -> float:
        """How many times worse an error is than rounding."""
        return max(error.largest / self.explained.largest, error.rms / self.explained.rms)


def measures(pairs: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype) -> Iterator[Measure]:
    """The measures from (name, the tensor in float64, the same computed in `rounding_dtype(dtype)`), in order of
    execution.
    """
    eps = torch.finfo(dtype).eps
    finer = eps / torch.finfo(rounding_dtype(dtype)).eps
    before, loudest = Error(0.0, 0.0), 0.0
    layers: dict[str, Error] = {}  # by the tensor's row in TABLE, the largest errors of the layers so far
    for name, truth, own in pairs:
        size = largest(truth)
        if name.startswith(GRADIENT):
            loudest = max(loudest, size)
            size = max(size, QUIET * loudest)
        measure = Measure(name, truth, size or 1.0, Error(0.0, 0.0))
        error = Error(*(finer * each for each in measure.error(own)))
        if not error.largest < float("inf"):  # where rounding alone overflows, nothing finite can be right either
            error = Error(0.0, 0.0)
        row = "layers.N.feed_forward_norm" if name.startswith(("head.", "logits")) else row_of(name)
        earlier = layers.get(row, error)
        least = Error(eps, max(eps * rms(truth) / measure.scale, 1e-3 * max(eps, error.largest)))
        explained = Error(*map(max, least, error, before, earlier))
        if name.startswith("layers."):
            layers[row] = Error(*map(max, error, earlier))
        if truth.numel() < FEW:
            explained = explained._replace(rms=explained.largest * K / K_RMS)
        yield measure._replace(explained=explained)
        before = Error(*map(max, before, error)) if name.startswith(GRADIENT) else error


def is_half(dtype: torch.dtype) -> bool:
    """Whether it is float16 or bfloat16."""
    return torch.finfo(dtype).eps > 1e-4


def rounding_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for the error that rounding makes in `dtype`."""
    return torch.float32 if dtype == torch.float64 else dtype


class Shaken(Steps):
    """The model with other roundings: what each LayerNorm gives is moved by up to one eps."""

    def __init__(self, model: BertForMaskedLM, inputs: Inputs, given: Trace, seed: int) -> None:
        super().__init__(model, inputs, given)
        self.generator = torch.Generator().manual_seed(seed)

    def layer_norm(self, name: str, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = super().layer_norm(name, x, norm)
        noise = torch.rand(x.shape, generator=self.generator).to(x.device) * 2 - 1
        return x + x * (noise * torch.finfo(x.dtype).eps).to(x.dtype)


class Yardstick:
    """What a trace is measured with. Raises ValueError if it is a trace of a model of another size."""

    def __init__(self, model: BertForMaskedLM, given: Trace, *, grad: bool) -> None:
        require_same_size(model, given)
        self.given, self.shapes = given, given.shapes()
        own = converted(model, given.dtype)
        self.exact = converted(own, torch.float64)
        self.rounded = converted(own, rounding_dtype(given.dtype))
        self.inputs = given.inputs()[0].to(next(model.parameters()).device)
        try:
            check_inputs(model.config, *self.inputs)
        except ValueError as error:
            raise ValueError(f"{given.name}: --model does not take its inputs: {error}") from error
        self.mask = self.inputs.attention_mask.bool()
        self.grad = grad and self.inputs.labels is not None
        self.others: dict[str, Error] | None = None  # the largest errors of other roundings; see `shaken`

    def measures(self, kind: type[Steps] = Steps) -> Iterator[Measure]:
        """In order of execution, zeros in the padding. `kind` may be a fault: both computations then have it, for what
        rounding does to a faulty model is not what it does to a right one."""
        return measures(self._pairs(kind), self.given.dtype)

    def errors(self, kind: type[Steps] = Steps) -> Iterator[tuple[Measure, Error]]:
        """Of every tensor that the trace has. Raises ValueError where its shape is not this model's."""
        for measure in self.measures(kind):
            name, wanted = measure.name, tuple(measure.truth.shape)
            shape = self.shapes.get(name)
            if shape is None:
                continue
            if shape != wanted:
                axes = exchanged_axes(shape, wanted)
                hint = ": axes {} and {} are exchanged".format(*axes) if axes else ""
                raise ValueError(
                    f"{self.given.name}: {name} is {shape}, and this model's is {wanted}{hint}. No fault is sought "
                    "before the shapes agree"
                )
            self.given.settle(name, measure.truth)
            measure = measure.stored_in(self.given.stored_dtype(name), self.given.dtype)
            yield measure, measure.error(self.there(name))

    def there(self, name: str) -> Tensor:
        """A tensor of the trace, with zeros where nothing is compared."""
        return self.hidden(name, self.given.read(name).to(self.mask.device))

    def hidden(self, name: str, x: Tensor) -> Tensor:
        """The same of a tensor that the model computed."""
        return hide_padding(name, x, self.given.compared(name, self.mask))

    def shaken(self, measure: Measure) -> Measure:
        """The measure with more chances for rounding, in half precision: a model that is about to decide between two
        words may be tipped over by any rounding, and then no multiple of one rounding's error is right. So before a
        tensor is called wrong, the model computes some times more, each time with other roundings.
        """
        if not is_half(self.given.dtype):
            return measure
        if self.others is None:
            self.others = {}
            exact = Steps(self.exact, self.inputs, self.given)
            shaken = [Shaken(self.rounded, self.inputs, self.given, seed).run() for seed in range(SHAKEN)]
            for (name, truth), *tried in zip(exact.run(), *shaken, strict=True):
                truth = self.hidden(name, truth)
                errors = [error_of(self.hidden(name, x), truth, largest(truth) or 1.0) for _, x in tried]
                finite = [error for error in errors if error.largest < float("inf")]
                self.others[name] = Error(*map(max, *finite)) if len(finite) > 1 else Error(0.0, 0.0)
        other = self.others.get(measure.name, Error(0.0, 0.0))
        return measure._replace(explained=Error(*map(max, measure.explained, other)))

    def _pairs(self, kind: type[Steps]) -> Iterator[tuple[str, Tensor, Tensor]]:
        exact, rounded = (kind(model, self.inputs, self.given) for model in (self.exact, self.rounded))
        for (name, truth), (_, own) in zip(exact.run(), rounded.run(), strict=True):
            yield name, self.hidden(name, truth), self.hidden(name, own)
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
    return max(piece.nan_to_num(0.0, 0.0, 0.0).abs().amax().item() for (piece,) in _pieces(x))


def rms(x: Tensor) -> float:
    """Over the finite entries."""
    pieces = (piece.double().nan_to_num(0.0, 0.0, 0.0) for (piece,) in _pieces(x))
    return (sum(piece.square().sum().item() for piece in pieces) / x.numel()) ** 0.5


def error_of(x: Tensor, truth: Tensor, scale: float = 1.0) -> Error:
    """How far two tensors are apart, in the wider of their dtypes. Infinite if one has a NaN or an infinity that the
    other has not.
    """
    most = squares = 0.0
    for one, two in _pieces(x, truth):
        same = (one == two) | (one.isnan() & two.isnan())
        apart = torch.where(same, 0.0, (one - two).abs()).nan_to_num(float("inf"), float("inf"))
        most = max(most, apart.amax().item())
        squares += apart.double().square().sum().item()
    return Error(most / scale, (squares / x.numel()) ** 0.5 / scale)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.reshape(-1).split(PIECE) for x in tensors), strict=True)
