"""View 5: how much each layer changes a token's vector, and how much of it comes from other tokens.

The length of a state says nothing: the LayerNorm at the end of each step fixes it. So everything here is a ratio, or an
angle.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LayerChange:
    """Of one layer, a number for each token. `mixing` is None without the model's weights."""

    attention: list[float]  # ‖attention output‖ / ‖what the layer reads‖
    feed_forward: list[float]  # ‖feed-forward output‖ / ‖what it reads‖
    cosine: list[float]  # of what goes into the layer and what comes out
    mixing: list[float] | None  # see `mixing_ratio`


def length_ratio(update: Tensor, x: Tensor) -> Tensor:
    """‖update‖ / ‖x‖ of each token: (S, D), (S, D) → (S,)"""
    return update.norm(dim=-1) / x.norm(dim=-1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ / (‖x‖ ‖y‖) of each token: (S, D), (S, D) → (S,)"""
    return F.cosine_similarity(x, y, dim=-1)


def mixing_ratio(x: Tensor, context: Tensor, probabilities: Tensor, given: Tensor, gamma: Tensor) -> Tensor:
    """How much of a token's vector after attention, residual and LayerNorm comes from other tokens, (S,), 0 to 1:

        others = Σ over j ≠ i of αᵢⱼ f(xⱼ),  own = αᵢᵢ f(xᵢ) + xᵢ
        ratio  = ‖g(others)‖ / (‖g(others)‖ + ‖g(own)‖),  g(x) = (x − mean(x)) · γ

    The division by the standard deviation is the same for both and cancels; biases belong to neither.

    x (S, D) is what the layer reads, context (S, D) the attention output without its bias, probabilities (H, S, S),
    given: f(x) (H, S, D), gamma (D,) the LayerNorm's weight.
    Source: Kobayashi et al. 2021, "Incorporating Residual and Normalization Layers into Analysis of Masked Language
    Models", https://arxiv.org/abs/2109.07152, section 3.
    """

    def seen_by_norm(part: Tensor) -> Tensor:
        return ((part - part.mean(-1, keepdim=True)) * gamma).norm(dim=-1)

    own = torch.einsum("hs,hsd->sd", probabilities.diagonal(dim1=-2, dim2=-1), given)  # (S, D)
    others, kept = seen_by_norm(context - own), seen_by_norm(own + x)
    return others / (others + kept)
