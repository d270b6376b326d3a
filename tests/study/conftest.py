"""Made once in a run: two models with the same weights, and the study of two texts. Nobody may change them."""

import pytest
from studied import PAIR, TEXT, pair_of_models, tokenizer

from minibert.study import study


@pytest.fixture(scope="session")
def models():
    """(ours, transformers')"""
    return pair_of_models()


@pytest.fixture(scope="session")
def model(models):
    return models[0]


@pytest.fixture(scope="session")
def found(model):
    return study(model, tokenizer(), TEXT, PAIR, targets=["france", "tea"])
