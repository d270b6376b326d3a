"""The words that a model can answer with."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minibert import checks
from minibert.config import BertConfig


class Vocabulary:
    """What each of the model's ids is called, and which of them are words.

    A model may have more ids than its tokenizer, to fill up its vocabulary: they are never an answer. Without a
    tokenizer an id is called "#2003", and all of them are words. Raises ValueError if the tokenizer has ids that the
    model has not.
    """

    def __init__(self, tokenizer: Tokenizer | None, config: BertConfig) -> None:
        self.tokenizer = tokenizer
        self.words: Tensor | None = None  # (V,) bool; None if all ids are words
        self.size = config.vocab_size
        known = [] if tokenizer is None else sorted(tokenizer.get_vocab().values())
        if known:
            checks.require_vocabulary(known[-1] + 1, config)
        if known and len(known) < config.vocab_size:
            self.size = len(known)
            nothing = torch.zeros(config.vocab_size, dtype=torch.bool)
            self.words = nothing.index_fill(0, torch.tensor(known), True)

    def name(self, token: int) -> str:
        return (self.tokenizer.id_to_token(token) if self.tokenizer is not None else None) or f"#{token}"

    def only_words(self, x: Tensor, otherwise: float) -> Tensor:
        """x (…, V) with `otherwise` at the ids that are no words."""
        return x if self.words is None else x.masked_fill(~self.words.to(x.device), otherwise)
