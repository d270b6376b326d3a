"""Checkpoints are read, and written again: spellings, shards, data types; the report; what a caller may ask for."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    BIAS,
    DECODER,
    DECODER_BIAS,
    SIZES,
    WEIGHTS,
    WORD,
    assert_same,
    logits,
    refused,
    store,
)
from safetensors import safe_open
from safetensors.torch import load_file

from minibert import BertConfig, BertForMaskedLM, PackedBatch
from minibert.checkpoint import hub
from minibert.checkpoint.names import from_transformers

# ------------------------------------------------------------------------------------------------------- every spelling


def test_same_logits_as_transformers(theirs, ours, ids):
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)
    assert not ours.training


def old_layer_norms(tensors):
    for key in list(tensors):
        if ".LayerNorm." in key:
            new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(key)


def decoder_copies(tensors):
    tensors[DECODER], tensors[DECODER_BIAS] = tensors[WORD], tensors[BIAS]


def only_decoder_bias(tensors):
    tensors[DECODER_BIAS] = tensors.pop(BIAS)


def no_prefix(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("bert.")] = tensors.pop(key)


def leftovers(tensors):
    tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"] = torch.ones(32, 32), torch.ones(32)
    tensors["cls.seq_relationship.weight"], tensors["cls.seq_relationship.bias"] = torch.ones(2, 32), torch.ones(2)


def everything_at_once(tensors):
    only_decoder_bias(tensors)
    tensors[DECODER] = tensors[WORD]
    leftovers(tensors)
    old_layer_norms(tensors)


@pytest.mark.parametrize(
    "respell", [old_layer_norms, decoder_copies, only_decoder_bias, no_prefix, leftovers, everything_at_once]
)
def test_each_spelling_gives_the_same_model(folder, tensors, theirs, ours, ids, respell):
    assert not {DECODER, DECODER_BIAS} & tensors.keys()  # so the unchanged file is the spelling without a decoder
    respell(tensors)
    store(folder, tensors)
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same(model, ours)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)


def test_spelling_is_reported(folder, tensors):
    old_layer_norms(tensors)
    decoder_copies(tensors)
    leftovers(tensors)
    store(folder, tensors)
    report = BertForMaskedLM.from_pretrained(folder).load_report
    assert report.renamed["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"
    assert report.renamed["bert.embeddings.LayerNorm.beta"] == "bert.embeddings.LayerNorm.bias"
    assert len(report.renamed) == 2 * (1 + 2 * 5 + 1)
    assert report.tied == {DECODER: WORD, DECODER_BIAS: BIAS}
    assert set(report.ignored) == {
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }
    assert all(report.ignored.values())  # each with its reason
    assert not set(report.loaded) & {*report.ignored, *report.tied}
    assert set(report.loaded) | {*report.ignored, *report.tied} == tensors.keys()


def test_gamma_is_renamed_only_under_a_layer_norm(folder, tensors):
    name = "bert.encoder.layer.0.output.dense."
    tensors[name + "gamma"] = tensors.pop(name + "weight")
    store(folder, tensors)
    refused(folder, "output.dense", mentions=WEIGHTS)


@pytest.mark.parametrize(("copy", "original"), [(DECODER, WORD), (DECODER_BIAS, BIAS)])
def test_tied_copies_that_differ(folder, tensors, copy, original):
    decoder_copies(tensors)
    tensors[copy] = tensors[copy].clone()
    tensors[copy].view(-1)[-1] += 1e-3
    store(folder, tensors)
    refused(folder, f"{re.escape(copy)} and {re.escape(original)} .*differ", mentions=WEIGHTS)


def test_tied_copy_of_another_shape(folder, tensors):
    decoder_copies(tensors)
    tensors[DECODER] = tensors[WORD][:1]
    store(folder, tensors)
    refused(folder, f"{re.escape(DECODER)} and {re.escape(WORD)} .*differ", mentions=WEIGHTS)


def test_tied_copies_with_nan_are_equal(folder, tensors):
    tensors[WORD][3, 4] = float("nan")
    tensors[DECODER] = tensors[WORD]
    store(folder, tensors)
    with pytest.warns(UserWarning, match="NaN"):
        model = BertForMaskedLM.from_pretrained(folder)
    assert model.load_report.non_finite == ("embeddings.word.weight",)
    assert from_transformers(tensors)["embeddings.word.weight"] is tensors[WORD]  # one rule
    tensors[DECODER] = tensors[WORD].nan_to_num()
    with pytest.raises(ValueError, match="differ"):
        from_transformers(tensors)
    store(folder, tensors)
    refused(folder, "differ", mentions=WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, tensors, dtype):
    store(folder, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    name = "bert.encoder.layer.3.output.dense.weight"
    for asked, expected in ((None, torch.float32), (dtype, dtype), (torch.float64, torch.float64)):
        model = BertForMaskedLM.from_pretrained(folder, dtype=asked)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
        assert torch.equal(model.layers[3].feed_forward.output.weight, tensors[name].to(dtype).to(expected))
        assert model.load_report.dtype == str(expected).removeprefix("torch.")
        assert model.load_report.file_dtypes == {{torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]: len(tensors)}


def test_float32_file_in_half_precision(good, ours):
    model = BertForMaskedLM.from_pretrained(good, dtype=torch.bfloat16)
    assert_same(model, BertForMaskedLM.from_pretrained(good).to(torch.bfloat16))
    assert model.load_report.file_dtypes == {"F32": 90}


def test_older_transformers_dtype_key(folder, ours):
    values = json.loads((folder / "config.json").read_text())
    del values["dtype"]
    (folder / "config.json").write_text(json.dumps(values | {"torch_dtype": "float16"}))
    assert_same(BertForMaskedLM.from_pretrained(folder), ours)


def test_sharded(sharded, ours):
    model = BertForMaskedLM.from_pretrained(sharded)
    assert_same(model, ours)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert list(model.load_report.files) == shards
    assert model.load_report.sha256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def test_encoder_only(theirs, ours, tmp_path, ids):
    theirs.bert.save_pretrained(tmp_path)  # no `bert.` prefix, no head
    refused(tmp_path, "init_missing_head", mentions=WEIGHTS)
    model = BertForMaskedLM.from_pretrained(tmp_path, init_missing_head=True)
    assert set(model.load_report.initialised) == {
        "head.bias",
        "head.dense.weight",
        "head.dense.bias",
        "head.LayerNorm.weight",
        "head.LayerNorm.bias",
    }
    batch = PackedBatch.from_padded(ids)
    with torch.inference_mode():
        assert torch.equal(model.encode(batch), ours.encode(batch))
    assert logits(model, ids).isfinite().all()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_init_missing_head_changes_nothing_in_a_whole_checkpoint(good, ours):
    model = BertForMaskedLM.from_pretrained(good, init_missing_head=True)
    assert_same(model, ours)
    assert model.load_report.initialised == ()


def test_half_a_head_is_an_error_all_the_same(folder, tensors):
    del tensors["cls.predictions.transform.dense.weight"]
    store(folder, tensors)
    refused(folder, "transform.dense.weight is missing", mentions=WEIGHTS, init_missing_head=True)


# ----------------------------------------------------------------------------------------------------------- the report


def test_load_report(good, ours, tensors):
    report = ours.load_report
    assert report.name == str(good)
    assert report.files == (good / WEIGHTS,)
    assert report.file_dtypes == {"F32": 90}
    assert report.dtype == "float32"
    assert report.loaded == tuple(sorted(tensors))
    assert (report.renamed, report.tied, report.ignored) == ({}, {}, {})
    assert (report.initialised, report.non_finite) == ((), ())
    assert {"architectures", "transformers_version", "use_cache"} <= set(report.ignored_config_keys)
    assert not set(report.ignored_config_keys) & set(SIZES)
    assert report.sha256 == {WEIGHTS: hashlib.sha256((good / WEIGHTS).read_bytes()).hexdigest()}


def test_sha256_of_a_file_that_has_changed_since(folder, tensors):
    report = BertForMaskedLM.from_pretrained(folder).load_report
    tensors["bert.pooler.dense.bias"] = torch.ones(32)
    store(folder, tensors)
    with pytest.raises(ValueError, match="has changed"):
        _ = report.sha256


def test_a_configuration_that_waits_for_other_weights_is_not_read(ours, tmp_path):
    """What a killed save left is void as soon as somebody else has put other weights there."""
    ours.save_pretrained(tmp_path)
    waiting = {"weights_sha256": "0" * 64, "config": {**ours.config.to_dict(), "layer_norm_eps": 0.5}}
    (tmp_path / hub.NEXT).write_text(json.dumps(waiting))
    assert BertForMaskedLM.from_pretrained(tmp_path).config == ours.config
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / hub.NEXT).exists()


# ---------------------------------------------------------------------------------------------------------- the decoder


def test_the_decoder_cannot_come_untied(good, ids):
    model = BertForMaskedLM.from_pretrained(good)
    assert len(model.state_dict()) == 4 + 1 + 5 * 12 + 5
    assert not [name for name in model.state_dict() if "decoder" in name]
    before = logits(model, ids)
    with torch.no_grad():
        model.embeddings.word.weight[98] = 0  # a word that is not in the input: only its own score may change
    after = logits(model, ids)
    assert torch.equal(after[..., :98], before[..., :98])
    assert torch.allclose(after[..., 98], model.head.bias[98])
    model.double()
    assert torch.allclose(logits(model, ids)[..., 98], model.head.bias[98])


# ------------------------------------------------------------------------------------------------------- and back again


def test_transformers_reads_it_back(ours, theirs, ids, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    ours.save_pretrained(tmp_path / "new" / "folder")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = transformers.BertForMaskedLM.from_pretrained(
                tmp_path / "new" / "folder", output_loading_info=True
            )
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert not any(info.values()), info
    assert torch.equal(logits(model, ids), logits(theirs, ids))


def test_what_is_written(ours, tensors, tmp_path):
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(tmp_path / WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert_same(BertForMaskedLM.from_pretrained(tmp_path), ours)


def test_half_precision_survives_the_round_trip(good, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = BertForMaskedLM.from_pretrained(good, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(BertForMaskedLM.from_pretrained(tmp_path, dtype="auto"), model)
    back = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}


def test_save_into_the_folder_it_came_from(folder, ours):
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.head.bias.add_(1)
    model.save_pretrained(folder)
    assert_same(BertForMaskedLM.from_pretrained(folder), model)


def test_config_survives_the_round_trip(tmp_path):
    config = BertConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-5, type_vocab_size=3, pad_token_id=None)
    model = BertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    back = BertForMaskedLM.from_pretrained(tmp_path)
    assert back.config == config
    assert_same(back, model)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak memory in /proc")
def test_peak_memory_of_loading(tmp_path):
    config = BertConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=7, num_attention_heads=8, intermediate_size=2048
    )
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert 100e6 < size < 120e6
    program = """if True:
        import re, sys, torch, minibert
        def status(key):
            return 1024 * int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1])
        torch.set_num_threads(1)
        before = status("VmRSS")
        model = minibert.BertForMaskedLM.from_pretrained(sys.argv[1])
        print(status("VmHWM") - before)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    # The weights once, which nobody can do without. The allowance is for the largest single tensor (15 % here, the
    # word embeddings), which is there twice while it is copied out of the file, and a few MB of code that is first
    # run, modules and headers. Holding the file and the model side by side would be 2.0.
    assert size < int(done.stdout) < 1.25 * size


