"""Cross-entropy over the masked positions.

Source: Devlin et al. 2019, section 3.1, task 1; google-research/bert, run_pretraining.py, get_masked_lm_output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.checks import IGNORE as IGNORE
from minibert.checks import being_traced


@dataclass(frozen=True)
class MaskedLMLoss:
    """The sum of the negative log-likelihoods (in nats), over how many labels, and their quotient. All are scalars.

    Sum and count are both here because the mean over several batches or processes is the sum of the sums over
    the sum of the counts, not the mean of the means.
    """

    sum: Tensor
    count: Tensor
    mean: Tensor


def masked_lm_loss(logits: Tensor, targets: Tensor) -> MaskedLMLoss:
    """The loss of `logits` (…, V) against `targets` (…), ids or −100 where nothing is asked.

    Computed in float32 whatever the dtype of the logits (float64 stays). With no target at all the loss is 0
    and still has a graph, where a plain mean would be NaN. Raises ValueError for a target that is neither an id
    nor −100.
    """
    for name, given in (("logits", logits), ("targets", targets)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(given).__name__}: torch.tensor(…) makes one")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, not {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be ids, whole numbers, not {targets.dtype}")
    targets = targets.long()
    vocab_size = logits.shape[-1]
    asked = targets != IGNORE
    out_of_range = asked & ((targets < 0) | (targets >= vocab_size))
    if not being_traced() and bool(out_of_range.any()):
        raise ValueError(
            f"label {int(targets[out_of_range][0])} is not an id below {vocab_size}. "
            f"Give {IGNORE} where nothing is asked: that, and no other value, leaves a position out of the loss"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    total = F.cross_entropy(logits.reshape(-1, vocab_size), targets.reshape(-1), ignore_index=IGNORE, reduction="sum")
    count = asked.sum()
    return MaskedLMLoss(sum=total, count=count, mean=total / count.clamp(min=1))
