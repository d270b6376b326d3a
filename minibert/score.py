"""How likely is a sentence? Its pseudo-log-likelihood.

A masked language model has no probability for a whole sentence. But it can be asked for each token in turn, with this
one masked and all others seen. The sum of the logarithms of these probabilities is the pseudo-log-likelihood: of two
sentences that say the same, the better English mostly has the higher one.

    the cat sat      →  [MASK] cat sat  ·  the [MASK] sat  ·  the cat [MASK]      one copy for each token
    PLL(the cat sat)  =  log P(the | …)  +  log P(cat | …)  +  log P(sat | …)

Salazar, Liang, Nguyen, Kirchhoff: "Masked Language Model Scoring", 2020, https://arxiv.org/abs/1910.14659, equation 1.

A word that the tokenizer cut into pieces is overrated by that: ##iev is no surprise between "unbel" and "##able". So,
unless asked otherwise, the pieces of the same word that are to the right of the masked one are masked too: the word is
guessed from left to right. Kauf and Ivanova: "A Better Way to Do Masked Language Model Scoring", 2023,
https://arxiv.org/abs/2305.10588.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from math import exp, inf, sqrt
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from minibert import checks
from minibert.fill_mask import BATCH_TOKENS, batches_by_length
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.tokenizer import as_tokenizer, count_ids, encode, own_mask, own_token, require_id, special_ids, words_of

WITHIN_WORD = ("l2r", "original")
WINDOW = 256  # texts whose copies are sorted by length together
SHORTEST = 16  # a copy counts as so many tokens at least, since each asks for a row of V logits: 256 rows at most
ROUNDING = 1e-4  # nats, of a sum in float32: two sums that are closer than this are alike


class TokenScore(NamedTuple):
    """A token of a text. log_probability: in nats. start, end: where it is in the text, in characters. sentence: 1 in
    the second sentence of a pair, otherwise 0.
    """

    token: str
    log_probability: float
    start: int
    end: int
    sentence: int = 0


@dataclass(frozen=True)
class Score:
    """A text, or two sentences, and the tokens that were scored."""

    text: str | tuple[str, str]
    tokens: tuple[TokenScore, ...]

    @cached_property
    def pll(self) -> float:
        """The pseudo-log-likelihood, in nats: the sum over the tokens, and so 0 where there is none."""
        return sum((token.log_probability for token in self.tokens), start=0.0)

    @property
    def pseudo_perplexity(self) -> float | None:
        """Among how many words, all as likely, the model would have to choose at each place."""
        return pseudo_perplexity(self.pll, len(self.tokens))


def pseudo_perplexity(pll: float, tokens: int) -> float | None:
    """exp(−Σ PLL / Σ tokens), of a text or of a whole corpus; None if there is no token."""
    try:
        return exp(-pll / tokens) if tokens else None
    except OverflowError:
        return inf


def pseudo_log_likelihood(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Iterable[str | tuple[str, str]],
    *,
    within_word: str = "l2r",
    given: str | None = None,
    truncate: bool = False,
) -> Iterator[Score]:
    """The score of each text, in their order, while later ones are still to be read: memory does not grow with their
    number. A text that is a tuple is two sentences, as BERT was trained on; the tokens of both are scored.

    within_word: "l2r" masks the pieces to the right within the word too, "original" masks one token at a time. given: a
    first sentence for all texts, which is seen and not scored. truncate: cut a text that is too long for the model,
    which is otherwise an error; of two sentences the longer one, until both fit.

    Special tokens are never scored. One that is written in a text, such as [MASK], is seen as what it is and counts as
    no token; a warning says so. A word that the vocabulary does not have is scored as what it became, [UNK].

    `prepare_for_inference(model)` is faster for many texts. Raises ValueError for a text that is too long, a model in
    training mode, and arguments that do not fit.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be several texts, not {texts[:60]!r} alone: put it into a list")
    if within_word not in WITHIN_WORD:
        raise ValueError(f"within_word must be one of {', '.join(WITHIN_WORD)}, not {within_word!r}")
    checks.require_model(model)
    tokenizer = as_tokenizer(tokenizer)
    checks.require_no_dropout(model)
    checks.require_vocabulary(count_ids(tokenizer), model.config)
    return Scorer(model, tokenizer, within_word, given, truncate).stream(texts)


