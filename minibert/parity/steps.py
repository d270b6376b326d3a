"""A second copy of BERT, because here a fault must be able to replace each step, and a trace to stop at it (faults/).
model.py runs whole layers on packed tokens; this one computes with its modules, on padded rows.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.checkpoint.names import hub_names
from minibert.loss import masked_lm_loss
from minibert.masked_lm import BertForMaskedLM
from minibert.model import ACTIVATIONS, EncoderLayer
from minibert.trace.table import GRADIENT, Inputs, parameter_names
from minibert.trace.tracefile import Trace

Section = Callable[..., Iterator[tuple[str, Tensor]]]


class Steps:
    """BERT on padded rows: `run` yields (name, tensor) in order of execution. The names are those of a trace.

    title: the fault's name. remedy: what to change. source: where the fault is known from. given: the trace under
    examination, which dropout and an overflow need: there, chance has decided.

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
        self.read: list[Tensor | None] = list(read or [None])  # with these `gradients` can compute a section again
        last = self.read.pop()
        for section, start in islice(self.sections(), len(self.read), None):
            self.section = start
            self.read.append(last)
            steps = section() if last is None else section(last)
            for name, last in steps:
                if name:
                    yield name, last

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradient of the loss by each parameter, from the head to the embeddings. For inputs with labels, after a
        whole `run`.

        Each section runs once more, with a graph, and hands on the gradient of what it read: memory holds the
        graph of one layer, never that of the model.
        """
        order = list(reversed(parameter_names(self.config)))
        parameters = self.model.state_dict(keep_vars=True)
        found: dict[str, Tensor] = {}
        flow: Tensor | None = None  # the gradient of what this section gives; None for the loss
        for (section, start), read in zip(reversed(list(self.sections())), reversed(self.read), strict=True):
            self.section = start
            names = [name for name in parameters if name.startswith(start)]
            if start == "head.":
                names.append("embeddings.word.weight")  # read here too; the embeddings add their part at the end
            with torch.enable_grad():
                inputs = [] if read is None else [read.detach().requires_grad_()]
                *_, (_, last) = section(*inputs)
                wanted = [parameters[name] for name in names] + inputs
                gradients = torch.autograd.grad(last, wanted, flow, allow_unused=True)
            flow = gradients[-1]
            for name, gradient in zip(names, gradients, strict=False):
                gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
                found[name] = found[name] + gradient if name in found else gradient
            parts: dict[str, Tensor] = {}
            for name in [name for name in names if name.startswith(start)]:
                hubs = hub_names(name)
                parts.update(zip(hubs, found.pop(name).chunk(len(hubs)), strict=True))
            yield from ((GRADIENT + name, parts[name]) for name in order if name in parts)

    def sections(self) -> Iterator[tuple[Section, str]]:
        """What the model consists of, and the start of the names of its parameters. Each section takes what the one
        before it yielded last; the first takes nothing.
        """
        yield self.embeddings, "embeddings."
        for number, layer in enumerate(self.model.layers):
            assert isinstance(layer, EncoderLayer)
            yield partial(self.layer, f"layers.{number}.", layer), f"layers.{number}."
        yield self.prediction, "head."

    def embeddings(self) -> Iterator[tuple[str, Tensor]]:
        x = self.made("embeddings.sum", self.embed())
        yield "embeddings.sum", x
        yield (
            "embeddings.norm",
            self.made("embeddings.norm", self.layer_norm("embeddings.norm", x, self.model.embeddings.LayerNorm)),
        )

    def prediction(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        transformed = x
        for name, transformed in self.head(x):
            yield name, transformed
        logits = self.made("logits", self.decode(transformed))
        yield "logits", logits
        if self.inputs.labels is not None:
            yield "loss", masked_lm_loss(logits, self.inputs.labels).mean

    def embed(self) -> Tensor:
        embeddings = self.model.embeddings
        return embeddings.word(self.inputs.input_ids) + self.types() + embeddings.position(self.positions())

    def types(self) -> Tensor:
        result: Tensor = self.model.embeddings.token_type(self.inputs.token_type_ids)
        return result

    def positions(self) -> Tensor:
        return torch.arange(self.seen.shape[1], device=self.seen.device).expand_as(self.seen)

    def clamp(self, positions: Tensor) -> Tensor:
        return positions.clamp(0, self.config.max_position_embeddings - 1)

    def layer(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The last thing yielded is what the next layer reads."""
        update = x
        for name, update in self.attend(prefix, layer, x):
            yield name, update
        name = prefix + "attention_norm"
        x = self.made(name, self.add_and_norm(name, x, update, layer.attention_LayerNorm))
        yield name, x
        for name, update in self.feed_forward(prefix, layer, x):
            yield name, update
        name = prefix + "feed_forward_norm"
        yield name, self.made(name, self.add_and_norm(name, x, update, layer.feed_forward_LayerNorm))

    def add_and_norm(self, name: str, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
        return self.layer_norm(name, update + x, norm)

    def attend(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        names = [prefix + part for part in ("query", "key", "value")]
        parts = zip(names, self.project(layer, x), strict=True)
        query, key, value = (self.made(name, self.split(part)) for name, part in parts)  # each (B, H, S, K)
        yield from zip(names, (query, key, value), strict=True)
        name = prefix + "scores"
        scores = self.made(name, self.masked(query @ key.transpose(-1, -2) * self.scale()))
        yield name, scores
        name = prefix + "probabilities"
        probabilities = self.made(name, self.softmax(name, scores))
        yield name, probabilities
        name = prefix + "context"
        context = self.made(name, self.merge(probabilities @ value))
        yield name, context
        name, output = prefix + "attention_output", layer.attention.output
        yield name, self.made(name, self.square(context, output.weight, output.bias))

    def scale(self) -> float:
        return self.config.head_size**-0.5

    def project(self, layer: EncoderLayer, x: Tensor) -> tuple[Tensor, ...]:
        qkv = layer.attention.qkv
        parts = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        return tuple(self.square(x, weight, bias) for weight, bias in parts)

    def square(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A projection from D to D."""
        return F.linear(x, weight, bias)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)  # (B, H, S, K)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(-2)  # (B, S, D)

    def softmax(self, name: str, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.seen[:, None, None, :], torch.finfo(scores.dtype).min)

    def feed_forward(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        x = self.made(prefix + "intermediate", layer.feed_forward.intermediate(x))
        yield prefix + "intermediate", x
        x = self.made(prefix + "activation", self.activation(x))
        yield prefix + "activation", x
        yield prefix + "feed_forward", self.made(prefix + "feed_forward", layer.feed_forward.output(x))

    def activation(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.config.hidden_act](x)

    def layer_norm(self, name: str, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, self.eps(name))

    def eps(self, name: str) -> float:
        """Of the LayerNorm that gives the tensor `name`."""
        return self.config.layer_norm_eps

    def made(self, name: str, x: Tensor) -> Tensor:
        """What a trace has under `name`, and the next step reads."""
        return x

    def head(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        head = self.model.head
        x = self.made("head.dense", self.square(x, head.dense.weight, head.dense.bias))
        yield "head.dense", x
        x = self.made("head.activation", self.head_activation(x))
        yield "head.activation", x
        yield "head.norm", self.made("head.norm", self.layer_norm("head.norm", x, head.LayerNorm))

    def head_activation(self, x: Tensor) -> Tensor:
        return self.activation(x)

    def decode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.decoder(), self.decoder_bias())

    def decoder(self) -> Tensor:
        return self.model.embeddings.word.weight

    def decoder_bias(self) -> Tensor | None:
        return self.model.head.bias
