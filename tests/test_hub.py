"""Names on the hub. A small server on this machine stands in for huggingface.co; nothing here leaves the machine."""

import hashlib
import http.server
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import types

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert import hub as minihub

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 16,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "the", "capital", "of", "france", "##s", "."]
VOCABULARY = "\n".join(WORDS + [f"[unused{number}]" for number in range(99 - len(WORDS))]) + "\n"
COMMIT, OLDER = "c" * 40, "0" * 40
NAME, WEIGHTS, INDEX = "owner/name", "model.safetensors", "model.safetensors.index.json"
BERT = "google-bert/bert-base-uncased"
HTML = b"<!DOCTYPE html><html><body>Please log in to the airport's network</body></html>"


class Hub(http.server.ThreadingHTTPServer):
    """repos: name → commit or branch or tag → file name → bytes. What is in `spoilt` goes wrong on its way."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.branches, self.spoilt, self.asked = {}, {"main": COMMIT}, {}, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        if self.path.startswith("/api/models/"):
            return self.list()
        repo, slash, rest = self.path[1:].partition("/resolve/")
        revision, _, filename = rest.partition("/")
        if not slash:
            return self.reply(404)
        hub.asked.append((self.command, repo, revision, filename))
        commit = hub.branches.get(revision, revision)
        fault = hub.spoilt.get(filename)
        if fault == "portal":  # a network that answers everything itself
            return self.reply(200, HTML, {"Content-Type": "text/html"})
        if fault == "broken":
            return self.reply(500)
        if repo not in hub.repos:
            return self.reply(401, headers={"X-Error-Code": "RepoNotFound"})
        if commit not in hub.repos[repo]:
            return self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": commit}
        data = hub.repos[repo][commit].get(filename)
        if data is None:
            return self.reply(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = '"' + hashlib.md5(f"{repo}/{commit}/{filename}".encode()).hexdigest() + '"'
        if self.command == "GET" and fault == "html":
            data = HTML
        cut = len(data)
        if fault == "cut":  # some of it, and then no more, however often it is asked for the rest
            tries = sum(asked == (self.command, repo, revision, filename) for asked in hub.asked)
            cut = len(data) // 2 if tries == 1 else 0
        return self.reply(200, data, headers, cut)

    def list(self):
        """The files of a repository, as snapshot_download asks for them."""
        owner, name, kind, revision = self.path.partition("?")[0].removeprefix("/api/models/").split("/")[:4]
        commit = self.server.branches.get(revision, revision)
        files = self.server.repos[f"{owner}/{name}"][commit]
        if kind == "tree":
            listed = [{"type": "file", "path": name, "oid": "0", "size": len(data)} for name, data in files.items()]
            return self.reply(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        listed = [{"rfilename": filename} for filename in files]
        answer = {"id": f"{owner}/{name}", "sha": commit, "siblings": listed}
        return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def reply(self, status, data=b"", headers=None, cut=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of one checkpoint: name → bytes."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    (folder / "vocab.txt").write_text(VOCABULARY)
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def waited(monkeypatch):
    """The seconds that huggingface_hub wanted to sleep between its attempts. It does not get them."""
    sleeps = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": sleeps.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return sleeps


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no bundled checkpoints or folders that could answer in the hub's place."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(minihub, "BUNDLED", ())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    return tmp_path / "cache"


def use(monkeypatch, endpoint):
    # huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for key in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(key, "127.0.0.1")
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    huggingface_hub.close_session()  # its connections, and the proxies it knows


@pytest.fixture
def hub(files, cache, waited, monkeypatch):
    hub = Hub()
    hub.repos[NAME] = {COMMIT: dict(files)}
    use(monkeypatch, f"http://127.0.0.1:{hub.server_port}")
    yield hub
    hub.stop()
    huggingface_hub.close_session()


@pytest.fixture
def unreachable(cache, waited, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use(monkeypatch, f"http://127.0.0.1:{port}")


def assert_is(model, files, folder):
    folder.mkdir(exist_ok=True)
    for name in ("config.json", WEIGHTS):
        (folder / name).write_bytes(files[name])
    expected = BertForMaskedLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def cached(cache, name):
    return sorted(path for path in cache.glob(f"models--*/snapshots/*/{name}") if path.exists())


def partial(cache):
    return [path for path in cache.rglob("*.incomplete") if path.is_file()]


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


def shard(files, folder):
    """The same checkpoint in two files and an index."""
    from safetensors.torch import load, save_file

    tensors = load(files[WEIGHTS])
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    result = {name: data for name, data in files.items() if name != WEIGHTS}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
        result[shard] = (folder / shard).read_bytes()
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    return {**result, INDEX: json.dumps({"weight_map": weight_map}).encode()}


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
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"config\.json .*cannot be reached.*folder.*bundled.*HF_HOME"):
        BertForMaskedLM.from_pretrained(NAME)
    assert time.monotonic() - start + sum(waited) < 10  # it is asked once; huggingface_hub alone tries for 23 s


def test_a_hub_that_does_not_answer(hub, monkeypatch, waited):
    monkeypatch.setattr(minihub, "ASK_SECONDS", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        use(monkeypatch, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"owner/name: .*cannot be reached"):
            BertForMaskedLM.from_pretrained(NAME)
        assert time.monotonic() - start + sum(waited) < 5


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


@pytest.mark.parametrize("folder", ["plain", "with 'quotes' and $HOME", 'with "quotes" [1]', "ünï 模型"])
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
    command = str(error)[str(error).index("python -c") :].replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
    with pytest.raises(ValueError, match=r"SHA-256 is .*68d45e23.*cache has changed"):
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert cached(cache, WEIGHTS), "a file that cannot be downloaded again is not deleted"
    monkeypatch.setitem(minihub.PINNED_SHA256, (pinned, WEIGHTS), hashlib.sha256(files[WEIGHTS]).hexdigest())
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

    def ask_and_push(source):
        commit = ask(source)
        hub.branches["main"] = OLDER
        return commit

    monkeypatch.setattr(minihub, "_ask_for_commit", ask_and_push)
    with pytest.raises(ConnectionError, match="another commit"):
        BertForMaskedLM.from_pretrained(NAME)


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
def pinned(hub, files):
    revision = minihub.PINNED_REVISION[BERT]
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

    monkeypatch.setitem(minihub.PINNED_SHA256, (pinned, WEIGHTS), hashlib.sha256(files[WEIGHTS]).hexdigest())
    for name in ("bert-base-uncased", BERT):
        assert_is(BertForMaskedLM.from_pretrained(name), files, tmp_path / "expected")
    gets = [filename for command, _, _, filename in hub.asked if command == "GET"]
    assert sorted(gets) == ["config.json", WEIGHTS, WEIGHTS]  # the wrong bytes, then the right ones, once


def test_wrong_bytes_and_then_the_right_ones(hub, cache, pinned, files, monkeypatch, tmp_path):
    monkeypatch.setitem(minihub.PINNED_SHA256, (pinned, WEIGHTS), hashlib.sha256(files[WEIGHTS]).hexdigest())
    wrong = bytearray(files[WEIGHTS])
    wrong[-1] ^= 1
    hub.repos[BERT][pinned][WEIGHTS] = bytes(wrong)
    for _ in range(2):
        with pytest.raises(ValueError, match="SHA-256"):
            BertForMaskedLM.from_pretrained("bert-base-uncased")
    hub.repos[BERT][pinned][WEIGHTS] = files[WEIGHTS]
    assert_is(BertForMaskedLM.from_pretrained("bert-base-uncased"), files, tmp_path / "expected")


def test_cached_bytes_that_rot_are_found(hub, cache, pinned, files, monkeypatch, tmp_path):
    monkeypatch.setitem(minihub.PINNED_SHA256, (pinned, WEIGHTS), hashlib.sha256(files[WEIGHTS]).hexdigest())
    BertForMaskedLM.from_pretrained("bert-base-uncased")
    blob = cached(cache, WEIGHTS)[0].resolve()
    blob.write_bytes(files[WEIGHTS][:-1] + b"\xff")
    with pytest.raises(ValueError, match="SHA-256"):
        BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert_is(BertForMaskedLM.from_pretrained("bert-base-uncased"), files, tmp_path / "expected")


def test_the_vocabulary_is_pinned_too(hub, cache, pinned, files, monkeypatch):
    del hub.repos[BERT][pinned]["tokenizer.json"]
    with pytest.raises(ValueError, match=r"vocab\.txt: SHA-256"):
        load_tokenizer("bert-base-uncased")
    assert cached(cache, "vocab.txt") == []
    monkeypatch.setitem(minihub.PINNED_SHA256, (pinned, "vocab.txt"), hashlib.sha256(files["vocab.txt"]).hexdigest())
    assert load_tokenizer("bert-base-uncased").encode("Paris").ids == [2, 5, 3]


def test_another_revision_is_the_users_choice(hub, pinned, files, tmp_path):
    hub.repos[BERT][COMMIT] = dict(files)
    model = BertForMaskedLM.from_pretrained("bert-base-uncased", revision="main")
    assert_is(model, files, tmp_path / "expected")
    assert {revision for _, _, revision, _ in hub.asked} == {"main"}
