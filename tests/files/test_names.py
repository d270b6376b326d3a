"""The names of tensors, as programs write them: read beside transformers, reported, or refused by the real cause; and
how they are written again.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import (
    BIAS,
    DECODER,
    DECODER_BIAS,
    IDS,
    SIZES,
    WEIGHTS,
    WORD,
    assert_same,
    assert_same_logits,
    change_json,
    logits,
    random_weights,
    refused,
    store,
)
from safetensors import safe_open
from safetensors.torch import load_file

from minibert import BertConfig, BertForMaskedLM, PackedBatch
from minibert.checkpoint.names import BEGINS, NAMES, common_prefix, from_transformers, hub_names

# ------------------------------------------------------------------------------------------------------- every spelling

POOLER, PLACES = "bert.pooler.dense.weight", "bert.embeddings.position_ids"
NEXT_SENTENCE = "cls.seq_relationship.weight"


def older(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def in_layers(word, name):
    return re.sub(r"(layer\.\d+\.)", rf"\1{word}.", name)


# What stands before every name, or how each name is written.
PREFIXES = [
    "module.",  # DataParallel
    "model.",  # Lightning
    "base_model.model.",  # PEFT
    "bert.",  # a BertForMaskedLM in the attribute `bert` of another module
    "_orig_mod.module.model.",  # torch.compile of it all
    "0.auto_model.",
]
SPELLINGS = {
    "older LayerNorms": older,
    "no prefix": lambda name: name.removeprefix("bert."),
    "the decoder's bias": lambda name: DECODER_BIAS if name == BIAS else name,
    "the decoder's weight": lambda name: DECODER if name == WORD else name,
    "torch.compile of each layer": lambda name: in_layers("_orig_mod", name),
    "torch.compile of the encoder": lambda name: name.replace("bert.encoder", "bert._orig_mod.encoder"),
    "FSDP": lambda name: "_fsdp_wrapped_module." + in_layers("_fsdp_wrapped_module", name),
    "activation checkpointing": lambda name: in_layers("_checkpoint_wrapped_module", name),
    "Lightning and torch.compile of a part": lambda name: "model." + name.replace("bert.", "bert._orig_mod."),
    **{prefix: (lambda name, prefix=prefix: prefix + name) for prefix in PREFIXES},
    "all at once": lambda name: "module." + older(DECODER if name == WORD else DECODER_BIAS if name == BIAS else name),
}


@pytest.mark.parametrize("spell", SPELLINGS)
def test_each_spelling_gives_the_same_model(folder, tensors, ours, spell):
    respelled = {SPELLINGS[spell](name): tensor for name, tensor in tensors.items()}
    assert set(respelled) != set(tensors)
    store(folder, respelled)
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same(model, ours)
    assert model.load_report.loaded == tuple(sorted(respelled))
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in from_transformers(respelled).items())
    if spell in PREFIXES:
        assert (model.load_report.prefix, model.load_report.renamed) == (spell, {})
        encoder = {name: tensor for name, tensor in respelled.items() if "cls.predictions" not in name}
        store(folder, encoder)
        model = BertForMaskedLM.from_pretrained(folder, init_missing_head=True)
        assert torch.equal(model.encode(PackedBatch.from_padded(IDS)), ours.encode(PackedBatch.from_padded(IDS)))


def test_what_was_found_is_reported(folder, tensors, ours, good):
    report = ours.load_report
    assert (report.name, report.files, report.file_dtypes) == (str(good), (good / WEIGHTS,), {"F32": 90})
    found = (report.commit, report.prefix, report.renamed, report.tied, report.ignored, report.initialised)
    assert not any((*found, report.non_finite)), "nothing out of the ordinary"
    assert {"architectures", "transformers_version", "use_cache"} <= set(report.ignored_config_keys)
    assert report.sha256 == {WEIGHTS: hashlib.sha256((good / WEIGHTS).read_bytes()).hexdigest()}

    leftovers = {PLACES: torch.arange(16)[None], POOLER: torch.ones(32, 32), NEXT_SENTENCE: torch.ones(2, 32)}
    copies = {DECODER: tensors[WORD], DECODER_BIAS: tensors[BIAS]}
    everything = {f"module.{older(name)}": x for name, x in {**tensors, **leftovers, **copies}.items()}
    store(folder, everything)
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same(model, ours)
    report = model.load_report
    assert report.renamed == {f"module.{older(name)}": name for name in tensors if name != older(name)}
    assert report.tied == {f"module.{DECODER}": WORD, f"module.{DECODER_BIAS}": BIAS}
    assert set(report.ignored) == {f"module.{name}" for name in leftovers}
    assert all(report.ignored.values())  # each with its reason
    assert {*report.loaded, *report.ignored, *report.tied} == everything.keys()
    store(folder, tensors)
    with pytest.raises(ValueError, match="has changed"):
        _ = report.sha256


def test_every_name_of_the_table_shows_where_a_prefix_ends():
    for name, _ in NAMES:
        for hub in hub_names(name.replace(".N.", ".7.") + (".bias" if name == "head" else ".weight")):
            assert BEGINS.search("x." + hub).start() == 2, hub
            assert common_prefix(["x.y." + hub]) == "x.y."
            assert common_prefix([hub]) == ""


@pytest.mark.parametrize(("copy", "original"), [(DECODER, WORD), (DECODER_BIAS, BIAS)])
def test_tied_copies(folder, tensors, copy, original):
    tensors[original].view(-1)[3] = float("nan")
    store(folder, {**tensors, copy: tensors[original]})
    with pytest.warns(UserWarning, match="NaN"):
        BertForMaskedLM.from_pretrained(folder)
    assert from_transformers({**tensors, copy: tensors[original]}).keys() == from_transformers(tensors).keys()
    changed = tensors[original].clone()
    changed.view(-1)[-1] += 1e-3
    for other in (changed, tensors[original].nan_to_num(), tensors[original][:1], tensors[original].half()):
        store(folder, {**tensors, copy: other})
        refused(folder, f"{re.escape(copy)} and {re.escape(original)} .*differ", mentions=WEIGHTS)
        with pytest.raises(ValueError, match="differ"):
            from_transformers({**tensors, copy: other})


# ---------------------------------------------------------------------------------------------------------- other heads


@pytest.mark.parametrize(("name", "head"), [("BertModel", []), ("BertForQuestionAnswering", ["qa_outputs.weight"])])
def test_another_tasks_head(tmp_path, name, head):
    theirs = random_weights(getattr(transformers, name)(transformers.BertConfig(**SIZES)))
    theirs.save_pretrained(tmp_path)
    refused(tmp_path, rf"without the masked.*{'.*'.join(head)}.*init_missing_head=True", mentions=WEIGHTS)
    model = BertForMaskedLM.from_pretrained(tmp_path, init_missing_head=True)
    assert set(model.load_report.ignored) >= set(head)
    assert set(model.load_report.initialised) == {name for name in model.state_dict() if name.startswith("head.")}
    with torch.inference_mode():
        expected = getattr(theirs, "bert", theirs)(IDS).last_hidden_state
        got = model.encode(PackedBatch.from_padded(IDS))
        torch.testing.assert_close(got, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
        assert torch.equal(model.head.dense.weight, torch.eye(32))  # the head starts as a comparison with the words
        assert model.head.LayerNorm.weight.eq(1).all()
        assert not model.head.bias.any()


def test_both_heads_of_pretraining(tmp_path):
    theirs = random_weights(transformers.BertForPreTraining(transformers.BertConfig(**SIZES)))
    theirs.save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path, init_missing_head=True)
    assert model.load_report.initialised == ()
    with torch.inference_mode():
        torch.testing.assert_close(logits(model), theirs(IDS).prediction_logits, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- names that are none

KEY = "bert.encoder.layer.1.attention.self.query.weight"
LORA = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
LAYER_NORM, DENSE = "bert.embeddings.LayerNorm.weight", "bert.encoder.layer.0.output.dense.weight"
PLACE, UP = "bert.embeddings.position_embeddings.weight", "bert.encoder.layer.1.intermediate.dense.weight"
TRANSFORM, ADAPTER = "cls.predictions.transform.dense.weight", "bert.encoder.layer.0.adapter.weight"


def moved(old, new):
    return lambda x: {**x, old: None, new: x[old]}


# What is done to the tensors (None: taken out), and what the message names.
WRONG = {
    "too few": (lambda x: {**x, DENSE: None}, r"0\.output\.dense\.weight is missing"),
    "several too few": (lambda x: {**x, WORD: None, KEY: None}, r"tensors .*word_embeddings.* are missing"),
    "too many": (lambda x: {**x, ADAPTER: torch.ones(3)}, "adapter.weight is not expected"),
    "half a head": (lambda x: {**x, TRANSFORM: None}, "transform.dense.weight is missing"),
    "two spellings": (lambda x: {**x, older(LAYER_NORM): x[LAYER_NORM]}, "two spellings"),
    "gamma of no LayerNorm": (moved(DENSE, DENSE.replace("weight", "gamma")), "output.dense"),
    "a wrong letter": (moved(KEY, KEY.replace("ery", "erry")), "nearest to .* is .*querry"),
    "two models": (lambda x: {f"{w}.{k}": x[k] for w in "ab" for k in x}, r"look like [ab]\..*; the nearest to"),
    "another model": (lambda x: {f"h.{n}.a": x[WORD] for n in range(3)}, r"like h\.\d+\.a"),
    "an adapter": (lambda x: {**{f"base_model.model.{k}": x[k] for k in x}, LORA: x[BIAS]}, "merge_and_unload"),
    "another shape": (lambda x: {**x, PLACE: torch.zeros(17, 32)}, r"has shape \(17, 32\).*\(16, 32\)"),
    "transposed": (lambda x: {**x, UP: x[UP].T.contiguous()}, r"has shape \(32, 37\).*\(37, 32\)"),
    "whole numbers": (lambda x: {**x, WORD: x[WORD].long()}, "word_embeddings.weight is I64"),
    "yes and no": (lambda x: {**x, WORD: x[WORD].bool()}, "word_embeddings.weight is BOOL"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_are_not_this_model(folder, tensors, kind):
    change, match = WRONG[kind]
    store(folder, {name: tensor for name, tensor in change(tensors).items() if tensor is not None})
    refused(folder, match, mentions=WEIGHTS, init_missing_head=True)


def test_config_contradicts_the_tensors(folder):
    for change, match in (
        ({"hidden_size": 64}, r"\(99, 32\).*config.json.*\(99, 64\)"),
        ({"hidden_size": 32, "num_hidden_layers": 4}, r"not expected.*num_hidden_layers in config.json is 4"),
        ({"num_hidden_layers": 6}, r"missing.*num_hidden_layers in config.json is 6"),
    ):
        change_json(folder / "config.json", **change)
        refused(folder, match, mentions=WEIGHTS)


def test_weights_that_are_not_finite(folder, tensors, recwarn):
    tensors[WORD][:] = 3e38  # their sum overflows
    store(folder, tensors)
    assert BertForMaskedLM.from_pretrained(folder).load_report.non_finite == ()
    assert not recwarn
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors["bert.encoder.layer.4.attention.self.key.weight"][31, 31] = value
        store(folder, tensors)
        with pytest.warns(UserWarning, match=r"NaN or infinite weights in layers\.4\.attention\.qkv\.weight") as caught:
            model = BertForMaskedLM.from_pretrained(folder)
        assert str(folder / WEIGHTS) in str(caught[0].message)
        assert caught[0].filename == __file__  # the warning points at the caller
        assert model.load_report.non_finite == ("layers.4.attention.qkv.weight",)


STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@pytest.mark.parametrize("stored", STORED)
def test_other_dtypes_in_the_file(folder, tensors, stored):
    dtype = STORED[stored]
    store(folder, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    expected = tensors["bert.encoder.layer.3.output.dense.weight"].to(dtype)
    for asked, held in ((None, torch.float32), (dtype, dtype), (torch.bfloat16, torch.bfloat16)):
        model = BertForMaskedLM.from_pretrained(folder, dtype=asked)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {held}
        assert torch.equal(model.layers[3].feed_forward.output.weight, expected.to(held))
        assert model.load_report.file_dtypes == {stored: len(tensors)}


# -------------------------------------------------------------------------------------------------------- written again


def test_transformers_reads_it_back(ours, theirs, tensors, tmp_path):
    ours.save_pretrained(folder := tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(folder / WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    model, info = transformers.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(model), logits(theirs))
    assert_same_logits(ours, theirs)
    assert not ours.training


def test_everything_survives_the_round_trip(good, tmp_path):
    model = BertForMaskedLM.from_pretrained(good, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(BertForMaskedLM.from_pretrained(tmp_path, dtype="auto"), model)
    assert transformers.BertForMaskedLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    config = BertConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-5, type_vocab_size=3, pad_token_id=None)
    model = BertForMaskedLM(config)
    for _ in range(2):  # and into the folder that it came from
        torch.nn.init.normal_(model.head.bias)
        model.save_pretrained(tmp_path)
        back = BertForMaskedLM.from_pretrained(tmp_path)
        assert back.config == config
        assert_same(back, model)
        model = back


def test_the_decoder_cannot_come_untied(good):
    model = BertForMaskedLM.from_pretrained(good, device="cpu")
    assert len(model.state_dict()) == 4 + 1 + 5 * 12 + 5
    before = logits(model)
    with torch.no_grad():
        model.embeddings.word.weight[98] = 0  # a word that is not in the input: only its own score may change
    assert torch.equal(logits(model)[..., :98], before[..., :98])
    for changed in (model, model.double()):
        assert torch.allclose(logits(changed)[..., 98], model.head.bias[98])


def test_what_a_caller_may_not_ask_for(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, options, error, match in (
        ("./nowhere", {}, FileNotFoundError, "'./nowhere' is no folder.*bundled name.*hub id"),
        (good / WEIGHTS, {}, FileNotFoundError, "is a file"),
        ("", {}, FileNotFoundError, "is no folder"),
        (good, {"revision": "v1"}, ValueError, r"'v1'.*is a folder"),
        (good, {"device": "nonsense"}, (RuntimeError, ValueError), "nonsense"),
        (good, {"torch_type": torch.float16}, TypeError, "torch_type"),
    ):
        with pytest.raises(error, match=match):
            BertForMaskedLM.from_pretrained(name, **options)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak memory in /proc")
def test_peak_memory_of_loading(tmp_path):
    config = BertConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=7, num_attention_heads=8, intermediate_size=2048
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
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
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    # The weights once, which nobody can do without. The allowance is for the largest single tensor (15 % here, the
    # word embeddings), which is there twice while it is copied out of the file, and a few MB of code that is first
    # run, modules and headers. Holding the file and the model side by side would be 2.0.
    assert size < int(done.stdout) < 1.25 * size
