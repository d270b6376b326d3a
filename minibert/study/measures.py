"""The numbers of a study, view by view, each with its formula and source. `Facts` at the end holds them all; result.py
fills it in, text.py and page.py show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.study.heads import Head, Maps
from minibert.study.reading import Guess, Reading, Vocabulary


def shares(parts: Sequence[Tensor]) -> Tensor:
    """How much each part gives to the sum of all: (number of parts, T). A column adds up to 1; a part that points away
    from the sum has a negative share.

        share of part i = ⟨P partᵢ, P sum⟩ / ‖P sum‖²,  P x = x − mean(x)

    P, because the LayerNorm that reads the sum takes the mean out first. The formula is the projection of each part
    onto the sum.
    """
    centred = torch.stack([part - part.mean(-1, keepdim=True) for part in parts])  # (parts, T, D)
    total = centred.sum(0)  # (T, D)
    return (centred * total).sum(-1) / total.pow(2).sum(-1)


@dataclass(frozen=True)
class Followed:
    """One word at one step: its probability, and its rank among all words (1 is the best)."""

    probability: float
    rank: int


@dataclass(frozen=True)
class Step:
    after: str  # "embeddings", "layer 3 attention", "layer 3 feed-forward"
    best: list[Guess]
    answer: Followed
    targets: list[Followed]


@dataclass(frozen=True)
class Guesses:
    """All steps at one place. The answer is the best word of the last step."""

    position: int
    answer: Guess
    steps: list[Step]

    @property
    def first(self) -> str:
        """The step from which on the answer is the best word, to the end."""
        ranks = [step.answer.rank for step in self.steps]
        behind = [number for number, rank in enumerate(ranks) if rank > 1]
        return self.steps[behind[-1] + 1 if behind else 0].after


def state_names(layers: int) -> dict[str, str]:
    """Each step, and the name that its states have in a trace."""
    names = {"embeddings": "embeddings.norm"}
    for number in range(layers):
        names[f"layer {number + 1} attention"] = f"layers.{number}.attention_norm"
        names[f"layer {number + 1} feed-forward"] = f"layers.{number}.feed_forward_norm"
    return names


def guesses(
    position: int, steps: Sequence[str], logits: Tensor, vocabulary: Vocabulary, top_k: int, targets: Sequence[int]
) -> Guesses:
    """The steps at one place, from the logits after each of them, (number of steps, V).

    rank of a word = 1 + the number of words with a higher logit
    """
    best = vocabulary.best(logits, top_k)
    followed = [best[-1][0].id, *targets]
    values = logits.float().softmax(-1)[:, followed].tolist()  # (steps, 1 + targets)
    own = logits[:, followed, None]
    logits = vocabulary.only_words(logits)
    ranks = (1 + (logits[:, None, :] > own).sum(-1)).tolist()  # (steps, 1 + targets)
    rows = []
    for number, after in enumerate(steps):
        answer, *others = (Followed(*one) for one in zip(values[number], ranks[number], strict=True))
        rows.append(Step(after, best[number], answer, others))
    return Guesses(position, best[-1][0], rows)


MOST_TOKENS = 8192  # of all the copies of the text in one experiment; above it, neighbouring words go together
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Change:
    """log p of the answer in this experiment, minus log p of it in the experiment's starting point, in nats. `winner`
    is the best word in the experiment.
    """

    nats: float
    winner: str


@dataclass(frozen=True)
class Influence:
    """One word, or a group of neighbours: the places of its pieces, and for each asked place what it does there."""

    places: list[int]
    hidden: list[Change]
    alone: list[Change]


def neighbours(groups: Sequence[list[int]], length: int) -> list[list[int]]:
    """The groups themselves while one copy of the text for each stays within MOST_TOKENS, else runs of neighbours."""
    size = -(-len(groups) // max(1, MOST_TOKENS // length))
    return [[place for group in groups[i : i + size] for place in group] for i in range(0, len(groups), size or 1)]


def influence(
    model: BertForMaskedLM,
    reading: Reading,
    asked: Sequence[Guesses],
    mask_id: int,
    vocabulary: Vocabulary,
    progress: bool = False,
) -> list[Influence]:
    """For each word, or group of neighbours, and for the answer at each asked place (M of them):

        hidden = log p(answer | the text without the group) − log p(answer | the text)
        alone  = log p(answer | the group alone) − log p(answer | no word at all)

    "Without" and "no word" mean: the mask token stands there. Added tokens always stay. A word that helps has a
    negative `hidden` and a positive `alone`. progress: show a bar where it takes long.
    """
    from tqdm import tqdm

    ids, device = reading.ids, model.device
    groups = neighbours(reading.groups(), len(ids))
    hideable = {place for group in groups for place in group}
    nothing = [mask_id if place in hideable else token for place, token in enumerate(ids)]
    rows = [ids, nothing]
    for group in groups:
        rows.append([mask_id if place in group else token for place, token in enumerate(ids)])
        rows.append([token if place in group else nothing[place] for place, token in enumerate(ids)])
    size = max(1, TOKENS_AT_ONCE // max(len(ids), 8 * len(asked)))
    answers = torch.tensor([one.answer.id for one in asked], device=device)  # (M,)
    positions = torch.tensor([one.position for one in asked], device=device)
    values, winners = [], []
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    for some in tqdm(batches, "hiding words", delay=1, leave=False, disable=not progress):
        batch = PackedBatch.from_lists(some, [reading.segments] * len(some), device=device)
        places = batch.cu_seqlens[:-1, None] + positions  # (R, M)
        with torch.inference_mode():
            logits = model.predict(batch, places.flatten()).float()  # (R · M, V)
        log_p = logits.log_softmax(-1).gather(-1, answers.repeat(len(some))[:, None])
        values.append(log_p.view(places.shape).cpu())
        winners += [best[0].token for best in vocabulary.best(logits, 1)]
    log_p = torch.cat(values)  # (rows, M)
    change = log_p[2:] - log_p[:2].repeat(len(groups), 1)  # to the whole text, and to no word, in turn
    named = iter(winners[2 * len(asked) :])
    changes = [[Change(nats, next(named)) for nats in row] for row in change.tolist()]
    return [Influence(group, changes[2 * n], changes[2 * n + 1]) for n, group in enumerate(groups)]


@dataclass(frozen=True)
class LayerChange:
    """Of one layer, a number for each token. `mixing` is None without the model's weights."""

    attention: list[float]  # ‖attention output‖ / ‖what the layer reads‖
    feed_forward: list[float]  # ‖feed-forward output‖ / ‖what it reads‖
    cosine: list[float]  # of what goes into the layer and what comes out
    mixing: list[float] | None  # see `mixing_ratio`


