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
IDS = torch.randint(1, 90, (13, 7), generator=torch.Generator().manual_seed(1))


def random_weights(model):
    """All of them random, also the biases and LayerNorms that start as 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


def assert_same_logits(model, theirs):
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def store(folder, tensors, name=WEIGHTS):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})


def change_json(path, leave_out=(), **values):
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if key not in leave_out}))


def assert_same(model, ours):
    """The same tensors under the same names, bit for bit."""
    state, expected = model.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def refused(folder, match, error=ValueError, mentions="", **options):
    """Loading is refused with this cause, and the message names the file at fault."""
    with pytest.raises(error, match=match) as caught:
        BertForMaskedLM.from_pretrained(folder, **options)
    assert str(folder / mentions) in str(caught.value)
