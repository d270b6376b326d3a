"""What the tests of the commands share: FillMask and transformers' twin of the tiny model."""

import io

import pytest
from transformers import BertForMaskedLM as HubBert

from minibert import BertForMaskedLM, FillMask, load_tokenizer


@pytest.fixture
def given(monkeypatch):
    """given(text or bytes): that is on standard input, as Linux opens it; None: it is closed."""

    def put(raw):
        raw = raw.encode() if isinstance(raw, str) else raw
        monkeypatch.setattr("sys.stdin", None if raw is None else io.TextIOWrapper(io.BytesIO(raw), newline="\n"))

    return put


@pytest.fixture(scope="session")
def folder(checkpoint):
    return checkpoint


@pytest.fixture(scope="session")
def fill(folder):
    return FillMask(BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder))


@pytest.fixture(scope="session")
def hub_model(folder):
    return HubBert.from_pretrained(folder).eval()
