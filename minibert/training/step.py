"""One step of the optimizer, in one pass or many, in one process or many; and how well the model guesses after it.

The loss of a step is the mean over the masked tokens of its whole batch, however many passes and processes the batch is
cut into. The logits are computed at the masked positions only.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minibert.loss import masked_lm_loss
from minibert.masked_lm import BertForMaskedLM
from minibert.masking import example_generator
from minibert.packing import PackedBatch
from minibert.tokenizer import as_tokenizer
from minibert.training.data import ALONE, Example, Ranks, Share, masked_rows
from minibert.training.settings import Settings
from minibert.training.tokens import TokenFile


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases and LayerNorm (optimization.py, exclude_from_weight_decay)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, and the ε of google-research/bert, optimization.py."""
    groups = parameter_groups(model, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, eps=1e-6, fused=True)


class LossSum(nn.Module):
    """Its forward() is the sum of the loss over the targets. (DistributedDataParallel can wrap only a forward().)"""

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, positions: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.predict(batch, positions)  # (M, V)
        # Not masked_lm_loss, which asks whether a target is out of range: in each step that would stop a GPU.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, reduction="sum")


def accumulate(objective: nn.Module, passes: Sequence[Example], targets: float, dtype: str, ranks: Ranks) -> Tensor:
    """Add the gradient of the mean loss over the step. `targets` is how many masked tokens the step has, in all passes
    of all ranks. Returns the sum of the loss over the passes of this rank, on the device.
    """
    device = next(objective.parameters()).device
    losses: list[Tensor] = []
    for number, example in enumerate(passes, start=1):
        example = example.to(device)
        with ExitStack() as around:
            if isinstance(objective, DistributedDataParallel) and number < len(passes):
                around.enter_context(objective.no_sync())  # gradients go over the wire once a step
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = objective(example.batch, example.positions, example.targets)
            # Over the ranks, DistributedDataParallel takes the mean of the gradients, and this is a part of a sum.
            (loss * (ranks.size / targets)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def take_step(
    objective: nn.Module, optimizer: torch.optim.Optimizer, share: Share, step: int, settings: Settings, ranks: Ranks
) -> dict[str, Any]:
    """Take one step of the optimizer; `step` counts from 0. Returns its loss (None if no token was masked), learning
    rate, length of the gradient, and numbers of tokens.

    Raises FloatingPointError if the loss or the gradient is not a number any more; the weights are then untouched.

    A GPU is asked nothing until all of the step is under way. (Several first add up their numbers of masked tokens.)
    """
    targets, tokens = ranks.sum(sum(len(example.targets) for example in share.passes), share.tokens)
    # Dropout draws from torch's own generator. It is seeded anew for each step, so there is no state to save.
    torch.manual_seed(random.Random(f"{settings.seed} {step} {ranks.rank}").getrandbits(63))
    optimizer.zero_grad()
    loss_sum = accumulate(objective, share.passes, max(1, targets), settings.dtype, ranks)
    length = nn.utils.clip_grad_norm_(objective.parameters(), settings.clip)
    # As GradScaler does it: where this is 1, torch's fused AdamW leaves the weights alone.
    optimizer.found_inf = (~(loss_sum.isfinite() & length.isfinite())).float()  # type: ignore[attr-defined]
    rate = settings.rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    here, norm = torch.stack([loss_sum, length.to(loss_sum)]).tolist()
    loss = ranks.sum(here)[0] / max(1, targets)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss}, the length of the gradient {norm}. The weights were not touched, "
            f"and what was saved before stands. Is a learning rate of {settings.learning_rate} too high?"
        )
    return {
        "loss": loss if targets else None,
        "learning_rate": rate,
        "gradient_norm": norm,
        "masked_tokens": int(targets),
        "tokens": int(tokens),
    }


def compiles(settings: Settings, device: torch.device) -> bool:
    """Whether the layers are compiled: as asked, or else on CUDA where Triton is, which torch.compile needs there."""
    if settings.compile is not None:
        return settings.compile
    return device.type == "cuda" and find_spec("triton") is not None


class QuickDropout(nn.Dropout):
    """nn.Dropout for training on the CPU, where torch draws random numbers one after the other, which is slow. Here 16
    random bits decide over an element, not 64. So p is rounded to a multiple of 2^-16, and the elements dropped are
    others than those of nn.Dropout (and of transformers) for the same seed.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        dropped = min(max(round(self.p * 2**16), 1), 2**16 - 1)  # of the 2^16 patterns that 16 bits have
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)  # 64 each
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)


@contextmanager
def quick_dropout(model: nn.Module) -> Iterator[None]:
    """Within this block a `QuickDropout` stands in place of every nn.Dropout of `model` that has no hooks."""
    replaced = [
        (part, name, old)
        for part in model.modules()
        for name, old in part.named_children()
        if isinstance(old, nn.Dropout) and not (old._forward_hooks or old._forward_pre_hooks)
    ]
    try:
        for part, name, old in replaced:
            setattr(part, name, QuickDropout(old.p).train(old.training))
        yield
    finally:
        for part, name, old in replaced:
            setattr(part, name, old.train(part.get_submodule(name).training))


@contextmanager
def wrapped_layers(
    model: BertForMaskedLM, *, compile: bool = False, checkpoint_activations: bool = False
) -> Iterator[None]:
    """In this block the encoder layers are compiled, or keep only their input for the backward pass, as asked. On the
    CPU dropout takes a quicker form, unless the layers are compiled.
    """
    with ExitStack() as around:
        if not compile and model.embeddings.word.weight.is_cpu:
            around.enter_context(quick_dropout(model))
        if checkpoint_activations and not model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable()
            around.callback(model.gradient_checkpointing_disable)
        for layer in model.layers if compile else ():
            # Attention stays outside: its loop over the lengths would make another graph of every batch.
            attention = layer.get_submodule("attention")
            around.enter_context(mock.patch.object(attention, "forward", torch.compiler.disable(attention.forward)))
            around.enter_context(mock.patch.object(layer, "once", torch.compile(layer.once, dynamic=True)))
        yield


# ------------------------------------------------------------------------------------------------------- held-out lines


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
    figures: Figures = {}
    for name, (total, hits, count) in sums.items():
        figures[name] = {"loss": total / count if count else None, "top1": hits / count if count else None}
        figures[name]["masked_tokens"] = count
    return figures
