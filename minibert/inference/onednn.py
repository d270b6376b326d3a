"""The linear layers of a prepared model on the CPU: oneDNN computes them, on weights that are in its own order.

torch computes nn.Linear in float32 with MKL, which is slower on many CPUs. In bfloat16 it uses oneDNN, but orders the
weights anew in each call. Here they are ordered once, and the activation is computed while its input is still in the
cache. oneDNN has two ways to compute a linear layer: as a matrix product, and as a 1×1 convolution. Which is the
fastest, or whether torch's own is, depends on the CPU (prepare.py). Layers of 8-bit numbers are in int8.py.

torch has no public way to call oneDNN like this. All private operators are in the first part of this file, as seen in
torch 2.13. If another version lacks one, or it computes something else, `working_ways` leaves the way out.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minibert.attention import has_amx
from minibert.model import MLMHead
from minibert.packing import PackedBatch

# -------------------------------------------------------------------------------------------------- private operators

ONE_BY_ONE = ([0, 0], [1, 1], [1, 1], 1)  # of a convolution: padding, stride, dilation, groups
Activation = tuple[str, str]  # oneDNN's name of an activation function, and of its approximation
NONE: Activation = ("none", "")
# hidden_act in config.json → the activation that oneDNN computes together with the product
FUSED: dict[str, Activation] = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError, NotImplementedError):  # another torch, or one that was built without oneDNN
        return False


def has_int8() -> bool:
    """Whether this CPU has instructions that multiply 8-bit numbers and add the products up exactly (VNNI). Without
    them oneDNN adds two products up in 16 bits, which is too little for the largest.
    """
    try:
        return bool(torch.cpu._is_vnni_supported() or torch.cpu.get_capabilities().get("avx_vnni"))
    except (AttributeError, RuntimeError):
        return False


def order_for_product(weight: Tensor) -> Tensor:
    """A copy of weight (outputs, inputs) in oneDNN's order. Only oneDNN can read the result."""
    ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return ordered


def multiply(x: Tensor, ordered: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """activation(x · weightᵀ + bias), of x (T, inputs): (T, outputs). T must not be 0."""
    name, algorithm = activation
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, ordered, bias, name, [], algorithm)
    return y


def order_int8(weight: Tensor) -> Tensor:
    """A copy of weight (outputs, inputs), int8, in oneDNN's order."""
    ordered: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return ordered


def multiply_int8(x: Tensor, ordered: Tensor, factor: Tensor, zeros: Tensor) -> Tensor:
    """x · weightᵀ, of x (T, inputs), int8, and each column times factor (outputs,): (T, outputs) float32. zeros
    (outputs,) int32. T must not be 0.

    VNNI multiplies numbers without a sign by numbers with one. For two with a sign, oneDNN has a fast kernel with AMX
    only. So elsewhere it gets x + 128, and is told that 128 means 0.
    """
    source, zero = (x, 0) if has_amx() else (x.view(torch.uint8) ^ 128, 128)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        source, 1.0, zero, ordered, factor, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def order_for_images(weight: Tensor, images: int, height: int) -> Tensor:
    """A copy of weight (outputs, inputs) in the order that oneDNN wants for convolving so many images of height × 1
    pixels.
    """
    shape = [images, weight.shape[1], height, 1]
    ordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], *ONE_BY_ONE, shape)
    return ordered


def convolve(x: Tensor, ordered: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """The same as `multiply`, of images (N, inputs, height, 1): (N, outputs, height, 1)."""
    name, algorithm = activation
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, ordered, bias, *ONE_BY_ONE, name, [], algorithm)
    return y


def describe_order(ordered: Tensor) -> tuple[int, ...]:
    """oneDNN's description of the order that a matrix is in."""
    return tuple(torch.ops.mkldnn._get_mkldnn_serialized_md(ordered).tolist())


# ------------------------------------------------------------------------------------------------------- linear layers


BADLY_SHARED, BADLY_SHARED_TOKENS = (768, 3072), range(500, 1281)  # outputs and inputs of a product; of how many tokens
PIECE = 384  # tokens


def refuse(what: str) -> Callable[..., Any]:
    """A method that a prepared model has not, since it would have no effect or half of one."""

    def refusal(*_: object, **__: object) -> NoReturn:
        raise ValueError(f"a model prepared for inference {what} the one it was made from")

    return refusal


