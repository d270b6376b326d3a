"""What BERT reads: the tokens of a text, with their words and segments. All that is asked of a tokenizer is asked here,
and what its words are.

A *piece* is a token's text ("break", "##fast"). A *word* is what the tokenizer cut the pieces from. An *added* token is
one that the tokenizer put around the text ([CLS] and [SEP] in most BERTs).
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from torch import Tensor

from minibert.config import BertConfig
from minibert.fill_mask import best_words, known_words
from minibert.tokenizer import encode, own_mask, require_id, words_of


@dataclass(frozen=True)
class Reading:
    """S tokens. `positions` count from 0; after padding on the left of a trace they start later. `words` counts the
    words of text and pair together; it is None for added tokens. `masks` are the places where the model is asked.
    `filling` is the text around them: len(masks) + 1 strings.
    """

    text: str | None
    pair: str | None
    pieces: list[str]
    ids: list[int]
    segments: list[int]
    positions: list[int]
    words: list[int | None]
    added: list[bool]
    masks: list[int]
    filling: list[str]

    def groups(self) -> list[list[int]]:
        """The words that can be hidden: the places of each one's pieces. A word that is asked for is not among them."""
        places: dict[int, list[int]] = {}
        for place, word in enumerate(self.words):
            if word is not None and place not in self.masks:
                places.setdefault(word, []).append(place)
        return list(places.values())

    def is_punctuation(self, place: int) -> bool:
        """Whether a piece is made of punctuation and symbols alone."""
        return not self.added[place] and all(unicodedata.category(c)[0] in "PS" for c in self.pieces[place])


def read_text(
    tokenizer: Tokenizer, config: BertConfig, text: str, pair: str | None = None, *, truncate: bool = False
) -> Reading:
    """A text, or two, as the model reads them.

    truncate: cut the end of the longer text until both fit. Raises ValueError for a text that is empty, no Unicode, or
    too long; for a pair where the model knows one segment; and where a cut would take a [MASK] away.
    """
    if pair is not None and config.type_vocab_size < 2:
        raise ValueError(f"this model knows {config.type_vocab_size} segment: it cannot tell a pair of texts apart")
    encoding = encode(tokenizer, text, config.max_position_embeddings, pair=pair, truncate=truncate)
    if all(encoding.special_tokens_mask):
        raise ValueError("the text is empty: there is nothing to read")
    text = own_mask(tokenizer, text)
    pair = None if pair is None else own_mask(tokenizer, pair)
    mask_id = require_id(tokenizer, "[MASK]")
    masks = [place for place, token in enumerate(encoding.ids) if token == mask_id]
    filling, start = [], 0
    whole = text if pair is None else f"{text} {pair}"
    for place in masks:
        shift = len(text) + 1 if encoding.sequence_ids[place] else 0
        filling.append(whole[start : encoding.offsets[place][0] + shift])
        start = encoding.offsets[place][1] + shift
    return Reading(
        text=text,
        pair=pair,
        pieces=list(encoding.tokens),
        ids=list(encoding.ids),
        segments=list(encoding.type_ids),
        positions=list(range(len(encoding.ids))),
        words=words_of(tokenizer, encoding, text, pair),
        added=[bool(added) for added in encoding.special_tokens_mask],
        masks=masks,
        filling=[*filling, whole[start:]],
    )


def read_ids(
    ids: list[int], segments: list[int], positions: list[int], asked: Sequence[int], tokenizer: Tokenizer | None
) -> Reading:
    """The tokens of a trace. Without a tokenizer a piece is its id, and each token a word of its own.

    asked: the places where the trace asks. The model is also asked at its mask tokens.
    """
    added, prefix, mask = set[int](), "", -1
    pieces = [f"#{token}" for token in ids]
    if tokenizer is not None:
        added = set(tokenizer.encode("", "").ids)  # what stands around a text without words
        prefix = getattr(tokenizer.model, "continuing_subword_prefix", "")
        mask = require_id(tokenizer, "[MASK]")
        pieces = [tokenizer.id_to_token(token) or f"#{token}" for token in ids]
    masks = sorted({*asked, *(place for place, token in enumerate(ids) if token == mask)})
    words: list[int | None] = []
    count, filling = -1, [""]
    for place, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        goes_on = bool(prefix) and piece.startswith(prefix)
        count += not goes_on and token not in added
        words.append(None if token in added else max(count, 0))
        if place in masks:
            filling = [*filling[:-1], f"{filling[-1]} ", ""]
        elif token not in added:
            filling[-1] += piece.removeprefix(prefix) if goes_on else f" {piece}"
    filling[0] = filling[0].lstrip()
    around = [token in added for token in ids]
    return Reading(None, None, pieces, ids, segments, positions, words, around, masks, filling)


@dataclass(frozen=True)
class Guess:
    token: str
    id: int
    probability: float


class Vocabulary:
    """What each of the model's ids is called, and which of them are words.

    A model may have more ids than its tokenizer, to fill up its vocabulary: they are never an answer. Without a
    tokenizer an id is called "#2003", and all of them are words. Raises ValueError if the tokenizer has ids that the
    model has not.
    """

    def __init__(self, tokenizer: Tokenizer | None, config: BertConfig) -> None:
        self.tokenizer = tokenizer
        self.known = None if tokenizer is None else known_words(tokenizer, config)  # ids; None if all are words

    def name(self, token: int) -> str:
        return (self.tokenizer.id_to_token(token) if self.tokenizer is not None else None) or f"#{token}"

    def best(self, logits: Tensor, top_k: int) -> list[list[Guess]]:
        """The likeliest words of each row of logits (M, V), best first."""
        rows = zip(*(x.tolist() for x in best_words(logits, top_k, self.known)), strict=True)
        return [[Guess(self.name(token), token, p) for p, token in zip(*row, strict=True)] for row in rows]

    def only_words(self, logits: Tensor) -> Tensor:
        """(…, V) → (…, number of words)"""
        return logits if self.known is None else logits[..., self.known.to(logits.device)]