def mixing_ratio(x: Tensor, context: Tensor, probabilities: Tensor, given: Tensor, gamma: Tensor) -> Tensor:
    """How much of a token's vector after attention, residual and LayerNorm comes from other tokens, (S,), 0 to 1:

        others = Σ over j ≠ i of αᵢⱼ f(xⱼ),  own = αᵢᵢ f(xᵢ) + xᵢ
        ratio  = ‖g(others)‖ / (‖g(others)‖ + ‖g(own)‖),  g(x) = (x − mean(x)) · γ

    The division by the standard deviation is the same for both and cancels; biases belong to neither.

    x (S, D) is what the layer reads, context (S, D) the attention output without its bias, probabilities (H, S, S),
    given: f(x) (H, S, D), gamma (D,) the LayerNorm's weight.
    Source: Kobayashi et al. 2021, "Incorporating Residual and Normalization Layers into Analysis of Masked Language
    Models", https://arxiv.org/abs/2109.07152, section 3.
    """

    def seen_by_norm(part: Tensor) -> Tensor:
        return ((part - part.mean(-1, keepdim=True)) * gamma).norm(dim=-1)

    own = torch.einsum("hs,hsd->sd", probabilities.diagonal(dim1=-2, dim2=-1), given)  # (S, D)
    others, kept = seen_by_norm(context - own), seen_by_norm(own + x)
    return others / (others + kept)


@dataclass(frozen=True)
class Part:
    """times: how often the step is there. parameters and multiply_adds are of all times together."""

    name: str
    shapes: str
    times: int
    parameters: int
    multiply_adds: int


def cost(config: BertConfig, tokens: int, asked: int) -> list[Part]:
    """What each step of the model reads and gives, for S tokens and M asked places; its learned numbers; and its
    multiply-adds, those of the matrix products alone (lookups, norms, the softmax and activations have almost none).
    """
    s, m, d, f = tokens, asked, config.hidden_size, config.intermediate_size
    n, h, k, v = config.num_hidden_layers, config.num_attention_heads, config.head_size, config.vocab_size
    rows = v + config.max_position_embeddings + config.type_vocab_size

    def part(name: str, shapes: str, times: int, parameters: int, products: int) -> Part:
        return Part(name, shapes, times, times * parameters, times * products)

    return [
        part("embeddings: word + position + segment, LayerNorm", f"({s}) → ({s}, {d})", 1, rows * d + 2 * d, 0),
        part("query, key, value", f"({s}, {d}) → 3 × ({s}, {h}, {k})", n, 3 * (d * d + d), 3 * s * d * d),
        part("attention: scores, softmax", f"({h}, {s}, {k}) · ({h}, {k}, {s}) → ({h}, {s}, {s})", n, 0, s * s * d),
        part("attention: weights · values", f"({h}, {s}, {s}) · ({h}, {s}, {k}) → ({s}, {d})", n, 0, s * s * d),
        part("attention: output, add, LayerNorm", f"({s}, {d}) → ({s}, {d})", n, d * d + 3 * d, s * d * d),
        part("feed-forward: up, activation", f"({s}, {d}) → ({s}, {f})", n, d * f + f, s * d * f),
        part("feed-forward: down, add, LayerNorm", f"({s}, {f}) → ({s}, {d})", n, f * d + 3 * d, s * f * d),
        part("head: dense, activation, LayerNorm", f"({m}, {d}) → ({m}, {d})", 1, d * d + 3 * d, m * d * d),
        part("head: product with every word embedding", f"({m}, {d}) → ({m}, {v})", 1, v, m * d * v),
    ]


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    heads: int
    hidden_size: int
    feed_forward_size: int
    vocabulary: int
    parameters: int


@dataclass(frozen=True)
class Answer:
    """The best words at one place, from the whole model."""

    position: int
    best: list[Guess]


@dataclass(frozen=True)
class Facts:
    """What BERT does with one text. A view that cannot be shown is empty, and `left_out` says why."""

    model: Model
    reading: Reading
    targets: list[str]
    answers: list[Answer]
    shares: dict[str, list[float]] = field(default_factory=dict)  # view 1: of word, position and segment
    guesses: list[Guesses] = field(default_factory=list)  # view 2: of each followed place
    influence: list[Influence] = field(default_factory=list)  # view 3: of each word
    looks: list[Head] = field(default_factory=list)  # view 4: the heads by their weights, and by what they take
    takes: list[Head] = field(default_factory=list)
    maps: Maps | None = None
    changes: list[LayerChange] = field(default_factory=list)  # view 5: of each layer
    cost: list[Part] = field(default_factory=list)  # view 6
    left_out: dict[str, str] = field(default_factory=dict)
