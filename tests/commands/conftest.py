"""What the tests of the commands share: standard input, the tiny model, and transformers' twin of it."""

import io

import pytest
from transformers import BertForMaskedLM as HubBert

from minibert import BertForMaskedLM, FillMask, load_tokenizer
from minibert.inference import prepare_for_inference


@pytest.fixture
def given(monkeypatch):
    """given(text or bytes): that is on standard input, as Linux opens it; None: it is closed."""

    def put(raw):
        raw = raw.encode() if isinstance(raw, str) else raw
        monkeypatch.setattr("sys.stdin", None if raw is None else io.TextIOWrapper(io.BytesIO(raw), newline="\n"))

    return put


@pytest.fixture
def prepared(monkeypatch):
    """The types in which models have been prepared for inference."""
    types = []

    def prepare(model, dtype):
        types.append(dtype)
        return prepare_for_inference(model, dtype)

    monkeypatch.setattr("minibert.inference.prepare_for_inference", prepare)
    return types


@pytest.fixture(scope="session")
def folder(checkpoint):
    return checkpoint


@pytest.fixture(scope="session")
def fill(folder):
    return FillMask(BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder))


@pytest.fixture(scope="session")
def hub_model(folder):
    return HubBert.from_pretrained(folder).eval()
