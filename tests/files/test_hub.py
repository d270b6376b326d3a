"""Names on the hub, beside a small server that stands in for it: loading, offline, what is not there, bad downloads."""

import hashlib
import json

import huggingface_hub
import pytest
import torch
from hub_server import (
    BERT,
    COMMIT,
    HTML,
    NAME,
    OLDER,
    SIZES,
    WEIGHTS,
    assert_is,
    cached,
    partial,
    shard,
)
from huggingface_hub import constants

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.checkpoint import hub as minihub

# -------------------------------------------------------------------------------------------------------------- loading


def test_load_by_name(hub, cache, files, tmp_path):
    model = BertForMaskedLM.from_pretrained(NAME)
    assert_is(model, files, tmp_path / "expected")
    path = cache / "models--owner--name" / "snapshots" / COMMIT / WEIGHTS  # where every other program looks, too
    assert model.load_report.files == (path,)
    assert model.load_report.name == NAME
    assert model.load_report.sha256 == {WEIGHTS: hashlib.sha256(files[WEIGHTS]).hexdigest()}
    ids = load_tokenizer(NAME).encode("Paris is the [MASK] of France.").ids
    assert ids == [2, 5, 6, 7, 4, 9, 10, 12, 3]
    assert {revision for _, _, revision, _ in hub.asked} == {"main"}


def test_tokenizer_from_a_vocabulary(hub, files):
    del hub.repos[NAME][COMMIT]["tokenizer.json"]
    assert load_tokenizer(NAME).encode("Paris [MASK]").ids == [2, 5, 4, 3]


def test_each_file_is_downloaded_once(hub):
    for _ in range(2):
        BertForMaskedLM.from_pretrained(NAME)
    gets = [filename for command, _, _, filename in hub.asked if command == "GET"]
    assert sorted(gets) == ["config.json", WEIGHTS]


def test_revision(hub, files, tmp_path):
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "older")
    older = {path.name: path.read_bytes() for path in (tmp_path / "older").iterdir()}
    hub.repos[NAME][OLDER] = older
    hub.branches["v1"] = OLDER
    for revision, expected in (("v1", older), (OLDER, older), (COMMIT, files), (None, files)):
        assert_is(BertForMaskedLM.from_pretrained(NAME, revision=revision), expected, tmp_path / "expected")


def test_sharded(hub, files, tmp_path):
    hub.repos[NAME][COMMIT] = shard(files, tmp_path)
    model = BertForMaskedLM.from_pretrained(NAME)
    assert_is(model, files, tmp_path / "expected")
    assert len(model.load_report.files) == 2


# -------------------------------------------------------------------------------------------------------------- offline


def load_both(**options):
    load_tokenizer(NAME, **options)
    return BertForMaskedLM.from_pretrained(NAME, **options)


@pytest.fixture(params=["tokenizer.json and one file", "vocab.txt and shards"])
def filled(request, hub, files, tmp_path):
    """The hub has been asked for everything once."""
    if request.param == "vocab.txt and shards":
        hub.repos[NAME][COMMIT] = shard(files, tmp_path)
        del hub.repos[NAME][COMMIT]["tokenizer.json"]
    load_both()
    hub.asked.clear()
    return hub


def test_second_load_from_the_cache_alone(filled, files, tmp_path):
    assert_is(load_both(local_files_only=True), files, tmp_path / "expected")
    assert filled.asked == []


