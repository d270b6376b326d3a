"""The training loop: one process, packed batches, the head on the masked positions only.

Recipe: Devlin et al. 2019, appendix A.2: Adam with decoupled weight decay 0.01 (none on biases and LayerNorm),
warm-up, then linear decay of the learning rate; google-research/bert, optimization.py.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from minibert.loss import masked_lm_loss
from minibert.masking import example_generator
from minibert.model import BertForMaskedLM
from minibert.training.data import Corpus, masked_rows
from minibert.training.tokens import TokenFile


@dataclass(frozen=True, kw_only=True)
class Settings:
    """steps: optimizer steps. batch_size: rows in each. max_length: tokens in a row, at most. short_fraction:
    share of rows that are one line alone. learning_rate: its peak, after `warmup` of the steps. dropout: use
    the model's own dropout rates. save_every: steps between saves.
    """

    steps: int
    batch_size: int = 64
    max_length: int = 128
    short_fraction: float = 0.3
    learning_rate: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: bool = True
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "save_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.max_length < 3:
            raise ValueError(f"max_length must be at least 3, for [CLS], a token and [SEP], not {self.max_length}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases and LayerNorm (optimization.py, exclude_from_weight_decay)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def train(
    model: BertForMaskedLM, tokenizer: Tokenizer, files: Sequence[TokenFile], out: Path, settings: Settings
) -> list[float]:
    """Train `model` in place and save it, with its tokenizer, in `out`. Returns the loss of every step.

    Raises ValueError if the rows are longer than the model allows, FloatingPointError if the loss is not a
    number any more; what was saved before stays.
    """
    if settings.max_length > model.config.max_position_embeddings:
        raise ValueError(
            f"max_length {settings.max_length} is more than the {model.config.max_position_embeddings} positions "
            "that the model has"
        )
    corpus = Corpus(
        files,
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_length=settings.max_length,
        short_fraction=settings.short_fraction,
        tokens_per_step=settings.batch_size * settings.max_length,
        seed=settings.seed,
    )
    device = model.embeddings.word.weight.device
    torch.manual_seed(settings.seed)  # dropout draws from torch's own generator
    model.train(settings.dropout)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, eps=1e-6, fused=True
    )
    warm = max(1, round(settings.warmup * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (settings.steps - step) / max(1, settings.steps - warm))
    )
    losses: list[float] = []
    tokens, began = 0, time.perf_counter()
    every_step = ((epoch, numbers) for epoch in count() for numbers in corpus.steps(epoch))
    progress = tqdm(islice(every_step, settings.steps), total=settings.steps, desc="training", mininterval=5)
    for step, (epoch, numbers) in enumerate(progress):
        example = corpus.examples(epoch, numbers)
        batch, positions, targets = example.batch.to(device), example.positions.to(device), example.targets.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model.predict(batch, positions)  # (M, V)
        loss = masked_lm_loss(logits, targets).mean
        losses.append(loss.item())
        if not losses[-1] < float("inf"):
            raise FloatingPointError(
                f"the loss of step {step} is {losses[-1]}: lower the learning rate {settings.learning_rate}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        tokens += batch.num_tokens
        recent = losses[-100:]
        progress.set_postfix_str(
            f"loss {sum(recent) / len(recent):.3f}, {tokens / (time.perf_counter() - began):.0f} tokens/s",
            refresh=False,
        )
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            model.save_pretrained(out)
            tokenizer.save(str(out / "tokenizer.json"))
    model.eval()
    return losses


@torch.inference_mode()
def evaluate(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    *,
    max_length: int = 128,
    lines: int = 300,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Loss (nats a token) and top-1 accuracy on masked tokens of each file's held-out lines, the first `lines`
    of each, one line a row, masked by BERT's recipe; and over all of them together, under "all".
    """
    device = model.embeddings.word.weight.device
    result: dict[str, dict[str, float]] = {}
    totals = torch.zeros(3, dtype=torch.float64)
    for file in files:
        sums = torch.zeros(3, dtype=torch.float64)  # loss, right answers, masked tokens
        rows = [file.held_out.line(number)[: max_length - 2] for number in range(min(lines, len(file.held_out)))]
        for at in range(0, len(rows), 64):
            some = rows[at : at + 64]
            generators = [example_generator(seed, 1, number) for number in range(at, at + len(some))]
            example = masked_rows(some, generators, tokenizer, model.config.vocab_size)
            logits = model.predict(example.batch.to(device), example.positions.to(device)).cpu()  # (M, V)
            loss = masked_lm_loss(logits, example.targets)
            right = (logits.argmax(-1) == example.targets).sum()
            sums += torch.stack([loss.sum, right, loss.count]).double()
        totals += sums
        result[file.name] = _figures(sums)
    result["all"] = _figures(totals)
    return result


def _figures(sums: torch.Tensor) -> dict[str, float]:
    loss, right, count = sums.tolist()
    if not count:
        return {"loss": math.nan, "top1": math.nan, "masked_tokens": 0}
    return {"loss": loss / count, "top1": right / count, "masked_tokens": count}
