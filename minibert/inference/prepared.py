"""PreparedBert: what `prepare_for_inference` returns. It has the two calls of BertForMaskedLM, and gives the same
answers, up to rounding. Everywhere, `predict` runs the last layer for the asked positions only: no later layer reads
the others.

On the CPU, linear layers are computed by oneDNN (onednn.py, int8.py), and a few tokens by a compiled program, if there
is one (compiled.py). On CUDA, what is done for each token alone is compiled by the first call, once for all lengths.
Attention stays outside, since it needs the lengths on the host. Small batches are replayed as CUDA graphs
(cuda_graphs.py).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from minibert import checks
from minibert.attention import attention, forced_kernel, one_sequence
from minibert.checkpoint.reading import shapes_only
from minibert.config import BertConfig
from minibert.inference.compiled import CompiledLayers
from minibert.inference.cuda_graphs import Graphs, can_compile, has_flash_attention
from minibert.inference.int8 import Int8Embedding, Int8Linear
from minibert.inference.onednn import (
    FUSED,
    NONE,
    ConvolvedLinear,
    PrepackedHead,
    PrepackedLinear,
    filled_up,
    has_bfloat16,
    refuse,
)
from minibert.masked_lm import BertForMaskedLM, Layer
from minibert.model import SelfAttention
from minibert.packing import PackedBatch

COMPILED_ON = ("cuda",)


class _NotCalled(nn.Module):
    """A part that a prepared model does not call, or not always: it calls what is inside."""

    register_forward_hook = register_forward_pre_hook = refuse(
        "does not call its parts one by one, so a hook on one would not run: register it on"
    )


class PreparedAttention(_NotCalled, SelfAttention):
    pass


class PreparedLayer(_NotCalled, Layer):
    """EncoderLayer in two halves. They repeat its `forward`, because something comes between: attention for the asked
    positions only, and on CUDA the end of what is compiled.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.attention = PreparedAttention(config)

    def before_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value, each (T, H, K), of x (T, D)"""
        return self.attention.split_heads(x)

    def after_attention(self, context: Tensor, x: Tensor) -> Tensor:
        """For any tokens: context (M, H, K) and what the layer read, x (M, D) → (M, D)"""
        x = self.attention_LayerNorm(self.attention.output(context.flatten(-2)) + x)  # (M, D)
        return self.feed_forward_LayerNorm(self.feed_forward(x) + x)  # (M, D)

    def prepack(self, linear: type[PrepackedLinear], hidden_act: str) -> None:
        """Replace the four linear layers."""
        attention, network = self.attention, self.feed_forward
        for part, name, activation in (
            (attention, "qkv", NONE),
            (attention, "output", NONE),
            (network, "intermediate", FUSED[hidden_act]),
            (network, "output", NONE),
        ):
            plain = part.get_submodule(name)
            setattr(part, name, linear(plain.weight, plain.bias, activation))  # type: ignore[arg-type]
        network.activation = nn.Identity()  # `intermediate` computes it now
        if issubclass(linear, Int8Linear):
            attention.qkv.result = torch.bfloat16 if has_bfloat16() else torch.float32  # type: ignore[assignment]
            network.output.spare = True  # type: ignore[assignment]


class PreparedBert(BertForMaskedLM):
    """It answers, and that is all: it cannot be trained, saved, moved or copied. The model it was made from can.

    Why: its matrices are copies in oneDNN's own order, which torch does not know as parameters. On CUDA, kernels are
    recorded together with the addresses of the tensors that they read.

    linear: the way in which its linear layers are computed. packed: the class that computes them; None is torch's own.
    program: computes all layers for few tokens.
    """

    layers: Sequence[PreparedLayer]

    def __init__(
        self,
        model: BertForMaskedLM,
        dtype: torch.dtype,
        linear: str,
        packed: type[PrepackedLinear] | None,
        program: CompiledLayers | None = None,
    ) -> None:
        with shapes_only():
            super().__init__(model.config)
            layers = nn.ModuleList(PreparedLayer(model.config) for _ in model.layers)
            self.layers = layers  # type: ignore[assignment]
        self.linear, self.program, self.load_report = linear, program, model.load_report
        self._copy(model, torch.float32 if dtype == torch.int8 else dtype, packed)
        self.eval()
        self._before, self._after = PreparedLayer.before_attention, PreparedLayer.after_attention
        self._graphs: Graphs | None = None
        if packed:
            self._pack(packed)
        word = self.embeddings.word.weight
        if word.device.type in COMPILED_ON and can_compile():
            self._before = torch.compile(PreparedLayer.before_attention, dynamic=True)
            self._after = torch.compile(PreparedLayer.after_attention, dynamic=True)
        if word.is_cuda and has_flash_attention(word, model.config.head_size):
            self._graphs = Graphs(word.device)

    def _copy(self, model: BertForMaskedLM, dtype: torch.dtype, packed: type[PrepackedLinear] | None) -> None:
        """Its own copy of every tensor. A matrix that is put into oneDNN's order, or rounded, is copied by that."""
        copied = {f"{name}.weight" for name, part in self.named_modules() if packed and isinstance(part, nn.Linear)}
        if packed is Int8Linear:
            copied.add("embeddings.word.weight")
        own = {  # tensors that were made in inference mode could not be used outside it, so they are copied too
            name: x.detach().to(dtype, copy=x.is_inference() or name not in copied)
            for name, x in model.state_dict().items()
        }
        nn.Module.load_state_dict(self, own, assign=True)
        for _, x in nn.Module.named_parameters(self):
            x.requires_grad_(False)
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # whatever happens to the mode of a part

    def _pack(self, linear: type[PrepackedLinear]) -> None:
        """Replace the linear layers, and in int8 the word embeddings."""
        hidden_act, word = self.config.hidden_act, self.embeddings.word.weight
        for layer in self.layers:
            layer.prepack(linear, hidden_act)
        if linear is Int8Linear:
            self.embeddings.word = Int8Embedding(word)  # type: ignore[assignment]
        lookup = self.embeddings.word.weight
        self.head = PrepackedHead(self.head, linear, word, lookup, hidden_act)  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "PreparedBert":
        if mode:
            refuse("cannot be trained: train")(self)
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "PreparedBert":
        return self.train(requires_grad)

    _apply = refuse("stays as it is and where it is: move or convert")  # to(), half(), cpu() and the like call it
    resize_token_embeddings = refuse("keeps its size: resize")
    gradient_checkpointing_enable = refuse("cannot be trained: train")
    load_state_dict = refuse("takes no other weights: load them into")
    save_pretrained = refuse("cannot be saved: save")
    __reduce_ex__ = refuse("can be neither copied nor pickled: copy or save")  # deepcopy and torch.save call it
    _forward_rectangle = refuse("cannot be recorded: export or trace")  # the padded call while a program is recorded
    state_dict = parameters = named_parameters = refuse(
        "has no list of its tensors, since some are in an order that only oneDNN knows, nor a size to be counted: its "
        "device is model.device. For the rest ask"
    )

    def _looked_into(self, asked: bool) -> bool:
        """Whether the padded call keeps its padding: there are no gradients here."""
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        if self.dtype != torch.int8:
            return super().get_input_embeddings()
        raise ValueError("a model prepared in int8 has its words as whole numbers: call model.embeddings.word(ids)")

    def _shown(self, attention_map: Tensor) -> Tensor:
        """In int8, attention is computed in bfloat16, but what is shown has the type of the answers."""
        return attention_map.float() if self.dtype == torch.int8 else attention_map

    def attention_maps(self, batch: PackedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
        return {number: self._shown(x) for number, x in super().attention_maps(batch, layers).items()}

    def _padded_maps(self, states: Sequence[Tensor], batch: PackedBatch) -> Iterator[Tensor]:
        yield from map(self._shown, super()._padded_maps(states, batch))

    def encode(self, batch: PackedBatch) -> Tensor:
        """As in BertForMaskedLM: (T, D)."""
        checks.require_embeddings(batch.largest, self.config)
        if self.program is not None and self.program.takes(batch):
            return self.program(self.embeddings(batch), batch)
        filled = self._fill_up(batch)
        x = self.embeddings(filled)  # (T, D)
        for layer in self.layers:
            x = self._after(layer, attention(*self._before(layer, x), filled), x)  # (T, D)
        return x if filled is batch else x[: batch.num_tokens]

    def predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """As in BertForMaskedLM: (M, V); the last layer runs for these positions only."""
        checks.require_positions(positions, batch.num_tokens)
        checks.require_embeddings(batch.largest, self.config)
        if self.program is not None and self.program.takes(batch):
            return self.head(self.encode(batch)[positions], self.word_embeddings)
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
        """Convolutions need certain numbers of tokens. Here the batch is filled up once for the first of them, which
        mostly suits all. If it does not suit another one, that one fills up its own input.
        """
        qkv = self.layers[0].attention.get_submodule("qkv")
        missing = qkv.missing(batch.num_tokens) if isinstance(qkv, ConvolvedLinear) else 0
        return filled_up(batch, missing) if missing else batch


def attention_at(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, positions: Tensor) -> Tensor:
    """The context of the tokens at `positions` (M,) only: (M, H, K). Without dropout."""
    if not query.is_cpu or forced_kernel() is not None or not 0 < len(positions) < len(query):
        return attention(query, key, value, batch)[positions]
    starts = batch.cu_seqlens
    sequence = torch.searchsorted(starts, positions, right=True) - 1  # (M,)
    order = sequence.argsort(stable=True)
    asked = sequence.bincount(minlength=batch.num_sequences).tolist()
    queries = query[positions[order]].transpose(0, 1).split(asked, dim=1)
    keys, values = (x.transpose(0, 1).split(batch.lengths, dim=1) for x in (key, value))
    contexts = [
        one_sequence(q, k, v).transpose(0, 1) for q, k, v in zip(queries, keys, values, strict=True) if q.shape[1]
    ]
    return torch.cat(contexts)[order.argsort()]  # (M, H, K)
