"""What the tests of study share: a tokenizer of few words, twins of a model for it, and how weights are unpacked."""

import base64
import zlib

import torch
from twins import twins

from minibert.tokenizer import from_vocabulary

WORDS = (
    "paris is the capital of france . , she drank a cup before breakfast un ##believ ##ab ##ly cold tea water".split()
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"word{number}" for number in range(50))]
SIZES = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=40,
    type_vocab_size=2,
)
TEXT, PAIR = "Paris is unbelievably cold, the capital of [MASK].", "She drank a cup of [MASK] before breakfast."
SHORT = torch.tensor([[2, 5, 6, 4, 3]])  # paris is [MASK]
LONG = "she drank a cup before breakfast of cold tea , the capital of france is paris .".split() * 40


def tokenizer():
    return from_vocabulary(VOCABULARY)


def pair_of_models(**sizes):
    """(ours, transformers') with random weights, and large enough ones that every number is far from its neighbours."""
    return twins({**SIZES, **sizes})


def inputs(reading):
    """A reading as both models take it."""
    return dict(input_ids=torch.tensor([reading.ids]), token_type_ids=torch.tensor([reading.segments]))


def unpack(text):
    """The weights that `heads.pack` was given, (n,), to 0.004."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8).div(255).square()
