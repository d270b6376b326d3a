"""A loaded model → its fastest form on the device that it is on.

`prepare_for_inference` returns a model with the same two doors and the same answers, up to rounding. Everywhere,
`predict` runs the last layer for the asked positions only: no later layer reads the others. Beyond that,

on the CPU, linear layers go to oneDNN with weights that were put in its own order beforehand, and the activation is
computed while their result is still in the cache. torch's own nn.Linear in float32 goes to MKL, which is up to two
times slower on an AMD CPU and slower for short batches on others; in bfloat16 it goes to oneDNN too, but orders the
weights anew in each call. oneDNN has two ways, as a product and as a 1×1 convolution; which is fastest is measured.

on CUDA, the weights are bfloat16, which is what lets attention.py choose flash attention on packed tokens. What is
done for each token alone is compiled, once for all lengths, by the first call; attention, which asks the host for the
lengths, stays outside. Small batches are bound by the launching of kernels, not by the kernels: they are rounded up to
a few sizes, and from the second batch of a size on `predict` replays a CUDA graph.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from math import inf
from threading import Lock
from time import perf_counter
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import checkpoint, checks
from minibert.kernels import attention, attention_at, forced_kernel, use_kernel
from minibert.masked_lm import BertForMaskedLM
from minibert.model import EncoderLayer, MLMHead
from minibert.packing import PackedBatch

# hidden_act → the name and the algorithm of oneDNN's fused form
FUSED = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}
COMPILED_ON = ("cuda",)
GRAPH_TOKENS = 4096  # with more tokens than this the kernels take longer than their launching
GRAPHS = 64  # at most; batches of other sizes than theirs run without


def prepare_for_inference(model: BertForMaskedLM, dtype: torch.dtype | None = None) -> "PreparedBert":
    """The fastest form of `model` for inference on its device. It holds a copy of every tensor: what happens to `model`
    afterwards does not reach it, and `model` itself stays as it is. A model that is prepared already is returned.

    dtype: of the weights and the arithmetic; None is the model's own on the CPU, bfloat16 on CUDA. Raises
    ValueError for a dtype that this device has no instructions for, for a prepared model of another dtype, and for a
    model with forward hooks, which would not be called.
    """
    if isinstance(model, PreparedBert):
        had = model.embeddings.word.weight.dtype
        if dtype not in (None, had):
            raise ValueError(f"this model is prepared in {had} already: for {dtype}, prepare the one it was made from")
        return model
    if hooked := [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]:
        raise ValueError(
            f"{hooked[0] or 'the model'} has a forward hook, and a prepared model would not call it: remove the hook, "
            "or use the model as it is"
        )
    device = model.embeddings.word.weight.device
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else model.embeddings.word.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype must be a floating-point type such as torch.bfloat16, not {dtype!r}")
    if device.type == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("this CPU has no instructions for bfloat16: leave dtype out, or use torch.float32")
    with torch.inference_mode(False):  # tensors that are made in inference mode could not be used outside it
        return PreparedBert(model, dtype)


class PreparedBert(BertForMaskedLM):
    """What `prepare_for_inference` returns. It answers, and that is all: it cannot be trained, saved, moved, copied or
    changed. The model it was made from can.
    """

    def __init__(self, model: BertForMaskedLM, dtype: torch.dtype) -> None:
        with checkpoint.shapes_only():
            super().__init__(model.config)
        word = model.embeddings.word.weight
        linear = fastest_linear(dtype) if word.is_cpu else None
        # Its own copy of every tensor. A matrix that is put into oneDNN's order is copied by that.
        ordered = {f"{name}.weight" for name, part in self.named_modules() if linear and isinstance(part, nn.Linear)}
        own = {name: x.detach().to(dtype, copy=name not in ordered) for name, x in model.state_dict().items()}
        self.load_state_dict(own, assign=True)
        self.requires_grad_(False).eval()
        self.load_report = model.load_report
        word = self.embeddings.word.weight
        self._before, self._after = before_attention, after_attention
        self._graphs: Graphs | None = None
        if linear:
            for layer in self.layers:
                assert isinstance(layer, EncoderLayer)
                _prepack_layer(layer, linear, model.config.hidden_act)
            self.head = PrepackedHead(self.head, linear, word, model.config.hidden_act)  # type: ignore[assignment]
        if word.device.type in COMPILED_ON and _can_compile():
            self._before = torch.compile(before_attention, dynamic=True)
            self._after = torch.compile(after_attention, dynamic=True)
        if word.is_cuda and _has_flash_attention(word, model.config.head_size):
            self._graphs = Graphs(word.device)
        for part in list(self.modules()):
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            part.__class__ = _fixed(type(part), Fixed if part is self else FixedPart)  # type: ignore[arg-type]

    def encode(self, batch: PackedBatch) -> Tensor:
        """As in BertForMaskedLM: (T, D)."""
        checks.require_embeddings(batch.largest, self.config)
        filled = self._fill_up(batch)
        x = self.embeddings(filled)  # (T, D)
        for layer in self.layers:
            x = self._after(layer, attention(*self._before(layer, x), filled), x)  # (T, D)
        return x if filled is batch else x[: batch.num_tokens]

    def predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """As in BertForMaskedLM: (M, V); the last layer runs for these positions only."""
        checks.require_positions(positions, batch.num_tokens)
        checks.require_embeddings(batch.largest, self.config)
        if self._graphs is not None and len(positions):
            logits = self._graphs(self._predict, batch, positions, self.config.max_position_embeddings)
            if logits is not None:
                return logits
        return self._predict(batch, positions)

    def _predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        batch = self._fill_up(batch)
        x = self.embeddings(batch)  # (T, D)
        *layers, last = self.layers
        for layer in layers:
            x = self._after(layer, attention(*self._before(layer, x), batch), x)  # (T, D)
        context = attention_at(*self._before(last, x), batch, positions)  # (M, H, K)
        return self.head(self._after(last, context, x[positions]), self.embeddings.word.weight)  # (M, V)

    def _fill_up(self, batch: PackedBatch) -> PackedBatch:
        """Convolutions need certain numbers of tokens. Here they get what is best for the first of them, and mostly for
        all, once; what still does not fit is filled up in `multiply`.
        """
        qkv = self.layers[0].get_submodule("attention.qkv")
        missing = qkv.missing(batch.num_tokens) if isinstance(qkv, ConvolvedLinear) else 0
        return filled_up(batch, missing) if missing else batch

    @classmethod
    def from_pretrained(cls, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError("load the weights with BertForMaskedLM.from_pretrained, and prepare that")


# ----------------------------------------------------------------------------------------------- what cannot be changed

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
    def __getitem__(self, index: Any) -> Any:  # a slice of it is a new list
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


@cache
def _fixed(kind: type[nn.Module], fixed: type[Fixed]) -> type[nn.Module]:
    """`kind`, but with the refusals of `fixed`."""
    return FixedList if kind is nn.ModuleList else type(kind.__name__, (fixed, kind), {})


def before_attention(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, each (T, H, K), of x (T, D)"""
    assert isinstance(layer, EncoderLayer)
    return layer.attention.split_heads(x)


