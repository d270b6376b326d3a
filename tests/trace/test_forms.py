"""Other forms of a trace that mean the same are read; what is nearly right is an error that says what is meant."""

import json
import re

import numpy
import pytest
import torch
from traced import stored, traced

from minibert.cli import main
from minibert.parity import TraceFile, diff, trace
from minibert.trace.table import INPUTS

ROW = {"input_ids": [[5, 6, 7, 8, 9]], "labels": [[-100, 6, -100, 8, -100]]}


@pytest.fixture
def given():
    """(a trace with padding and gradients, its model)"""
    a, _, ours = traced()
    return a, ours


def require_same(given, read):
    for name in given.names:
        torch.testing.assert_close(read.read(name), given.read(name), rtol=0, atol=0)
    assert diff(given, read).ok


@pytest.mark.parametrize("merged", [True, False], ids=["B S D", "B S H K"])
def test_other_heads_a_loss_with_an_axis_and_older_names(given, tmp_path, merged):
    a, _ = given
    changes, without = {"loss": a.tensors["loss"].reshape(1)}, []
    for name, x in a.tensors.items():
        if name.endswith((".query", ".key", ".value")):
            changes[name] = x.transpose(1, 2).flatten(-2) if merged else x.transpose(1, 2)
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if older != name:
            changes[older] = x
            without.append(name)
    assert without
    require_same(a, stored(tmp_path / "a.safetensors", a, changes, without))


def test_one_row_without_a_batch_axis(given, tmp_path):
    _, ours = given
    a = trace(ours, **{name: torch.tensor(x) for name, x in ROW.items()})
    bare = {name: x[0] for name, x in a.tensors.items() if x.dim()}
    bare["layers.0.query"] = bare["layers.0.query"].transpose(0, 1)
    bare["layers.1.key"] = bare["layers.1.key"].transpose(0, 1).flatten(-2)
    require_same(a, stored(tmp_path / "a.safetensors", a, bare))


def test_packed_tokens(given, tmp_path):
    a, ours = given
    mask = a.tensors["attention_mask"].bool()
    packed = {name: x[mask] for name, x in a.tensors.items() if x.shape[:2] == mask.shape and name not in INPUTS}
    for name in ("layers.0.query", "layers.0.key"):
        packed[name] = a.tensors[name].transpose(1, 2)[mask]
    packed["layers.0.key"] = packed["layers.0.key"].flatten(-2)
    assert len(packed) > 10
    require_same(a, stored(tmp_path / "a.safetensors", a, packed))

    # and with the inputs packed too, where the rows are padded on the right
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.where(mask == 1, 5, -100)
    a = trace(ours, torch.randint(1, 99, mask.shape) * mask, mask, labels=labels)
    mask = mask.bool()
    packed = {name: x[mask] for name, x in a.tensors.items() if x.shape[:2] == mask.shape}
    packed |= {"cu_seqlens": torch.tensor([0, 3, 7, 9], dtype=torch.int32)}
    scores = ("scores", "probabilities", "query", "key", "value")
    without = ["attention_mask", *(name for name in a.names if name.endswith(scores))]
    read = stored(tmp_path / "b.safetensors", a, packed, without)
    assert diff(a, read).ok
    assert diff(a, read, ours).ok
    with pytest.raises(ValueError, match="it must grow from 0 to 9"):
        stored(tmp_path / "b.safetensors", a, {**packed, "cu_seqlens": torch.tensor([0, 3, 8])}, without)


def test_logits_only_where_asked(given, tmp_path):
    a, ours = given
    asked = a.tensors["labels"] != -100
    read = stored(tmp_path / "a.safetensors", a, {"logits": a.tensors["logits"][asked]})
    for model in (None, ours):
        assert diff(a, read, model).ok
    wrong = a.tensors["logits"][asked] * 1.01
    read = stored(tmp_path / "a.safetensors", a, {"logits": wrong})
    for model in (None, ours):
        assert diff(a, read, model).rows[-1].name == "logits"


