"""Pseudo-log-likelihoods beside two loops over transformers: the same weights, the same texts.

    python tests/measure/scoring.py                          # the bundled model
    python tests/measure/scoring.py --model bert-base        # BERT-base's sizes with random weights

Transformers gets its best: a text at a time, so there is no padding. It has no int8: there it stays in float32. What is
credited are the tokens scored in a second, in the median of the rounds; in a round each takes its turn.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from tokenizers import Tokenizer

from minibert.bench.contenders import random_model
from minibert.inference import prepare_for_inference
from minibert.masked_lm import BertForMaskedLM
from minibert.score import pseudo_log_likelihood
from minibert.tokenizer import load_tokenizer
from minibert.training.processes import keep_freed_memory

Way = Callable[[str], list[float]]  # the log-probability of each token of a text
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


def theirs(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype, *, everywhere: bool) -> Way:
    """All masked copies of a text as one batch. everywhere: with the logits of all positions, as transformers gives
    them.
    """
    from transformers import BertForMaskedLM as HubBert

    model = HubBert.from_pretrained(folder, dtype=torch.float32 if dtype == torch.int8 else dtype).eval()

    @torch.inference_mode()
    def score(text: str) -> list[float]:
        encoding = tokenizer.encode(text)
        ids, words = torch.tensor(encoding.ids), encoding.word_ids
        places = torch.tensor([place for place, word in enumerate(words) if word is not None])
        copies = ids.repeat(len(places), 1)
        for row, place in enumerate(places.tolist()):
            of_the_word = [later for later in range(place, len(words)) if words[later] == words[place]]
            copies[row, of_the_word] = tokenizer.token_to_id("[MASK]")
        rows = torch.arange(len(places))
        if everywhere:
            logits = model(input_ids=copies).logits[rows, places]
        else:
            logits = model.cls(model.bert(input_ids=copies).last_hidden_state[rows, places])
        return logits.float().log_softmax(-1)[rows, ids[places]].tolist()

    return score


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
    texts, prepared = make_texts(tokenizer, options.texts), prepare_for_inference(model, dtype)

    def ours(texts: list[str]) -> list[list[float]]:
        scores = pseudo_log_likelihood(prepared, tokenizer, texts)
        return [[token.log_probability for token in score.tokens] for score in scores]

    contenders: dict[str, Callable[[list[str]], list[list[float]]]] = {"minibert": ours}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, everywhere in (
            ("transformers", True),
            ("transformers, its head at the masked positions only", False),
        ):
            one = theirs(Path(folder), tokenizer, dtype, everywhere=everywhere)
            contenders[name] = lambda texts, one=one: [one(text) for text in texts]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, list[list[float]]] = {}
    for way in contenders.values():
        way(texts[:10])  # memory and threads are there
    for _ in range(options.rounds):
        for name, way in contenders.items():
            began = perf_counter()
            answers[name] = way(texts)
            seconds[name].append(perf_counter() - began)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{options.model}, {options.dtype}, {len(texts)} texts, {torch.get_num_threads()} threads; {packages}")
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
