"""A model in training mode has dropout, so its answers are random: whoever asks is told."""

import pytest
import torch
from twins import CONFIGS, twins

from minibert import FillMask
from minibert.tokenizer import from_vocabulary

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(20))]
TEXT = "w3 [MASK] w5"


@pytest.fixture
def model():
    return twins({**CONFIGS["batch 13, gelu"], "vocab_size": len(WORDS)})[0]


def test_fill_mask_refuses_a_model_in_training_mode(model):
    fill = FillMask(model, from_vocabulary(WORDS))
    expected = fill(TEXT)
    model.train()
    with pytest.raises(ValueError, match=r"training mode .*dropout of 0\.1.* call model\.eval\(\)"):
        fill(TEXT)
    assert model.training, "it is not touched: another thread may be training it"
    assert fill.model.eval()
    assert fill(TEXT) == expected


def test_fill_mask_notices_it_in_the_middle_of_a_stream(model, monkeypatch):
    monkeypatch.setattr("minibert.fill_mask.WINDOW", 1)
    answers = FillMask(model, from_vocabulary(WORDS)).stream([TEXT, TEXT])
    next(answers)
    model.layers[0].train()  # one part is enough
    with pytest.raises(ValueError, match=r"layers\.0\..*dropout"):
        next(answers)


def test_without_dropout_training_mode_does_no_harm(model):
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    fill = FillMask(model, from_vocabulary(WORDS))
    expected = fill(TEXT)
    model.train()
    assert fill(TEXT) == expected
