"""`minibert parity`, with transformers and without, and `assert_parity`: right models pass, planted faults do not. And
tokenizers compared.
"""

import json
import re
import sys
import warnings
from functools import partial

import pytest
import torch
import transformers
from planted import PLANTED, port
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from twins import CONFIGS, assert_same_gradients, assert_same_logits_and_loss, assert_same_submodules, twins

import minibert.attention
import minibert.masked_lm
import minibert.model
from minibert import BertForMaskedLM, load_tokenizer
from minibert.checkpoint import hub
from minibert.checkpoint.files import sha256
from minibert.cli import main
from minibert.parity import assert_parity, golden

SIZES = CONFIGS["3 heads, gelu_new"]
ROWS = ["intermediates", "logits", "loss", "gradients", "padding invariance", "batch invariance", "masking"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    twins(SIZES)[0].save_pretrained(path)
    return str(path)


def parity(capsys, *options):
    status = main(["parity", *options, "--json"])
    out = capsys.readouterr()
    return status, json.loads(out.out) if out.out else out.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_any_folder_of_weights_has_parity(folder, dtype, capsys):
    status, report = parity(capsys, "--model", folder, "--dtype", dtype)
    assert (status, report["ok"]) == (0, True)
    assert [row["name"] for row in report["rows"]] == ROWS
    assert all(row["value"] <= row["bound"] for row in report["rows"])
    assert f"against transformers {transformers.__version__}: {dtype}, cpu" in report["title"]


def wrong(capsys, folder):
    status, report = parity(capsys, "--model", folder)
    assert status == 1
    return [row["name"] for row in report["rows"] if not row["ok"]], report["first_wrong"]


def test_each_row_can_fail(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:  # the formula stays right: only the fused kernel is wrong
        real = minibert.attention.sequences
        patch.setattr(minibert.attention, "sequences", lambda *given, **more: real(*given, **more) * 1.001)
        assert wrong(capsys, folder) == (["logits", "loss", "gradients", *ROWS[4:6]], "logits")
    with monkeypatch.context() as patch:
        patch.setitem(minibert.model.ACTIVATIONS, "gelu_new", nn.functional.gelu)
        names, first = wrong(capsys, folder)
        # The loss moves by 1.5e-6 of itself: 8 times what rounding explains, or a little more, as the processor rounds.
        assert [name for name in names if name != "loss"] == ["intermediates", "logits", "gradients"]
        assert first == "layers.0.activation"
    with monkeypatch.context() as patch:
        real_loss = minibert.masked_lm.masked_lm_loss
        patch.setattr(minibert.masked_lm, "masked_lm_loss", lambda logits, ids: real_loss(logits, ids.clamp(max=9)))
        assert wrong(capsys, folder)[0] == ["loss", "gradients"]
    with monkeypatch.context() as patch:
        patch.setattr("minibert.parity.check.mask_tokens", partial(minibert.mask_tokens, mask_fraction=0.7))
        assert wrong(capsys, folder)[0] == ["masking"]
    with monkeypatch.context() as patch:  # a row that knows what stands beside it
        real_forward = BertForMaskedLM.forward

        def forward(self, input_ids, *given, **more):
            out = real_forward(self, input_ids, *given, **more)
            return minibert.masked_lm.MaskedLMOutput(out.loss, out.logits + 1e-3 * (len(input_ids) == 1))

        patch.setattr(BertForMaskedLM, "forward", forward)
        assert wrong(capsys, folder) == (["padding invariance", "batch invariance"], None)


def test_without_transformers_the_golden_trace_is_used(capsys, monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    status, report = parity(capsys, "--model", "minibert-uncased")
    assert status == 0, report
    assert "golden trace, for transformers is not installed" in report["title"]
    assert [row["name"] for row in report["rows"]] == ROWS
    status, said = parity(capsys, "--model", folder)
    assert (status, "is of other weights than these" in said) == (2, True)
    assert "pip install transformers" in parity(capsys, "--dtype", "bfloat16")[1]
    with monkeypatch.context() as patch:
        patch.setitem(minibert.model.ACTIVATIONS, "gelu", minibert.model.ACTIVATIONS["gelu_new"])
        status, report = parity(capsys)
        assert (status, report["first_wrong"]) == (1, "layers.0.activation")
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.safetensors")
    status, said = parity(capsys)
    assert (status, said.count("\n")) == (2, 1)
    assert "an installed package has not): pip install transformers" in said


@pytest.mark.slow
def test_the_golden_trace_is_what_transformers_computes_with_the_bundled_weights(tmp_path):
    with safe_open(golden.PATH, framework="pt") as file:
        made_from = file.metadata()["sha256"]
    found = sha256(hub.locate(golden.BUNDLED).require(hub.WEIGHTS))
    assert made_from == found, f"the bundled weights are new: remake the golden trace with `{golden.REMAKE}`"
    golden.write(tmp_path / "new.safetensors")
    new, old = load_file(tmp_path / "new.safetensors"), load_file(golden.PATH)
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        if not name.startswith("float32."):  # other machines add in another order; float64 has 9 digits to spare
            atol = 1e-9 * float(old[name].double().abs().max()) + 1e-12
            torch.testing.assert_close(tensor, old[name], rtol=1e-6, atol=atol)


def frozen(model, names=""):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names not in name)
    return model


class Holds(nn.Module):
    """A user's module around BERT."""

    def __init__(self, model, factor=1.0):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, **asked):
        out = self.model(**asked)
        out.logits = out.logits * self.factor
        return out


class Step(Holds):
    def forward(self, batch):
        return self.model(**batch).loss


def adapted(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"])).eval()


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda model: model, "WRONG"),
        (nn.DataParallel, "as it is called"),
        pytest.param(partial(torch.compile, backend="eager"), "as it is called", marks=pytest.mark.slow),
        (Step, "alone: the outer module is called otherwise"),
        (adapted, "left out: the gradients of cls.predictions.bias"),
        (partial(frozen, names="layer.1.output.dense.bias"), "left out: the gradients of .*layer.1.output.dense.bias,"),
        (frozen, "left out: the gradients of cls.predictions.bias"),
    ],
)
def test_assert_parity_takes_real_modules_and_says_what_it_left_out(wrap, words):
    ours, theirs = twins(SIZES)
    other = wrap(theirs)
    assert_parity(ours, other)
    theirs.bert.encoder.layer[0].output.dense.bias.data += 0.1
    with pytest.raises(AssertionError, match=r"first wrong: layers\.0\.feed_forward\. ") as error:
        assert_parity(ours, other)
    assert re.search(words, str(error.value)), error.value


