"""What a run starts from: a checkpoint to go on training, or a config.json and random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.tokenizer import load_tokenizer


def start_model(init: str, *, seed: int, device: str) -> BertForMaskedLM:
    """init: anything that `BertForMaskedLM.from_pretrained` reads, an encoder without a head too; or the path of a
    configuration, a .json file, whose model begins with random weights: the same for the same seed.
    """
    if not _is_config(init):
        return BertForMaskedLM.from_pretrained(init, device=device, init_missing_head=True)
    config = BertConfig.from_json_file(_existing(init))
    torch.manual_seed(seed)
    return BertForMaskedLM(config).to(device)


def start_config(init: str, model: BertForMaskedLM) -> BertConfig:
    """What `init` says now that the model is. A configuration may have changed since `model`, which began with it, was
    saved; a checkpoint was read once, and `model` is what came of it.
    """
    return BertConfig.from_json_file(_existing(init)) if _is_config(init) else model.config


def start_tokenizer(init: str, tokenizer: str | None) -> Tokenizer:
    """The tokenizer with the name `tokenizer`, or else the one that belongs to `init`. Raises FileNotFoundError, naming
    the option, if neither is there.
    """
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    where = _existing(init).parent if _is_config(init) else init
    try:
        return load_tokenizer(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: name a model that has one with --tokenizer") from error


def _is_config(init: str) -> bool:
    return init.endswith(".json")


def _existing(init: str) -> Path:
    if not Path(init).is_file():
        raise FileNotFoundError(f"--init {init}: no such file")
    return Path(init)
