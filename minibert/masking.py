"""Which tokens BERT has to guess, and what it sees in their place.

Devlin et al. 2019, section 3.1, task 1, and appendix A.1: 15 % of the tokens are chosen. Of these 80 % become
[MASK], 10 % a random token, 10 % stay as they are, so that the model cannot rely on seeing [MASK] where it is
asked.

The random draws are those of transformers' DataCollatorForLanguageModeling, in its order: with the same
generator and settings the result is the same, token for token. (google-research/bert,
create_pretraining_data.py, draws with Python's random.)
"""

import hashlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from minibert import checks
from minibert.loss import IGNORE


class Outcome(IntEnum):
    """What happened to a token."""

    NOT_ELIGIBLE = 0  # a special token: it could not be chosen
    NOT_CHOSEN = 1
    MASK = 2  # chosen, and replaced by [MASK]
    RANDOM = 3  # chosen, and replaced by a random token (which may be the same one, by chance)
    KEPT = 4  # chosen, and left as it is


class MaskedTokens(NamedTuple):
    """All (B, S). input_ids: what the model sees. labels: the original id where a token was chosen, −100
    elsewhere. outcome: an `Outcome` for each token, int8.
    """

    input_ids: Tensor
    labels: Tensor
    outcome: Tensor


def mask_tokens(
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    *,
    vocab_size: int,
    mask_token_id: int,
    probability: float = 0.15,
    mask_fraction: float = 0.8,
    random_fraction: float = 0.1,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Choose tokens and replace them; `input_ids` itself is not touched.

    input_ids (B, S) int64; special_tokens_mask (B, S), true where a token may not be chosen. probability: of
    choosing a token; of the chosen, mask_fraction become [MASK] and random_fraction a random id below
    vocab_size (special ones included), the rest stay. mask_fraction=1, random_fraction=0 is the plain recipe of
    many tutorials.

    word_ids (B, S) turns on whole-word masking: the tokens of a word, which stand side by side and share a
    number ≥ 0, are chosen together, with `probability` a word. Each token of a chosen word is then replaced on
    its own account, as in Google's code.

    generator: the draws are made on its device, and so one of the CPU gives the same draws for ids on a GPU. What is
    returned is where input_ids is. Raises ValueError for shapes, dtypes or fractions that do not fit.
    """
    _check(input_ids, special_tokens_mask, word_ids, probability, mask_fraction, random_fraction)
    # Whole numbers are fine to give; as a fill value they would make a tensor of integers, from which nothing is drawn.
    probability, mask_fraction, random_fraction = float(probability), float(mask_fraction), float(random_fraction)
    shape, home = input_ids.shape, input_ids.device
    device = home if generator is None else generator.device
    input_ids, special_tokens_mask = input_ids.to(device), special_tokens_mask.to(device)
    word_ids = None if word_ids is None else word_ids.to(device)

    def draw(odds: Tensor) -> Tensor:
        return torch.bernoulli(odds, generator=generator).bool()

    def draw_ids() -> Tensor:
        return torch.randint(vocab_size, shape, dtype=torch.long, device=device, generator=generator)

    eligible = ~special_tokens_mask.bool()
    if word_ids is None:
        chosen = draw(torch.full(shape, probability, device=device).masked_fill(~eligible, 0.0))
    else:
        eligible = eligible & (word_ids >= 0)
        new_word = torch.ones(shape, dtype=torch.bool, device=device)
        new_word[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | ~eligible[:, :-1]
        first = torch.arange(shape[1], device=device).expand(shape).masked_fill(~new_word, 0).cummax(1).values
        chosen = draw(torch.full(shape, probability, device=device).masked_fill(~(eligible & new_word), 0.0))
        chosen = chosen.gather(1, first) & eligible  # what was drawn for a word's first token holds for all of it
    masked = _replace(input_ids, eligible, chosen, mask_token_id, mask_fraction, random_fraction, draw, draw_ids)
    return MaskedTokens(*(x.to(home) for x in masked))


def mask_packed(
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    lengths: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    vocab_size: int,
    mask_token_id: int,
) -> MaskedTokens:
    """BERT's recipe for sequences end to end, all (T,). Sequence b has lengths[b] tokens and draws from generators[b],
    on the CPU, what `mask_tokens` would draw for it alone. For many sequences this is several times as fast.
    """

    def draw(odds: Tensor) -> Tensor:
        parts = zip(odds.split(list(lengths)), generators, strict=True)
        return torch.cat([torch.bernoulli(part, generator=generator) for part, generator in parts]).bool()

    def draw_ids() -> Tensor:
        parts = zip(lengths, generators, strict=True)
        return torch.cat([torch.randint(vocab_size, (length,), generator=generator) for length, generator in parts])

    eligible = ~special_tokens_mask.bool()
    chosen = draw(torch.full(input_ids.shape, 0.15).masked_fill(~eligible, 0.0))
    return _replace(input_ids, eligible, chosen, mask_token_id, 0.8, 0.1, draw, draw_ids)


def _replace(
    input_ids: Tensor,
    eligible: Tensor,
    chosen: Tensor,
    mask_token_id: int,
    mask_fraction: float,
    random_fraction: float,
    draw: Callable[[Tensor], Tensor],
    draw_ids: Callable[[], Tensor],
) -> MaskedTokens:
    """What becomes of the chosen tokens."""
    odds = torch.ones(input_ids.shape, device=input_ids.device)
    masked = draw(mask_fraction * odds) & chosen
    replaced = torch.zeros_like(chosen)
    new_ids = torch.where(masked, mask_token_id, input_ids)
    if mask_fraction < 1 and random_fraction > 0:  # the collator draws nothing more otherwise
        replaced = draw(min(1.0, random_fraction / (1 - mask_fraction)) * odds) & chosen & ~masked
        new_ids = torch.where(replaced, draw_ids(), new_ids)

    outcome = torch.full(input_ids.shape, Outcome.NOT_CHOSEN, dtype=torch.int8, device=input_ids.device)
    outcome[~eligible] = Outcome.NOT_ELIGIBLE
    outcome[chosen] = Outcome.KEPT
    outcome[replaced] = Outcome.RANDOM
    outcome[masked] = Outcome.MASK
    return MaskedTokens(new_ids, input_ids.masked_fill(~chosen, IGNORE), outcome)


def example_generator(seed: int, epoch: int, example: int) -> torch.Generator:
    """A generator for one example in one epoch. Masks drawn from it do not depend on the order of the batches,
    on the number of worker processes, or on the examples beside it.
    """
    digest = hashlib.blake2b(f"{seed},{epoch},{example}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check(
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    word_ids: Tensor | None,
    probability: float,
    mask_fraction: float,
    random_fraction: float,
) -> None:
    checks.require_tensors(input_ids=input_ids, special_tokens_mask=special_tokens_mask, word_ids=word_ids)
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be (batch, length) int64, not {tuple(input_ids.shape)} {input_ids.dtype}")
    for name, tensor in (("special_tokens_mask", special_tokens_mask), ("word_ids", word_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but input_ids is {tuple(input_ids.shape)}")
    if special_tokens_mask.is_floating_point():
        raise ValueError(f"special_tokens_mask must be bool or 0 and 1, not {special_tokens_mask.dtype}")
    if word_ids is not None and (word_ids.is_floating_point() or word_ids.dtype == torch.bool):
        raise ValueError(f"word_ids must be whole numbers, not {word_ids.dtype}")
    for name, value in (
        ("probability", probability),
        ("mask_fraction", mask_fraction),
        ("random_fraction", random_fraction),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
    if mask_fraction + random_fraction > 1 + 1e-9:
        raise ValueError(
            f"mask_fraction {mask_fraction} and random_fraction {random_fraction} are shares of the chosen tokens: "
            "together at most 1"
        )