def after_attention(layer: nn.Module, context: Tensor, x: Tensor) -> Tensor:
    """The rest of EncoderLayer, for any tokens: context (M, H, K) and what the layer read, x (M, D) → (M, D)"""
    assert isinstance(layer, EncoderLayer)
    x = layer.attention_norm(layer.attention.output(context.flatten(-2)) + x)  # (M, D)
    return layer.feed_forward_norm(layer.feed_forward(x) + x)  # (M, D)


# ------------------------------------------------------------------------------------------------------------------ CPU


class PrepackedLinear(nn.Module):
    """nn.Linear, and an activation, in one oneDNN call on weights in oneDNN's own order. CPU, inference only."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__()
        self.bias = bias
        self.activation = activation
        self.pack(weight)

    # What is private to torch is called here, in ConvolvedLinear, and in what that one calls.

    def pack(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # an opaque tensor: no parameter, not saved

    def multiply(self, x: Tensor) -> Tensor:
        name, algorithm = self.activation
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x) if x.shape[0] else x.new_empty(0, self.bias.shape[0])


USUAL = (8, 64)  # images × height whose order of the weights is taken: that which most heights of many tokens want
HEIGHTS = (4, 8, 12, 16, 18, 24, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, 256)
ONE_BY_ONE = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


class ConvolvedLinear(PrepackedLinear):
    """The same as a 1×1 convolution: a token is a pixel, D its channels, and `height` tokens are an image. On CPUs with
    AVX2 and no AVX-512, oneDNN has a faster kernel for that than for the product. float32.

    In which order it wants the weights depends on the height, and every batch has another number of tokens. So the
    height is one of those in HEIGHTS that want the same order, and the last image is filled up with zeros. To find out
    costs some milliseconds when a number of tokens is new.
    """

    def pack(self, weight: Tensor) -> None:
        self.shape = weight.shape  # (outputs, inputs)
        self.weight = _order_for_images(weight, *USUAL)

    def missing(self, tokens: int) -> int:
        """How many more tokens it takes to fill the last image."""
        return -tokens % self.height(tokens) if tokens else 0

    def height(self, tokens: int) -> int:
        return _best_height(*self.shape, tokens, torch.get_num_threads())

    def multiply(self, x: Tensor) -> Tensor:
        tokens, inputs = x.shape
        height = self.height(tokens)
        if missing := -tokens % height:
            x = torch.cat([x, x.new_zeros(missing, inputs)])
        images = x.reshape(-1, height, 1, inputs).permute(0, 3, 1, 2)  # (images, inputs, height, 1), inputs innermost
        name, algorithm = self.activation
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self.weight, self.bias, *ONE_BY_ONE, name, [], algorithm
        )
        y = y.permute(0, 2, 3, 1).reshape(tokens + missing, -1)
        return y[:tokens] if missing else y


def filled_up(batch: PackedBatch, missing: int) -> PackedBatch:
    """The batch and one more sequence of `missing` tokens, whose results nobody reads, for kernels that are fastest at
    certain T. For `unpack` it is one row of all its tokens: the rectangle belongs to the batch that was given.
    """
    zeros = batch.input_ids.new_zeros(missing)
    tokens = batch.num_tokens + missing
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, zeros]),
        token_type_ids=torch.cat([batch.token_type_ids, zeros]),
        position_ids=torch.cat([batch.position_ids, zeros]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + missing]),
        lengths=(*batch.lengths, missing),
        padded_shape=(1, tokens),
        padded_index=torch.arange(tokens, device=batch.padded_index.device),
    )


@cache
def _best_height(outputs: int, inputs: int, tokens: int, threads: int) -> int:
    """Large images are faster, but leave more to fill up: a small model of what was measured."""
    for height in sorted(HEIGHTS, key=lambda height: (tokens + -tokens % height) * (1 + 4 / height)):
        images = -(-tokens // height)
        if images > threads:  # as it seems, all that then matters is how evenly threads can share them; a test looks
            images = threads + images % threads
        if _order_fits(outputs, inputs, images, height):
            return height
    return USUAL[1]  # right, and slow: the weights are ordered anew in each call


@cache
def _order_fits(outputs: int, inputs: int, images: int, height: int) -> bool:
    """Whether this CPU's oneDNN wants the weights for so many images of this height in the same order as for USUAL."""
    return _describe_order(outputs, inputs, images, height) == _describe_order(outputs, inputs, *USUAL)


