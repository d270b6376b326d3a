"""What a study shows, from the tensors of a trace. What the numbers mean is in measures.py and heads.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minibert.fill_mask import best_words
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.study.heads import Head, Maps, habits, maps, taken, written
from minibert.study.measures import (
    Answer,
    Guess,
    Guesses,
    LayerChange,
    cosine,
    embedding_parts,
    guesses,
    length_ratio,
    mixing_ratio,
    shares,
    state_names,
)
from minibert.study.reading import Reading, Vocabulary
from minibert.trace.table import SHAPES, expected_shape, row_of
from minibert.trace.tracefile import Trace


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
        x = self.trace.rows(name, self.number, self.number + 1)[0]
        for axis, letter in enumerate(SHAPES[row_of(name)][1:]):
            if letter == "S" and len(self.kept) < self.shape[1]:
                x = x.index_select(axis, self.kept)
        if not bool(x.isfinite().all()):
            raise ValueError(f"{self.trace.name}: {name} holds numbers that are not finite: a weight is broken")
        return x.float()


# Masks that are followed through the layers: at most so many, and so many words of all their steps together. What is
# answered at the others is there all the same.
MOST_MASKS, MOST_GUESSES = 32, 10_000
SAME_SUM = 0.01  # a trace is of this model if its sums differ by less than this share of their largest number


def left_out(row: TracedText, reading: Reading, model: BertForMaskedLM | None) -> dict[str, str]:
    """The views that cannot be shown, and why."""
    layers = range(row.config.num_hidden_layers)
    steps = ("attention_output", "attention_norm", "feed_forward", "feed_forward_norm")
    needed = {
        "shares": [],
        "guesses": list(state_names(row.config.num_hidden_layers).values()),
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


def answers(
    row: TracedText, reading: Reading, model: BertForMaskedLM | None, vocabulary: Vocabulary, top_k: int
) -> list[Answer]:
    """The best words at every mask, from the logits of the trace, or from the head on its last states."""
    if not reading.masks:
        return []
    last = f"layers.{row.config.num_hidden_layers - 1}.feed_forward_norm"
    if row.has("logits"):
        logits = row.read("logits")[reading.masks]  # (M, V)
    elif model is not None and row.has(last):
        weight = model.embeddings.word.weight
        logits = model.head(row.read(last)[reading.masks].to(weight), weight).float().cpu()
    else:
        return []
    best, chosen = best_words(logits, top_k, vocabulary.known)  # both (M, top_k)
    pairs = zip(reading.masks, chosen.tolist(), best.tolist(), strict=True)
    return [
        Answer(place, [Guess(vocabulary.name(token), token, p) for token, p in zip(tokens, scores, strict=True)])
        for place, tokens, scores in pairs
    ]


def sum_shares(row: TracedText, model: BertForMaskedLM) -> dict[str, list[float]]:
    """What word, position and segment give to each sum. Empty if the trace's sums are not this model's."""
    given = (torch.tensor([numbers], device=_device(model)) for numbers in (row.ids, row.segments, row.positions))
    ids, segments, positions = given
    batch = PackedBatch.from_padded(ids, None, segments, positions)
    parts = [part.float().cpu() for part in embedding_parts(model, batch)]
    if row.has("embeddings.sum"):
        recorded, total = row.read("embeddings.sum"), sum(parts[1:], parts[0])
        if float((recorded - total).abs().max()) > SAME_SUM * float(total.abs().max()):
            return {}
    return dict(zip(("word", "position", "segment"), shares(parts).tolist(), strict=True))


def layer_guesses(
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
    found = []
    for place, of_place in zip(followed, states, strict=True):
        weight = model.embeddings.word.weight
        logits = model.head(of_place.to(weight), weight).cpu()  # (steps, V)
        found.append(guesses(place, list(names), logits, vocabulary, top_k, targets))
    return found


def heads(row: TracedText, reading: Reading, model: BertForMaskedLM | None) -> tuple[list[Head], list[Head], Maps]:
    """View 4: the heads by their weights, the heads by what they take (empty without a model), and the maps."""
    looks: list[Head] = []
    takes: list[Head] = []
    weights, shares_taken, lengths = [], [], []
    for number in range(row.config.num_hidden_layers):
        probabilities = row.read(f"layers.{number}.probabilities")  # (H, S, S)
        weights.append(probabilities)
        looks += habits(probabilities, reading, number)
        if model is None:
            continue
        length = _given(row, number, model).norm(dim=-1)  # (H, S)
        lengths.append(length)
        shares_taken.append(taken(probabilities, length))
        takes += habits(shares_taken[-1], reading, number)
    return looks, takes, maps(weights, shares_taken, lengths, reading.masks)


def layer_change(row: TracedText, number: int, model: BertForMaskedLM | None) -> LayerChange:
    """View 5 for one layer."""
    before = f"layers.{number - 1}.feed_forward_norm" if number else "embeddings.norm"
    read = {
        name: row.read(f"layers.{number}.{name}") for name in ("attention_output", "attention_norm", "feed_forward")
    }
    x, out = row.read(before), row.read(f"layers.{number}.feed_forward_norm")
    mixing = None
    if model is not None and row.has(f"layers.{number}.value", f"layers.{number}.probabilities"):
        layer = model.layers[number]
        context = read["attention_output"] - layer.attention.output.bias.float().cpu()
        gamma = layer.attention_LayerNorm.weight.float().cpu()
        probabilities = row.read(f"layers.{number}.probabilities")
        mixing = mixing_ratio(x, context, probabilities, _given(row, number, model), gamma).tolist()
    return LayerChange(
        attention=length_ratio(read["attention_output"], x).tolist(),
        feed_forward=length_ratio(read["feed_forward"], read["attention_norm"]).tolist(),
        cosine=cosine(x, out).tolist(),
        mixing=mixing,
    )


def _given(row: TracedText, number: int, model: BertForMaskedLM) -> Tensor:
    """f(x) of one layer, (H, S, D)."""
    weight = model.layers[number].attention.output.weight.float().cpu()
    return written(row.read(f"layers.{number}.value"), weight)


def _device(model: BertForMaskedLM) -> torch.device:
    return model.embeddings.word.weight.device