class PrepackedLinear(nn.Module):
    """nn.Linear and an activation function in one call, as a matrix product. It holds copies of weight and bias.

    With AMX, oneDNN shares the second product of BERT-base's feed-forward badly among several threads, in bfloat16 and
    for some numbers of tokens. So that one is computed in pieces.
    """

    _apply = refuse("stays as it is and where it is: move or convert")
    state_dict = refuse("has no list of its tensors: ask")
    __reduce_ex__ = refuse("can be neither copied nor pickled: copy or save")

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation = NONE) -> None:
        super().__init__()
        self.in_pieces = weight.dtype == torch.bfloat16 and weight.shape == BADLY_SHARED and has_amx()
        self.bias = bias.clone()
        self.activation = activation
        self.pack(weight)

    def pack(self, weight: Tensor) -> None:
        self.weight = order_for_product(weight)  # torch cannot read it: it is no parameter, and is not saved

    def compute(self, x: Tensor) -> Tensor:
        if not (self.in_pieces and len(x) in BADLY_SHARED_TOKENS and torch.get_num_threads() > 1):
            return multiply(x, self.weight, self.bias, self.activation)
        pieces = x.chunk(-(-len(x) // PIECE))
        return torch.cat([multiply(piece, self.weight, self.bias, self.activation) for piece in pieces])

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if x.shape[0] else x.new_empty(0, self.bias.shape[0])


USUAL = (8, 64)  # images × height: most batches of many tokens want the order of the weights that this size wants
HEIGHTS = (4, 8, 12, 16, 18, 24, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, 256)


class ConvolvedLinear(PrepackedLinear):
    """The same as a 1×1 convolution, in float32. A token is a pixel, D is the number of its channels, and `height`
    tokens are an image. On CPUs that have AVX2 and not AVX-512, oneDNN has a faster kernel for this than for a product.

    The order that oneDNN wants the weights in depends on the height, and each batch has another number of tokens. So
    the height is one of those in HEIGHTS that want the usual order, and the last image is filled up with zeros. Finding
    the height takes some milliseconds for each new number of tokens.
    """

    def pack(self, weight: Tensor) -> None:
        self.shape = weight.shape  # (outputs, inputs)
        self.weight = order_for_images(weight, *USUAL)

    def height(self, tokens: int) -> int:
        return _best_height(*self.shape, tokens, torch.get_num_threads())

    def missing(self, tokens: int) -> int:
        """How many more tokens it takes to fill the last image."""
        return -tokens % self.height(tokens) if tokens else 0

    def compute(self, x: Tensor) -> Tensor:
        tokens, inputs = x.shape
        height = self.height(tokens)
        if missing := self.missing(tokens):
            x = torch.cat([x, x.new_zeros(missing, inputs)])
        images = x.reshape(-1, height, 1, inputs).permute(0, 3, 1, 2)  # (images, inputs, height, 1), inputs innermost
        y = convolve(images, self.weight, self.bias, self.activation)  # (images, outputs, height, 1)
        y = y.permute(0, 2, 3, 1).reshape(tokens + missing, -1)
        return y[:tokens] if missing else y


@cache
def _best_height(outputs: int, inputs: int, tokens: int, threads: int) -> int:
    """High images are faster, but leave more to fill up. The factor 1 + 4 / height is a fit to what was measured."""
    for height in sorted(HEIGHTS, key=lambda height: (tokens + -tokens % height) * (1 + 4 / height)):
        images = -(-tokens // height)
        if images > threads:  # then only how evenly the threads share them changes the order that is wanted
            images = threads + images % threads
        if _wanted_order(outputs, inputs, images, height) == _wanted_order(outputs, inputs, *USUAL):
            return height
    return USUAL[1]  # correct, but slow: the weights are ordered anew in each call


@cache
def _wanted_order(outputs: int, inputs: int, images: int, height: int) -> tuple[int, ...]:
    """The order that oneDNN wants the weights in for so many images of this height."""
    # oneDNN tells the order only by ordering a matrix. The first 4096 words of a vocabulary are ordered like all.
    return describe_order(order_for_images(torch.empty(min(outputs, 4096), inputs), images, height))


def filled_up(batch: PackedBatch, missing: int) -> PackedBatch:
    """The batch and one more sequence of `missing` tokens, for kernels that are fastest at certain numbers of tokens.
    The results of that sequence are thrown away. To `unpack`, the new batch is one row of all its tokens.
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


class PrepackedHead(nn.Module):
    """MLMHead with such linear layers. It holds an ordered copy of the word embeddings, beside `lookup`, those that the
    model looks words up in.
    """

    def __init__(
        self, head: MLMHead, linear: type[PrepackedLinear], word_embeddings: Tensor, lookup: Tensor, hidden_act: str
    ) -> None:
        super().__init__()
        self.dense = linear(head.dense.weight, head.dense.bias, FUSED[hidden_act])
        self.norm = head.LayerNorm
        self.decoder = linear(word_embeddings, head.bias)
        self.copied = (lookup.data_ptr(), lookup._version)

    def forward(self, x: Tensor, lookup: Tensor) -> Tensor:
        if (lookup.data_ptr(), lookup._version) != self.copied:
            raise ValueError(
                "the word embeddings of a model prepared for inference were changed, and its head still has the old "
                "ones: change them in the model it was made from, and prepare that"
            )
        return self.decoder(self.norm(self.dense(x)))  # (M, V)
