"""BERT as people call it: padded batches, labels and their loss, attention maps, loading and saving.

What is computed is in model.py. Here is what surrounds it in a user's program, under the names of transformers'
BertForMaskedLM.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree  # where torch keeps how a program's own classes are taken apart

from minibert import checks
from minibert.attention import equation_1, forced_kernel, formula
from minibert.checkpoint import hub, names, reading, writing
from minibert.checkpoint.reading import LoadReport, shapes_only
from minibert.config import BertConfig, config_of
from minibert.devices import find_device
from minibert.loss import IGNORE, masked_lm_loss
from minibert.model import Bert, EncoderLayer
from minibert.packing import PackedBatch
from minibert.recomputing import is_recomputing, set_recomputing
from minibert.tokenizer import as_files
from minibert.tracing import Rectangle, being_traced, rectangle

# What from_pretrained and save_pretrained take.
LOADING = ("dtype", "torch_dtype", "device", "revision", "local_files_only", "init_missing_head")
SAVING = ("tokenizer", "state_dict", "is_main_process", "save_function")
States = tuple[Tensor, ...]


@dataclass(init=False, repr=False, eq=False)
class MaskedLMOutput(OrderedDict[str, Any]):
    """What the padded call gives: a mapping, whose entries are attributes too, as transformers' MaskedLMOutput is.

    loss: a scalar, or None without labels. logits: (B, S, V), zeros where the attention mask is 0. If asked for,
    hidden_states: N + 1 of (B, S, D), and attentions: N of (B, H, S, S).

    What is None is no entry. A number or a slice counts the entries: `out[0]` is the loss if there is one. Going
    through it gives their names, so that libraries can rebuild it; for the values there is `to_tuple()`.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: States | None
    attentions: States | None

    def __init__(
        self,
        loss: Any = None,  # or all entries, as a mapping or as pairs: so accelerate and DataParallel make one
        logits: Tensor | None = None,
        hidden_states: States | None = None,
        attentions: States | None = None,
    ) -> None:
        given = {"loss": loss, "logits": logits, "hidden_states": hidden_states, "attentions": attentions}
        if loss is not None and not isinstance(loss, Tensor):
            given = dict(loss)
        super().__init__((name, value) for name, value in given.items() if value is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"there is no {key!r}, only {', '.join(self)}")
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name in self or name in type(self).__annotations__:
            return self.get(name)
        raise AttributeError(f"there is no {name!r}, only {', '.join(self)}")

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