def test_coarser_and_finer_storage(tmp_path):
    _, _, ours = traced(grad=False)
    ids = {name: torch.tensor(x) for name, x in ROW.items()}
    a = trace(ours.double(), **ids)
    read = stored(tmp_path / "a.safetensors", a, {"loss": a.tensors["loss"].float()})
    assert diff(a, read, ours).ok
    a = trace(ours.bfloat16(), **ids)
    wider = {name: x.float() for name, x in a.tensors.items() if x.is_floating_point()}
    read = stored(tmp_path / "a.safetensors", a, wider)
    assert (read.dtype, read.read("logits").dtype) == (torch.bfloat16, torch.float32)
    assert diff(a, read, ours).ok


def write_numpy(path, arrays, metadata=None):
    """A .npz; or a folder of .npy files, where the path has no ending."""
    if path.suffix:
        numpy.savez(path, **arrays, **({} if metadata is None else {"metadata": json.dumps(metadata)}))
        return
    path.mkdir()
    for name, x in arrays.items():
        numpy.save(path / f"{name}.npy", x)
    (path / "metadata.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("path", ["a", "a.npz"])
def test_numpy_files(given, tmp_path, path):
    a, _ = given
    write_numpy(tmp_path / path, {name: x.numpy() for name, x in a.tensors.items()}, a.metadata)
    require_same(a, TraceFile(tmp_path / path))


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize(("path", "name"), [("a", "input_ids"), ("a.npz", "input_ids"), ("a.npz", "metadata")])
def test_a_pickle_in_numpy_files_is_not_opened(given, tmp_path, path, name):
    evil = numpy.array([Code(tmp_path / "run")], dtype=object)
    write_numpy(tmp_path / path, {"input_ids": given[0].tensors["input_ids"].numpy(), name: evil})
    with pytest.raises(ValueError, match="not a whole set of numpy arrays"):
        TraceFile(tmp_path / path)
    assert not (tmp_path / "run").exists()


def test_numpy_files_that_are_no_traces(given, tmp_path):
    a, file = given[0], tmp_path / "a.npz"
    ids = a.tensors["input_ids"].numpy()

    def refused(words):
        with pytest.raises(ValueError, match=words):
            TraceFile(file).read("loss")

    write_numpy(file, {"input_ids": ids})
    refused("give the format None")
    file.write_bytes(file.read_bytes()[:200])
    refused("numpy arrays")
    write_numpy(file, {"input_ids": ids.astype(">i8")})
    refused(r"a.npz: .*'>i8'.* of this byte order")
    arrays = {name: x.numpy() for name, x in a.tensors.items()}
    write_numpy(file, arrays, a.metadata)
    read = TraceFile(file)
    write_numpy(file, {**arrays, "mine": ids}, a.metadata)
    with pytest.raises(ValueError, match=r"a\.npz: .* it has changed since it was opened"):
        read.read("loss")


def test_two_names_of_one_tensor(given, tmp_path):
    name = "gradient.bert.embeddings.LayerNorm.weight"
    older = name.replace("weight", "gamma")
    with pytest.raises(ValueError, match=f"{older}.* {name} |{name}.* {older} "):
        stored(tmp_path / "a.safetensors", given[0], {older: given[0].tensors[name] * 2})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.0.querys", r"layers.0.querys \(is it layers.0.query\?\)"),
        ("layer.1.context", r"layer.1.context \(is it layers.1.context\?\)"),
        ("pooler", "no trace of this model has pooler. "),
        ("logits\nboth right", r"logits\\nboth right"),
    ],
)
def test_names_that_are_not_ours(given, tmp_path, name, words):
    a, _ = given
    with pytest.raises(ValueError, match=words):
        stored(tmp_path / "a.safetensors", a, {name: torch.ones(2)})
    assert stored(tmp_path / "b.safetensors", a, {f"extra.{name}": torch.ones(2)}).names == a.names


