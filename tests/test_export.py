"""`minibert export`: a file that runs without the package, tried on odd shapes before it is kept."""

import importlib.util
import json

import pytest
import torch
from twins import CONFIGS, twins

import minibert.export
from minibert import BertConfig, BertForMaskedLM
from minibert.cli import main
from minibert.export import INPUTS, export

SIZES = {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 1, "max_position_embeddings": 80}


@pytest.fixture(scope="module")
def model():
    return twins(SIZES)[0]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_pt2_file_runs_by_itself_at_the_longest_length(model, folder, tmp_path, capsys):
    path = tmp_path / "model.pt2"
    assert main(["export", "--model", folder, "--out", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["difference"] < 1e-5
    assert len({tuple(shape) for shape in said["shapes"]}) == 8
    assert list(tmp_path.iterdir()) == [path]
    ids = torch.arange(80)[None]
    given = [ids, (ids > 0).long(), torch.zeros_like(ids)]
    got = torch.export.load(path).module()(**dict(zip(INPUTS, given, strict=True)))
    torch.testing.assert_close(got, model(*given).logits, rtol=0, atol=1e-5)  # sums in other orders


@pytest.mark.slow
def test_an_onnx_file_is_right_in_onnxruntime_on_ten_shapes(model, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    result = export(model, tmp_path / "model.onnx")
    assert result.difference < 1e-5
    session = onnxruntime.InferenceSession(str(result.path))
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    from test_tracing import batches

    for given in batches():
        named = {name: x.numpy() for name, x in zip(INPUTS, given, strict=True)}
        got = torch.from_numpy(session.run(None, named)[0])
        torch.testing.assert_close(got, model(*given).logits, rtol=0, atol=1e-5)  # sums in other orders


@pytest.mark.slow
def test_a_program_that_is_wrong_is_not_kept_and_a_model_in_training_trains_on(tmp_path, monkeypatch):
    path, model = tmp_path / "model.pt2", BertForMaskedLM(BertConfig(**SIZES)).train()
    path.write_text("what was there before")
    load = minibert.export._load_pt2
    monkeypatch.setattr(minibert.export, "_load_pt2", lambda *where: lambda given: load(*where)(given) + 0.5)
    with pytest.raises(ValueError, match="recorded it wrongly, and it was not kept"):
        export(model, path)
    assert path.read_text() == "what was there before"
    assert model.training
    assert model.layers[0].training


@pytest.mark.parametrize(
    ("out", "said"),
    [("model.bin", "must end in .onnx or .pt2"), ("nowhere/model.pt2", "no folder nowhere"), ("", "must end in")],
)
def test_mistakes(folder, tmp_path, monkeypatch, fails, out, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails("export", "--model", folder, "--out", out)


def test_a_missing_package_and_another_dtype_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed: pip install -c constraints.txt -e "):
        export(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="load it in float32 on the CPU"):
        export(twins(SIZES, dtype=torch.float64)[0], tmp_path / "model.pt2")


@pytest.mark.slow
def test_the_file_is_tried_on_the_device_that_is_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.checks.find_device", torch.device)
    with pytest.raises(NotImplementedError, match="meta"):  # which holds no numbers to compare
        export(model, tmp_path / "model.pt2", device="meta")
    if importlib.util.find_spec("onnxruntime"):
        with pytest.raises(ValueError, match=r"cannot run on mps:0: it has .*CPUExecutionProvider"):
            export(model, tmp_path / "model.onnx", device="mps:0")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_the_file_runs_on_a_gpu(model, tmp_path):
    assert export(model, tmp_path / "model.pt2", device="cuda").difference < 1e-4
