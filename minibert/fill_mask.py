"""The likeliest words for each [MASK] in a text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minibert import checks
from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.tokenizer import as_tokenizer, decode, encode, own_mask, own_token, require_id

BATCH_TOKENS = 4096  # that are computed together, at most
WINDOW = 1024  # texts that are sorted by length together


class FillMask:
    """Call it with a text, or several, each with one [MASK] or more. The answers are those of transformers'
    fill-mask pipeline.

    The model must be in evaluation mode, as it is after loading. In training mode dropout would make the answers
    random, so there a question is a ValueError.
    """

    def __init__(
        self, model: BertForMaskedLM, tokenizer: Any, *, top_k: int = 5, targets: str | Sequence[str] | None = None
    ) -> None:
        """top_k and targets hold for each call that does not say."""
        checks.require_model(model)
        self.top_k, self.targets = top_k, targets
        self.model, self.tokenizer = model, as_tokenizer(tokenizer)
        self.mask_id = require_id(self.tokenizer, "[MASK]")
        self._mask = own_token(self.tokenizer, "[MASK]") or ""
        self._padding = self.tokenizer.token_to_id(own_token(self.tokenizer, "[PAD]") or "")
        self._words = known_words(self.tokenizer, model.config)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        truncate: bool = False,
        inputs: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """For a text with one [MASK]: its top_k answers, best first, each a dict with `score` (probability over the
        whole vocabulary), `token` (id), `token_str` and `sequence` (the text with the answer in place). For a text with
        several: such a list for each [MASK]. For a list of texts: a list with what each would give alone; for a list of
        one text, as in the pipeline, what it gives alone (`stream` gives one answer a text in any case).

        targets: only these words compete; each must be one token. truncate: cut a text that is too long for the model.
        By the pipeline's names: inputs is the text, tokenizer_kwargs={"truncation": True} cuts it, and batch_size
        changes nothing. Raises ValueError for a text without [MASK], one too long, a bad top_k or target.
        """
        if (text is None) == (inputs is None):
            raise TypeError("give the text once: fill(text), or fill(inputs=text)")
        text = inputs if text is None else text
        options = {name: value for name, value in (tokenizer_kwargs or {}).items() if name != "padding"}
        truncate = bool(options.pop("truncation", truncate))
        if options:
            raise TypeError(f"tokenizer_kwargs may hold truncation and padding only, not {', '.join(options)}")
        if not isinstance(text, str | Iterable):
            raise TypeError(f"text must be a str, or a list of them, not {type(text).__name__} {text!r}")
        texts = [text] if isinstance(text, str) else text
        answers = list(self.stream(texts, top_k=top_k, targets=targets, truncate=truncate))
        return answers[0] if isinstance(text, str) or len(answers) == 1 else answers

    def stream(
        self,
        texts: Iterable[str],
        *,
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        truncate: bool = False,
    ) -> Iterator[list[Any]]:
        """The answer for each text, in the order of the texts, while later ones are still to be read.

        Texts of like length are computed together, WINDOW texts at a time: a mistake in one of them is an error before
        the first answer of its window.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be several texts, not {texts[:60]!r} alone: put it into a list")
        top_k = self.top_k if top_k is None else top_k
        targets = self.targets if targets is None else targets
        require_top_k(top_k)
        wanted = self._words if targets is None else torch.tensor(target_ids(self.tokenizer, targets))
        remaining = iter(texts)
        while window := [self._encode(text, truncate) for text in islice(remaining, WINDOW)]:
            answers: dict[int, list[Any]] = {}
            for numbers in batches_by_length([len(row) for row in window], BATCH_TOKENS):
                rows = [window[number] for number in numbers]
                answers.update(zip(numbers, self._answer_batch(rows, top_k, wanted), strict=True))
            yield from (answers[number] for number in range(len(window)))

    def _encode(self, text: str, truncate: bool) -> list[int]:
        ids = encode(self.tokenizer, text, self.model.config.max_position_embeddings, truncate=truncate).ids
        if self.mask_id not in ids:
            shown = text if len(text) <= 60 else text[:57] + "…"
            if self._mask in own_mask(self.tokenizer, text):
                raise ValueError(f"{self._mask} in {shown!r} is cut into pieces: this tokenizer splits special tokens")
            raise ValueError(f"there is no {self._mask} in {shown!r}: write {self._mask} where a word is missing")
        return ids

    @torch.inference_mode()
    def _answer_batch(self, rows: list[list[int]], top_k: int, wanted: Tensor | None) -> list[list[Any]]:
        checks.require_no_dropout(self.model)
        batch = PackedBatch.from_lists(rows, device=self.model.embeddings.word.weight.device)
        positions = (batch.input_ids == self.mask_id).nonzero().flatten()  # (M,)
        scores, chosen = best_words(self.model.predict(batch, positions), top_k, wanted)  # both (M, top_k)
        best = iter(zip(scores.tolist(), chosen.tolist(), strict=True))
        answers = []
        for row in rows:
            places = [place for place, token in enumerate(row) if token == self.mask_id]
            per_mask = [self._answers(row, place, *next(best), len(places) == 1) for place in places]
            answers.append(per_mask[0] if len(places) == 1 else per_mask)
        return answers

    def _answers(
        self, row: list[int], place: int, scores: list[float], tokens: list[int], single: bool
    ) -> list[dict[str, Any]]:
        rows = []
        for score, token in zip(scores, tokens, strict=True):
            filled = [other for other in (*row[:place], token, *row[place + 1 :]) if other != self._padding]
            # As transformers has it: no [PAD]; with several masks the others stay visible, and so do [CLS] and [SEP].
            sequence = decode(self.tokenizer, filled, skip_special_tokens=single)
            word = decode(self.tokenizer, [token])
            rows.append({"score": score, "token": token, "token_str": word, "sequence": sequence})
        return rows


