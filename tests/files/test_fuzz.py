"""Damaged files: whatever bytes are in a file, reading it gives what it should, or one of our errors, quickly."""

import gzip
import json
import re
import struct
import time
import warnings

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.cli.texts import read_pairs
from minibert.parity import trace
from minibert.parity.check import read_tokenizer
from minibert.tokenizer import encode, from_vocabulary, special_ids
from minibert.trace import TraceFile
from minibert.trace.recorder import read_ids
from minibert.trace.stores import read_names
from minibert.training import saving
from minibert.training.settings import Settings
from minibert.training.step import make_optimizer
from minibert.training.tokens import token_files

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "café"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = (ValueError, OSError)  # what the command line turns into one line; OSError: no such file
SECONDS = 1.0  # for one folder
NASTY = ["null", "true", "-1", "0", "1e400", "99999999999999999999", "2147483647", "0.5", '""', "[]", "{}", '"\\ud800"']
NASTY += ['"[MASK]"', '{"content": 5}', "[[[]]]", '"a b"', "NaN", '"\\u0000"', "4294967296"]
SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8)
CONFIG = BertConfig(vocab_size=12, **SIZES)
TEXT = "the cat\nthe cats\n" + "\n".join(f"cat {number}" for number in range(9))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of everything that is read, a whole one, in which no file makes another one needless: path → bytes."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    from_vocabulary(TOKENS).save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    listed = {"4": {"content": "[MASK]", **flags, "special": True}, "9": {"content": "[E]", **flags, "special": True}}
    said = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "mask_token": "[MASK]"}
    header = json.loads(split_header((folder / WEIGHTS).read_bytes())[0])
    objects = {
        "tokenizer_config.json": {**said, "added_tokens_decoder": listed, "extra_special_tokens": ["[E]"]},
        "special_tokens_map.json": {"mask_token": {"content": "[MASK]", **flags}, "cls_token": "[CLS]"},
        "added_tokens.json": {"[E]": 9, "covid19": 10},
        INDEX: {"metadata": {}, "weight_map": {name: "one.safetensors" for name in header if name != "__metadata__"}},
        ".config.json.next": {"weights_sha256": "0" * 64, "config": CONFIG.to_dict()},
        "ids.json": {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 0]]},
        "names.json": {"x": "logits", "l.{N}.q": "layers.{N}.query", "y": None},
    }
    for name, values in objects.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "one.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / "pairs.tsv").write_text("the cat\ta cat\nthe cats\ta cats\n")
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    given = trace(model, torch.tensor([[1, 2, 3]]))
    given.save(folder / "trace.safetensors")
    few = {name: given.tensors[name].numpy() for name in ("input_ids", "embeddings.sum", "logits")}
    numpy.savez(folder / "trace.npz", metadata=json.dumps(given.metadata), **few)
    (folder / "arrays").mkdir()
    for name, array in few.items():
        numpy.save(folder / "arrays" / f"{name}.npy", array)
    (folder / "arrays" / "metadata.json").write_text(json.dumps(given.metadata))
    optimizer = make_optimizer(model, Settings(steps=2))
    model.train()(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    saving.save_checkpoint(folder, model, from_vocabulary(TOKENS), optimizer, saving.Progress(1))
    saving.open_run(folder, RUN)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 0.5}) + "\n" for n in range(3)))
    token_files([str(folder / "text.txt")], from_vocabulary(TOKENS), folder / "tokens", workers=1)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def split_header(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return raw[8 : 8 + length], raw[8 + length :]


def damage(raw, draw):
    """Other bytes: some changed, cut, doubled or put in; or, in JSON, another value in the place of one."""
    kind = draw.choice(["bytes", "cut", "double", "insert", "value", "value", "value", "key"])
    if kind in ("value", "key") and (places := json_places(raw, kind)):
        start, end = draw.choice(places)
        new = draw.choice(NASTY) if kind == "value" else json.dumps(draw.choice([*TOKENS, "id", "type", "vocab_size"]))
        return raw[:start] + new.encode() + raw[end:]
    raw = bytearray(raw)
    place = draw.randrange(len(raw))
    length = draw.choice([1, 2, 7, 40])
    if kind == "cut":
        del raw[place : place + length]
    elif kind == "double":
        raw[place:place] = raw[place : place + length]
    elif kind == "insert":
        raw[place:place] = draw.choice([b"9", b'"', b"{", b"]", b"\\u0000", b"\xff", b"\xc3\xa9", b"\n", b","]) * length
    else:
        for _ in range(length):
            raw[draw.randrange(len(raw))] = draw.choice([draw.randrange(256), *b'0123456789"{}[],:-.'])
    return bytes(raw)


SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[-\d][\d.eE+-]*|true|false|null')


def json_places(raw, kind):
    """Where the values (or the keys) of a JSON text begin and end."""
    text = raw.decode("latin-1")
    try:
        json.loads(text)
    except ValueError:
        return []
    found = SCALAR.finditer(text)
    return [one.span() for one in found if text[one.end() :].lstrip().startswith(":") == (kind == "key")]


def read_tokens(folder):
    tokenizer = load_tokenizer(folder)
    special_ids(tokenizer)
    encode(tokenizer, "The cats [MASK] café", 100)


def read_trace(path):
    found = TraceFile(path)
    found.inputs()
    for name in found.names:
        found.read(name)


def read_checkpoint(folder):
    model = BertForMaskedLM(CONFIG)
    saving.restore(folder, model, make_optimizer(model, Settings(steps=2)))


RUN = {"seed": 0, "dtype": "float32"}


def read_text(path):
    token_files([str(path)], from_vocabulary(TOKENS), path.parent / "tokens", workers=1)


# What is damaged, what else is there, what reads it, and from where.
MODEL, BESIDE = ("config.json", WEIGHTS), ("special_tokens_map.json", "added_tokens.json")
KINDS = [
    ("config.json", MODEL, BertForMaskedLM.from_pretrained, ""),
    (WEIGHTS, MODEL, BertForMaskedLM.from_pretrained, ""),
    (INDEX, ("config.json", "one.safetensors"), BertForMaskedLM.from_pretrained, ""),
    (".config.json.next", MODEL, BertForMaskedLM.from_pretrained, ""),
    ("tokenizer.json", (), read_tokens, ""),
    ("tokenizer.json", ("tokenizer_config.json",), read_tokens, ""),
    ("tokenizer_config.json", ("tokenizer.json",), read_tokens, ""),
    ("vocab.txt", ("tokenizer_config.json",), read_tokens, ""),
    ("tokenizer_config.json", ("vocab.txt",), read_tokens, ""),
    ("special_tokens_map.json", ("vocab.txt", *BESIDE), read_tokens, ""),
    ("added_tokens.json", ("vocab.txt", *BESIDE), read_tokens, ""),
    ("config.json", ("vocab.txt",), read_tokens, ""),
    ("tokenizer.json", (), read_tokenizer, "tokenizer.json"),
    ("trace.safetensors", (), read_trace, "trace.safetensors"),
    ("trace.npz", (), read_trace, "trace.npz"),
    ("arrays/logits.npy", ("arrays/input_ids.npy", "arrays/metadata.json"), read_trace, "arrays"),
    ("arrays/metadata.json", ("arrays/input_ids.npy", "arrays/logits.npy"), read_trace, "arrays"),
    ("ids.json", (), read_ids, "ids.json"),
    ("names.json", (), read_names, "names.json"),
    ("pairs.tsv", (), lambda path: list(read_pairs(str(path))), "pairs.tsv"),
    ("checkpoint-1/optimizer.safetensors", ("checkpoint-1/progress.json",), read_checkpoint, "checkpoint-1"),
    ("checkpoint-1/progress.json", ("checkpoint-1/optimizer.safetensors",), read_checkpoint, "checkpoint-1"),
    ("run.json", (), lambda folder: saving.open_run(folder, RUN), ""),
    ("metrics.jsonl", (), lambda folder: saving.cut_metrics(folder, 1), ""),
    ("text.txt", (), read_text, "text.txt"),
    ("text.gz", (), read_text, "text.gz"),
    ("TOKENS/about.json", ("text.txt",), read_text, "text.txt"),
    ("TOKENS/train.starts", ("text.txt",), read_text, "text.txt"),
]


def fault_of(place, read, start):
    """What is wrong with how it is read; "" if nothing is."""
    begun, said = time.process_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(place / start)
    except OURS as error:
        said = str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if (seconds := time.process_time() - begun) > SECONDS:
        return f"it took {seconds:.1f} s"
    return "" if said is None or str(place) in said or "the text is" in said else f"no file is named: {said}"


@pytest.mark.parametrize("examples", [6, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "others", "read", "start"), KINDS, ids=[f"{name} with {len(others)}" for name, others, *_ in KINDS]
)
def test_damaged_files_give_our_errors(files, tmp_path_factory, name, others, read, start, examples):
    folder = next(path.rpartition("/")[0] for path in files if path.startswith("tokens/") and "/about" in path)
    name = name.replace("TOKENS", folder)
    others = [path for path in files if path in others or (folder in name and path.startswith("tokens/"))]
    place = tmp_path_factory.mktemp("damaged")

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=False))
    def every(draw):
        for path in (name, *others):
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(files[path])
        raw = files[name]
        if name.endswith("safetensors") and draw.random() < 0.8:
            header, data = split_header(raw)
            header = damage(header, draw)
            length = len(header) if draw.random() < 0.9 else draw.choice([0, 2**31, 2**63, len(header) + 8])
            (place / name).write_bytes(struct.pack("<Q", length) + header + data)
        else:
            (place / name).write_bytes(damage(raw, draw))
        assert fault_of(place, read, start) == ""

    every()
