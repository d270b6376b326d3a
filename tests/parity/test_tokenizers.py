"""Tokenizers compared over hard texts: the first text that differs, and the step."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from minibert import load_tokenizer
from minibert.cli import main


def changed(step):
    theirs = load_tokenizer("minibert-uncased")
    if step == "normalizer":
        theirs.normalizer = BertNormalizer(lowercase=True, strip_accents=False)
    elif step == "pre-tokenizer":
        theirs.pre_tokenizer = WhitespaceSplit()
    elif step == "model":
        values = json.loads(theirs.to_str())
        values["model"]["max_input_chars_per_word"] = 20
        theirs = Tokenizer.from_str(json.dumps(values))
    elif step == "post-processor":
        theirs.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 101)])
    return theirs


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("normalizer", "Café"),
        ("pre-tokenizer", "The quick brown fox"),
        ("model", "pneumonoultra"),
        ("post-processor", "The quick brown fox"),
    ],
)
def test_the_first_text_and_the_step(tmp_path, capsys, step, text):
    changed(step).save(str(tmp_path / "theirs.json"))
    assert main(["parity", "--tokenizer", str(tmp_path / "theirs.json")]) == 1
    said = capsys.readouterr().out
    assert f"differ first on '{text}" in said
    assert f"\n  step    {step}\n" in said
    assert main(["parity", "--tokenizer", str(tmp_path / "theirs.json"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["step"]) == (False, step)
    assert report["ours"] != report["theirs"]


def test_the_same_tokenizer_and_a_file_that_is_none(tmp_path, capsys):
    load_tokenizer("minibert-uncased").save(str(tmp_path / "theirs.json"))
    assert main(["parity", "--tokenizer", str(tmp_path / "theirs.json")]) == 0
    assert "agree on all of" in capsys.readouterr().out
    (tmp_path / "theirs.json").write_text('{"model": 3}')
    assert main(["parity", "--tokenizer", str(tmp_path / "theirs.json")]) == 2
    assert "not a tokenizer.json" in capsys.readouterr().err
    assert main(["parity", "--tokenizer", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err
