"""The checkpoint that the tests of files change; the hub, its cache, and what is wrong with the network."""

import json
import shutil
import socket
import time
import types
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import transformers
from checkpoints import SIZES, WEIGHTS, random_weights
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from minibert import BertForMaskedLM
from minibert.checkpoint import hub as minihub
from minibert.tokenizer import from_vocabulary


@pytest.fixture(scope="session")
def theirs():
    return random_weights(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)))


@pytest.fixture(scope="session")
def good(theirs, tmp_path_factory):
    """A folder that nobody may change."""
    folder = tmp_path_factory.mktemp("good")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


@pytest.fixture
def tensors(good):
    return load_file(good / WEIGHTS)


@pytest.fixture(scope="session")
def ours(good):
    return BertForMaskedLM.from_pretrained(good)


@pytest.fixture
def sharded(theirs, tmp_path):
    folder = tmp_path / "sharded"
    theirs.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / WEIGHTS).exists()
    return folder


@pytest.fixture(scope="session")
def files(good, ours):
    """The files of one checkpoint: name → bytes."""
    tokenizer = from_vocabulary(hub_server.VOCABULARY.split())
    return {
        WEIGHTS: (good / WEIGHTS).read_bytes(),
        "config.json": json.dumps(ours.config.to_dict()).encode(),
        "vocab.txt": hub_server.VOCABULARY.encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
    }


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


@pytest.fixture
def hub(files, cache, waited, monkeypatch):
    hub = hub_server.Hub()
    hub.repos[hub_server.NAME] = {hub_server.COMMIT: dict(files)}
    hub_server.use(monkeypatch, f"http://127.0.0.1:{hub.server_port}")
    yield hub
    hub.stop()
    huggingface_hub.close_session()


@pytest.fixture
def unreachable(cache, waited, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hub_server.use(monkeypatch, f"http://127.0.0.1:{port}")
