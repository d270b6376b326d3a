"""What the tests of the commands share: FillMask and transformers' twin of the tiny model."""

import pytest
from transformers import BertForMaskedLM as HubBert

from minibert import BertForMaskedLM, FillMask, load_tokenizer


@pytest.fixture(scope="session")
def folder(checkpoint):
    return checkpoint


@pytest.fixture(scope="session")
def fill(folder):
    return FillMask(BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder))


@pytest.fixture(scope="session")
def hub_model(folder):
    return HubBert.from_pretrained(folder).eval()
