"""minibert: BERT's masked language model, from scratch, in pure PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert.config import BertConfig as BertConfig
    from minibert.fill_mask import FillMask as FillMask
    from minibert.inference import prepare_for_inference as prepare_for_inference
    from minibert.loss import masked_lm_loss as masked_lm_loss
    from minibert.masked_lm import BertForMaskedLM as BertForMaskedLM
    from minibert.masking import mask_tokens as mask_tokens
    from minibert.packing import PackedBatch as PackedBatch
    from minibert.score import pseudo_log_likelihood as pseudo_log_likelihood
    from minibert.tokenizer import load_tokenizer as load_tokenizer
    from minibert.training.step import parameter_groups as parameter_groups

__version__ = "0.1.0"
_WHERE = {
    "BertConfig": "config",
    "BertForMaskedLM": "masked_lm",
    "FillMask": "fill_mask",
    "PackedBatch": "packing",
    "load_tokenizer": "tokenizer",
    "mask_tokens": "masking",
    "masked_lm_loss": "loss",
    "parameter_groups": "training.step",
    "prepare_for_inference": "inference",
    "pseudo_log_likelihood": "score",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    """Import a public name, or a part such as minibert.study, when it is first used, so that `minibert --help` does not
    wait for torch.
    """
    if name in _WHERE:
        return getattr(import_module(f"minibert.{_WHERE[name]}"), name)
    if not name.startswith("_") and find_spec(f"minibert.{name}"):
        return import_module(f"minibert.{name}")
    raise AttributeError(f"module 'minibert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