# -------------------------------------------------------------------------------------------------- the caller's errors


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "int8", "float", 16])
def test_dtype_that_is_none(good, dtype):
    with pytest.raises((TypeError, ValueError), match="dtype"):
        BertForMaskedLM.from_pretrained(good, dtype=dtype)


def test_device(good, ours):
    assert_same(BertForMaskedLM.from_pretrained(good, device="cpu"), ours)
    assert_same(BertForMaskedLM.from_pretrained(good, device=torch.device("cpu")), ours)
    with pytest.raises((RuntimeError, ValueError), match="nonsense"):
        BertForMaskedLM.from_pretrained(good, device="nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(good):
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"CUDA|NVIDIA"):  # torch's own error
        BertForMaskedLM.from_pretrained(good, device="cuda")


def test_misspelt_keyword(good):
    with pytest.raises(TypeError, match="torch_type"):
        BertForMaskedLM.from_pretrained(good, torch_type=torch.float16)


def test_unknown_folder(tmp_path, good, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "nowhere"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            BertForMaskedLM.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="is a file"):
        BertForMaskedLM.from_pretrained(good / WEIGHTS)
    with pytest.raises(FileNotFoundError):
        BertForMaskedLM.from_pretrained("")


def test_revision_of_a_folder(good):
    with pytest.raises(ValueError, match=r"'v1'.*is a folder"):
        BertForMaskedLM.from_pretrained(good, revision="v1")


def test_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json", FileNotFoundError)


def test_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "no such file", FileNotFoundError, mentions=WEIGHTS)