def require_top_k(top_k: int, most: int | None = None) -> None:
    """Raise ValueError if this many best words cannot be given."""
    if top_k < 1 or (most is not None and top_k > most):
        raise ValueError(f"top_k must be {'at least 1' if most is None else f'1 to {most}'}, not {top_k}")


def known_words(tokenizer: Tokenizer, config: BertConfig) -> Tensor | None:
    """The ids that are words; None if all of the model's are. A model may have more rows than its tokenizer has words,
    to fill up its vocabulary: they are no answers. Raises ValueError if the tokenizer has ids that the model has not.
    """
    words = sorted(tokenizer.get_vocab().values())
    checks.require_vocabulary(words[-1] + 1, config)
    return None if len(words) == config.vocab_size else torch.tensor(words)


def best_words(logits: Tensor, top_k: int, among: Tensor | None) -> tuple[Tensor, Tensor]:
    """The likeliest words of each row of logits (M, V), best first: their probabilities and their ids, both (M, top_k)
    and on the host. among: the ids that may be answers, or None for all; where they are fewer than top_k, all of them
    are given. A probability is over the whole vocabulary, and in float32.
    """
    logits = logits.float()
    probabilities = logits.softmax(-1)  # (M, V)
    if among is not None:
        logits, probabilities = (x[:, among.to(x.device)] for x in (logits, probabilities))  # (M, number of ids)
    chosen = logits.topk(min(top_k, logits.shape[-1])).indices  # (M, top_k): logits differ where probabilities are 0
    scores, chosen = probabilities.gather(-1, chosen).cpu(), chosen.cpu()
    return scores, chosen if among is None else among[chosen]


def target_ids(tokenizer: Tokenizer, targets: str | Sequence[str]) -> list[int]:
    """The ids of words (or of one) that are to be followed, each once. Raises ValueError for a word that is not one
    token.
    """
    if not targets:
        raise ValueError(f"targets must be a word or a list of words, not {targets!r}")
    ids = []
    for word in [targets] if isinstance(targets, str) else targets:
        token = tokenizer.token_to_id(word)
        if token is None:
            pieces = tokenizer.encode(word, add_special_tokens=False)
            unknown = require_id(tokenizer, "[UNK]")
            if len(pieces.ids) != 1 or pieces.ids[0] == unknown:
                became = " ".join(pieces.tokens) or "nothing"
                raise ValueError(f"the target {word!r} became {became}: take a word that is one token, as a [MASK] is")
            token = pieces.ids[0]
        ids.append(token)
    return list(dict.fromkeys(ids))


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of rows of these lengths, the short ones first, in groups of at most `batch_tokens` tokens. A row
    that is longer than that is a group of its own.
    """
    group: list[int] = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if group and tokens + lengths[number] > batch_tokens:
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += lengths[number]
    if group:
        yield group