GGML = {
    "inp_embd": "embeddings.sum",
    "inp_norm": "embeddings.norm",
    "blk.{N}.attn_q": "layers.{N}.query",
    "blk.{N}.attn_k": "layers.N.key",
    "blk.{N}.attn_v": "layers.N.value",
    "blk.{N}.ffn_out": "layers.N.feed_forward",
    "l_out-{N}": "layers.N.feed_forward_norm",
    "result_output": "logits",
}


def ggml(path, a):
    """The trace under names of a port's own, in the order in which it computes."""
    arrays = {name: a.tensors[name].numpy() for name in INPUTS}
    for theirs, ours in GGML.items():
        for number in range(2) if "{N}" in theirs else [0]:
            name = ours.replace("{N}", str(number)).replace(".N.", f".{number}.")
            arrays[theirs.replace("{N}", str(number))] = a.tensors[name].numpy()
    numpy.savez(path, metadata=json.dumps(a.metadata), mine=numpy.ones(3, numpy.float32), **arrays)
    return str(path)


def test_a_port_with_names_of_its_own(given, tmp_path, capsys, fails):
    a, ours = given
    ours.save_pretrained(tmp_path / "model")
    a.save(tmp_path / "ours.safetensors")
    port, model = ggml(tmp_path / "port.npz", a), ["--model", str(tmp_path / "model")]
    (tmp_path / "names.json").write_text(json.dumps({**GGML, "mine": None}))
    names = ["--names", str(tmp_path / "names.json")]
    assert set(TraceFile(port, {**GGML, "mine": None}).names) >= {"layers.1.query", "layers.0.feed_forward", "logits"}
    for command in (
        ["diff", port, *model],
        ["diff", str(tmp_path / "ours.safetensors"), port],
        ["diagnose", port, *model],
    ):
        assert main([*command, *names]) == 0
        capsys.readouterr()
    said = fails("diagnose", port, *model)  # without --names they are unknown
    assert "--names FILE" in said
    assert "for you to check and correct" in said
    offered = json.loads(said[said.index('{"') :])
    assert sum(offered.get(theirs) == ours.replace("{N}", "N") for theirs, ours in GGML.items()) >= 6
    a.tensors["layers.1.key"] = a.tensors["layers.1.key"] + 1
    assert main(["diff", ggml(tmp_path / "port.npz", a), *model, *names, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first_wrong"] == "layers.1.key"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"result_output": "logit"}, r"result_output stands for logit \(is it logits\?\)"),
        ({"blk.0.attn_q": "layers.N.query"}, "both have {N} for a layer, or neither"),
        ({"result_output": 3}, "stands for 3"),
        ({"blk.{N}.nothing": "layers.N.query"}, "there is no tensor blk.{N}.nothing"),
        ({"blk.{N}.attn_k": "layers.N.query"}, "blk.0.attn_k and blk.0.attn_q are both layers.0.query"),
        (["blk"], "not a proper JSON file"),
    ],
    ids=str,
)
def test_names_that_are_wrong(given, tmp_path, fails, names, words):
    port = ggml(tmp_path / "port.npz", given[0])
    (tmp_path / "names.json").write_text(json.dumps({**GGML, **names} if isinstance(names, dict) else names))
    said = fails("diagnose", port, "--names", str(tmp_path / "names.json"))
    assert re.search(words, said), said
    assert str(tmp_path) in said


def test_what_a_file_says_cannot_look_like_a_verdict(given, tmp_path):
    a, ours = given
    read = stored(tmp_path / "a.safetensors", a, {"loss": a.tensors["loss"] + 1}, backend="mine)\nboth right\x1b[2J")
    out = "\n".join(diff(a, read, ours).lines())
    assert "\nboth right" not in out
    assert "\x1b" not in out
    assert r"mine)\nboth right\x1b[2J" in out
