"""A loaded model → its fastest form on the device that it is on.

`prepare_for_inference` returns a model with the same two doors and the same answers, up to rounding. On the CPU
it differs in this:

- Linear layers go to oneDNN with weights that were put in its own order beforehand, and the activation is
computed while their
  result is still in the cache. torch's own nn.Linear in float32 goes to MKL, which is up to two times slower on
  an AMD CPU and somewhat slower on an Intel one; in bfloat16 it goes to oneDNN too, but orders the weights anew
  in each call.
- `predict` runs the last layer for the asked positions only: no later layer reads the others.

On CUDA it is the same model in bfloat16, which is what lets attention.py choose flash attention on packed tokens.
"""

from functools import cache
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import checkpoint
from minibert.attention import attention_at
from minibert.model import BertForMaskedLM, EncoderLayer, MLMHead
from minibert.packing import PackedBatch

# hidden_act → the name and the algorithm of oneDNN's fused form
FUSED = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}


def prepare_for_inference(model: BertForMaskedLM, dtype: torch.dtype | None = None) -> "PreparedBert":
    """The fastest form of `model` for inference on its device. `model` itself stays as it is.

    dtype: of the weights and the arithmetic; None is the model's own on the CPU, bfloat16 on CUDA. Raises
    ValueError for a dtype that this device has no instructions for.
    """
    device = model.embeddings.word.weight.device
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else model.embeddings.word.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype must be a floating-point type such as torch.bfloat16, not {dtype!r}")
    if device.type == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("this CPU has no instructions for bfloat16: leave dtype out, or use torch.float32")
    return PreparedBert(model, dtype)


class PreparedBert(BertForMaskedLM):
    """What `prepare_for_inference` returns. It cannot be trained or saved: the model it was made from can."""

    def __init__(self, model: BertForMaskedLM, dtype: torch.dtype) -> None:
        with checkpoint.shapes_only():
            super().__init__(model.config)
        self.load_state_dict(
            {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}, assign=True
        )
        self.load_report = model.load_report
        self.requires_grad_(False).eval()
        if self.embeddings.word.weight.is_cpu and _prepacking_pays(dtype):
            for layer in self.layers:
                assert isinstance(layer, EncoderLayer)
                _prepack_layer(layer, model.config.hidden_act)
            head = PrepackedHead(self.head, self.embeddings.word.weight, model.config.hidden_act)
            self.head = head  # type: ignore[assignment]

    def predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """As in BertForMaskedLM; the last layer runs for these positions only."""
        batch.require_positions(positions)
        x = self.embeddings(batch)  # (T, D)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, batch)  # (T, D)
        assert isinstance(last, EncoderLayer)
        query, key, value = last.attention.split_heads(x)  # each (T, H, K)
        context = attention_at(query, key, value, batch, positions)  # (M, H, K)
        x = last.attention_norm(last.attention.output(context.flatten(-2)) + x[positions])  # (M, D)
        x = last.feed_forward_norm(last.feed_forward(x) + x)  # (M, D)
        return self.head(x, self.embeddings.word.weight)  # (M, V)

    def train(self, mode: bool = True) -> "PreparedBert":
        if mode:
            raise ValueError("a model prepared for inference cannot be trained: train the one it was made from")
        super().train(False)
        return self

    def save_pretrained(self, folder: object) -> None:
        raise ValueError("a model prepared for inference cannot be saved: save the one it was made from")


class PrepackedLinear(nn.Module):
    """nn.Linear, and an activation, in one oneDNN call on weights in oneDNN's own order. CPU, inference only."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # an opaque tensor: no parameter, not saved
        self.bias = bias
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.bias.shape[0])
        name, algorithm = self.activation
        # Private to torch, and the only place where it is called.
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y


class PrepackedHead(nn.Module):
    """MLMHead with prepacked linear maps. It holds a second, ordered copy of the word embeddings."""

    def __init__(self, head: MLMHead, word_embeddings: Tensor, hidden_act: str) -> None:
        super().__init__()
        self.dense = PrepackedLinear(head.dense.weight, head.dense.bias, FUSED[hidden_act])
        self.norm = head.norm
        self.decoder = PrepackedLinear(word_embeddings, head.bias)

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return self.decoder(self.norm(self.dense(x)))  # (M, V)


def _prepack_layer(layer: EncoderLayer, hidden_act: str) -> None:
    attention, feed_forward = layer.attention, layer.feed_forward
    for module, name, activation in (
        (attention, "qkv", ("none", "")),
        (attention, "output", ("none", "")),
        (feed_forward, "intermediate", FUSED[hidden_act]),
        (feed_forward, "output", ("none", "")),
    ):
        linear = getattr(module, name)
        setattr(module, name, PrepackedLinear(linear.weight, linear.bias, activation))
    feed_forward.activation = nn.Identity()  # it is part of `intermediate` now


@cache
def _prepacking_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN on prepacked weights is there, gives what nn.Linear gives, and is faster. Measured once in
    a process, some milliseconds, on a layer of BERT's size.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (
            torch.randn(*shape, generator=generator).to(dtype) for shape in ((64, 768), (768, 768), (768,))
        )
        try:
            packed = PrepackedLinear(weight, bias)
            if not torch.allclose(packed(x).float(), F.linear(x, weight, bias).float(), rtol=2e-2, atol=0.5):
                return False
        except (AttributeError, RuntimeError, NotImplementedError):  # another torch, or a build without oneDNN
            return False

        def fastest(run: nn.Module | None) -> float:
            times = []
            for _ in range(5):
                began = perf_counter()
                F.linear(x, weight, bias) if run is None else run(x)
                times.append(perf_counter() - began)
            return min(times)

        return fastest(packed) < 1.05 * fastest(None)