@dataclass(frozen=True)
class EncodedText:
    """A text of L tokens, n of which are scored.

    ids, types    (L,)
    masked        (n, 2): in the copy for token i the places masked[i, 0] to masked[i, 1] − 1 are masked, and it is the
                  first of them that is predicted
    """

    text: str | tuple[str, str]
    encoding: Encoding
    ids: Tensor
    types: Tensor
    masked: Tensor

    def copies(self, chosen: list[int], mask_id: int) -> Tensor:
        """The masked copies for the chosen ones of the n tokens: (number of chosen, L)."""
        first, end = self.masked[chosen].unbind(1)  # both (number of chosen,)
        place = torch.arange(len(self.ids))
        return self.ids.where((place < first[:, None]) | (place >= end[:, None]), mask_id)


class Scorer:
    """The arguments of `pseudo_log_likelihood`, and what is found out once for all texts."""

    def __init__(
        self, model: BertForMaskedLM, tokenizer: Tokenizer, within_word: str, given: str | None, truncate: bool
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.whole_words, self.given, self.truncate = within_word == "l2r", given, truncate
        self.mask_id, self.mask = require_id(tokenizer, "[MASK]"), own_token(tokenizer, "[MASK]") or ""
        # [UNK] is what a word became, and so it is scored; no other special token is.
        self.unscored = set(special_ids(tokenizer)) - {require_id(tokenizer, "[UNK]")}
        self.first_scored = 0 if given is None else 1  # the number of a sentence
        self.warned = False

    def stream(self, texts: Iterable[str | tuple[str, str]]) -> Iterator[Score]:
        remaining = iter(texts)
        while window := [self.encode(text) for text in islice(remaining, WINDOW)]:
            copies = [(number, token) for number, text in enumerate(window) for token in range(len(text.masked))]
            lengths = [max(len(window[number].ids), SHORTEST) for number, _ in copies]
            found = [[0.0] * len(text.masked) for text in window]
            for batch in batches_by_length(lengths, BATCH_TOKENS):
                chosen = [copies[copy] for copy in batch]
                for (number, token), value in zip(chosen, self.score_copies(window, chosen), strict=True):
                    found[number][token] = value
            for text, values in zip(window, found, strict=True):
                yield self.answer(text, values)

    def encode(self, text: str | tuple[str, str]) -> EncodedText:
        if not isinstance(text, str) and not (isinstance(text, Sequence) and len(text) == 2):
            raise TypeError(f"a text must be a str, or a tuple of two, not {type(text).__name__} {text!r}")
        first, second = (text, None) if isinstance(text, str) else text
        if self.given is not None:
            if second is not None:
                raise ValueError(f"{_shown(text)} is two sentences, and a third is given: BERT takes two at most")
            first, second = self.given, first
        longest = self.model.config.max_position_embeddings
        try:
            encoding = encode(self.tokenizer, first, longest, pair=second, truncate=self.truncate)
        except ValueError as error:
            raise ValueError(f"{_shown(text)}: {error}") from error
        sentences = encoding.sequence_ids  # 0, 1, or None for the special tokens around them
        asked = [place for place, one in enumerate(sentences) if one is not None and one >= self.first_scored]
        scored = [place for place in asked if encoding.ids[place] not in self.unscored]
        if len(scored) < len(asked) and not self.warned:
            self.warned = True  # once is enough, for a corpus may have millions
            special = next(encoding.tokens[place] for place in asked if place not in scored)
            checks.warn(
                f"{_shown(text)} has {special} in it, which is seen, but not scored: here and in the other texts"
            )
        words = words_of(self.tokenizer, encoding, first, second)
        ends = list(range(1, len(words) + 1))
        if self.whole_words:
            for place in range(len(words) - 2, -1, -1):
                if words[place] == words[place + 1]:
                    ends[place] = ends[place + 1]
        masked = torch.tensor([(place, ends[place]) for place in scored]).view(-1, 2)
        return EncodedText(text, encoding, torch.tensor(encoding.ids), torch.tensor(encoding.type_ids), masked)

    @torch.inference_mode()
    def score_copies(self, window: list[EncodedText], chosen: list[tuple[int, int]]) -> list[float]:
        """For each (number of a text, number of one of its scored tokens): the log-probability of that token. The
        copies of a text stand together.
        """
        ids, types, targets, places, lengths = [], [], [], [], []
        for number, group in groupby(chosen, key=lambda one: one[0]):
            text, tokens = window[number], [token for _, token in group]
            first = text.masked[tokens, 0]
            ids.append(text.copies(tokens, self.mask_id).flatten())
            types.append(text.types.repeat(len(tokens)))
            targets.append(text.ids[first])
            places.append(first)
            lengths += [len(text.ids)] * len(tokens)
        batch = PackedBatch.from_flat(torch.cat(ids), lengths, torch.cat(types))
        positions = batch.cu_seqlens[:-1] + torch.cat(places)  # (M,), a copy each
        device = self.model.embeddings.word.weight.device
        logits = self.model.predict(batch.to(device), positions.to(device))  # (M, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        values = -F.cross_entropy(logits, torch.cat(targets).to(device), reduction="none")  # (M,)
        if not bool(values.isfinite().all()):
            raise FloatingPointError("the model's answer is not a number: is there a NaN or an infinity in its file?")
        return values.tolist()

    def answer(self, text: EncodedText, values: list[float]) -> Score:
        encoding = text.encoding
        tokens = []
        for place, value in zip(text.masked[:, 0].tolist(), values, strict=True):
            sentence = encoding.sequence_ids[place]
            assert sentence is not None
            sentence -= self.first_scored
            written = text.text if isinstance(text.text, str) else text.text[sentence]
            start, end = (self.place_in(written, place) for place in encoding.offsets[place])
            tokens.append(TokenScore(encoding.tokens[place], value, start, end, sentence))
        return Score(text.text, tuple(tokens))

    def place_in(self, text: str, place: int) -> int:
        """A place in the text as the tokenizer read it, with its own name for [MASK], as a place in the text itself."""
        if own_mask(self.tokenizer, text) == text:
            return place
        skipped = 0
        for part in text.split("[MASK]"):
            if place <= len(part):
                break
            place -= len(part) + len(self.mask)
            skipped += len(part) + len("[MASK]")
        return skipped + place


def _shown(text: str | tuple[str, str]) -> str:
    whole = text if isinstance(text, str) else " | ".join(text)
    return repr(whole if len(whole) <= 60 else whole[:57] + "…")


# --------------------------------------------------------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """Two sentences of which one should be likelier: `good` and `bad`."""

    good: Score
    bad: Score

    @property
    def outcome(self) -> str:
        """ "win" if the good one has the higher pseudo-log-likelihood, "loss" if the bad one, "tie" if they differ by
        no more than rounding.
        """
        difference = self.good.pll - self.bad.pll
        return "tie" if abs(difference) < ROUNDING else "win" if difference > 0 else "loss"


def score_pairs(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[str, str]],
    *,
    within_word: str = "l2r",
    given: str | None = None,
    truncate: bool = False,
) -> Iterator[Pair]:
    """Each (good, bad) with its two scores, in order. The arguments are those of `pseudo_log_likelihood`. Raises
    ValueError for a pair in which a text has no token: it would win by that.
    """
    texts = (text for pair in pairs for text in pair)
    scores = pseudo_log_likelihood(model, tokenizer, texts, within_word=within_word, given=given, truncate=truncate)
    return _in_pairs(scores)


def _in_pairs(scores: Iterator[Score]) -> Iterator[Pair]:
    for good, bad in zip(scores, scores, strict=True):
        if not good.tokens or not bad.tokens:
            raise ValueError(f"there is nothing to score in one of the pair {_shown((str(good.text), str(bad.text)))}")
        yield Pair(good, bad)


class WinRate(NamedTuple):
    """How often the good one of a pair wins. A tie is no win."""

    wins: int
    ties: int
    losses: int

    @property
    def pairs(self) -> int:
        return sum(self)

    @property
    def share(self) -> float:
        return self.wins / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval at 95 %: where the share would lie for more pairs of this kind. Unlike the usual p ± 2σ it
        stays between 0 and 1 (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).
        """
        z, n, p = NormalDist().inv_cdf(0.975), self.pairs, self.share
        middle = p + z * z / (2 * n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
