"""Linear layers of 8-bit numbers, on CPUs that have instructions for them: a quarter of float32's memory, less time.

A number x is rounded to a whole number of steps, from −127 to 127. Then the product is one of whole numbers, which the
CPU adds up exactly:

    x ≈ step_x · x₈      w ≈ step_w · w₈      x · w ≈ step_x · step_w · (x₈ · w₈)

Each output of a weight matrix and each token of the input has a step of its own: its largest number over 127. So a
token with large numbers costs the others nothing, and the steps for a text are the same whatever else is in the batch.
LayerNorm, the activation function and the residual sums stay in float32. Attention is computed in bfloat16 where the
CPU has instructions for that, and else in float32.

Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022,
https://arxiv.org/abs/2208.07339, section 2.1 and "vector-wise quantization" in 3.1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minibert.inference.onednn import FUSED, Activation, PrepackedLinear, multiply_int8, order_int8

LARGEST = 127
# The activation functions in place, so that no second tensor of their size is made and read.
IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    FUSED["gelu"]: torch.ops.aten.gelu_,
    FUSED["gelu_new"]: partial(torch.ops.aten.gelu_, approximate="tanh"),
    FUSED["relu"]: torch.relu_,
    FUSED["silu"]: torch.ops.aten.silu_,
}


def to_int8(x: Tensor, *, spare: bool = False) -> tuple[Tensor, Tensor]:
    """x (N, inputs) float32, as whole numbers (N, inputs) int8 and the step of each row (N, 1) float32. spare: x may be
    written over.
    """
    largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))  # faster than x.abs().amax(1)
    step = largest / LARGEST
    # In a row of zeros 0 / 0 becomes some whole number, and the step of 0 makes 0 of it again.
    steps = x.div_(step) if spare else x / step
    return steps.round_().to(torch.int8), step


class Int8Linear(PrepackedLinear):
    """nn.Linear and an activation function. result: the type of what it returns. spare: whether nobody reads its input
    afterwards, so that it may be written over.
    """

    result = torch.float32
    spare = False

    def pack(self, weight: Tensor) -> None:
        rounded, step = to_int8(weight)
        self.weight, self.step = order_int8(rounded), step.flatten()  # (outputs,)
        self.zero_points = torch.zeros_like(self.step, dtype=torch.int32)

    def compute(self, x: Tensor) -> Tensor:
        rounded, step = to_int8(x.float(), spare=self.spare)
        y = multiply_int8(rounded, self.weight, self.step, self.zero_points)  # (T, outputs)
        torch.addcmul(self.bias, y, step, out=y)
        if self.activation in IN_PLACE:
            IN_PLACE[self.activation](y)
        return y.to(self.result)


class Int8Embedding(nn.Module):
    """A lookup of vectors that are stored as 8-bit numbers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.step = to_int8(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.step[ids]  # (T, D)
