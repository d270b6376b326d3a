"""`study`: all numbers of one text, from a model or from a trace, and the ways to show them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minibert import checks
from minibert.fill_mask import require_top_k, target_ids
from minibert.masked_lm import BertForMaskedLM
from minibert.study import page, views
from minibert.study.measures import Facts, Model, cost, influence, neighbours
from minibert.study.reading import Reading, Vocabulary, mask_id, read_ids, read_text
from minibert.study.text import says, to_text
from minibert.study.views import TracedText
from minibert.tokenizer import as_tokenizer
from minibert.trace.recorder import trace
from minibert.trace.tracefile import Trace

MOST_BEST = 20  # words at each step: more would make a page too large to send
DIGITS = 5  # of every number in JSON and on the page


@dataclass(frozen=True)
class Study(Facts):
    """What BERT does with one text, and ways to show it."""

    def __repr__(self) -> str:
        return f"<study of {' '.join(self.reading.pieces)[:60]!r}: save(path), to_text(), to_dict()>"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it, and under "says" the sentence of each view. Numbers have DIGITS digits."""
        rounded: dict[str, Any] = _rounded({"format": "minibert-study", **asdict(self), "says": says(self)})
        return rounded

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """The views as text, for a terminal."""
        return to_text(self)

    def to_html(self) -> str:
        """The page: one file that loads nothing. The same study gives the same bytes."""
        return page.to_html(self.to_dict())

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
    words = influence(
        model,
        reading.ids,
        reading.segments,
        neighbours(reading.groups(), len(reading.ids)),
        [one.position for one in found.guesses],
        [one.answer.id for one in found.guesses],
        mask_id(tokenizer),
        vocabulary,
        progress,
    )
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
    config, left_out = row.config, views.left_out(row, reading, model)
    with torch.inference_mode():
        found: dict[str, Any] = {}
        if "shares" not in left_out and model is not None:
            found["shares"] = views.sum_shares(row, model)
            if not found["shares"]:
                left_out["shares"] = "the sums in the trace are not those of this model's embeddings"
        if "guesses" not in left_out and model is not None:
            found["guesses"] = views.layer_guesses(row, reading, model, vocabulary, top_k, targets)
        if "attention" not in left_out:
            found["looks"], found["takes"], found["maps"] = views.heads(
                row, reading, None if "takes" in left_out else model
            )
        if "changes" not in left_out:
            found["changes"] = [views.layer_change(row, number, model) for number in range(config.num_hidden_layers)]
        found["answers"] = views.answers(row, reading, model, vocabulary, top_k)
    parts_of_cost = cost(config, len(reading.ids), len(reading.masks))
    size = Model(
        name=name,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        feed_forward_size=config.intermediate_size,
        vocabulary=config.vocab_size,
        parameters=sum(part.parameters for part in parts_of_cost),
    )
    words = [vocabulary.name(token) for token in targets]
    return Study(size, reading, words, **found, cost=parts_of_cost, left_out=left_out)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