class Parts(nn.Module):
    """Parts of a model under the names that transformers has for them, to look at and to freeze. No computing."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "only the whole model can be called and hooked: model(…, output_hidden_states=True).hidden_states[-1] is "
            "what transformers' encoder gives; model.embeddings, model.layers[N] and model.head take hooks"
        )

    register_forward_hook = register_forward_pre_hook = register_full_backward_hook = forward


class BertForMaskedLM(Bert):
    """BERT with two ways to call it.

    The padded call is `model(input_ids, …)`: a rectangle of ids in, a logit for every word at every position out, as
    transformers' BertForMaskedLM has it. The packed call is `encode` and `predict`, from `Bert`: no padding is
    computed, and logits only at the positions that you ask for (BERT's loss needs 15 % of them).
    """

    load_report: LoadReport | None = None
    # What a call gives that does not say; from_pretrained sets them.
    output_hidden_states, output_attentions, return_dict = False, False, True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(checks.own_config(config))

    def __getattr__(self, name: str) -> Any:
        if name in checks.ATTRIBUTES:
            raise AttributeError(f"this model has no {name!r}: {checks.ATTRIBUTES[name]}")
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embeddings.word.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self.embeddings.word.weight.dtype

    @property
    def word_embeddings(self) -> Tensor:
        """The vectors of all words, (V, D). Where a library keeps weights elsewhere until their module computes (as
        accelerate's offloading does), all words are looked up.
        """
        word = self.embeddings.word
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
        out. What a tokenizer of transformers gives beside them (special_tokens_mask, …) may be passed on, and is not
        read; any other name is an error.

        labels are ids where a prediction is scored and −100 elsewhere; the loss is the mean over the scored positions.
        output_hidden_states: N + 1 of (B, S, D). output_attentions: N of (B, H, S, S), by the formula, without dropout.
        return_dict=False: a tuple of what is not None. For these three, None is what from_pretrained was told.

        The padding is left out, unless somebody looks inside: while the call is recorded (torch.compile, torch.export,
        torch.jit.trace) or transformed (torch.func), while a part has a forward hook, and where a gradient by a hidden
        state or an attention map can be asked for, all is computed in (B, S, …) (tracing.py).

        Raises ValueError for wrong shapes, dtypes, ids, or a label where the attention mask is 0. While the call is
        recorded or transformed, only shapes and dtypes can be checked, and labels where the mask is 0 are left out.
        """
        checks.refuse_others(others)
        checks.refuse_more(more)
        checks.require_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            labels=labels,
        )
        assert input_ids is not None
        with_states = self.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_maps = self.output_attentions if output_attentions is None else output_attentions
        batch: PackedBatch | Rectangle
        if being_traced():
            batch = rectangle(input_ids, attention_mask, token_type_ids, position_ids, [] if with_maps else None)
            output = self._forward_rectangle(batch, labels, with_states)
        else:
            batch = PackedBatch.from_padded(input_ids, attention_mask, token_type_ids, position_ids)
            checks.require_embeddings(batch.largest, self.config)
            if labels is not None:
                checks.require_labels(labels, attention_mask, input_ids)
            if self._looked_into(with_states or with_maps):
                output = self._forward_rectangle(Rectangle.of(batch, [] if with_maps else None), labels, with_states)
            else:
                output = self._forward_packed(batch, labels, with_states, with_maps)
        as_tuple = (self.return_dict if return_dict is None else return_dict) is False
        return output.to_tuple() if as_tuple else output

    if TYPE_CHECKING:

        @overload
        def __call__(self, *given: Tensor | None, return_dict: Literal[False], **named: Any) -> tuple[Any, ...]: ...
        @overload
        def __call__(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            token_type_ids: Tensor | None = None,
            position_ids: Tensor | None = None,
            labels: Tensor | None = None,
            *,
            output_hidden_states: bool | None = None,
            output_attentions: bool | None = None,
            return_dict: Literal[True] | None = None,
            **others: object,
        ) -> MaskedLMOutput: ...
        def __call__(self, *given: Any, **named: Any) -> Any: ...

    def _looked_into(self, asked: bool) -> bool:
        """Whether what the layers compute must be (B, S, …): somebody may ask for a gradient by it, or hooks see it."""
        if asked and torch.is_grad_enabled() and any(x.requires_grad for x in self.parameters()):
            return True
        hooks = (
            hook
            for part in (self.embeddings, self.layers, self.head)
            for module in part.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
        return forced_kernel() is None and any(not _of_torch(hook) for hook in hooks)

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
        """The padded call with its padding (tracing.py)."""
        unseen = ~batch.attention_mask[..., None]
        # Zeros in the padding at once, where states are given back: so they lie on the way to the logits.
        seen_of = (lambda x: x.masked_fill(unseen, 0)) if with_states else (lambda x: x)
        states = [seen_of(self.embeddings(batch))]  # (B, S, D)
        for layer in self.layers:
            states.append(seen_of(layer(states[-1], batch)))  # (B, S, D)
        logits = self.head(states[-1], self.word_embeddings)  # (B, S, V)
        loss = None
        if labels is not None:
            loss = masked_lm_loss(logits, labels.masked_fill(~batch.attention_mask, IGNORE)).mean
        maps = None if batch.maps is None else tuple(batch.maps)
        return MaskedLMOutput(loss, logits.masked_fill(unseen, 0), tuple(states) if with_states else None, maps)

    def _padded_maps(self, states: Sequence[Tensor], batch: PackedBatch) -> Iterator[Tensor]:
        """The attention probabilities of each layer, (B, H, S, S), S being the padded length."""
        seen = batch.unpack(torch.ones_like(batch.input_ids)).bool()  # (B, S)
        for layer, x in zip(self.layers, states, strict=False):  # x: what this layer reads, (T, D)
            assert isinstance(layer, EncoderLayer)
            q, k, v = (batch.unpack(part).transpose(1, 2) for part in layer.attention.split_heads(x))  # (B, H, S, K)
            probabilities = equation_1(q, k, v, seen[:, None, None, :])[1]
            yield probabilities * seen[:, None, :, None] * seen[:, None, None, :]

    def hidden_states(self, batch: PackedBatch) -> list[Tensor]:
        """What the embeddings give and what each layer gives, N + 1 of (T, D). The last is `encode(batch)`."""
        return list(self._states(batch))

    def layer_guesses(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """What BERT would answer at `positions` (M,) if it stopped after the embeddings, and after each layer: logits,
        (N + 1, M, V). The last are `predict(batch, positions)`.

        The head was trained on the last layer only: how it reads an earlier one is a view, not a measurement.
        Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
        """
        checks.require_positions(positions, batch.num_tokens)
        word_embeddings = self.word_embeddings
        return torch.stack([self.head(x[positions], word_embeddings) for x in self._states(batch)])  # (N + 1, M, V)

    def attention_maps(self, batch: PackedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
        """Who looks at whom: for each of the given layers (from 0) the attention probabilities, (B, H, S, S), S being
        the longest sequence; 0 beyond the end of a shorter one. The other layers stay on the fused kernel.
        """
        layers = list(layers)
        wrong = [number for number in layers if not 0 <= number < len(self.layers)]
        if wrong or not layers:
            raise ValueError(f"layers must name some of 0 to {len(self.layers) - 1}, not {layers}")
        maps = {}
        for number, x in enumerate(islice(self._states(batch), max(layers) + 1)):  # x: what this layer reads, (T, D)
            if number in layers:
                layer = self.layers[number]
                assert isinstance(layer, EncoderLayer)
                query, key, value = layer.attention.split_heads(x)  # each (T, H, K)
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
        """A checkpoint as a model, in evaluation mode (`model.train()` turns dropout on). `model.load_report`
        tells what was read.

        name_or_path: a folder; a bundled name ("minibert-uncased"); "bert-base-uncased"; or a hub id
        ("owner/name"). dtype: of the weights in memory: torch.bfloat16, "bfloat16", …; "auto" is what config.json says,
        or else what the file holds; None is float32 whatever the file holds. torch_dtype: the same, by its older name.
        revision: of a hub repository. local_files_only: never ask the hub, use what is in its cache.
        init_missing_head: accept a file that has an encoder and no MLM head; the head's transformation then starts as
        the identity. output_hidden_states, output_attentions, return_dict: of each call that does not say.
        Also: hidden_dropout_prob and attention_probs_dropout_prob, in place of the configuration's; and those of
        transformers' that change nothing here.

        Raises ValueError for a file that is not exactly this model, FileNotFoundError for one that is not there.
        """
        rates = {name: others.pop(name) for name in checks.RATES if others.get(name) is not None}
        device = checks.device_of(others.pop("device_map", None), device)
        checks.refuse_others(others, LOADING, "from_pretrained")
        device = None if device is None else find_device(device)
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype is {dtype!r} and torch_dtype {torch_dtype!r}: give one of the two")
        source = hub.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        with reading.opened(source, config_of) as found:
            with shapes_only():  # no memory yet: the weights are held once, when they are read
                model = cls(replace(found.config, **rates))
            state, report = reading.read_weights(
                found,
                {name: tensor.shape for name, tensor in model.state_dict().items()},
                dtype=torch_dtype if dtype is None else dtype,
                device=device,
                init_missing_head=init_missing_head,
            )
        model.load_state_dict(state, assign=True)
        checks.require_weights(model)
        model.load_report = report
        model.output_hidden_states, model.output_attentions = bool(output_hidden_states), bool(output_attentions)
        model.return_dict = return_dict is not False
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

        tokenizer: a tokenizers.Tokenizer, or a fast tokenizer of transformers, to be written beside them, for
        `load_tokenizer` and AutoTokenizer. The others are those of accelerate. state_dict: write these tensors, and not
        the model's own, which may be spread over several processes. is_main_process: another one writes nothing.
        save_function: has no effect, as in transformers, where it does not write safetensors either.

        Raises ValueError if the tensors are not those of a model of this size, OSError if they cannot be written.
        """
        checks.refuse_others(others, SAVING, "save_pretrained")
        if not is_main_process:
            return
        with shapes_only():
            wanted = Bert(self.config).state_dict()
        state = self.state_dict() if state_dict is None else state_dict
        names.require_state(state, wanted)
        files = None if tokenizer is None else as_files(tokenizer, self.config.max_position_embeddings)
        writing.write(folder, self.config.to_dict(), state, files)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; the names may also be those of `named_parameters`. `minibert.checkpoint.names.from_transformers`
        translates those of transformers.
        """
        ours = {names.beginning(name): name for name in self.state_dict()}
        state_dict = {ours.get(name, name): value for name, value in state_dict.items()}
        names.refuse_transformers(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def named_parameters(self, *given: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Called without arguments, as training programs do: names that begin as transformers' (bert.embeddings.,
        bert.encoder.layer.N., cls.predictions.), so that who chooses parameters by those finds them. `bert` and `cls`
        lead to the same parts.

        With arguments, as libraries call it that match these names with modules and state dicts: the names of the parts
        themselves. So too where something was put in, such as an adapter of PEFT.
        """
        found = list(super().named_parameters(*given, **named))
        as_theirs = not given and not named and all(names.is_ours(name) for name, _ in found)
        yield from ((names.beginning(name), x) for name, x in found) if as_theirs else found

    @property
    def bert(self) -> nn.Module:
        """All but the head: `bert.embeddings` and `bert.encoder.layer`, as transformers has them."""
        return Parts(embeddings=self.embeddings, encoder=Parts(layer=self.layers))

    base_model = bert

    @property
    def cls(self) -> nn.Module:
        """The head: `cls.predictions`, as transformers has it."""
        return Parts(predictions=self.head)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model has learned; or how many of them still learn."""
        return sum(x.numel() for x in self.parameters() if x.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Embedding:
        """The vectors of the words, which the head also compares its answer with."""
        return self.embeddings.word

    def tie_weights(self, **_: object) -> None:
        """Does nothing: the head has no matrix of its own, it reads that of the words."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give the model a vocabulary of so many tokens, filled up to a multiple if that is asked for. New ones start
        as the mean of the old ones, so that they are no likelier than others (Hewitt 2021); fewer cuts off the last
        ones. The weights become new tensors, so make the optimizer after this.

        Raises ValueError if pad_token_id would be cut off.
        """
        if not mean_resizing:
            raise ValueError(
                "new tokens start as the mean of the old ones: for others, leave mean_resizing out, and then set "
                "model.embeddings.word.weight.data[old:] and model.head.bias.data[old:]"
            )
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.embeddings.word
        new_num_tokens = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        config = replace(self.config, vocab_size=new_num_tokens)
        word, head = self.embeddings.word, self.head
        word.weight, head.bias = resized(word.weight, new_num_tokens), resized(head.bias, new_num_tokens)
        word.num_embeddings = new_num_tokens
        self.config = config
        return word

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """From now on, in training, each layer keeps only what it read, and is computed again for the gradient: a third
        more time, and far less memory (recomputing.py). It is done as with {"use_reentrant": False}.
        """
        if dict(gradient_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
            raise ValueError(
                f"gradient_checkpointing_kwargs is {gradient_checkpointing_kwargs}, and {{'use_reentrant': False}} is "
                "what there is: leave it out"
            )
        set_recomputing(self.layers, True)

    def gradient_checkpointing_disable(self) -> None:
        """The opposite."""
        set_recomputing(self.layers, False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return is_recomputing(self.layers)


def _of_torch(hook: object) -> bool:
    """Whether torch itself has put this hook there: FSDP brings weights by hooks, and looks at nothing."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def resized(tensor: Tensor, length: int) -> nn.Parameter:
    """The tensor with another first dimension: cut, or filled up with the mean of its rows."""
    old = tensor.detach()
    new = old.mean(0, dtype=torch.float32).to(old.dtype).expand(max(0, length - len(old)), *old.shape[1:])
    return nn.Parameter(torch.cat([old[:length], new]), requires_grad=tensor.requires_grad)