@cache
def _describe_order(outputs: int, inputs: int, images: int, height: int) -> tuple[int, ...]:
    # Nobody asks oneDNN but with a matrix; one of a whole vocabulary takes 50 ms, and is ordered as one of 4096 words.
    weight = _order_for_images(torch.empty(min(outputs, 4096), inputs), images, height)
    return tuple(torch.ops.mkldnn._get_mkldnn_serialized_md(weight).tolist())


def _order_for_images(weight: Tensor, images: int, height: int) -> Tensor:
    """weight (outputs, inputs) as oneDNN wants it for a convolution of so many images of height × 1 pixels."""
    shape = [images, weight.shape[1], height, 1]
    ordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], *ONE_BY_ONE, shape)
    return ordered


class PrepackedHead(nn.Module):
    """MLMHead with prepacked linear maps. It holds a second, ordered copy of the word embeddings."""

    def __init__(self, head: MLMHead, linear: type[PrepackedLinear], word_embeddings: Tensor, hidden_act: str) -> None:
        super().__init__()
        self.dense = linear(head.dense.weight, head.dense.bias, FUSED[hidden_act])
        self.norm = head.norm
        self.decoder = linear(word_embeddings, head.bias)
        self.ordered = (word_embeddings.data_ptr(), word_embeddings._version)

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        if (word_embeddings.data_ptr(), word_embeddings._version) != self.ordered:
            raise ValueError(
                f"the word embeddings of {PREPARED} were changed, and its head has a copy in another order: change "
                "them in the one it was made from, and prepare that"
            )
        return self.decoder(self.norm(self.dense(x)))  # (M, V)


