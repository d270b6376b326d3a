"""BERT as people call it: padded batches, labels and their loss, attention maps, loading and saving.

What is computed is in model.py. Here is what surrounds it, under the names of transformers' BertForMaskedLM.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree  # where torch keeps how a program's own classes are taken apart
from torch.utils.checkpoint import checkpoint as computed_again

from minibert import checks
from minibert.attention import equation_1, forced_kernel, formula
from minibert.checkpoint import hub, names, reading, writing
from minibert.checkpoint.reading import LoadReport, shapes_only
from minibert.config import BertConfig, config_of
from minibert.loss import IGNORE, masked_lm_loss
from minibert.model import Bert, EncoderLayer
from minibert.packing import PackedBatch
from minibert.tokenizer import as_files


@dataclass(init=False, repr=False, eq=False)
class MaskedLMOutput(OrderedDict[str, Any]):
    """What the padded call gives: a mapping, whose entries are attributes too, as transformers' MaskedLMOutput is.

    loss: a scalar. logits: (B, S, V), zeros where the attention mask is 0. hidden_states: N + 1 of (B, S, D).
    attentions: N of (B, H, S, S). What is None is no entry. `out[0]` is the first entry, the loss if there is one.
    Going through it gives names, so that libraries can rebuild it; for the values there is `to_tuple()`.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def __init__(
        self,
        loss: Any = None,  # or all entries, as a mapping or as pairs: so accelerate and DataParallel make one
        logits: Tensor | None = None,
        hidden_states: tuple[Tensor, ...] | None = None,
        attentions: tuple[Tensor, ...] | None = None,
    ) -> None:
        named = {"loss": loss, "logits": logits, "hidden_states": hidden_states, "attentions": attentions}
        given = named if loss is None or isinstance(loss, Tensor) else dict(loss)
        super().__init__((name, value) for name, value in given.items() if value is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self or name in type(self).__annotations__:
            return self.get(name)
        raise checks.no_attribute(f"the output, which holds {', '.join(self)},", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value


_pytree.register_pytree_node(
    MaskedLMOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: MaskedLMOutput(dict(zip(names, values, strict=True))),
    serialized_type_name="minibert.MaskedLMOutput",
    to_dumpable_context=list,
    from_dumpable_context=list,
    flatten_with_keys_fn=lambda output: ([(_pytree.MappingKey(key), x) for key, x in output.items()], list(output)),
)


@dataclass(frozen=True)
class Rectangle:
    """A batch with its padding, each (B, S), in place of a PackedBatch.

    Whoever records a program (torch.export, torch.compile, torch.jit.trace) cannot ask a tensor how long its sentences
    are: the answer of this one batch would become a constant. So the padding stays, and attention masks the keys.

    maps: a list that attention adds its probabilities to, (B, H, S, S), layer after layer; None if nobody wants them.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor  # bool: true where a token is
    maps: list[Tensor] | None = None

    @property
    def device(self) -> torch.device:  # captum asks what a layer reads
        return self.input_ids.device

    @classmethod
    def from_padded(cls, maps: list[Tensor] | None, input_ids: Tensor, *others: Tensor | None) -> "Rectangle":
        """The arguments of the padded call, with nothing left out, and 0 in the padding."""
        mask, types, positions = checks.padded_inputs(input_ids, *others)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        ids, types, positions = (x.masked_fill(~mask, 0) for x in (input_ids, types, positions))
        return cls(ids, types, positions, mask, maps)

    def seen(self, x: Tensor) -> Tensor:
        """(B, S, …), with 0 in the padding."""
        return x.masked_fill(~self.attention_mask[..., None], 0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: nn.Dropout | None = None) -> Tensor:
        """(B, S, H, K), from query, key and value (B, S, H, K)."""
        nobody = ~self.attention_mask.any(1, keepdim=True)  # (B, 1): such a row may see all, for a softmax of something
        mask = (self.attention_mask | nobody)[:, None, None, :]  # (B, 1, 1, S)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # each (B, H, S, K)
        if self.maps is None:
            rate = 0.0 if dropout is None else dropout.p
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate).transpose(1, 2)
        maps, seen = self.maps, self.attention_mask[:, None, :, None] & self.attention_mask[:, None, None, :]

        def keep(probabilities: Tensor) -> Tensor:
            """The map lies on the way to the values, so that there is a gradient by it."""
            maps.append(probabilities.masked_fill(~seen, 0))
            return maps[-1] if dropout is None else dropout(maps[-1])

        return equation_1(q, k, v, mask, keep)[0].transpose(1, 2)


class Named(nn.Module):
    """A module that says what to use in place of an attribute that transformers' module has."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise checks.no_attribute(type(self).__name__, name) from None


class Layer(EncoderLayer):
    """An encoder layer that may keep only what it read, and is then computed again for the gradient (activation
    checkpointing): Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174.
    """

    is_computed_again = False

    def once(self, x: Tensor, batch: PackedBatch) -> Tensor:
        return super().forward(x, batch)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        if self.is_computed_again and torch.is_grad_enabled():
            return computed_again(self.once, x, batch, use_reentrant=False)
        return self.once(x, batch)


class Parts(Named, nn.ModuleDict):
    """Parts of a model under the names that transformers has for them, to look at and to freeze. No computing."""

    def forward(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "only the whole model can be called, model(…, output_hidden_states=True).hidden_states[-1], and "
            "model.embeddings, model.layers[N] and model.head take hooks"
        )

    register_forward_hook = register_forward_pre_hook = register_full_backward_hook = forward


class BertForMaskedLM(Named, Bert):
    """BERT with two ways to call it.

    The padded call is `model(input_ids, …)`, as transformers' BertForMaskedLM has it: a logit for every word at every
    position. The packed call is `encode` and `predict`, from `Bert`: logits at the positions that you ask for alone.
    """

    layers: Sequence[Layer]
    load_report: LoadReport | None = None
    output_hidden_states, output_attentions, return_dict = False, False, True  # of a call that does not say

    def __init__(self, config: BertConfig) -> None:
        super().__init__(checks.own_config(config), Layer)

    @property
    def device(self) -> torch.device:
        return self.embeddings.word.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.word.weight.dtype

    @property
    def word_embeddings(self) -> Tensor:
        word = self.embeddings.word  # accelerate may keep them elsewhere: then all are looked up
        return word(torch.arange(self.config.vocab_size)) if word.weight.is_meta else word.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *more: object,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **others: object,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Padded in, padded out. All tensors are (B, S); `PackedBatch.from_padded` says what holds when one is left
        out. What else a tokenizer of transformers gives may be passed on, and is not read; other names are errors.

        labels are ids where a prediction is scored and −100 elsewhere; the loss is the mean over the scored positions.
        output_attentions gives the maps without dropout. return_dict=False gives a tuple of what is not None. For these
        three, None is what from_pretrained was told.

        The padding is not computed, unless somebody looks inside: while the call is recorded or transformed (by
        torch.func), while a part has a forward hook, and where a gradient by a state or a map can be asked for.

        Raises ValueError for wrong shapes, dtypes, ids, or a label where the attention mask is 0. While it is recorded
        or transformed, only shapes and dtypes can be checked, and labels where the mask is 0 are left out.
        """
        checks.refuse_others(others, "the model", more)
        checks.require_tensors(input_ids=input_ids, labels=labels)
        assert input_ids is not None
        with_states = self.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_maps = self.output_attentions if output_attentions is None else output_attentions
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        batch = None if checks.being_traced() else PackedBatch.from_padded(*given)
        if batch is not None:
            checks.require_embeddings(batch.largest, self.config)
            if labels is not None:
                checks.require_labels(labels, attention_mask, input_ids)
        if batch is None or self._looked_into(with_states or with_maps):
            rows = Rectangle.from_padded([] if with_maps else None, *given)
            output = self._forward_rectangle(rows, labels, with_states)
        else:
            output = self._forward_packed(batch, labels, with_states, with_maps)
        return output if (self.return_dict if return_dict is None else return_dict) else output.to_tuple()

    if TYPE_CHECKING:

        @overload
        def __call__(self, *given: Tensor | None, return_dict: Literal[False], **named: Any) -> tuple[Any, ...]: ...
        @overload
        def __call__(
            self, *given: Tensor | None, return_dict: Literal[True] | None = None, **named: Any
        ) -> MaskedLMOutput: ...
        def __call__(self, *given: Any, **named: Any) -> Any: ...

    def _looked_into(self, asked: bool) -> bool:
        """Whether layers must compute (B, S, …), for a gradient by what they give, or hooks (FSDP's see nothing)."""
        if asked and torch.is_grad_enabled() and any(x.requires_grad for x in self.parameters()):
            return True
        parts = [module for part in self.children() for module in part.modules()]
        hooks = [hook for x in parts for hook in (*x._forward_hooks.values(), *x._forward_pre_hooks.values())]
        by_fsdp = [str(getattr(x, "__module__", "")).startswith("torch.distributed.") for x in hooks]
        return forced_kernel() is None and not all(by_fsdp)

    def _forward_packed(
        self, batch: PackedBatch, labels: Tensor | None, with_states: bool, with_maps: bool
    ) -> MaskedLMOutput:
        states = self.hidden_states(batch) if with_states or with_maps else [self.encode(batch)]
        logits = self.head(states[-1], self.word_embeddings)  # (T, V)
        return MaskedLMOutput(
            None if labels is None else masked_lm_loss(logits, batch.pack(labels)).mean,
            batch.unpack(logits),
            tuple(batch.unpack(x) for x in states) if with_states else None,
            tuple(self._padded_maps(states, batch)) if with_maps else None,
        )

    def _forward_rectangle(self, batch: Rectangle, labels: Tensor | None, with_states: bool) -> MaskedLMOutput:
        # Zeros in the padding at once, where states are given back: so they lie on the way to the logits.
        seen = batch.seen if with_states else (lambda x: x)
        states = [seen(self.embeddings(batch))]  # each (B, S, D)
        for layer in self.layers:
            states.append(seen(layer(states[-1], batch)))
        logits = self.head(states[-1], self.word_embeddings)  # (B, S, V)
        labels = None if labels is None else labels.masked_fill(~batch.attention_mask, IGNORE)
        return MaskedLMOutput(
            None if labels is None else masked_lm_loss(logits, labels).mean,
            batch.seen(logits),
            tuple(states) if with_states else None,
            None if batch.maps is None else tuple(batch.maps),
        )

    def _padded_maps(self, states: Sequence[Tensor], batch: PackedBatch) -> Iterator[Tensor]:
        """The attention probabilities of each layer, (B, H, S, S), S being the padded length."""
        seen = batch.unpack(torch.ones_like(batch.input_ids)).bool()  # (B, S)
        for layer, x in zip(self.layers, states, strict=False):  # x: what this layer reads, (T, D)
            q, k, v = (batch.unpack(part).transpose(1, 2) for part in layer.attention.split_heads(x))  # (B, H, S, K)
            probabilities = equation_1(q, k, v, seen[:, None, None, :])[1]
            yield probabilities * seen[:, None, :, None] * seen[:, None, None, :]

    def hidden_states(self, batch: PackedBatch) -> list[Tensor]:
        """What the embeddings give and what each layer gives, N + 1 of (T, D). The last is `encode(batch)`."""
        return list(self._states(batch))

    def layer_guesses(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """The logit lens: what the head answers at `positions` (M,) if it reads the embeddings, and each layer: logits,
        (N + 1, M, V). The last are `predict(batch, positions)`; the head was not trained to read the others.
        Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
        """
        checks.require_positions(positions, batch.num_tokens)
        word_embeddings = self.word_embeddings
        return torch.stack([self.head(x[positions], word_embeddings) for x in self._states(batch)])  # (N + 1, M, V)

    def attention_maps(self, batch: PackedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
        """Who looks at whom: for each of the given layers (from 0) the attention probabilities, (B, H, S, S), S being
        the longest sequence; 0 beyond the end of a shorter one.
        """
        if not layers or [number for number in layers if not 0 <= number < len(self.layers)]:
            raise ValueError(f"layers must name some of 0 to {len(self.layers) - 1}, not {list(layers)}")
        maps = {}
        for number, x in enumerate(islice(self._states(batch), max(layers) + 1)):  # x: what this layer reads, (T, D)
            if number in layers:
                query, key, value = self.layers[number].attention.split_heads(x)  # each (T, H, K)
                maps[number] = formula(query, key, value, batch)[1]  # (B, H, S, S)
        return maps

    def _states(self, batch: PackedBatch) -> Iterator[Tensor]:
        """The hidden states (T, D) that `encode` goes through, one after the other."""
        checks.require_embeddings(batch.largest, self.config)
        x = self.embeddings(batch)  # (T, D)
        yield x
        for layer in self.layers:
            x = layer(x, batch)  # (T, D)
            yield x

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_missing_head: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool | None = True,
        **others: Any,
    ) -> "BertForMaskedLM":
        """A checkpoint as a model, in evaluation mode (`model.train()` turns dropout on), and its `load_report`.

        name_or_path: a folder; a bundled name ("minibert-uncased"); "bert-base-uncased"; or a hub id ("owner/name").
        dtype: of the weights in memory: torch.bfloat16, "bfloat16", …; "auto" is what config.json says, or else what
        the file holds; None is float32. torch_dtype: the same, by its older name. revision: of a hub repository.
        local_files_only: never ask the hub. init_missing_head: accept a file without MLM head, whose transformation
        then starts as the identity. output_hidden_states, output_attentions, return_dict: of each call that does not
        say. Also the two dropout rates of the configuration, and what of transformers' changes nothing here.

        Raises ValueError for a file that is not exactly this model, FileNotFoundError for one that is not there.
        """
        rates = {name: others.pop(name) for name in checks.RATES if others.get(name) is not None}
        device = checks.device_of(others.pop("device_map", None), device)
        checks.refuse_others(others, "from_pretrained")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype is {dtype!r} and torch_dtype {torch_dtype!r}: give one of the two")
        source = hub.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        with reading.opened(source, config_of) as found:
            with shapes_only():  # no memory yet: the weights are held once, when they are read
                model = cls(replace(found.config, **rates))
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            dtype = torch_dtype if dtype is None else dtype
            state, report = reading.read_weights(
                found, shapes, dtype=dtype, device=device, init_missing_head=init_missing_head
            )
        model.load_state_dict(state, assign=True)
        if model.device.type == "meta":  # accelerate's init_empty_weights()
            raise ValueError(checks.NOWHERE)
        model.load_report, model.return_dict = report, return_dict is not False
        model.output_hidden_states, model.output_attentions = bool(output_hidden_states), bool(output_attentions)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        tokenizer: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        save_function: object = None,
        **others: object,
    ) -> None:
        """Write config.json and model.safetensors, under the names that transformers (and `from_pretrained`) reads.

        tokenizer: to be written beside them, a fast one of transformers, too. The others are those of accelerate.
        state_dict: write these tensors, and not the model's own. is_main_process: another one writes nothing.

        Raises ValueError if the tensors are not those of a model of this size, OSError if they cannot be written.
        """
        checks.refuse_others(others, "save_pretrained")
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        with shapes_only():
            names.require_state(state, Bert(self.config).state_dict())
        files = None if tokenizer is None else as_files(tokenizer, self.config.max_position_embeddings)
        writing.write(folder, self.config.to_dict(), state, files)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch. The names may also be those of `named_parameters`."""
        ours = {names.beginning(name): name for name in self.state_dict()}
        state_dict = {ours.get(name, name): value for name, value in state_dict.items()}
        names.refuse_transformers(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def named_parameters(self, *given: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Without arguments, as training programs call it: names that begin as transformers' (bert.encoder.layer.N.),
        so that who chooses by those finds them. With arguments, as libraries call it, or where something was put in,
        such as an adapter of PEFT: the names of the parts themselves.
        """
        found = list(super().named_parameters(*given, **named))
        as_theirs = not given and not named and all(names.is_ours(name) for name, _ in found)
        yield from ((names.beginning(name) if as_theirs else name, x) for name, x in found)

    @property
    def bert(self) -> nn.Module:
        """All but the head: `bert.embeddings` and `bert.encoder.layer`, as transformers has them."""
        return Parts({"embeddings": self.embeddings, "encoder": Parts({"layer": self.get_submodule("layers")})})

    base_model = bert

    @property
    def cls(self) -> nn.Module:
        """The head: `cls.predictions`, as transformers has it."""
        return Parts({"predictions": self.head})

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers it has learned."""
        tables = [x.weight for x in self.embeddings.children() if isinstance(x, nn.Embedding)]
        counted = set(self.parameters()) - set(tables if exclude_embeddings else [])
        return sum(x.numel() for x in counted if x.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word

    def tie_weights(self, **_: object) -> None:
        """Nothing to do: the head reads the matrix of the words."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """New tokens start as the mean of the old ones, no likelier than others (Hewitt 2021). The weights become new
        tensors: make the optimizer afterwards.

        Raises ValueError if pad_token_id would be cut off.
        """
        if not mean_resizing:
            raise ValueError("mean_resizing is True only: set other rows in model.embeddings.word.weight afterwards")
        multiple, word, head = pad_to_multiple_of or 1, self.embeddings.word, self.head
        asked = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        new_num_tokens = -(-asked // multiple) * multiple
        if new_num_tokens == self.config.vocab_size:
            return word
        self.config = replace(self.config, vocab_size=new_num_tokens)
        word.weight, head.bias = resized(word.weight, new_num_tokens), resized(head.bias, new_num_tokens)
        word.num_embeddings = new_num_tokens
        return word

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """From now on each layer is computed again for the gradient, as with {"use_reentrant": False}: a third more
        time, and far less memory.
        """
        if dict(gradient_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
            raise ValueError(f"there is use_reentrant=False alone: leave {gradient_checkpointing_kwargs} out")
        for layer in self._wrapped_layers():
            layer.is_computed_again = True

    def gradient_checkpointing_disable(self) -> None:
        for layer in self._wrapped_layers():
            layer.is_computed_again = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(layer.is_computed_again for layer in self._wrapped_layers())

    def _wrapped_layers(self) -> list[Layer]:
        """The layers, also where another module was put around each, as FSDP does."""
        return [part for part in self.modules() if isinstance(part, Layer)]


def resized(tensor: Tensor, length: int) -> nn.Parameter:
    """The tensor with another first dimension: cut, or filled up with the mean of its rows."""
    old = tensor.detach()
    new = old.mean(0, dtype=torch.float32).to(old.dtype).expand(max(0, length - len(old)), *old.shape[1:])
    return nn.Parameter(torch.cat([old[:length], new]), requires_grad=tensor.requires_grad)
