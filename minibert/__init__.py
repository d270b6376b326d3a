"""minibert: BERT's masked language model, from scratch, in pure PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert.config import BertConfig
    from minibert.fill_mask import FillMask
    from minibert.inference import prepare_for_inference
    from minibert.loss import masked_lm_loss
    from minibert.masked_lm import BertForMaskedLM
    from minibert.masking import mask_tokens
    from minibert.packing import PackedBatch
    from minibert.score import pseudo_log_likelihood
    from minibert.tokenizer import load_tokenizer
    from minibert.training.step import parameter_groups

__version__ = "0.1.0"
__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "FillMask",
    "PackedBatch",
    "load_tokenizer",
    "mask_tokens",
    "masked_lm_loss",
    "parameter_groups",
    "prepare_for_inference",
    "pseudo_log_likelihood",
]

_ROOMS = {
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


def __getattr__(name: str) -> Any:
    """Import a public name, or a part such as minibert.study, when it is first used, so that `minibert --help` does not
    wait for torch.
    """
    if name not in _ROOMS:
        if not name.startswith("_") and find_spec(f"minibert.{name}"):
            return import_module(f"minibert.{name}")
        raise AttributeError(f"module 'minibert' has no attribute {name!r}")
    return getattr(import_module(f"minibert.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
