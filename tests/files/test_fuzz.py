"""Damaged files: whatever bytes a folder holds, reading it gives a model or a tokenizer, or one of our errors, quickly.

More than the gate runs:  python tests/test_fuzz.py 100000
"""

import json
import random
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.tokenizer import encode, from_vocabulary, special_ids

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "café"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = (ValueError, OSError)  # what the command line turns into one line; OSError: no such file
SECONDS = 1.0  # for one folder
NASTY = ["null", "true", "-1", "0", "1e400", "99999999999999999999", "2147483647", "0.5", '""', "[]", "{}", '"\\ud800"']
NASTY += ['"[MASK]"', '{"content": 5}', "[[[]]]", '"a b"', "NaN", '"\\u0000"', "4294967296"]


def make_folder(folder):
    """A whole checkpoint with each kind of file, in which no file makes another one needless."""
    config = BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    from_vocabulary(TOKENS).save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    listed = {"4": {"content": "[MASK]", **flags, "special": True}, "9": {"content": "[E]", **flags, "special": True}}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "mask_token": "[MASK]"}
    files = {
        "tokenizer_config.json": {**settings, "added_tokens_decoder": listed, "extra_special_tokens": ["[E]"]},
        "special_tokens_map.json": {"mask_token": {"content": "[MASK]", **flags}, "cls_token": "[CLS]"},
        "added_tokens.json": {"[E]": 9, "covid19": 10},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    header = json.loads(split_header((folder / WEIGHTS).read_bytes())[0])
    names = {name: "one.safetensors" for name in header if name != "__metadata__"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split_header(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return raw[8 : 8 + length], raw[8 + length :]


# Which files a folder has, which of them is damaged, and what then reads it.
MODEL = ("config.json", WEIGHTS)
KINDS = [
    (MODEL, "config.json", "model"),
    (MODEL, WEIGHTS, "model"),
    (("config.json", INDEX, "one.safetensors"), INDEX, "model"),
    (("tokenizer.json",), "tokenizer.json", "tokenizer"),
    (("tokenizer.json", "tokenizer_config.json"), "tokenizer.json", "tokenizer"),
    (("tokenizer.json", "tokenizer_config.json"), "tokenizer_config.json", "tokenizer"),
    (("vocab.txt", "tokenizer_config.json"), "vocab.txt", "tokenizer"),
    (("vocab.txt", "tokenizer_config.json"), "tokenizer_config.json", "tokenizer"),
    (("vocab.txt", "special_tokens_map.json", "added_tokens.json"), "special_tokens_map.json", "tokenizer"),
    (("vocab.txt", "special_tokens_map.json", "added_tokens.json"), "added_tokens.json", "tokenizer"),
    (("vocab.txt", "config.json"), "config.json", "tokenizer"),
]


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


def json_places(raw, kind):
    """Where the values (or the keys) of a JSON text begin and end."""
    text, places = raw.decode("latin-1"), []
    try:
        json.loads(text)
    except ValueError:
        return places
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at] in " \n\t,:{}[]":
            at += 1
            continue
        end = decoder.raw_decode(text, at)[1]
        is_key = text[at] == '"' and text[end:].lstrip().startswith(":")
        if is_key == (kind == "key"):
            places.append((at, end))
        at = end
    return places


def damaged(files, draw):
    names, name, reader = draw.choice(KINDS)
    folder = {each: files[WEIGHTS if each == "one.safetensors" else each] for each in names}
    if name == WEIGHTS:
        header, data = split_header(folder[name])
        if draw.random() < 0.8:
            header = damage(header, draw)
            length = len(header) if draw.random() < 0.9 else draw.choice([0, 2**31, 2**63, len(header) + 8])
            folder[name] = struct.pack("<Q", length) + header + data
        else:
            folder[name] = damage(folder[name], draw)
    else:
        folder[name] = damage(folder[name], draw)
    return folder, name, reader


def read(folder, reader):
    if reader == "model":
        BertForMaskedLM.from_pretrained(folder)
    else:
        tokenizer = load_tokenizer(folder)
        special_ids(tokenizer)
        encode(tokenizer, "The cats [MASK] café", 100)


def fault_of(place, name, reader):
    """What is wrong with how a folder is read ("" if nothing is), and whether it was refused."""
    begun, said = time.process_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(place, reader)
    except OURS as error:
        said = str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}", True
    if (seconds := time.process_time() - begun) > SECONDS:
        return f"it took {seconds:.1f} s", said is not None
    if said is not None and str(place) not in said and "the text is" not in said:
        return f"no file is named: {said}", True
    return "", said is not None


def run(count, seed, folder):
    """The faults that were found, and how many folders were refused."""
    files = make_folder(Path(tempfile.mkdtemp(dir=folder)))
    draw, refused, faults = random.Random(seed), 0, []
    place = folder / "damaged"
    place.mkdir()
    for number in range(count):
        changed, name, reader = damaged(files, draw)
        for path in place.iterdir():
            path.unlink()
        for each, raw in changed.items():
            (place / each).write_bytes(raw)
        fault, was_refused = fault_of(place, name, reader)
        refused += was_refused
        if fault:
            faults.append(f"{number}, {name}: {fault}")
    return faults, refused


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_give_our_errors(tmp_path, seed):
    faults, refused = run(1000, seed, tmp_path)
    assert faults == []
    assert 300 < refused < 950  # the damage is neither always harmless nor always fatal


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found, out_of = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2, Path(scratch))
    print(*found, f"{sys.argv[1]} folders, {out_of} refused, {len(found)} faults", sep="\n")