def _prepack_layer(layer: EncoderLayer, linear: type[PrepackedLinear], hidden_act: str) -> None:
    attention, feed_forward = layer.attention, layer.feed_forward
    for module, name, activation in (
        (attention, "qkv", ("none", "")),
        (attention, "output", ("none", "")),
        (feed_forward, "intermediate", FUSED[hidden_act]),
        (feed_forward, "output", ("none", "")),
    ):
        plain = getattr(module, name)
        setattr(module, name, linear(plain.weight, plain.bias, activation))
    feed_forward.activation = nn.Identity()  # it is part of `intermediate` now


@cache
def fastest_linear(dtype: torch.dtype) -> type[PrepackedLinear] | None:
    """The fastest of nn.Linear (None) and the two above, as far as they are there and give what it gives. Measured once
    in a process, in a tenth of a second, on a linear layer of BERT-base's size and GELU, with few tokens and with many.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    generator = torch.Generator().manual_seed(0)
    few, many, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((16, 768), (128, 768), (1536, 768), (1536,))
    )
    weight /= 768**0.5  # the results are of order 1
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # another order of the sums; a rounding or two to 2^-8

    def plain(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    ways: dict[type[PrepackedLinear] | None, Callable[[Tensor], Tensor]] = {None: plain}
    with torch.inference_mode():
        for packing in (PrepackedLinear, ConvolvedLinear) if dtype == torch.float32 else (PrepackedLinear,):
            with suppress(AttributeError, RuntimeError, NotImplementedError):  # another torch, or one without oneDNN
                packed = packing(weight, bias, FUSED["gelu"])
                if all(torch.allclose(packed(x), plain(x), rtol=tolerance, atol=tolerance) for x in (few, many)):
                    ways[packing] = packed
        fastest = {(kind, x): inf for kind in ways for x in (few, many)}
        for _ in range(5):  # in turn, so that whatever else the machine does hits all alike
            for kind, x in fastest:
                began = perf_counter()
                ways[kind](x)
                fastest[kind, x] = min(fastest[kind, x], perf_counter() - began)
    return min(ways, key=lambda kind: fastest[kind, few] * fastest[kind, many])


# ----------------------------------------------------------------------------------------------------------------- CUDA


def _can_compile() -> bool:
    if find_spec("triton") is None:
        warnings.warn("Triton is not installed, so nothing is compiled: this is slower than it could be", stacklevel=4)
        return False
    return True


def _has_flash_attention(weight: Tensor, head_size: int) -> bool:
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return (
        half and head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    )


Predict = Callable[[PackedBatch, Tensor], Tensor]


class Graphs:
    """`predict` as CUDA graphs: one for each rounded size of a batch, captured when that size is seen a second time.

    One thread at a time, and one stream: the graphs share their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.seen: Counter[tuple[int, int, int]] = Counter()
        self.captured: dict[tuple[int, int, int], CapturedPredict] = {}
        self.lock = Lock()

    def __call__(self, predict: Predict, batch: PackedBatch, positions: Tensor, longest: int) -> Tensor | None:
        """The logits (M, V); or None if the batch is too large for a graph, or the first of its size. longest: how long
        a sequence of this model can be.
        """
        if max(batch.num_tokens, len(positions)) > GRAPH_TOKENS or forced_kernel() is not None or capturing():
            return None
        size = (_round_up(batch.num_tokens), _power_of_two(batch.num_sequences), _round_up(len(positions)))
        with self.lock:
            self.seen[size] += 1
            if size not in self.captured:
                if self.seen[size] == 1 or len(self.captured) == GRAPHS:
                    return None
                self.captured[size] = CapturedPredict(self, predict, *size, longest=longest)
            return self.captured[size](batch, positions)


