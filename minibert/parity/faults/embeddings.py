"""Faults in the embeddings: token types and positions."""

import torch
from torch import Tensor

from minibert.parity.steps import Steps


class MissingTypes(Steps):
    title = "token type embedding missing"
    remedy = "add the token type embedding to the sum, also when every type is 0: row 0 is not zero"
    source = "foundation-model-stack#399: a converted checkpoint whose token_type_embeddings nobody read"

    def types(self) -> Tensor:
        return torch.zeros_like(super().types())


class ConstantTypes(Steps):
    title = "token types ignored"
    remedy = "look up token_type_ids as they were given, not 0 for every token"
    source = "bytedance/lightseq#265: the export adds type 0 to every word embedding"

    def types(self) -> Tensor:
        result: Tensor = self.model.embeddings.token_type(torch.zeros_like(self.inputs.token_type_ids))
        return result


class PositionsFromOne(Steps):
    title = "positions off by one"
    remedy = "count positions from 0"
    source = "an embedding table that keeps row 0 for padding counts from 1 (padding_idx in fairseq)"

    def positions(self) -> Tensor:
        return self.clamp(super().positions() + 1)


class PositionsOfTokens(Steps):
    title = "positions count tokens, not columns"
    remedy = "the position is the column, whatever the mask says: a left-padded row starts late"
    source = "transformers, generation: position_ids = attention_mask.cumsum(-1) - 1, for left-padded decoders"

    def positions(self) -> Tensor:
        return self.clamp(self.seen.long().cumsum(1) - 1)


class PositionsOfRoberta(Steps):
    title = "positions off by the padding id (RoBERTa's)"
    remedy = "count positions from 0; RoBERTa counts tokens from padding_idx + 1"
    source = "huggingface/transformers#5285 and #11242: RoBERTa's positions start at padding_idx + 1"

    def positions(self) -> Tensor:
        padding = 1  # RoBERTa's id, whatever this model's is
        return self.clamp(self.seen.long().cumsum(1) * self.seen + padding)


FAULTS: tuple[type[Steps], ...] = (
    MissingTypes,
    ConstantTypes,
    PositionsFromOne,
    PositionsOfTokens,
    PositionsOfRoberta,
)
