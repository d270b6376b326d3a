"""Mask a text, let the model guess, and read BERT's loss: the game that BERT was trained on, played once.

Some tokens of a text are chosen (15 % in BERT). Most of them are replaced by [MASK]; the model says for each which word
it expects there. The loss is −log of the probability that it gave to the true token, in nats, averaged over the chosen
tokens: 0 if it was always certain and right, log V ≈ 10.3 for a model that knows nothing about 30,522 words.

Devlin et al. 2019, section 3.1, task 1, and appendix A.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from minibert import checks
from minibert.fill_mask import best_words, known_words, require_top_k
from minibert.loss import IGNORE, masked_lm_loss
from minibert.masked_lm import BertForMaskedLM
from minibert.masking import MaskedTokens, Outcome, mask_tokens
from minibert.packing import PackedBatch
from minibert.tokenizer import as_tokenizer, count_ids, encode, require_id, special_ids, words_of

RECIPES = ("bert", "plain", "whole-word")
SCORES = ("masked", "all")


@dataclass(frozen=True)
class Prediction:
    """A token of the vocabulary, and the probability that the model gives to it."""

    token_str: str
    score: float


@dataclass(frozen=True)
class ScoredToken:
    """One position that the model was asked about."""

    position: int  # counted from [CLS] = 0
    token: str  # what the text has there; the mask token, if the text itself has a mask there
    outcome: str  # "mask", "random", "kept", "not chosen", "not eligible"; "in the text" for a mask of the text's own
    seen: str  # what the model saw there
    predictions: list[Prediction]  # the likeliest tokens, the best one first
    probability_of_token: float | None  # of `token`; None for a mask of the text's own, where nobody says what is true
    loss: float | None  # −log of that probability, in nats
    layers: list[Prediction] | None  # if asked for: the best guess after the embeddings, and after each layer


@dataclass(frozen=True)
class MaskedText:
    """What the model saw, what it guessed, and how well."""

    tokens: list[str]  # of the text, [CLS] and [SEP] included
    ids: list[int]  # of those tokens
    input_ids: list[int]  # what the model saw
    score: str  # what the loss is over: "masked" or "all"
    scored: list[ScoredToken]
    loss: float  # the mean over `count` tokens, in nats; 0 if there is none
    count: int


@torch.inference_mode()
def mask_and_guess(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    text: str,
    *,
    positions: Sequence[int] | None = None,
    probability: float | None = None,
    recipe: str | None = None,
    seed: int | None = None,
    score: str = "masked",
    truncate: bool = False,
    layers: bool = False,
    top_k: int = 5,
) -> MaskedText:
    """Choose tokens of a text, mask them, and let the model guess them.

    Which tokens are chosen:
    - A text that has a [MASK] of its own asks about that place, and no other token is drawn. There is no loss there,
      since the text does not say which word is right.
    - positions: these tokens, counted from [CLS] = 0. All of them become [MASK].
    - Otherwise they are drawn. probability: of choosing a token, 0.15 by default. seed: of the draw, 0 by default.
      recipe: "bert", the default (80 % [MASK], 10 % a random token, 10 % kept; never a special token); "plain" (all
      [MASK]; [CLS] and [SEP] may be chosen too); or "whole-word" (as "bert", all pieces of a word together).

    score: the loss is over the chosen tokens ("masked", as in BERT) or over all of them ("all"). truncate: cut a text
    that is too long. layers: also the best guess after each layer (the logit lens). top_k: guesses for each token.

    Raises ValueError for a text that is empty or too long, options out of range or at odds, and a model in training.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
    require_top_k(top_k)
    checks.require_model(model)
    checks.require_no_dropout(model)
    tokenizer = as_tokenizer(tokenizer)
    words = known_words(tokenizer, model.config)
    encoding = _encode(model, tokenizer, text, truncate)
    ids = torch.tensor(encoding.ids)  # (S,)
    own = ids == require_id(tokenizer, "[MASK]")  # (S,)
    masked = _mask(text, encoding, tokenizer, positions, probability, recipe, seed)
    asked = torch.ones_like(own) if score == "all" else (masked.labels[0] != IGNORE) | own  # (S,)
    places = asked.nonzero().flatten()  # (M,)
    batch = PackedBatch.from_lists(masked.input_ids.tolist(), device=model.embeddings.word.weight.device)
    guess = model.layer_guesses if layers else model.predict
    logits = guess(batch, places.to(batch.input_ids.device)).cpu()  # (N + 1, M, V), or only the last (M, V)
    known = ~own[places]  # (M,): where the text says which token is the true one
    loss = masked_lm_loss((logits[-1] if layers else logits)[known], ids[places][known])
    rows = _scored(places, known, encoding, masked, logits, tokenizer, words, top_k)
    return MaskedText(
        encoding.tokens, encoding.ids, masked.input_ids[0].tolist(), score, rows, loss.mean.item(), int(loss.count)
    )


