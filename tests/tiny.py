"""A text (the beginning of "Pride and Prejudice", a sentence a line), a tiny model, and the command that trains it."""

import json
import re
from pathlib import Path

import torch

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.cli import main
from minibert.tokenizer import from_vocabulary
from minibert.training.data import Corpus
from minibert.training.tokens import token_files

PROSE = Path(__file__).parent / "prose.txt"
# What `Tiny.arguments` says, for `Settings`.
SETTINGS = dict(steps=12, tokens_per_step=200, max_length=24, learning_rate=5e-3, dtype="float32")
SETTINGS |= dict(save_every=3, evaluate_every=4)


class Tiny:
    """text: a copy of the text. start: a folder with a model of 2 layers × 32 with random weights, and with a tokenizer
    that has the words of that text. tokens: a folder for token files.
    """

    def __init__(self, folder):
        self.text, self.start, self.tokens = folder / "prose.txt", folder / "start", folder / "tokens"
        prose = PROSE.read_text(encoding="utf-8")
        self.text.write_text(prose, encoding="utf-8")
        words = sorted(set(re.findall(r"[a-z0-9]+|[^a-z0-9\s]", prose.lower())))
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        self.config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, **sizes)
        torch.manual_seed(0)
        BertForMaskedLM(self.config).save_pretrained(self.start)
        from_vocabulary(vocabulary).save(str(self.start / "tokenizer.json"))

    def arguments(self, out, *more, texts=()):
        """`minibert train` as the tests run it: 12 small steps. An option in `more` overrides."""
        return [
            *("train", *map(str, texts or [self.text]), "--init", str(self.start)),
            *("--out", str(out), "--tokens", str(self.tokens)),
            *("--steps", "12", "--tokens-per-step", "200", "--max-length", "24", "--learning-rate", "5e-3"),
            *("--dtype", "float32", "--save-every", "3", "--evaluate-every", "4", "--device", "cpu", *map(str, more)),
        ]

    def train(self, out, *more, texts=()):
        return main(self.arguments(out, *more, texts=texts))

    def corpus(self, **settings):
        """The examples of the text, in rows and steps as `arguments` has them."""
        _, tokenizer, files = self.load()
        usual = dict(max_length=24, short_fraction=0.3, tokens_per_step=200, seed=0)
        return Corpus(files, tokenizer, **{**usual, **settings})

    def load(self):
        """Model, tokenizer and token files, for `minibert.training.run.train_steps`."""
        model, tokenizer = BertForMaskedLM.from_pretrained(self.start), load_tokenizer(self.start)
        return model, tokenizer, token_files([str(self.text)], tokenizer, self.tokens)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()
