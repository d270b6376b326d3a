"""A tiny model, transformers' twin of it, and the command."""

import pytest
import torch
from small import LONGEST, VOCAB
from transformers import BertForMaskedLM as HubBert

from minibert import BertConfig, BertForMaskedLM, FillMask, load_tokenizer
from minibert.cli import main
from minibert.tokenizer import from_vocabulary


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=37,
        max_position_embeddings=LONGEST,
        initializer_range=0.3,  # predictions that differ clearly
    )
    BertForMaskedLM(config).save_pretrained(path)
    from_vocabulary(VOCAB).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def fill(folder):
    return FillMask(BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder))


@pytest.fixture(scope="session")
def hub_model(folder):
    return HubBert.from_pretrained(folder).eval()


@pytest.fixture
def run(folder, capsys):
    """The command with the tiny model: what it printed. It must succeed and say nothing on stderr."""

    def call(command, *arguments):
        assert main([command, *arguments, "--model", str(folder)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


@pytest.fixture
def fails(capsys):
    """The command must fail with status 2, nothing on stdout and one line on stderr: that line."""

    def call(*arguments):
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("minibert")
        assert "Traceback" not in err
        return err.strip()

    return call
