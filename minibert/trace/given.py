"""The inputs of a trace, from texts and from a JSON file of ids."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minibert.checkpoint.files import read_json
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.tokenizer import encode
from minibert.trace.stores import require_file
from minibert.trace.table import INPUTS


def tokenized(texts: list[str], tokenizer: Tokenizer, config: BertConfig) -> dict[str, Tensor]:
    """The texts as rows, padded on the right. Every token is its own label, so that there is a loss."""
    rows = [encode(tokenizer, text, config.max_position_embeddings).ids for text in texts]
    length = max(len(row) for row in rows)
    padding = config.pad_token_id or 0
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def read_ids(path: Path) -> dict[str, Tensor]:
    """A JSON object of lists of rows: input_ids, and if wanted attention_mask, token_type_ids, labels."""
    require_file(path, "a JSON file of ids")
    values = read_json(path)
    if "input_ids" not in values or (unknown := values.keys() - set(INPUTS)):
        said = f"the key {sorted(unknown)[0]!r} is not known" if "input_ids" in values else "there is no input_ids"
        raise ValueError(f"{path}: {said}; it holds {', '.join(INPUTS)}, each a list of rows")
    result = {}
    for name, rows in values.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            raise ValueError(f"{path}: {name} must be a list of rows, [[…], […]], none of them empty")
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"{path}: {name} must be rows of one length, and row {number} has {len(row)} entries, row 0 "
                    f"{len(rows[0])}: fill up with padding, and give an attention_mask"
                )
            for column, entry in enumerate(row):
                if type(entry) is not int or not -(2**63) <= entry < 2**63:  # true and false are no ids
                    said = json.dumps(entry)[:40]
                    raise ValueError(f"{path}: {name} at {(number, column)} is {said}, and must be a whole number")
        result[name] = torch.tensor(rows)
    return result
