"""minibert: BERT's masked language model, from scratch, in pure PyTorch."""

from minibert.config import BertConfig
from minibert.fill_mask import FillMask
from minibert.loss import masked_lm_loss
from minibert.masking import mask_tokens
from minibert.model import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.tokenizer import load_tokenizer

__version__ = "0.1.0"
__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "FillMask",
    "PackedBatch",
    "load_tokenizer",
    "mask_tokens",
    "masked_lm_loss",
]