def _encode(model: BertForMaskedLM, tokenizer: Tokenizer, text: str, truncate: bool) -> Encoding:
    encoding = encode(tokenizer, text, model.config.max_position_embeddings, truncate=truncate)
    if len(encoding.ids) <= tokenizer.num_special_tokens_to_add(False):
        raise ValueError(f"there is no token to mask in {text!r}: give a text with at least one word")
    return encoding


def _require_nothing_drawn(draw: Mapping[str, object], reason: str) -> None:
    for name, value in draw.items():
        if value is not None:
            raise ValueError(f"{name} {value} says how tokens are drawn, and {reason}: give one of the two")


def _places(positions: Sequence[int], encoding: Encoding) -> list[int]:
    """The positions, checked. The error numbers the tokens, so that the right position can be read off."""
    count = len(encoding.ids)
    if outside := [place for place in positions if not 0 <= place < count]:
        listed = ", ".join(f"{place} {token}" for place, token in enumerate(encoding.tokens))
        raise ValueError(f"position {outside[0]} is not in the text, which is {count} tokens: {listed}")
    return list(positions)


def _mask(
    text: str,
    encoding: Encoding,
    tokenizer: Tokenizer,
    positions: Sequence[int] | None,
    probability: float | None,
    recipe: str | None,
    seed: int | None,
) -> MaskedTokens:
    """[MASK] at the positions if they are given, nothing more where the text has a [MASK], and else what is drawn."""
    mask = require_id(tokenizer, "[MASK]")
    ids = torch.tensor([encoding.ids])  # (1, S)
    special = torch.isin(ids, torch.tensor(special_ids(tokenizer)))  # (1, S)
    draw = {"probability": probability, "recipe": recipe, "seed": seed}
    if positions is not None:
        _require_nothing_drawn(draw, "positions names the masked tokens")
    elif mask in encoding.ids:
        _require_nothing_drawn(draw, "the text has a [MASK] of its own, and no other token is drawn")
        positions = []
    probability, recipe, seed = 0.15 if probability is None else probability, recipe or "bert", seed or 0
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, and {seed} does not")
    plain = recipe == "plain" or positions is not None
    left_out = torch.zeros_like(special) if plain else special
    if positions is not None:
        probability, left_out = 1.0, torch.ones_like(special)
        left_out[0, _places(positions, encoding)] = False
    words = torch.tensor([[-1 if word is None else word for word in words_of(tokenizer, encoding, text)]])
    return mask_tokens(
        ids,
        left_out,
        vocab_size=count_ids(tokenizer),
        mask_token_id=mask,
        probability=probability,
        mask_fraction=1.0 if plain else 0.8,
        random_fraction=0.0 if plain else 0.1,
        word_ids=words if recipe == "whole-word" else None,
        generator=torch.Generator().manual_seed(seed),
    )


def _scored(
    places: Tensor,
    known: Tensor,
    encoding: Encoding,
    masked: MaskedTokens,
    logits: Tensor,
    tokenizer: Tokenizer,
    words: Tensor | None,
    top_k: int,
) -> list[ScoredToken]:
    """A row for each of the M places. logits: of them, (M, V); or of each layer, (N + 1, M, V)."""
    after = [_predictions(tokenizer, x, 1, words) for x in logits] if logits.dim() == 3 else None
    logits = logits[-1] if after else logits  # (M, V)
    predictions = _predictions(tokenizer, logits, top_k, words)
    tokens = torch.tensor(encoding.ids)[places]  # (M,)
    log_odds = logits.float().log_softmax(-1).gather(1, tokens[:, None]).flatten().tolist()
    return [
        ScoredToken(
            position=place,
            token=encoding.tokens[place],
            outcome=Outcome(int(masked.outcome[0, place])).name.lower().replace("_", " ") if true else "in the text",
            seen=tokenizer.id_to_token(int(masked.input_ids[0, place])) or "",
            predictions=predictions[row],
            probability_of_token=exp(log_odds[row]) if true else None,
            loss=abs(log_odds[row]) if true else None,
            layers=None if after is None else [of_layer[row][0] for of_layer in after],
        )
        for row, (place, true) in enumerate(zip(places.tolist(), known.tolist(), strict=True))
    ]


def _predictions(tokenizer: Tokenizer, logits: Tensor, top_k: int, words: Tensor | None) -> list[list[Prediction]]:
    """The likeliest words for each row of logits (M, V)."""
    rows = zip(*(x.tolist() for x in best_words(logits, top_k, words)), strict=True)
    return [
        [Prediction(tokenizer.id_to_token(token) or "", score) for score, token in zip(scores, ids, strict=True)]
        for scores, ids in rows
    ]
