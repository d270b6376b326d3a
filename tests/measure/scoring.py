"""Pseudo-log-likelihoods beside minicons and two loops over transformers: the same weights, the same texts.

    python tests/measure/scoring.py                          # the bundled model
    python tests/measure/scoring.py --model bert-base        # BERT-base's sizes with random weights

Each peer is given its best: no padding, or as little as sorting by length leaves, and several sizes of batch. What is
credited are the tokens scored in a second, in the median of the rounds; in a round each takes its turn. With
`--dtype int8` the peers stay in float32, since they have no int8.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer

from minibert.bench.contenders import random_model
from minibert.inference import prepare_for_inference
from minibert.masked_lm import BertForMaskedLM
from minibert.score import pseudo_log_likelihood
from minibert.tokenizer import load_tokenizer
from minibert.training.processes import keep_freed_memory

Way = Callable[[list[str]], list[list[float]]]  # texts → the log-probability of each token of each
BERT_BASE = "bert-base"
# nats, of log-probabilities of order 10. float32: the same sums in another order; bfloat16 and int8: some tens of
# roundings.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.int8: 1.0}


def make_texts(tokenizer: Tokenizer, number: int) -> list[str]:
    """Texts of 3 to 60 words, 15 in the middle, drawn from the vocabulary; one word in ten is a word and a piece. The
    same in every run.
    """
    generator = torch.Generator().manual_seed(0)
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isascii() and word.isalpha() and len(word) > 2]
    pieces = [piece[2:] for piece in sorted(tokenizer.get_vocab()) if piece[:2] == "##" and piece[2:].isalpha()]
    lengths = (15 * (0.6 * torch.randn(number, generator=generator)).exp()).round().clamp(3, 60).int().tolist()

    def draw(choices: list[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def word() -> str:
        return draw(words) + (draw(pieces) if torch.rand((), generator=generator) < 0.1 else "")

    return [" ".join(word() for _ in range(length)) + "." for length in lengths]


def ways(model: BertForMaskedLM, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> dict[str, Way]:
    """Everything that is timed, ours first. Preparing and loading are not timed."""
    from transformers import BertForMaskedLM as HubBert
    from transformers import PreTrainedTokenizerFast

    prepared = prepare_for_inference(model, dtype)

    def ours(texts: list[str]) -> list[list[float]]:
        scores = pseudo_log_likelihood(prepared, tokenizer, texts)
        return [[token.log_probability for token in score.tokens] for score in scores]

    theirs = HubBert.from_pretrained(folder, dtype=torch.float32 if dtype == torch.int8 else dtype).eval()
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    hub_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    found: dict[str, Way] = {
        "minibert": ours,
        "transformers, a text at a time": loop(theirs, hub_tokenizer, everywhere=True),
        "transformers, and its head at the masked positions only": loop(theirs, hub_tokenizer, everywhere=False),
    }
    if find_spec("minicons") is not None:
        found |= {
            f"minicons, {size} {'text' if size == 1 else 'texts'} at a time": minicons(theirs, hub_tokenizer, size)
            for size in (1, 4, 16)
        }
    return found


def loop(model: Any, tokenizer: Any, *, everywhere: bool) -> Way:
    """All masked copies of a text as one batch, so without padding. everywhere: with the logits of all positions, as
    transformers gives them.
    """

    def one(text: str) -> list[float]:
        encoding = tokenizer(text)
        ids, words = torch.tensor(encoding["input_ids"]), encoding.word_ids()
        places = torch.tensor([place for place, word in enumerate(words) if word is not None])
        copies = ids.repeat(len(places), 1)
        for row, place in enumerate(places.tolist()):
            end = place
            while words[end] == words[place]:
                copies[row, end] = tokenizer.mask_token_id
                end += 1
        rows = torch.arange(len(places))
        if everywhere:
            logits = model(input_ids=copies).logits[rows, places]
        else:
            logits = model.cls(model.bert(input_ids=copies).last_hidden_state[rows, places])
        return logits.float().log_softmax(-1)[rows, ids[places]].tolist()

    @torch.inference_mode()
    def run(texts: list[str]) -> list[list[float]]:
        return [one(text) for text in texts]

    return run


def minicons(model: Any, tokenizer: Any, size: int) -> Way:
    """What minicons' token_score does, on batches of `size` texts of like length."""
    from minicons.scorer import MaskedLMScorer

    scorer = MaskedLMScorer(model, device="cpu", tokenizer=tokenizer)

    @torch.inference_mode()
    def run(texts: list[str]) -> list[list[float]]:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        answers: dict[int, list[float]] = {}
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            # minicons 0.3.39 would tokenize with a method that transformers 5 no longer has, and takes what this gives.
            batch = tokenizer([texts[number] for number in numbers], padding="longest")
            scores = scorer.compute_stats(scorer.prepare_text(batch, PLL_metric="within_word_l2r"))
            answers.update(zip(numbers, scores, strict=True))
        return [answers[number] for number in range(len(texts))]

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minibert-uncased", help=f"or {BERT_BASE}, with random weights")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    random = options.model == BERT_BASE
    model = random_model(layers=12) if random else BertForMaskedLM.from_pretrained(options.model)
    tokenizer = load_tokenizer("minibert-uncased" if random else options.model)
    texts = make_texts(tokenizer, options.texts)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        contenders = ways(model, tokenizer, Path(folder), dtype)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, list[list[float]]] = {}
    for way in contenders.values():
        way(texts[:10])  # memory and threads are there
    for _ in range(options.rounds):
        for name, way in contenders.items():
            began = perf_counter()
            answers[name] = way(texts)
            seconds[name].append(perf_counter() - began)
    names = ("torch", "transformers", *(["minicons"] if find_spec("minicons") else []))
    print(f"{options.model}, {options.dtype}, {len(texts)} texts, {torch.get_num_threads()} threads;", end=" ")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print_table(seconds, answers, TOLERANCE[dtype])


def print_table(seconds: dict[str, list[float]], answers: dict[str, list[list[float]]], tolerance: float) -> None:
    """Ours is the first. answers: the log-probabilities of each token of each text."""
    values = {name: torch.tensor([value for text in texts for value in text]) for name, texts in answers.items()}
    ours, *_ = values.values()
    fastest, *_ = (len(ours) / median(rounds) for rounds in seconds.values())
    print(f"{f'{len(ours)} tokens in each round':<57} {'tokens/s':>9} {'minibert is':>12} {'differs by':>12}")
    for name, rounds in seconds.items():
        rate = len(ours) / median(rounds)
        difference = float((values[name] - ours).abs().max())
        wrong = "" if difference <= tolerance else f"  more than {tolerance:.0e} nats: not the same computation"
        print(f"{name:<57} {rate:>9.0f} {fastest / rate:>11.2f}× {difference:>12.1e}{wrong}")


if __name__ == "__main__":
    main()
