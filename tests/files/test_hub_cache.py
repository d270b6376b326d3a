"""What other programs have left in the hub's cache, and the command that converts a pickle."""

import re
import shlex
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from checkpoints import SIZES
from hub_server import BERT, COMMIT, NAME, OLDER, WEIGHTS, assert_is, cached
from huggingface_hub import constants
from test_hub import now_known

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


@pytest.mark.parametrize("owner", ["", "google-bert/"])
def test_googles_short_names(alone, cache, files, owner, recwarn):
    for name in ("bert-base-uncased", "bert-base-multilingual-cased"):
        put_in_cache(cache, owner + name, OLDER, files)
        model = BertForMaskedLM.from_pretrained(name)
        assert_is(model, files)
        assert model.load_report.commit == OLDER
        assert load_tokenizer(name).encode("Paris").ids == [2, 5, 3]
    said = [str(each.message) for each in recwarn if "minibert" in str(each.message)]
    expected = f"bert-base-uncased: .*commit {OLDER}.*tested with {minihub.PINNED_REVISION[BERT]}"
    assert said
    assert all(re.match(expected, each) for each in said)


def test_the_pinned_commit_under_the_short_name_is_checked(alone, cache, files, monkeypatch):
    pinned = minihub.PINNED_REVISION[BERT]
    put_in_cache(cache, "bert-base-uncased", pinned, files, ref="")
    monkeypatch.setattr("minibert.config.PINNED", BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"SHA-256 is .*68d45e23.*cache has changed"):
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert cached(cache, WEIGHTS), "a file that cannot be downloaded again is not deleted"
    now_known(monkeypatch, files, WEIGHTS)
    model = BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert_is(model, files)
    assert model.load_report.commit == pinned


def test_a_revision_that_was_asked_for_is_no_other(alone, cache, files):
    put_in_cache(cache, BERT, OLDER, files)
    with pytest.raises((FileNotFoundError, ConnectionError)):
        BertForMaskedLM.from_pretrained("bert-base-uncased", revision=COMMIT)
    for revision in (OLDER, "main"):
        assert BertForMaskedLM.from_pretrained(BERT, revision=revision).load_report.commit == OLDER


# ----------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.slow
def test_the_command_that_converts_a_folder(files, tmp_path):
    """It is run as it stands in the message."""
    path = tmp_path / "with 'quotes' and $HOME [1] ünï 模型"
    path.mkdir()
    for name in ("config.json", "vocab.txt"):
        (path / name).write_bytes(files[name])
    tensors = list(safetensors.torch.load(files[WEIGHTS]).items())
    for number in (0, 1):
        torch.save(dict(tensors[number::2]), path / f"pytorch_model-0000{number + 1}-of-00002.bin")
    with pytest.raises(FileNotFoundError, match="pickle") as caught:
        BertForMaskedLM.from_pretrained(path)
    command = re.search(r": python (-c.*)", str(caught.value))[1]
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, cwd=tmp_path, check=True)
    assert_is(BertForMaskedLM.from_pretrained(path), files)


def test_the_command_that_converts_a_repository_gets_it_first(hub):
    repo = hub.repos[NAME][COMMIT]
    repo["pytorch_model.bin"] = repo.pop(WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"owner/name: .*pickle") as caught:
        BertForMaskedLM.from_pretrained(NAME)
    assert "pytorch_model.bin" not in {filename for *_, filename in hub.asked}
    program = shlex.split(re.search(r": python -c (.*)", str(caught.value))[1])[0]
    fetched = {}
    fetch = program.partition("; import glob")[0].replace("from huggingface_hub import snapshot_download; ", "")
    exec(fetch, {"snapshot_download": lambda name, **options: fetched.update(options, name=name)})
    assert fetched.pop("allow_patterns") == ["*.json", "*.txt", "pytorch_model*.bin"]
    assert fetched == {"name": NAME, "revision": COMMIT, "local_dir": "converted"}
    assert "d = 'converted'" in program
