"""View 1: what word, position and segment each give to the vector that BERT starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minibert.model import Bert
from minibert.packing import PackedBatch


def embedding_parts(model: Bert, batch: PackedBatch) -> list[Tensor]:
    """The three vectors of each token, (T, D) each: of its word, of its position, of its segment."""
    embeddings = model.embeddings
    return [
        embeddings.word(batch.input_ids),
        embeddings.position(batch.position_ids),
        embeddings.token_type(batch.token_type_ids),
    ]


def shares(parts: Sequence[Tensor]) -> Tensor:
    """How much each part gives to the sum of all: (number of parts, T). A column adds up to 1; a part that points away
    from the sum has a negative share.

        share of part i = ⟨P partᵢ, P sum⟩ / ‖P sum‖²,  P x = x − mean(x)

    P, because the LayerNorm that reads the sum takes the mean out first. The formula is the projection of each part
    onto the sum.
    """
    centred = torch.stack([part - part.mean(-1, keepdim=True) for part in parts])  # (parts, T, D)
    total = centred.sum(0)  # (T, D)
    return (centred * total).sum(-1) / total.pow(2).sum(-1)
