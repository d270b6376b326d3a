"""What a run starts from: a checkpoint to go on training, or a config.json and random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.tokenizer import load_tokenizer


def start_model(init: str, *, seed: int, device: str, revision: str | None = None) -> BertForMaskedLM:
    """The model that a run begins with.

    init: what `BertForMaskedLM.from_pretrained` reads, of the hub's `revision`; an encoder without a head too. Or the
    path of a configuration, a .json file: then the weights are random, and the same for the same seed.
    """
    if not _is_config(init):
        return BertForMaskedLM.from_pretrained(init, device=device, revision=revision, init_missing_head=True)
    if revision is not None:
        raise ValueError(f"revision {revision!r} was given, but {init} is a file: revisions are the hub's")
    config = BertConfig.from_json_file(_existing(init))
    torch.manual_seed(seed)
    return BertForMaskedLM(config).to(device)


def start_config(init: str, model: BertForMaskedLM) -> BertConfig:
    """The configuration that `init` gives today. If `init` is a file, it may have changed since the run began with it,
    and a run that goes on checks that. If it is a checkpoint, the configuration is that of `model`.
    """
    return BertConfig.from_json_file(_existing(init)) if _is_config(init) else model.config


def start_tokenizer(init: str, tokenizer: str | None, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of the model named `tokenizer`; None: that of `init`, of the hub's `revision`.

    Raises FileNotFoundError, naming the option --tokenizer, if it is not there.
    """
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    where = _existing(init).parent if _is_config(init) else init
    try:
        return load_tokenizer(where, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: name a model that has one with --tokenizer") from error


def _is_config(init: str) -> bool:
    return init.endswith(".json")


def _existing(init: str) -> Path:
    if not Path(init).is_file():
        raise FileNotFoundError(f"--init {init}: no such file")
    return Path(init)