def test_assert_parity_sees_what_a_wrapper_and_eight_bits_change():
    ours, theirs = twins(SIZES)
    assert_parity(ours, ours)
    with pytest.raises(AssertionError, match="first wrong: logits"):
        assert_parity(ours, Holds(theirs, 1.01))
    with pytest.raises(ValueError, match=r"2 models of the kind BertForMaskedLM in .*ModuleList"):
        assert_parity(ours, nn.ModuleList([ours, theirs]))
    with pytest.raises(ValueError, match=r"not .*Linear"):
        assert_parity(ours, nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has another way to quantise now
        eight_bits = torch.ao.quantization.quantize_dynamic(theirs, {nn.Linear}, torch.qint8)
    with pytest.raises(AssertionError, match=r"first wrong: layers.0.query"):
        assert_parity(ours, eight_bits)
    assert_parity(ours, theirs.bfloat16())  # another dtype: the weights of `ours` are rounded too


def test_assert_parity_asks_the_inputs_that_it_is_given():
    """A fault of the last position shows only in a row that is so long."""
    ours, theirs = twins(SIZES)
    theirs.bert.embeddings.position_embeddings.weight.data[4] += 1
    short = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, -100, 7]])}
    assert_parity(ours, theirs, short)
    with pytest.raises(AssertionError, match=r"embeddings\.sum"):
        assert_parity(ours, theirs, {name: x.repeat(1, 2) for name, x in short.items()})
    with pytest.raises(ValueError, match="labels"):
        assert_parity(ours, theirs, {"input_ids": short["input_ids"]})


def test_the_checks_of_the_tests_see_faults():
    """tests/twins.py compares the models of tests/test_parity.py. A check that sees nothing would be green too."""
    for title, check in (
        ("attention mask ignored", assert_same_logits_and_loss),
        ("decoder untied", assert_same_gradients),  # of which all outputs are right
    ):
        ours, theirs, batch = port()
        check(ours, theirs, batch)
        with pytest.MonkeyPatch.context() as patch:
            PLANTED[title](theirs, patch)
            with pytest.raises(AssertionError):
                check(ours, theirs, batch)
    assert_same_submodules(ours, theirs, batch)
    ours.layers[1].attention.output.bias.data[7] += 1e-3
    with pytest.raises(AssertionError, match=r"attention\.output"):
        assert_same_submodules(ours, theirs, batch)


def with_part(name, value):
    """The bundled tokenizer with another part."""
    theirs = load_tokenizer("minibert-uncased")
    setattr(theirs, name, value)
    return theirs


def with_short_words():
    values = json.loads(load_tokenizer("minibert-uncased").to_str())
    values["model"]["max_input_chars_per_word"] = 20
    return Tokenizer.from_str(json.dumps(values))


CUT = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 101)])


@pytest.mark.parametrize(
    ("step", "text", "theirs"),
    [
        ("normalizer", "Café", lambda: with_part("normalizer", BertNormalizer(lowercase=True, strip_accents=False))),
        ("pre-tokenizer", "The quick brown fox", lambda: with_part("pre_tokenizer", WhitespaceSplit())),
        ("model", "pneumonoultra", with_short_words),
        ("post-processor", "The quick brown fox", lambda: with_part("post_processor", CUT)),
    ],
)
def test_of_two_tokenizers_the_first_text_and_the_step(tmp_path, capsys, step, text, theirs):
    theirs().save(str(tmp_path / "theirs.json"))
    assert main(["parity", "--tokenizer", str(tmp_path / "theirs.json")]) == 1
    said = capsys.readouterr().out
    assert f"differ first on '{text}" in said
    assert f"\n  step    {step}\n" in said


def test_the_same_tokenizer_and_a_file_that_is_none(tmp_path, capsys):
    load_tokenizer("minibert-uncased").save(str(tmp_path / "theirs.json"))
    assert main(["parity", "--tokenizer", str(tmp_path / "theirs.json")]) == 0
    assert "agree on all of" in capsys.readouterr().out
    status, report = parity(capsys, "--tokenizer", str(tmp_path / "theirs.json"))
    assert (status, report["ok"], report["step"]) == (0, True, None)
    (tmp_path / "theirs.json").write_text('{"model": 3}')
    for file, words in (("theirs.json", "not a tokenizer.json"), ("none.json", "no such file")):
        assert main(["parity", "--tokenizer", str(tmp_path / file)]) == 2
        assert words in capsys.readouterr().err
