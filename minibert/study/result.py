"""`study`: all numbers of one text, from a model or from a trace. measures.py and heads.py say what they mean."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minibert import checks
from minibert.fill_mask import require_top_k, target_ids
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.study import page
from minibert.study.heads import Head, Maps, habits, maps, taken, written
from minibert.study.measures import (
    Answer,
    Facts,
    Guesses,
    LayerChange,
    Model,
    cost,
    guesses,
    influence,
    mixing_ratio,
    shares,
    state_names,
)
from minibert.study.reading import Reading, Vocabulary, read_ids, read_text
from minibert.study.text import filled, says, to_text
from minibert.tokenizer import as_tokenizer, require_id
from minibert.trace.recorder import trace
from minibert.trace.table import SHAPES, expected_shape, row_of
from minibert.trace.tracefile import Trace

MOST_BEST = 20  # words at each step: more would make a page too large to send
DIGITS = 5  # of every number in JSON and on the page
# Masks that are followed through the layers: at most so many, and so many words of all their steps together. What is
# answered at the others is there all the same.
MOST_MASKS, MOST_GUESSES = 32, 10_000
SAME_SUM = 0.01  # a trace is of this model if its sums differ by less than this share of their largest number


class TracedText:
    """Text number `number` of a trace. Raises ValueError if there is no such text, or no token in it."""

    def __init__(self, trace: Trace, number: int = 0) -> None:
        inputs, _ = trace.inputs()
        rows = len(inputs.input_ids)
        if not 0 <= number < rows:
            raise ValueError(f"{trace.name} has the texts 0 to {rows - 1}, and no text {number}")
        self.trace, self.number, self.config = trace, number, trace.config
        self.shape = tuple(inputs.input_ids.shape)
        self.kept = inputs.attention_mask[number].nonzero().flatten()  # (S,): the columns that are tokens
        if not len(self.kept):
            raise ValueError(f"text {number} of {trace.name} is padding alone")
        self.ids: list[int] = inputs.input_ids[number, self.kept].tolist()
        self.positions: list[int] = self.kept.tolist()
        self.segments: list[int] = inputs.token_type_ids[number, self.kept].tolist()
        # The model is asked where a label is another token than the one that stands there.
        labels = self.ids if inputs.labels is None else inputs.labels[number, self.kept].tolist()
        self.asked = [place for place, label in enumerate(labels) if label not in (IGNORE, self.ids[place])]

    def has(self, *names: str) -> bool:
        found = self.trace.shapes()
        return all(name in found for name in names)

    def read(self, name: str) -> Tensor:
        """A tensor in float32, B gone and S the tokens alone: "layers.0.value" is (H, S, K).

        Raises ValueError if its shape is another than the trace's config says, or a number in it is not finite.
        """
        shape = self.trace.shapes()[name]
        wanted = expected_shape(name, self.config, self.shape)
        if shape != wanted:
            raise ValueError(f"{self.trace.name}: {name} is {shape}, and must be {wanted}")
        x = self.trace.read(name)[self.number]
        for axis, letter in enumerate(SHAPES[row_of(name)][1:]):
            if letter == "S" and len(self.kept) < self.shape[1]:
                x = x.index_select(axis, self.kept)
        if not bool(x.isfinite().all()):
            raise ValueError(f"{self.trace.name}: {name} holds numbers that are not finite: a weight is broken")
        return x.float()


@dataclass(frozen=True)
class Study(Facts):
    """What BERT does with one text, and ways to show it."""

    def __repr__(self) -> str:
        return f"<study of {' '.join(self.reading.pieces)[:60]!r}: save(path), to_text(), to_dict()>"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it, and under "says" the sentence of each view. Numbers have DIGITS digits."""
        exact = json.dumps({"format": "minibert-study", **asdict(self), "says": says(self)}, allow_nan=False)
        rounded: dict[str, Any] = json.loads(exact, parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))
        return rounded

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_text(self) -> str:
        """The views as text, for a terminal."""
        return to_text(self)

    def to_html(self) -> str:
        """The page: one file that loads nothing. The same study gives the same bytes."""
        return page.to_html(self.to_dict(), f"BERT reads: {filled(self)[:100]}")

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write the page. Raises FileExistsError if `path` is a file that is no such page, unless `force` is given."""
        page.save(self.to_html(), path, force=force)

    def _repr_html_(self) -> str:
        """The page within a notebook."""
        return page.in_a_notebook(self.to_html())


def study(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    text: str,
    pair: str | None = None,
    top_k: int = 5,
    targets: Sequence[str] | None = None,
    *,
    truncate: bool = False,
    progress: bool = False,
    name: str = "this model",
) -> Study:
    """What the model does with a text, or with a pair of texts, [MASK] or not.

    top_k: best words after each step. targets: words to follow as well. truncate: cut what is too long. progress: show
    a bar where it takes long. name: of the model, to be read by people.

    Raises ValueError for a text that is empty or too long, a bad top_k, a target that is not one token, a model in
    training mode, and weights that are not finite.
    """
    checks.require_model(model)
    checks.require_no_dropout(model)
    tokenizer = as_tokenizer(tokenizer)
    vocabulary = Vocabulary(tokenizer, model.config)
    reading = read_text(tokenizer, model.config, text, pair, truncate=truncate)
    given = torch.tensor([reading.ids]), None, torch.tensor([reading.segments])  # no mask: every token is there
    row = TracedText(trace(model, *given))
    followed = [] if targets is None else target_ids(tokenizer, targets)
    if followed and not reading.masks:
        raise ValueError("targets are words for a mask, and the text has none: write one, or leave the targets out")
    found = _study(row, reading, model, vocabulary, top_k, followed, name)
    if not found.guesses:
        return found
    words = influence(model, reading, found.guesses, require_id(tokenizer, "[MASK]"), vocabulary, progress)
    left_out = {key: why for key, why in found.left_out.items() if key != "influence"}
    if not words:
        left_out["influence"] = "there is no word beside the masks that could be hidden"
    return replace(found, influence=words, left_out=left_out)


def study_trace(
    recorded: Trace,
    row: int = 0,
    model: BertForMaskedLM | None = None,
    tokenizer: Tokenizer | None = None,
    top_k: int = 5,
    targets: Sequence[str] | None = None,
    *,
    name: str | None = None,
) -> Study:
    """What is in a trace, of one of its texts. The model gives what needs weights, and its tokenizer the pieces;
    without them ids are shown, and the views that the trace alone allows. Nothing is hidden or revealed: a trace cannot
    run.

    Raises ValueError for a model of another size, and for a trace that holds wrong shapes or numbers.
    """
    if (model is None) != (tokenizer is None):
        raise ValueError("give the model and its tokenizer together, or neither")
    if model is not None and model.config != recorded.config:
        mine, theirs = asdict(model.config), asdict(recorded.config)
        key = next(key for key in mine if mine[key] != theirs[key])
        raise ValueError(f"{recorded.name} is of another model: its {key} is {theirs[key]}, the model's {mine[key]}")
    if targets is not None and tokenizer is None:
        raise ValueError("words can be followed only where a model's tokenizer is given")
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    vocabulary = Vocabulary(tokenizer, recorded.config)
    chosen = TracedText(recorded, row)
    reading = read_ids(chosen.ids, chosen.segments, chosen.positions, chosen.asked, tokenizer)
    followed = [] if targets is None or tokenizer is None else target_ids(tokenizer, targets)
    title = name or recorded.title.replace(recorded.name, Path(recorded.name).name)  # a page tells no folder
    return _study(chosen, reading, model, vocabulary, top_k, followed, title)


def _study(
    row: TracedText,
    reading: Reading,
    model: BertForMaskedLM | None,
    vocabulary: Vocabulary,
    top_k: int,
    targets: Sequence[int],
    name: str,
) -> Study:
    """Everything but the experiments of view 3."""
    require_top_k(top_k, MOST_BEST)
    config, left_out = row.config, _left_out(row, reading, model)
    layers = range(config.num_hidden_layers)
    with torch.inference_mode():
        found: dict[str, Any] = {}
        if "shares" not in left_out and model is not None:
            found["shares"] = _sum_shares(row, model)
            if not found["shares"]:
                left_out["shares"] = "the sums in the trace are not those of this model's embeddings"
        if "guesses" not in left_out and model is not None:
            found["guesses"] = _layer_guesses(row, reading, model, vocabulary, top_k, targets)
        if "attention" not in left_out:
            weights = None if "takes" in left_out else model
            found["looks"], found["takes"], found["maps"] = _heads(row, reading, weights)
        if "changes" not in left_out:
            found["changes"] = [_layer_change(row, number, model) for number in layers]
            for number, layer in enumerate(found["changes"]):
                if not all(map(isfinite, (*layer.attention, *layer.feed_forward))):
                    left_out["changes"] = f"in layers.{number} a vector that a step reads is 0: it has no length"
            if "changes" in left_out:
                del found["changes"]
        found["answers"] = _answers(row, reading, model, vocabulary, top_k)
    parts = cost(config, len(reading.ids), len(reading.masks))
    heads, widths = config.num_attention_heads, (config.hidden_size, config.intermediate_size)
    parameters = sum(part.parameters for part in parts)
    size = Model(name, len(layers), heads, *widths, config.vocab_size, parameters)
    words = [vocabulary.name(token) for token in targets]
    return Study(size, reading, words, **found, cost=parts, left_out=left_out)


def _left_out(row: TracedText, reading: Reading, model: BertForMaskedLM | None) -> dict[str, str]:
    """The views that cannot be shown, and why."""
    layers = range(row.config.num_hidden_layers)
    steps = ("attention_output", "attention_norm", "feed_forward", "feed_forward_norm")
    needed = {
        "shares": [],
        "guesses": list(state_names(len(layers)).values()),
        "attention": [f"layers.{number}.probabilities" for number in layers],
        "changes": ["embeddings.norm", *(f"layers.{number}.{step}" for number in layers for step in steps)],
    }
    absent = {view: [name for name in names if not row.has(name)] for view, names in needed.items()}
    reasons = {view: f"the trace has no {names[0]}" for view, names in absent.items() if names}
    if model is None:
        reasons["shares"] = reasons["guesses"] = "it needs the weights: give the model"
        reasons["takes"] = "what a head takes needs the weights: give the model"
    elif any(not row.has(f"layers.{number}.value") for number in layers):
        reasons["takes"] = "the trace has no values"
    reasons["influence"] = "a trace cannot be asked again: study the text with the model"
    if not reading.masks and model is not None:
        reasons["guesses"] = reasons["influence"] = "the text has no mask: nothing is asked"
    return reasons


def _answers(
    row: TracedText, reading: Reading, model: BertForMaskedLM | None, vocabulary: Vocabulary, top_k: int
) -> list[Answer]:
    """The best words at every mask, from the logits of the trace, or from the head on its last states."""
    last = f"layers.{row.config.num_hidden_layers - 1}.feed_forward_norm"
    if reading.masks and row.has("logits"):
        logits = row.read("logits")[reading.masks]  # (M, V)
    elif reading.masks and model is not None and row.has(last):
        logits = _head(model, row.read(last)[reading.masks])
    else:
        return []
    return [Answer(*one) for one in zip(reading.masks, vocabulary.best(logits, top_k), strict=True)]


def _sum_shares(row: TracedText, model: BertForMaskedLM) -> dict[str, list[float]]:
    """What word, position and segment give to each sum. Empty if the trace's sums are not this model's."""
    tables = (model.embeddings.word, model.embeddings.position, model.embeddings.token_type)
    numbers = (row.ids, row.positions, row.segments)
    parts = [
        table(torch.tensor(of_token, device=model.device)).float().cpu()  # (S, D)
        for table, of_token in zip(tables, numbers, strict=True)
    ]
    if row.has("embeddings.sum"):
        recorded, total = row.read("embeddings.sum"), torch.stack(parts).sum(0)
        if float((recorded - total).abs().max()) > SAME_SUM * float(total.abs().max()):
            return {}
    return dict(zip(("word", "position", "segment"), shares(parts).tolist(), strict=True))


def _layer_guesses(
    row: TracedText,
    reading: Reading,
    model: BertForMaskedLM,
    vocabulary: Vocabulary,
    top_k: int,
    targets: Sequence[int],
) -> list[Guesses]:
    """View 2, at the first masks."""
    names = state_names(row.config.num_hidden_layers)
    most = MOST_GUESSES // (len(names) * (top_k + len(targets)))
    followed = reading.masks[: max(1, min(MOST_MASKS, most))]
    states = torch.stack([row.read(name)[followed] for name in names.values()], dim=1)  # (M, steps, D)
    return [
        guesses(place, list(names), _head(model, of_place), vocabulary, top_k, targets)
        for place, of_place in zip(followed, states, strict=True)
    ]


def _head(model: BertForMaskedLM, states: Tensor) -> Tensor:
    """(n, D) → (n, V)"""
    weight = model.word_embeddings
    return model.head(states.to(weight), weight).float().cpu()


def _heads(row: TracedText, reading: Reading, model: BertForMaskedLM | None) -> tuple[list[Head], list[Head], Maps]:
    """View 4: the heads by their weights, the heads by what they take (empty without a model), and the maps."""
    layers = range(row.config.num_hidden_layers)
    weights = [row.read(f"layers.{number}.probabilities") for number in layers]  # (H, S, S) each
    lengths = [] if model is None else [_given(row, number, model).norm(dim=-1) for number in layers]  # (H, S)
    takes = [taken(one, length) for one, length in zip(weights, lengths, strict=False)]
    looks, found = (
        [head for number, of_layer in enumerate(some) for head in habits(of_layer, reading, number)]
        for some in (weights, takes)
    )
    return looks, found, maps(weights, takes, lengths, reading.masks)


def _layer_change(row: TracedText, number: int, model: BertForMaskedLM | None) -> LayerChange:
    """View 5 for one layer."""
    x = row.read(f"layers.{number - 1}.feed_forward_norm" if number else "embeddings.norm")
    steps = ("attention_output", "attention_norm", "feed_forward", "feed_forward_norm")
    attended, middle, worked, out = (row.read(f"layers.{number}.{step}") for step in steps)
    mixing = None
    if model is not None and row.has(f"layers.{number}.value", f"layers.{number}.probabilities"):
        layer = model.layers[number]
        context = attended - layer.attention.output.bias.float().cpu()
        gamma = layer.attention_LayerNorm.weight.float().cpu()
        probabilities = row.read(f"layers.{number}.probabilities")
        mixing = mixing_ratio(x, context, probabilities, _given(row, number, model), gamma).tolist()
    return LayerChange(
        attention=(attended.norm(dim=-1) / x.norm(dim=-1)).tolist(),
        feed_forward=(worked.norm(dim=-1) / middle.norm(dim=-1)).tolist(),
        cosine=F.cosine_similarity(x, out, dim=-1).tolist(),
        mixing=mixing,
    )


def _given(row: TracedText, number: int, model: BertForMaskedLM) -> Tensor:
    """f(x) of one layer, (H, S, D)."""
    weight = model.layers[number].attention.output.weight.float().cpu()
    return written(row.read(f"layers.{number}.value"), weight)
