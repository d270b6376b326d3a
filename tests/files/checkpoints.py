"""A small checkpoint of transformers, and what the tests of files ask about one that has been changed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from minibert import BertForMaskedLM

# Awkward sizes, no two alike: a swapped axis cannot go unnoticed.
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 16,
}
WORD = "bert.embeddings.word_embeddings.weight"
BIAS = "cls.predictions.bias"
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.inference_mode()
def logits(model, ids):
    return model(ids).logits


def store(folder, tensors, name=WEIGHTS):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same(model, ours):
    """The same tensors under the same names, bit for bit."""
    state, expected = model.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def refused(folder, match, error=ValueError, mentions=None, **options):
    """Loading is refused with this cause, and the message names the file at fault."""
    with pytest.raises(error, match=match) as caught:
        BertForMaskedLM.from_pretrained(folder, **options)
    assert str(folder if mentions is None else folder / mentions) in str(caught.value)


def loads_or_is_refused(folder, expected):
    """Either this very model, or an error that says where: never another exception, never other weights."""
    try:
        model = BertForMaskedLM.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        assert_same(model, expected)
        return
    assert str(folder) in message
