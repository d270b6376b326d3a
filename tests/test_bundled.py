"""The bundled weights: they answer, they are what their card says, and transformers reads them too."""

import re

import pytest
import torch
import transformers

from minibert import BertForMaskedLM, FillMask, load_tokenizer
from minibert.checkpoint.files import sha256
from minibert.checkpoint.hub import BUNDLED

NAME = "minibert-uncased"


@pytest.fixture(scope="module")
def folder():
    return next(parent / NAME for parent in BUNDLED if (parent / NAME).is_dir())


@pytest.fixture(scope="module")
def fill():
    return FillMask(BertForMaskedLM.from_pretrained(NAME), load_tokenizer(NAME))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The capital of France is [MASK].", "paris"),
        ("Paris is the capital of [MASK].", "france"),
        ("She opened the [MASK] and walked into the room.", "door"),
    ],
)
def test_it_answers_sensibly(fill, text, answer):
    assert answer in [row["token_str"] for row in fill(text, top_k=3)]


def test_what_is_in_the_files(fill, folder):
    report, file = fill.model.load_report, folder / "model.safetensors"
    assert (set(report.file_dtypes), report.dtype) == ({"F16"}, "float32"), "half precision, held in single"
    assert not report.ignored
    assert file.stat().st_size < 47e6
    assert re.findall(r"\b[0-9a-f]{64}\b", (folder / "README.md").read_text())[0] == sha256(file)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [fill.tokenizer.token_to_id(token) for token in specials] == [0, 100, 101, 102, 103], "BERT's"
    assert fill.tokenizer.get_vocab_size() == 30522


def test_transformers_reads_it_and_agrees(fill, folder, caplog):
    theirs, info = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    ids = torch.tensor([fill.tokenizer.encode("Paris is the [MASK] of France.").ids])
    with torch.no_grad():
        torch.testing.assert_close(fill.model(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-4)


def test_names_that_lead_to_no_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="is a file"):
        BertForMaskedLM.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match=NAME):  # lists what there is
        BertForMaskedLM.from_pretrained("minibert-uncased-typo")
