"""BERT a second time, on purpose: an error in model.py must not be able to hide in its own check. And here a fault can
replace each step, and a trace stop at it (faults.py). It computes with the weights of model.py, on padded rows.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.loss import masked_lm_loss
from minibert.masked_lm import BertForMaskedLM
from minibert.model import ACTIVATIONS, EncoderLayer
from minibert.trace.recorder import gradients
from minibert.trace.table import GRADIENT, Inputs, parameter_names
from minibert.trace.tracefile import Trace

# Yields the name and the value of each tensor, is sent what the next step reads, and returns what the next section
# reads.
Section = Generator[tuple[str, Tensor], Tensor, Tensor]


class Steps:
    """BERT on padded rows: `run` yields (name, tensor) in order of execution. The names are those of a trace.

    A subclass is a fault. title: its name. remedy: what to change. source: where the fault is known from. given: the
    trace under examination, which dropout and an overflow need, because there chance has decided.

    Three sections compute one after the other: "embeddings.", "layers.N." and "head.". `section` is the one that is
    computing.
    """

    title = "none"
    remedy = "nothing"
    source = ""

    def __init__(self, model: BertForMaskedLM, inputs: Inputs, given: Trace) -> None:
        self.model, self.config, self.inputs, self.given = model, model.config, inputs, given
        self.seen = inputs.attention_mask.bool()  # (B, S)
        self.section = ""

    @torch.no_grad()
    def run(self, read: list[Tensor | None] | None = None) -> Iterator[tuple[str, Tensor]]:
        """From the first section on, or from a later one: `read` is then what each section before it has read, and
        what that one reads. Afterwards `self.read` is what every section has read.
        """
        yield from self._run(read)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradient of the loss by each parameter, from the head to the embeddings. For inputs with labels."""
        with torch.enable_grad():
            *_, (_, loss) = self._run()
        found = gradients(self.model, loss)
        yield from ((GRADIENT + name, found[GRADIENT + name]) for name in reversed(parameter_names(self.config)))

    def _run(self, read: list[Tensor | None] | None = None) -> Iterator[tuple[str, Tensor]]:
        self.read: list[Tensor | None] = list(read or [None])
        last = self.read.pop()
        for section, start in islice(self.sections(), len(self.read), None):
            self.section = start
            self.read.append(last)
            steps = section() if last is None else section(last)
            x: Tensor | None = None
            while True:
                try:
                    name, x = next(steps) if x is None else steps.send(x)
                except StopIteration as end:
                    last = end.value
                    break
                x = self.made(name, x)
                yield name, x

    def made(self, name: str, x: Tensor) -> Tensor:
        """What a trace has under `name`, and the next step reads."""
        return x

    def sections(self) -> Iterator[tuple[Callable[..., Section], str]]:
        """What the model consists of, and the start of the names of its parameters. Each section takes what the one
        before it returned; the first takes nothing.
        """
        yield self.embeddings, "embeddings."
        for number, layer in enumerate(self.model.layers):
            yield partial(self.layer, f"layers.{number}.", layer), f"layers.{number}."
        yield self.prediction, "head."

    def embeddings(self) -> Section:
        x = yield "embeddings.sum", self.embed()
        return (yield "embeddings.norm", self.layer_norm("embeddings.norm", x, self.model.embeddings.LayerNorm))

    def embed(self) -> Tensor:
        embeddings = self.model.embeddings
        return embeddings.word(self.inputs.input_ids) + self.types() + embeddings.position(self.positions())

    def types(self) -> Tensor:
        return cast(Tensor, self.model.embeddings.token_type(self.inputs.token_type_ids))

    def positions(self) -> Tensor:
        return torch.arange(self.seen.shape[1], device=self.seen.device).expand_as(self.seen)

    def layer(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Section:
        update = yield from self.attend(prefix, layer, x)
        name = prefix + "attention_norm"
        x = yield name, self.add_and_norm(name, x, update, layer.attention_LayerNorm)
        update = yield from self.feed_forward(prefix, layer, x)
        name = prefix + "feed_forward_norm"
        return (yield name, self.add_and_norm(name, x, update, layer.feed_forward_LayerNorm))

    def attend(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Section:
        parts = []
        for part, projected in zip(("query", "key", "value"), self.project(layer, x), strict=True):
            parts.append((yield prefix + part, self.split(projected)))
        query, key, value = parts  # each (B, H, S, K)
        scores = yield prefix + "scores", self.masked(self.product(query, key.transpose(-1, -2)) * self.scale())
        name, output = prefix + "probabilities", layer.attention.output
        probabilities = yield name, self.softmax(name, scores)
        context = yield prefix + "context", self.merge(self.product(probabilities, value))
        return (yield prefix + "attention_output", self.square(context, output.weight, output.bias))

    def feed_forward(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Section:
        inner, output = layer.feed_forward.intermediate, layer.feed_forward.output
        x = yield prefix + "intermediate", self.linear(x, inner.weight, inner.bias)
        x = yield prefix + "activation", self.activation(x)
        return (yield prefix + "feed_forward", self.linear(x, output.weight, output.bias))

    def prediction(self, x: Tensor) -> Section:
        transformed = yield from self.head(x)
        logits = yield "logits", self.decode(transformed)
        if self.inputs.labels is None:
            return logits
        return (yield "loss", masked_lm_loss(logits, self.inputs.labels).mean)

    def head(self, x: Tensor) -> Section:
        head = self.model.head
        x = yield "head.dense", self.square(x, head.dense.weight, head.dense.bias)
        x = yield "head.activation", self.head_activation(x)
        return (yield "head.norm", self.layer_norm("head.norm", x, head.LayerNorm))

    def project(self, layer: EncoderLayer, x: Tensor) -> tuple[Tensor, ...]:
        qkv = layer.attention.qkv
        parts = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        return tuple(self.square(x, weight, bias) for weight, bias in parts)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)  # (B, H, S, K)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(-2)  # (B, S, D)

    def scale(self) -> float:
        return self.config.head_size**-0.5

    def masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.seen[:, None, None, :], torch.finfo(scores.dtype).min)

    def softmax(self, name: str, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def square(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A projection from D to D."""
        return self.linear(x, weight, bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    def add_and_norm(self, name: str, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
        return self.layer_norm(name, update + x, norm)

    def layer_norm(self, name: str, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, self.eps(name))

    def eps(self, name: str) -> float:
        """Of the LayerNorm that gives the tensor `name`."""
        return self.config.layer_norm_eps

    def activation(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.config.hidden_act](x)

    def head_activation(self, x: Tensor) -> Tensor:
        return self.activation(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.linear(x, self.decoder(), self.decoder_bias())

    def decoder(self) -> Tensor:
        return self.model.embeddings.word.weight

    def decoder_bias(self) -> Tensor | None:
        return self.model.head.bias
