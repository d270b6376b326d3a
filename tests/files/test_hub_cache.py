"""What other programs have left in the hub's cache, and the command that converts a pickle."""

import hashlib
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hub_server import (
    BERT,
    COMMIT,
    NAME,
    OLDER,
    SIZES,
    WEIGHTS,
    assert_is,
    cached,
)
from huggingface_hub import constants

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.checkpoint import hub as minihub

# --------------------------------------------------------------------------- what other programs have left in the cache


def put_in_cache(cache, repo, commit, files, ref="main"):
    """As huggingface_hub lays it out."""
    snapshot = cache / ("models--" + repo.replace("/", "--")) / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    if ref:
        (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
        (snapshot.parents[1] / "refs" / ref).write_text(commit)


@pytest.fixture(params=["offline", "no connection"])
def alone(request, unreachable, monkeypatch):
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


SHORT = ["bert-base-uncased", "bert-base-cased", "bert-base-chinese", "bert-base-multilingual-cased"]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("owner", ["", "google-bert/"])
def test_googles_short_names(alone, cache, files, tmp_path, name, owner):
    put_in_cache(cache, owner + name, OLDER, files)
    if name == "bert-base-uncased":
        with pytest.warns(UserWarning, match=f"commit {OLDER}.*tested with {minihub.PINNED_REVISION[BERT]}"):
            model = BertForMaskedLM.from_pretrained(name)
        with pytest.warns(UserWarning, match=OLDER):
            assert load_tokenizer(name).encode("Paris").ids == [2, 5, 3]
    else:
        model = BertForMaskedLM.from_pretrained(name)
        assert load_tokenizer(name).encode("Paris").ids == [2, 5, 3]
    assert_is(model, files, tmp_path / "expected")
    assert model.load_report.commit == OLDER


def test_the_pinned_commit_under_the_short_name_is_checked(alone, cache, files, monkeypatch, tmp_path):
    pinned = minihub.PINNED_REVISION[BERT]
    put_in_cache(cache, "bert-base-uncased", pinned, files, ref="")
    monkeypatch.setattr("minibert.config.PINNED", BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"SHA-256 is .*68d45e23.*cache has changed"):
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert cached(cache, WEIGHTS), "a file that cannot be downloaded again is not deleted"
    monkeypatch.setitem(minihub.PINNED_SHA256, WEIGHTS, hashlib.sha256(files[WEIGHTS]).hexdigest())
    model = BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert_is(model, files, tmp_path / "expected")
    assert model.load_report.commit == pinned


def test_a_revision_that_was_asked_for_is_no_other(alone, cache, files):
    put_in_cache(cache, BERT, OLDER, files)
    for name in ("bert-base-uncased", BERT):
        with pytest.raises((FileNotFoundError, ConnectionError)):
            BertForMaskedLM.from_pretrained(name, revision=COMMIT)
        assert BertForMaskedLM.from_pretrained(name, revision=OLDER).load_report.commit == OLDER
        assert BertForMaskedLM.from_pretrained(name, revision="main").load_report.commit == OLDER


def test_the_short_names_where_the_hub_is(hub, files):
    hub.repos["google-bert/bert-base-chinese"] = {COMMIT: dict(files)}
    assert BertForMaskedLM.from_pretrained("bert-base-chinese").load_report.commit == COMMIT
    assert {repo for _, repo, _, _ in hub.asked} == {"google-bert/bert-base-chinese"}


def test_a_commit_that_changes_while_it_is_loaded(hub, files, monkeypatch):
    hub.repos[NAME][OLDER] = dict(files)
    ask = minihub._ask_for_commit

    def ask_and_push(source, **options):
        commit = ask(source, **options)
        hub.branches["main"] = OLDER
        return commit

    monkeypatch.setattr(minihub, "_ask_for_commit", ask_and_push)
    with pytest.raises(ConnectionError, match="another commit"):
        BertForMaskedLM.from_pretrained(NAME)


# ----------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["with 'quotes' and $HOME", 'with "quotes" [1] ünï 模型'])
def test_the_command_that_converts_a_folder(hub, files, tmp_path, folder):
    """It is run as it stands in the message, and the folder then has a model and its tokenizer."""
    path = tmp_path / folder
    path.mkdir()
    for name in ("config.json", "vocab.txt"):
        (path / name).write_bytes(files[name])
    torch.save(safetensors.torch.load(files[WEIGHTS]), path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle") as caught:
        BertForMaskedLM.from_pretrained(path)
    run_advice(caught.value, tmp_path)
    assert_is(BertForMaskedLM.from_pretrained(path), files, tmp_path / "expected")
    assert load_tokenizer(path).encode("Paris [MASK]").ids == [2, 5, 4, 3]


@pytest.mark.slow
def test_the_command_that_converts_a_folder_of_shards(hub, files, tmp_path):
    path = tmp_path / "shards"
    path.mkdir()
    (path / "config.json").write_bytes(files["config.json"])
    tensors = list(safetensors.torch.load(files[WEIGHTS]).items())
    torch.save(dict(tensors[::2]), path / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(tensors[1::2]), path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(FileNotFoundError, match="pickle") as caught:
        BertForMaskedLM.from_pretrained(path)
    run_advice(caught.value, tmp_path)
    assert_is(BertForMaskedLM.from_pretrained(path), files, tmp_path / "expected")


def test_the_command_that_converts_a_repository(hub, files, tmp_path):
    repo = hub.repos[NAME][COMMIT]
    buffer = io.BytesIO()
    torch.save(safetensors.torch.load(repo.pop(WEIGHTS)), buffer)
    repo["pytorch_model.bin"] = buffer.getvalue()
    with pytest.raises(FileNotFoundError, match="pickle") as caught:
        BertForMaskedLM.from_pretrained(NAME)
    run_advice(caught.value, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_OFFLINE="0")
    assert_is(BertForMaskedLM.from_pretrained(tmp_path / "converted"), files, tmp_path / "expected")
    assert load_tokenizer(tmp_path / "converted").encode("Paris [MASK]").ids == [2, 5, 4, 3]


def run_advice(error, folder, **environment):
    command = re.search(r": (python -c.*)", str(error))[1]
    command = command.replace("python -c", f"{shlex.quote(sys.executable)} -c", 1)
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