class CapturedPredict:
    """One CUDA graph, and the tensors that it reads. A smaller batch leaves the rest of them as it was: no token
    outside a sequence is looked at by attention, and nobody asks for its logits.
    """

    def __init__(
        self, graphs: Graphs, predict: Predict, tokens: int, sequences: int, asked: int, *, longest: int
    ) -> None:
        def zeros(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=graphs.device)

        with torch.inference_mode(False):  # so that they can be written to in any mode
            self.positions = zeros(asked)
            self.batch = PackedBatch(
                input_ids=zeros(tokens),
                token_type_ids=zeros(tokens),
                position_ids=zeros(tokens),
                cu_seqlens=zeros(sequences + 1, torch.int32),
                lengths=(longest,) + (0,) * (sequences - 1),  # flash attention reads their number and the longest
                padded_shape=(0, 0),  # this and what follows is not read
                padded_index=zeros(0),
                largest=(0, 0, 0),
            )

        def run() -> Tensor:
            with torch.inference_mode(), use_kernel("varlen"):
                return predict(self.batch, self.positions)

        self.replay, self.logits = capture(run, graphs)

    def __call__(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        tokens, sequences, asked = batch.num_tokens, batch.num_sequences, len(positions)
        with torch.inference_mode():
            self.batch.input_ids[:tokens] = batch.input_ids
            self.batch.token_type_ids[:tokens] = batch.token_type_ids
            self.batch.position_ids[:tokens] = batch.position_ids
            self.batch.cu_seqlens[: sequences + 1] = batch.cu_seqlens
            self.batch.cu_seqlens[sequences + 1 :] = tokens  # sequences of no token
            # A position that is not in the batch must fail in the indexing, not find one of the tokens beyond its end.
            inside = (positions >= 0) & (positions < tokens)
            self.positions[:asked] = torch.where(inside, positions, self.batch.num_tokens)
            self.replay()
        return self.logits[:asked].clone()


def capture(run: Callable[[], Tensor], graphs: Graphs) -> tuple[Callable[[], None], Tensor]:
    """`run` as a CUDA graph: what replays it, and the tensor that then holds its result."""
    with torch.cuda.device(graphs.device), torch.inference_mode(False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # first calls compile, and allocate work space
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: it is only this one's calls that are captured.
        with torch.cuda.graph(graph, pool=graphs.pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result


def capturing() -> bool:
    """Whether our caller is capturing a graph of its own."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _round_up(number: int) -> int:
    """To a multiple of 64 or, from 1024 on, of a sixteenth of the power of two above: less than an eighth is added."""
    step = max(64, _power_of_two(number) // 16)
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
