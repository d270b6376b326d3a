"""Text files to training examples.

A text file holds one paragraph a line (.txt, or .txt.gz). A hundredth of the lines, chosen by their own
content, is held out: it is never trained on, so the accuracy on it says what the model has learnt and not what
it remembers.
"""

import gzip
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minibert.masking import example_generator, mask_tokens
from minibert.packing import PackedBatch
from minibert.tokenizer import require_id, special_ids


@dataclass(frozen=True)
class TextFile:
    """One file, tokenized. tokens: all training lines end to end, int32. starts: where each line begins, and
    the end.
    """

    name: str
    weight: float
    tokens: Tensor
    starts: Tensor
    held_out: list[list[int]]


@dataclass(frozen=True)
class Example:
    """A packed batch as the model sees it, the places that are scored, and the ids that belong there."""

    batch: PackedBatch
    positions: Tensor  # (M,)
    targets: Tensor  # (M,)


def is_held_out(line: str) -> bool:
    """Whether a line is for evaluation: md5 of its bytes, as a number, is a multiple of 100."""
    return int(hashlib.md5(line.encode()).hexdigest(), 16) % 100 == 0


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank. Raises ValueError, naming the file, if it is not UTF-8 text
    (or gzip).
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for line in file:
                if line := line.strip():
                    yield line
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (or gzip of one): {error}") from error


def read_text_file(spec: str, tokenizer: Tokenizer) -> TextFile:
    """Tokenize one file. `spec` is its path, or path:weight; the weight says how often its text is drawn,
    beside its length.
    """
    match = re.fullmatch(r"(.+?)(?::([0-9]+(?:\.[0-9]+)?))?", spec, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"{spec!r} is not FILE or FILE:WEIGHT")
    path, weight = Path(match[1]), float(match[2] or 1)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file")
    lines = list(dict.fromkeys(read_lines(path)))
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    for at in tqdm(range(0, len(lines), 1000), desc=f"reading {path.name}", leave=False):
        some = lines[at : at + 1000]
        for line, encoding in zip(some, tokenizer.encode_batch_fast(some, add_special_tokens=False), strict=True):
            if encoding.ids:
                (held_out if is_held_out(line) else train).append(encoding.ids)
    if not train:
        raise ValueError(f"{path}: there is no text to train on in it")
    lengths = torch.tensor([0, *(len(ids) for ids in train)])
    tokens = torch.tensor([token for ids in train for token in ids], dtype=torch.int32)
    return TextFile(path.name.split(".")[0], weight, tokens, lengths.cumsum(0), held_out)


class ExampleMaker:
    """Draws rows of text and masks them. Row number n is the same whoever makes it, in whatever order.

    A row is either one line alone (`short_fraction` of the rows) or a stretch of text that goes on over the
    ends of lines.
    """

    def __init__(
        self,
        files: Sequence[TextFile],
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_length: int = 128,
        short_fraction: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.files = files
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.short_fraction = short_fraction
        self.seed = seed
        self.shares = torch.tensor([file.weight * len(file.tokens) for file in files], dtype=torch.float64)
        if not self.shares.sum() > 0:
            raise ValueError("all texts have weight 0: nothing would be drawn")
        self.cls, self.sep, self.mask = (require_id(tokenizer, token) for token in ("[CLS]", "[SEP]", "[MASK]"))
        self.special = torch.tensor(special_ids(tokenizer))

    def row(self, number: int) -> list[int]:
        """The token ids of row `number`, [CLS] and [SEP] included, not yet masked."""
        generator = example_generator(self.seed, 0, number)
        file = self.files[int(torch.multinomial(self.shares, 1, generator=generator))]
        room = self.max_length - 2
        line = int(torch.randint(len(file.starts) - 1, (1,), generator=generator))
        if float(torch.rand(1, generator=generator)) < self.short_fraction:
            start, stop = file.starts[line].item(), file.starts[line + 1].item()
            stop = min(stop, start + room)
        else:
            start = int(torch.randint(max(1, len(file.tokens) - room), (1,), generator=generator))
            stop = start + room
        return [self.cls, *file.tokens[start:stop].tolist(), self.sep]

    def examples(self, numbers: Sequence[int], rows: Sequence[list[int]] | None = None) -> Example:
        """The rows with these numbers as one packed batch, masked by BERT's recipe. `rows` replaces the drawn
        text.
        """
        rows = [self.row(number) for number in numbers] if rows is None else rows
        ids, labels = [], []
        for number, row in zip(numbers, rows, strict=True):
            original = torch.tensor([row])
            masked = mask_tokens(
                original,
                torch.isin(original, self.special),
                vocab_size=self.vocab_size,
                mask_token_id=self.mask,
                generator=example_generator(self.seed, 1, number),
            )
            ids.append(masked.input_ids[0].tolist())
            labels.append(masked.labels[0])
        flat = torch.cat(labels)  # (T,)
        positions = (flat >= 0).nonzero().flatten()  # (M,)
        return Example(PackedBatch.from_lists(ids), positions, flat[positions])
