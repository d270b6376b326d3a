"""How well a model guesses on lines that it was not trained on."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from minibert.loss import masked_lm_loss
from minibert.masked_lm import BertForMaskedLM
from minibert.masking import example_generator
from minibert.tokenizer import as_tokenizer
from minibert.training.data import Example, masked_rows
from minibert.training.ranks import ALONE, Ranks
from minibert.training.tokens import TokenFile

Figures = dict[str, dict[str, float | None]]  # of each text and of "all": loss, top1, masked_tokens


def masked_lines(file: TokenFile, numbers: range, tokenizer: Tokenizer, *, max_length: int, seed: int = 0) -> Example:
    """The held-out lines of a file with these numbers, one line a row, masked by BERT's recipe. A line is masked in the
    same places whatever stands beside it.
    """
    rows = [file.held_out.line(number)[: max_length - 2] for number in numbers]
    return masked_rows(rows, [example_generator(seed, 1, number) for number in numbers], tokenizer)


@torch.inference_mode()
def evaluate(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    *,
    max_length: int = 128,
    lines: int = 300,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Figures:
    """Loss (nats a token) and top-1 accuracy on the masked tokens of each file's held-out lines, and over all files
    together under "all". Of each file the first `lines` are taken, one line a row, masked by BERT's recipe. Where
    nothing is masked, loss and accuracy are None. The ranks share the work.
    """
    tokenizer = as_tokenizer(tokenizer)
    device = model.embeddings.word.weight.device
    sums: dict[str, list[float]] = {}  # loss, right answers, masked tokens
    for file in files:
        rows = range(min(lines, len(file.held_out)))
        here = torch.zeros(3, dtype=torch.float64)
        for at in range(64 * ranks.rank, len(rows), 64 * ranks.size):
            example = masked_lines(file, rows[at : at + 64], tokenizer, max_length=max_length, seed=seed)
            logits = model.predict(example.batch.to(device), example.positions.to(device)).cpu()  # (M, V)
            loss = masked_lm_loss(logits, example.targets)
            right = (logits.argmax(-1) == example.targets).sum()
            here += torch.stack([loss.sum, right, loss.count]).double()
        sums[file.name] = ranks.sum(*here.tolist())
    sums["all"] = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    return {
        name: {"loss": loss / count, "top1": right / count, "masked_tokens": count}
        if count
        else {"loss": None, "top1": None, "masked_tokens": 0}
        for name, (loss, right, count) in sums.items()
    }
