"""BERT as people call it: padded batches, labels and their loss, attention maps, loading and saving.

What is computed is in model.py. Here is what surrounds it in a user's program, under the names of transformers'
BertForMaskedLM.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minibert import checks
from minibert.attention import equation_1, formula
from minibert.checkpoint import hub, names, reading, writing
from minibert.checkpoint.reading import LoadReport, shapes_only
from minibert.config import config_of
from minibert.devices import find_device
from minibert.loss import IGNORE, masked_lm_loss
from minibert.model import Bert, EncoderLayer
from minibert.output import MaskedLMOutput
from minibert.packing import PackedBatch
from minibert.recomputing import is_recomputing, set_recomputing
from minibert.tokenizer import as_files
from minibert.tracing import Rectangle, being_traced, rectangle

# What from_pretrained and save_pretrained take.
LOADING = ("dtype", "torch_dtype", "device", "revision", "local_files_only", "init_missing_head")
SAVING = ("tokenizer", "state_dict", "is_main_process", "save_function")


class BertForMaskedLM(Bert):
    """BERT with two ways to call it.

    The padded call is `model(input_ids, …)`: a rectangle of ids in, a logit for every word at every position out, as
    transformers' BertForMaskedLM has it. The packed call is `encode` and `predict`, from `Bert`: no padding is
    computed, and logits only at the positions that you ask for (BERT's loss needs 15 % of them).
    """

    load_report: LoadReport | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embeddings.word.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self.embeddings.word.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = False,
        output_attentions: bool | None = False,
        return_dict: bool | None = True,
        **others: object,
    ) -> MaskedLMOutput:
        """Padded in, padded out. All tensors are (B, S); `PackedBatch.from_padded` says what holds when one is left
        out. What a tokenizer of transformers gives beside them (special_tokens_mask, …) may be passed on, and is not
        read; any other name is an error.

        labels are ids where a prediction is scored and −100 elsewhere; the loss is the mean over the scored positions.
        output_hidden_states: N + 1 of (B, S, D). output_attentions: N of (B, H, S, S), by the formula, without dropout.
        return_dict=False: a tuple of what is not None.

        Raises ValueError for wrong shapes, dtypes, ids, or a label where the attention mask is 0. While the call is
        recorded (torch.compile, torch.export, torch.jit.trace), only shapes and dtypes can be checked, labels where the
        mask is 0 are left out, and there are no attention maps.
        """
        checks.refuse_others(others)
        checks.require_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            labels=labels,
        )
        if being_traced():
            output = self._forward_rectangle(
                rectangle(input_ids, attention_mask, token_type_ids, position_ids), labels, bool(output_hidden_states)
            )
            if output_attentions:
                raise ValueError("attention maps cannot be had from a program that is recorded: leave them out")
        else:
            batch = PackedBatch.from_padded(input_ids, attention_mask, token_type_ids, position_ids)
            states = self.hidden_states(batch) if output_hidden_states or output_attentions else [self.encode(batch)]
            logits = self.head(states[-1], self.embeddings.word.weight)  # (T, V)
            loss = None
            if labels is not None:
                checks.require_labels(labels, attention_mask, input_ids)
                loss = masked_lm_loss(logits, batch.pack(labels)).mean
            output = MaskedLMOutput(
                loss,
                batch.unpack(logits),
                tuple(batch.unpack(x) for x in states) if output_hidden_states else None,
                tuple(self._padded_maps(states, batch)) if output_attentions else None,
            )
        return output.to_tuple() if return_dict is False else output  # type: ignore[return-value]

    if TYPE_CHECKING:
        __call__ = forward

    def _forward_rectangle(self, batch: Rectangle, labels: Tensor | None, with_states: bool) -> MaskedLMOutput:
        """The padded call as it can be recorded (tracing.py)."""
        states = [self.embeddings(batch)]  # (B, S, D)
        for layer in self.layers:
            states.append(layer(states[-1], batch))  # (B, S, D)
        unseen = ~batch.attention_mask[..., None]
        logits = self.head(states[-1], self.embeddings.word.weight)  # (B, S, V)
        loss = None
        if labels is not None:
            loss = masked_lm_loss(logits, labels.masked_fill(~batch.attention_mask, IGNORE)).mean
        shown = tuple(x.masked_fill(unseen, 0) for x in states) if with_states else None
        return MaskedLMOutput(loss, logits.masked_fill(unseen, 0), shown)

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
        word_embeddings = self.embeddings.word.weight
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
        **others: object,
    ) -> "BertForMaskedLM":
        """A checkpoint as a model, in evaluation mode (`model.train()` turns dropout on). `model.load_report`
        tells what was read.

        name_or_path: a folder; a bundled name ("minibert-uncased"); "bert-base-uncased"; or a hub id
        ("owner/name"). dtype: of the weights in memory: torch.bfloat16, "bfloat16", …; "auto" is what config.json says,
        or else what the file holds; None is float32 whatever the file holds. torch_dtype: the same, by its older name.
        revision: of a hub repository. local_files_only: never ask the hub, use what is in its cache.
        init_missing_head: accept a file that has an encoder and no MLM head; the head's transformation then starts as
        the identity.

        Raises ValueError for a file that is not exactly this model, FileNotFoundError for one that is not there.
        """
        checks.refuse_others(others, LOADING, "from_pretrained")
        device = None if device is None else find_device(device)
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype is {dtype!r} and torch_dtype {torch_dtype!r}: give one of the two")
        source = hub.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        with reading.opened(source, config_of) as found:
            with shapes_only():  # no memory yet: the weights are held once, when they are read
                model = cls(found.config)
            state, report = reading.read_weights(
                found,
                {name: tensor.shape for name, tensor in model.state_dict().items()},
                dtype=torch_dtype if dtype is None else dtype,
                device=device,
                init_missing_head=init_missing_head,
            )
        model.load_state_dict(state, assign=True)
        model.load_report = report
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
        """As in torch. `minibert.checkpoint.names.from_transformers` translates tensors under transformers' names."""
        names.refuse_transformers(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model has learned; or how many of them still learn."""
        return sum(x.numel() for x in self.parameters() if x.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Embedding:
        """The vectors of the words, which the head also compares its answer with."""
        return self.embeddings.word

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        """Give the model a vocabulary of so many tokens. New ones start as the mean of the old ones, so that they are
        no likelier than others (Hewitt 2021); fewer cuts off the last ones. The weights become new tensors, so make the
        optimizer after this.

        Raises ValueError if pad_token_id would be cut off.
        """
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


def resized(tensor: Tensor, length: int) -> nn.Parameter:
    """The tensor with another first dimension: cut, or filled up with the mean of its rows."""
    old = tensor.detach()
    new = old.mean(0, dtype=torch.float32).to(old.dtype).expand(max(0, length - len(old)), *old.shape[1:])
    return nn.Parameter(torch.cat([old[:length], new]), requires_grad=tensor.requires_grad)
