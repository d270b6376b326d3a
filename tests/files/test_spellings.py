"""The names of tensors, as programs write them: read beside transformers, or refused by the real cause."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minibert import BertForMaskedLM, PackedBatch
from minibert.checkpoint.names import BEGINS, NAMES, common_prefix, hub_names, read_names

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=16,
)
WORD, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
WEIGHTS = "model.safetensors"
IDS = torch.randint(1, 99, (5, 7), generator=torch.Generator().manual_seed(1))


def random_weights(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    return random_weights(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)))


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tensors(folder):
    return load_file(folder / WEIGHTS)


def store(folder, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def assert_same_logits(model, theirs):
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- prefixes

PREFIXES = [
    "module.",  # DataParallel
    "_orig_mod.",  # torch.compile
    "model.",  # Lightning
    "base_model.model.",  # PEFT
    "bert.",  # a BertForMaskedLM in the attribute `bert` of another module
    "module._orig_mod.",
    "_orig_mod.module.model.",
    "0.auto_model.",
    "net.lm.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_before_every_name(folder, tensors, theirs, prefix):
    store(folder, {prefix + name: tensor for name, tensor in tensors.items()})
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same_logits(model, theirs)
    assert model.load_report.prefix == prefix
    assert model.load_report.renamed == {}
    assert set(model.load_report.loaded) == {prefix + name for name in tensors}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("bert", ["bert.", ""])
def test_a_prefix_before_an_encoder(folder, theirs, prefix, bert):
    theirs.bert.save_pretrained(folder)
    store(folder, {prefix + bert + name: tensor for name, tensor in load_file(folder / WEIGHTS).items()})
    model = BertForMaskedLM.from_pretrained(folder, init_missing_head=True)
    with torch.inference_mode():
        got = model.encode(PackedBatch.from_padded(IDS))
        expected = theirs.bert(IDS).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


WRAPPED = {
    "torch.compile of each layer": lambda name: re.sub(r"(layer\.\d+\.)", r"\1_orig_mod.", name),
    "torch.compile of the encoder": lambda name: name.replace("bert.encoder", "bert._orig_mod.encoder"),
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"(layer\.\d+\.)", r"\1_fsdp_wrapped_module.", name),
    "activation checkpointing": lambda name: re.sub(r"(layer\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
    "Lightning and torch.compile of a part": lambda name: "model." + name.replace("bert.", "bert._orig_mod."),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_of_wrapped_modules(folder, tensors, theirs, wrap):
    store(folder, {wrap(name): tensor for name, tensor in tensors.items()})
    assert_same_logits(BertForMaskedLM.from_pretrained(folder), theirs)


def test_a_prefix_and_older_names_and_a_decoder(folder, tensors, theirs):
    tensors[DECODER] = tensors[WORD]
    tensors[DECODER_BIAS] = tensors.pop(BIAS)
    tensors["bert.pooler.dense.weight"] = torch.ones(32, 32)
    tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
    respelled = {
        f"module.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    store(folder, respelled)
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same_logits(model, theirs)
    report = model.load_report
    assert report.renamed["module.bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"
    assert report.renamed["module.cls.predictions.decoder.bias"] == BIAS
    assert report.tied == {f"module.{DECODER}": WORD}
    assert set(report.ignored) == {"module.bert.pooler.dense.weight", "module.bert.embeddings.position_ids"}


def test_every_name_of_the_table_shows_where_a_prefix_ends():
    for name, _ in NAMES:
        for hub in hub_names(name.replace(".N.", ".7.") + (".bias" if name == "head" else ".weight")):
            assert BEGINS.search("x." + hub).start() == 2, hub
            assert common_prefix(["x.y." + hub]) == "x.y."
            assert common_prefix([hub]) == ""


def test_two_models_in_one_file(folder, tensors):
    two = {f"{which}.{name}": tensor for which in ("student", "teacher") for name, tensor in tensors.items()}
    store(folder, two)
    with pytest.raises(ValueError, match=r"names in the file look like (student|teacher)\.") as caught:
        BertForMaskedLM.from_pretrained(folder)
    assert str(folder / WEIGHTS) in str(caught.value)
    assert "nearest to bert.encoder.layer.0.attention.self.query.weight is" in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- tied


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bias", [BIAS, DECODER_BIAS])
def test_only_the_other_twin_of_the_word_embeddings(folder, tensors, theirs, prefix, bias):
    tensors[DECODER] = tensors.pop(WORD)
    tensors[bias] = tensors.pop(BIAS)
    store(folder, {prefix + name: tensor for name, tensor in tensors.items()})
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same_logits(model, theirs)
    assert model.load_report.renamed[prefix + DECODER] == WORD
    assert model.load_report.tied == {}


# ---------------------------------------------------------------------------------------------------------- other heads

OTHERS = [
    "BertModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
]


@pytest.mark.parametrize("name", OTHERS)
def test_another_tasks_head(tmp_path, name):
    theirs = random_weights(getattr(transformers, name)(transformers.BertConfig(**SIZES)))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without the masked-language-model head.*init_missing_head=True") as caught:
        BertForMaskedLM.from_pretrained(tmp_path)
    head = [key for key in load_file(tmp_path / WEIGHTS) if key.startswith(("classifier.", "qa_outputs."))]
    assert all(key in str(caught.value) for key in head)
    model = BertForMaskedLM.from_pretrained(tmp_path, init_missing_head=True)
    assert set(model.load_report.ignored) >= set(head)
    assert all(model.load_report.ignored.values())
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()  # the same encoder, and a head of its own
    with torch.inference_mode():
        got = model.encode(PackedBatch.from_padded(IDS))
        expected = again.bert(IDS).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_both_heads_of_pretraining(tmp_path):
    theirs = random_weights(transformers.BertForPreTraining(transformers.BertConfig(**SIZES)))
    theirs.save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = theirs(IDS).prediction_logits
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight",
        "base_model.model.classifier.modules_to_save.default.weight",
    ],
)
def test_adapters_that_are_not_merged(folder, tensors, name):
    store(folder, {**{f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match="merge_and_unload") as caught:
        BertForMaskedLM.from_pretrained(folder)
    assert name in str(caught.value)


def test_the_nearest_name_is_said(folder, tensors):
    tensors["bert.encoder.layer.1.attention.self.querry.weight"] = tensors.pop(
        wanted := "bert.encoder.layer.1.attention.self.query.weight"
    )
    store(folder, tensors)
    with pytest.raises(ValueError, match=rf"{re.escape(wanted)} is missing.*nearest to .* is .*querry"):
        BertForMaskedLM.from_pretrained(folder)


def test_names_of_another_model(folder, tensors):
    store(folder, {f"transformer.h.{number}.attn.weight": tensor for number, tensor in enumerate(tensors.values())})
    with pytest.raises(ValueError, match=r"no tensor .* BERT.*look like transformer\.h\.\d+\.attn\.weight"):
        BertForMaskedLM.from_pretrained(folder)


def test_two_spellings_of_one_tensor():
    with pytest.raises(ValueError, match="two spellings"):
        read_names([WORD, WORD.removeprefix("bert.")])