def test_second_load_in_offline_mode(filled, files, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_is(load_both(), files, tmp_path / "expected")
    assert filled.asked == []


def test_second_load_when_the_hub_is_gone(filled, files, tmp_path):
    filled.stop()
    huggingface_hub.close_session()
    assert_is(load_both(), files, tmp_path / "expected")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_with_an_empty_cache(hub, monkeypatch, how):
    options = {"local_files_only": True} if how == "argument" else {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    for load in (BertForMaskedLM.from_pretrained, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"owner/name: .*cache"):  # and not that the hub has no such file
            load(NAME, **options)
    assert hub.asked == []


def test_offline_with_a_cache_that_has_no_weights(hub, monkeypatch):
    hub.spoilt[WEIGHTS] = "broken"
    with pytest.raises(ConnectionError):
        BertForMaskedLM.from_pretrained(NAME)
    with pytest.raises(FileNotFoundError, match="cache"):
        BertForMaskedLM.from_pretrained(NAME, local_files_only=True)


def test_no_connection(unreachable, waited):
    with pytest.raises(ConnectionError, match=r"config\.json .*cannot be reached.*folder.*bundled.*HF_HOME"):
        BertForMaskedLM.from_pretrained(NAME)
    assert sum(waited) < 30  # huggingface_hub's five more tries


def test_a_hub_that_does_not_answer(hub, files, monkeypatch):
    """An answer is awaited for seconds: what is in the cache is read soon, and the error comes within a minute."""
    asked = []

    def deaf(url, *, timeout, retry_on_errors=False, **_):
        asked.append(timeout * (6 if retry_on_errors else 1))
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_hf_file_metadata", deaf)
        with pytest.raises(ConnectionError, match=r"owner/name: .*cannot be reached"):
            BertForMaskedLM.from_pretrained(NAME)
    BertForMaskedLM.from_pretrained(NAME)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", deaf)
    BertForMaskedLM.from_pretrained(NAME)
    assert len(asked) == 2
    assert asked[0] < 60
    assert asked[1] < 10


@pytest.mark.parametrize("hiccups", [[429], [500], [503], ["reset"], [503, "reset", 500]], ids=str)
@pytest.mark.parametrize("answered", [0, 1, 3], ids=["which commit", "config.json", "weights"])
def test_a_hiccup_of_the_hub_is_not_the_end(hub, files, tmp_path, waited, hiccups, answered):
    hub.hiccups[:] = [None] * answered + hiccups
    if answered == 2:
        hub.hiccups[:] = [
            None,
            None,
            None,
            *hiccups,
        ]  # the question for the weights. (Asked for their bytes: see below)
    assert_is(BertForMaskedLM.from_pretrained(NAME), files, tmp_path / "expected")
    assert load_tokenizer(NAME).encode("Paris").ids == [2, 5, 3]
    assert hub.hiccups == []
    if hiccups == [429] and answered == 0:
        assert waited[0] >= 2  # as long as the hub asked for


@pytest.mark.parametrize(
    "name",
    ["nowhere/x.bin", "nowhere/vocab.txt", "nowhere/model.safetensors", "./a/b", "a/b/c", "/a", "a", "", "a/../b"],
)
def test_a_path_that_is_no_folder_asks_nobody(hub, name):
    for load in (BertForMaskedLM.from_pretrained, load_tokenizer, BertConfig.from_pretrained):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            load(name)
    assert hub.asked == []


def test_a_name_with_a_dot_is_asked_for(hub, files):
    hub.repos["owner/bert.v1"] = {COMMIT: dict(files)}
    assert BertForMaskedLM.from_pretrained("owner/bert.v1").load_report.commit == COMMIT


def test_hub_that_is_broken(hub, waited):
    hub.spoilt["config.json"] = "broken"
    with pytest.raises(ConnectionError, match=r"owner/name: config\.json .*500"):
        BertForMaskedLM.from_pretrained(NAME)


# ---------------------------------------------------------------------------------------------------- what is not there


def test_no_such_repository(hub):
    for load in (BertForMaskedLM.from_pretrained, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="no repository owner/nobody"):
            load("owner/nobody")


def test_no_such_revision(hub):
    with pytest.raises(FileNotFoundError, match="no revision 'v9' of owner/name"):
        BertForMaskedLM.from_pretrained(NAME, revision="v9")


def test_no_such_file(hub):
    del hub.repos[NAME][COMMIT]["config.json"]
    with pytest.raises(FileNotFoundError, match=r"owner/name: there is no config\.json"):
        BertForMaskedLM.from_pretrained(NAME)
    for name in ("tokenizer.json", "vocab.txt"):
        del hub.repos[NAME][COMMIT][name]
    with pytest.raises(FileNotFoundError, match=r"owner/name: .*tokenizer\.json.*vocab\.txt"):
        load_tokenizer(NAME)


def test_only_a_pickle(hub):
    hub.repos[NAME][COMMIT]["pytorch_model.bin"] = hub.repos[NAME][COMMIT].pop(WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"owner/name: .*pickle.*[Cc]onvert.*'owner/name'.*save_file"):
        BertForMaskedLM.from_pretrained(NAME)
    assert "pytorch_model.bin" not in {filename for *_, filename in hub.asked}


# -------------------------------------------------------------------------------------------------------- bad downloads


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_download_that_is_cut_off(hub, cache, files, tmp_path, name):
    hub.spoilt[name] = "cut"
    with pytest.raises(ConnectionError, match=f"owner/name: {name}"):
        BertForMaskedLM.from_pretrained(NAME)
    assert cached(cache, name) == []
    assert partial(cache) == []
    with pytest.raises(FileNotFoundError):
        BertForMaskedLM.from_pretrained(NAME, local_files_only=True)
    hub.spoilt.clear()
    assert_is(BertForMaskedLM.from_pretrained(NAME), files, tmp_path / "expected")


@pytest.mark.parametrize("fault", ["portal", "html"])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_html_page_instead_of_the_file(hub, cache, files, tmp_path, name, fault):
    """portal: every answer is a page. html: the hub has said what will come, and a page comes."""
    hub.spoilt[name] = fault
    with pytest.raises(ConnectionError, match=f"owner/name: {name}"):
        BertForMaskedLM.from_pretrained(NAME)
    assert cached(cache, name) == []
    assert partial(cache) == []
    hub.spoilt.clear()
    assert_is(BertForMaskedLM.from_pretrained(NAME), files, tmp_path / "expected")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_html_page_that_the_hub_itself_holds(hub, cache, name):
    hub.repos[NAME][COMMIT][name] = HTML
    for _ in range(2):
        with pytest.raises(ValueError, match="HTML page") as caught:
            BertForMaskedLM.from_pretrained(NAME)
        assert str(cached(cache, name)[0]) in str(caught.value)  # the file to look at


# ------------------------------------------------------------------------------------------------ the pinned checkpoint


@pytest.fixture
def pinned(hub, files, monkeypatch):
    revision = minihub.PINNED_REVISION[BERT]
    monkeypatch.setattr("minibert.config.PINNED", BertConfig(**SIZES))
    hub.repos[BERT] = {revision: dict(files), COMMIT: {}}
    return revision


def test_bert_base_uncased_is_pinned(hub, cache, pinned, files, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"SHA-256 is .*bert-base-uncased.*68d45e23.*deleted") as caught:
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert hashlib.sha256(files[WEIGHTS]).hexdigest() in str(caught.value)
    assert str(cache) in str(caught.value)
    assert {(repo, revision) for _, repo, revision, _ in hub.asked} == {(BERT, pinned)}
    assert cached(cache, WEIGHTS) == []
    blobs = [path.read_bytes() for path in cache.glob("models--*/blobs/*")]
    assert blobs == [files["config.json"]]

    monkeypatch.setitem(minihub.PINNED_SHA256, WEIGHTS, hashlib.sha256(files[WEIGHTS]).hexdigest())
    for name in ("bert-base-uncased", BERT):
        assert_is(BertForMaskedLM.from_pretrained(name), files, tmp_path / "expected")
    gets = [filename for command, _, _, filename in hub.asked if command == "GET"]
    assert sorted(gets) == ["config.json", WEIGHTS, WEIGHTS]  # the wrong bytes, then the right ones, once


def test_wrong_bytes_and_then_the_right_ones(hub, cache, pinned, files, monkeypatch, tmp_path):
    monkeypatch.setitem(minihub.PINNED_SHA256, WEIGHTS, hashlib.sha256(files[WEIGHTS]).hexdigest())
    wrong = bytearray(files[WEIGHTS])
    wrong[-1] ^= 1
    hub.repos[BERT][pinned][WEIGHTS] = bytes(wrong)
    for _ in range(2):
        with pytest.raises(ValueError, match="SHA-256"):
            BertForMaskedLM.from_pretrained("bert-base-uncased")
    hub.repos[BERT][pinned][WEIGHTS] = files[WEIGHTS]
    assert_is(BertForMaskedLM.from_pretrained("bert-base-uncased"), files, tmp_path / "expected")


def test_cached_bytes_that_rot_are_found(hub, cache, pinned, files, monkeypatch, tmp_path):
    monkeypatch.setitem(minihub.PINNED_SHA256, WEIGHTS, hashlib.sha256(files[WEIGHTS]).hexdigest())
    BertForMaskedLM.from_pretrained("bert-base-uncased")
    blob = cached(cache, WEIGHTS)[0].resolve()
    blob.write_bytes(files[WEIGHTS][:-1] + b"\xff")
    with pytest.raises(ValueError, match="SHA-256"):
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert_is(BertForMaskedLM.from_pretrained("bert-base-uncased"), files, tmp_path / "expected")


def test_of_the_pinned_commit_nothing_is_read_unchecked(hub, cache, pinned, files, monkeypatch):
    other = json.loads(files["tokenizer.json"])
    other["model"]["vocab"] = dict(zip(other["model"]["vocab"], range(98, -1, -1), strict=True))
    hub.repos[BERT][pinned]["tokenizer.json"] = json.dumps(other).encode()
    hub.repos[BERT][pinned]["tokenizer_config.json"] = b'{"do_lower_case": false}'
    with pytest.raises(ValueError, match=r"vocab\.txt: SHA-256"):
        load_tokenizer("bert-base-uncased")
    assert cached(cache, "vocab.txt") == []
    monkeypatch.setitem(minihub.PINNED_SHA256, "vocab.txt", hashlib.sha256(files["vocab.txt"]).hexdigest())
    assert load_tokenizer("bert-base-uncased").encode("Paris").ids == [2, 5, 3]
    assert load_tokenizer(BERT, revision=pinned).encode("Paris").ids == [2, 5, 3]
    monkeypatch.setattr("minibert.config.PINNED", BertConfig())
    for load in (BertForMaskedLM.from_pretrained, BertConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json: bert-base-uncased at .*vocab_size 99.*30522"):
            load("bert-base-uncased")


def test_another_revision_is_the_users_choice(hub, pinned, files, tmp_path):
    hub.repos[BERT][COMMIT] = dict(files)
    model = BertForMaskedLM.from_pretrained("bert-base-uncased", revision="main")
    assert_is(model, files, tmp_path / "expected")
    assert {revision for _, _, revision, _ in hub.asked} == {"main"}
