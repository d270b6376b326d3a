"""A small server on this machine that stands in for huggingface.co. Nothing here leaves the machine."""

import hashlib
import http.server
import json
import socket
import threading

import huggingface_hub
import torch
from huggingface_hub import constants
from safetensors.torch import load, save_file

from minibert import BertConfig
from minibert.checkpoint.names import from_transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "the", "capital", "of", "france", "##s", "."]
VOCABULARY = "\n".join(WORDS + [f"[unused{number}]" for number in range(99 - len(WORDS))]) + "\n"
COMMIT, OLDER = "c" * 40, "0" * 40
NAME, WEIGHTS, INDEX = "owner/name", "model.safetensors", "model.safetensors.index.json"
BERT = "google-bert/bert-base-uncased"
HTML = b"<!DOCTYPE html><html><body>Please log in to the airport's network</body></html>"


class Hub(http.server.ThreadingHTTPServer):
    """repos: name → commit or branch or tag → file name → bytes. What is in `spoilt` goes wrong on its way; `hiccups`
    are what the next questions get instead of an answer: a status, or "reset".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.branches, self.spoilt, self.asked, self.hiccups = {}, {"main": COMMIT}, {}, [], []
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
        repo, slash, rest = self.path[1:].partition("/resolve/")
        revision, _, filename = rest.partition("/")
        if not slash:
            return self.reply(404)
        hub.asked.append((self.command, repo, revision, filename))
        if hub.hiccups and (status := hub.hiccups.pop(0)):
            if status == "reset":
                return self.connection.shutdown(socket.SHUT_RDWR)
            return self.reply(status, headers={"Retry-After": "2"} if status == 429 else {})
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


def shard(files, folder):
    """The same checkpoint in two files and an index."""
    tensors = load(files[WEIGHTS])
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    result = {name: data for name, data in files.items() if name != WEIGHTS}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
        result[shard] = (folder / shard).read_bytes()
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    return {**result, INDEX: json.dumps({"weight_map": weight_map}).encode()}


def assert_is(model, files):
    """The weights are these, and so is the configuration."""
    expected = from_transformers(load(files[WEIGHTS]))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config == BertConfig.from_dict(json.loads(files["config.json"]))


def cached(cache, name):
    return sorted(path for path in cache.glob(f"models--*/snapshots/*/{name}") if path.exists())


def partial(cache):
    return [path for path in cache.rglob("*.incomplete") if path.is_file()]
