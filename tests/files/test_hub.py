"""Names on the hub, beside a small server that stands in for it: loading, offline, what is not there, bad downloads;
what other programs have left in its cache; and the command that converts a pickle.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

import huggingface_hub
import pytest
import safetensors.torch
import torch
from checkpoints import SIZES
from hub_server import BERT, COMMIT, NAME, OLDER, WEIGHTS, assert_is, cached, partial, shard
from huggingface_hub import constants

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.checkpoint import hub as minihub

# -------------------------------------------------------------------------------------------------------------- loading


def test_load_by_name(hub, cache, files):
    for _ in range(2):
        model = BertForMaskedLM.from_pretrained(NAME)
        assert_is(model, files)
    assert sorted(name for command, _, _, name in hub.asked if command == "GET") == ["config.json", WEIGHTS]
    path = cache / "models--owner--name" / "snapshots" / COMMIT / WEIGHTS  # where every other program looks, too
    assert (model.load_report.files, model.load_report.name, model.load_report.commit) == ((path,), NAME, COMMIT)
    assert model.load_report.sha256 == {WEIGHTS: hashlib.sha256(files[WEIGHTS]).hexdigest()}
    assert load_tokenizer(NAME).encode("Paris is the [MASK] of France.").ids == [2, 5, 6, 7, 4, 9, 10, 12, 3]
    assert {revision for _, _, revision, _ in hub.asked} == {"main"}


def test_revision(hub, files, tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "older")
    older = {path.name: path.read_bytes() for path in (tmp_path / "older").iterdir()}
    hub.repos[NAME][OLDER] = older
    hub.branches["v1"] = OLDER
    for revision, expected in (("v1", older), (OLDER, older), (COMMIT, files), (None, files)):
        assert_is(BertForMaskedLM.from_pretrained(NAME, revision=revision), expected)


def test_names_that_are_asked_for_and_paths_that_are_not(hub, files):
    hub.repos["owner/bert.v1"] = hub.repos["google-bert/bert-base-chinese"] = {COMMIT: files}
    for name in ("owner/bert.v1", "bert-base-chinese"):
        assert BertForMaskedLM.from_pretrained(name).load_report.commit == COMMIT
    assert {repo for _, repo, _, _ in hub.asked} == hub.repos.keys() - {NAME}
    hub.asked.clear()
    os.mkdir("here")
    for name in ("here/bert", "nowhere/x.bin", "nowhere/vocab.txt", "./a/b", "a/b/c", "/a", "a", "", "a/../b"):
        for load in (BertForMaskedLM.from_pretrained, load_tokenizer, BertConfig.from_pretrained):
            with pytest.raises(FileNotFoundError, match="is no folder"):
                load(name)
    assert hub.asked == []


# -------------------------------------------------------------------------------------------------------------- offline


def load_both(**options):
    assert load_tokenizer(NAME, **options).encode("Paris").ids == [2, 5, 3]
    return BertForMaskedLM.from_pretrained(NAME, **options)


@pytest.mark.parametrize("shape", ["tokenizer.json and one file", "vocab.txt and shards"])
def test_a_second_load_from_the_cache(hub, files, tmp_path, monkeypatch, shape):
    if shape == "vocab.txt and shards":
        hub.repos[NAME][COMMIT] = shard(files, tmp_path)
        del hub.repos[NAME][COMMIT]["tokenizer.json"]
    model = load_both()
    assert_is(model, files)
    assert len(model.load_report.files) == (2 if "shards" in shape else 1)
    hub.asked.clear()
    assert_is(load_both(local_files_only=True), files)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_is(load_both(), files)
    assert hub.asked == []
    hub.stop()
    huggingface_hub.close_session()
    assert_is(load_both(), files)


def test_offline_without_the_file(hub, monkeypatch):
    hub.spoilt[WEIGHTS] = "broken"
    with pytest.raises(ConnectionError):
        BertForMaskedLM.from_pretrained(NAME)
    hub.asked.clear()
    for offline in (False, True):  # by the argument, by the environment
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for name, load in ((NAME, BertForMaskedLM.from_pretrained), (NAME, load_tokenizer), ("a/b", load_tokenizer)):
            with pytest.raises(FileNotFoundError, match=rf"{name}: .*cache"):  # and not that the hub has no such file
                load(name, local_files_only=not offline)
    assert hub.asked == []


def test_no_connection(unreachable, waited):
    with pytest.raises(ConnectionError, match=r"config\.json: .*cannot be reached.*folder.*bundled.*HF_HOME"):
        BertForMaskedLM.from_pretrained(NAME)
    assert sum(waited) < 30  # huggingface_hub's five more tries


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    """An answer is awaited for seconds: what is in the cache is read soon, and the error comes within a minute."""
    asked = []

    def deaf(url, *, timeout, retry_on_errors=False, **_):
        asked.append(timeout * (6 if retry_on_errors else 1))
        raise TimeoutError("no answer")

    ask = huggingface_hub.get_hf_file_metadata
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", deaf)
    with pytest.raises(ConnectionError, match=r"owner/name: .*cannot be reached"):
        BertForMaskedLM.from_pretrained(NAME)
    for how in (ask, deaf):
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", how)
        BertForMaskedLM.from_pretrained(NAME)
    assert [seconds < limit for seconds, limit in zip(asked, (60, 10), strict=True)] == [True, True]


# How many questions are answered first: the one for the commit, those for config.json (two), those for the weights.
HICCUPS = [(0, [429]), (0, [503, "reset", 500]), (1, [503, "reset", 500]), (3, [429]), (3, ["reset"])]


@pytest.mark.parametrize(("answered", "hiccups"), HICCUPS, ids=str)
def test_a_hiccup_of_the_hub_is_not_the_end(hub, files, waited, answered, hiccups):
    if answered == 0:
        load_tokenizer(NAME)  # what it leaves in the cache is no model
    hub.hiccups[:] = [None] * answered + hiccups
    assert_is(BertForMaskedLM.from_pretrained(NAME), files)
    assert hub.hiccups == []
    if answered == 0 and hiccups == [429]:
        assert waited[0] >= 2  # as long as the hub asked for


# ---------------------------------------------------------------------------------------------------- what is not there


def test_what_the_hub_does_not_have(hub):
    for load in (BertForMaskedLM.from_pretrained, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="no repository owner/nobody"):
            load("owner/nobody")
        with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
            load(NAME, revision="v9")
    del hub.repos[NAME][COMMIT]["config.json"]
    with pytest.raises(FileNotFoundError, match=r"owner/name: there is no config\.json"):
        BertForMaskedLM.from_pretrained(NAME)
    assert load_tokenizer(NAME).encode("Paris").ids == [2, 5, 3]  # a repository of tokenizers
    for name in ("tokenizer.json", "vocab.txt"):
        del hub.repos[NAME][COMMIT][name]
    hub.repos["owner/other"] = hub.repos[NAME]
    with pytest.raises(FileNotFoundError, match=r"owner/other: .*tokenizer\.json.*vocab\.txt"):
        load_tokenizer("owner/other")


# -------------------------------------------------------------------------------------------------------- bad downloads


@pytest.mark.parametrize("fault", ["portal", "html", "cut", "broken"])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_download_that_goes_wrong(hub, cache, files, name, fault):
    """portal: every answer is a page. html: the hub has said what will come, and a page comes."""
    hub.spoilt[name] = fault
    with pytest.raises(ConnectionError, match=f"owner/name: {name}"):
        BertForMaskedLM.from_pretrained(NAME)
    assert cached(cache, name) == []
    assert partial(cache) == []
    with pytest.raises(FileNotFoundError):
        BertForMaskedLM.from_pretrained(NAME, local_files_only=True)
    hub.spoilt.clear()
    assert_is(BertForMaskedLM.from_pretrained(NAME), files)


def test_a_commit_that_changes_while_it_is_loaded(hub, files, monkeypatch):
    hub.repos[NAME][OLDER] = files
    ask = minihub._ask_for_commit

    def ask_and_push(source, **options):
        commit = ask(source, **options)
        hub.branches["main"] = OLDER
        return commit

    monkeypatch.setattr(minihub, "_ask_for_commit", ask_and_push)
    with pytest.raises(ConnectionError, match="another commit"):
        BertForMaskedLM.from_pretrained(NAME)


# ------------------------------------------------------------------------------------------------ the pinned checkpoint


@pytest.fixture
def pinned(hub, files, monkeypatch):
    """Its revision, at which the hub has other files than those that are known."""
    revision = minihub.PINNED_REVISION[BERT]
    monkeypatch.setattr("minibert.config.PINNED", BertConfig(**SIZES))
    hub.repos[BERT] = {revision: dict(files), COMMIT: {}}
    return revision


def now_known(monkeypatch, files, *names):
    for name in names:
        monkeypatch.setitem(minihub.PINNED_SHA256, name, hashlib.sha256(files[name]).hexdigest())


def test_bert_base_uncased_is_pinned(hub, cache, pinned, files, monkeypatch):
    with pytest.raises(ValueError, match=r"SHA-256 is .*bert-base-uncased.*68d45e23.*deleted") as caught:
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert hashlib.sha256(files[WEIGHTS]).hexdigest() in str(caught.value)
    assert str(cache) in str(caught.value)
    assert {(repo, revision) for _, repo, revision, _ in hub.asked} == {(BERT, pinned)}
    assert [path.read_bytes() for path in cache.glob("models--*/blobs/*")] == [files["config.json"]]
    now_known(monkeypatch, files, WEIGHTS)
    for name in ("bert-base-uncased", BERT):
        assert_is(BertForMaskedLM.from_pretrained(name), files)
    gets = [filename for command, _, _, filename in hub.asked if command == "GET"]
    assert sorted(gets) == ["config.json", WEIGHTS, WEIGHTS]  # the wrong bytes, then the right ones, once
    blob = cached(cache, WEIGHTS)[0].resolve()
    blob.write_bytes(files[WEIGHTS][:-1] + b"\xff")  # the disk has lost a bit
    with pytest.raises(ValueError, match="SHA-256"):
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert_is(BertForMaskedLM.from_pretrained("bert-base-uncased"), files)


def test_of_the_pinned_commit_nothing_is_read_unchecked(hub, cache, pinned, files, monkeypatch):
    other = json.loads(files["tokenizer.json"])
    other["model"]["vocab"] = dict(zip(other["model"]["vocab"], range(98, -1, -1), strict=True))
    hub.repos[BERT][pinned]["tokenizer.json"] = json.dumps(other).encode()
    hub.repos[BERT][pinned]["tokenizer_config.json"] = b'{"do_lower_case": false}'
    with pytest.raises(ValueError, match=r"vocab\.txt: SHA-256"):
        load_tokenizer("bert-base-uncased")
    assert cached(cache, "vocab.txt") == []
    now_known(monkeypatch, files, "vocab.txt")
    assert load_tokenizer("bert-base-uncased").encode("Paris").ids == [2, 5, 3]
    assert load_tokenizer(BERT, revision=pinned).encode("Paris").ids == [2, 5, 3]
    monkeypatch.setattr("minibert.config.PINNED", BertConfig())
    for load in (BertForMaskedLM.from_pretrained, BertConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json: bert-base-uncased at .*vocab_size 99.*30522"):
            load("bert-base-uncased")


def test_another_revision_is_the_users_choice(hub, pinned, files):
    hub.repos[BERT][COMMIT] = files
    assert_is(BertForMaskedLM.from_pretrained("bert-base-uncased", revision="main"), files)
    assert {revision for _, _, revision, _ in hub.asked} == {"main"}


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
