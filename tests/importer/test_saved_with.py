"""A model saved as accelerate saves it, and with its tokenizer; and loaded as programs for transformers load theirs."""

import os
import tempfile
import threading
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from twins import CONFIGS

from minibert import BertConfig, BertForMaskedLM, FillMask, load_tokenizer
from minibert.checkpoint import writing
from minibert.mlm import mask_and_guess
from minibert.score import pseudo_log_likelihood
from minibert.study import study
from minibert.tokenizer import as_tokenizer, from_vocabulary
from minibert.training.tokens import token_files

SIZES = CONFIGS["batch 13, gelu"]
TEXTS = ["The cat sat.", "a [MASK] café, [UNK]!", "unbelievably", ""]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat a cafe café , . ! un ##believ ##ably The".split()


def make_model():
    torch.manual_seed(1)
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


def of_another_name():
    """A tokenizer whose tokens have other names, with one that was added, and which keeps upper case."""
    names = {f"{role}_token": f"<{role}>" for role in ("unk", "sep", "pad", "cls", "mask")}
    words = [word.replace("[", "<").replace("]", ">").lower() if word[0] == "[" else word for word in WORDS]
    added = {len(words): tokenizers.AddedToken("zyzzyva", normalized=False)}
    return from_vocabulary(words, {"do_lower_case": False, **names}, added)


def of_transformers():
    with tempfile.TemporaryDirectory() as folder:  # in all versions, and no other way
        (Path(folder) / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
        tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer(["The cat", "a"], padding=True, truncation=True, max_length=3)  # stays turned on inside of it
    return tokenizer


TOKENIZERS = {"ours": lambda: from_vocabulary(WORDS), "other names": of_another_name, "transformers": of_transformers}


@pytest.mark.parametrize("which", TOKENIZERS)
def test_a_tokenizer_saved_with_a_model_gives_the_same_ids_in_both_libraries(which, tmp_path):
    tokenizer = TOKENIZERS[which]()
    # What an earlier tokenizer left in the folder.
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "the", "cls_token": "cat"}')
    (tmp_path / "added_tokens.json").write_text('{"elephant": 18}')
    (tmp_path / "vocab.txt").write_text("cat\nsat\n[UNK]\n")
    make_model().save_pretrained(tmp_path, tokenizer=tokenizer)
    expected = as_tokenizer(tokenizer)
    again, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "zyzzyva zyzzyvas"]:
        for pair in (None, "a cat"):
            encoding = expected.encode(text, pair)
            assert again.encode(text, pair).ids == encoding.ids
            got = theirs(text, pair)
            assert got["input_ids"] == encoding.ids
            assert got["token_type_ids"] == encoding.type_ids
    mask = "<mask>" if which == "other names" else "[MASK]"
    assert theirs.mask_token == mask
    assert theirs.pad_token_id == again.token_to_id(theirs.pad_token) == 0
    assert len(theirs("cat " * 40, truncation=True)["input_ids"]) == SIZES["max_position_embeddings"]
    assert len(BertForMaskedLM.from_pretrained(tmp_path)(**theirs("a cat", return_tensors="pt")).logits[0]) == 4


def test_a_tokenizer_of_transformers_is_taken_everywhere(tmp_path):
    model, theirs, ours = make_model(), of_transformers(), as_tokenizer(of_transformers())
    text = "The cat sat , [MASK] a cafe sat !"
    assert FillMask(model, theirs)(text) == FillMask(model, ours)(text)
    assert mask_and_guess(model, theirs, text) == mask_and_guess(model, ours, text)
    scores = [list(pseudo_log_likelihood(model, each, ["a cat sat"])) for each in (theirs, ours)]
    assert scores[0] == scores[1]
    assert study(model, theirs, text).guesses == study(model, ours, text).guesses
    (tmp_path / "text.txt").write_text("\n".join([text.replace("[MASK]", "sat")] * 30))
    found = [token_files([str(tmp_path / "text.txt")], each, tmp_path / "tokens")[0] for each in (theirs, ours)]
    assert found[0].sha256 == found[1].sha256
    assert theirs.backend_tokenizer.truncation is not None, "the caller's own stays as it is"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("minibert-uncased", r"load_tokenizer makes one.*minibert-uncased"),
        (None, "not NoneType"),
        (BertConfig(), r"computed in Python.*BertConfig"),
    ],
)
def test_what_is_no_tokenizer_is_refused(given, said):
    with pytest.raises(TypeError, match=said):
        FillMask(make_model(), given)


def test_a_save_that_fails_leaves_model_and_tokenizer_as_they_were(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path, tokenizer=from_vocabulary(WORDS))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 1}))
    replace = os.replace
    for number in range(1, 6):
        calls = []

        def stop(source, target, calls=calls, number=number):
            calls.append(target)
            if len(calls) == number:
                raise OSError(28, "no space left")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(writing.os, "replace", stop)
            with pytest.raises(OSError, match="no space left"):
                other.save_pretrained(tmp_path, tokenizer=of_another_name())
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, f"at the {number}th file"


# ----------------------------------------------------------------------------------------------- accelerate's arguments


def test_what_accelerate_gives_is_written_by_the_main_process(tmp_path):
    model = make_model()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for main, folder in ((False, tmp_path / "other"), (True, tmp_path / "main")):
        model.save_pretrained(folder, is_main_process=main, state_dict=state, save_function=torch.save)
    assert not (tmp_path / "other").exists()
    again = BertForMaskedLM.from_pretrained(tmp_path / "main")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_tensors_of_another_model_are_not_written(tmp_path):
    model = make_model()
    state = model.state_dict()
    missing = {name: x for name, x in state.items() if name != "head.bias"}
    adapter = {**state, "layers.0.attention.qkv.lora_A.default.weight": torch.ones(3)}
    for wrong, said in (
        (missing, "tensor head.bias is missing"),
        ({**state, "elephant": torch.ones(3)}, "tensor elephant is not the model's"),
        ({**state, "head.bias": torch.ones(3)}, r"head.bias is \(3,\), and the model's is \(99,\)"),
        (adapter, "of an adapter: merge it"),
        ({"bert.embeddings.word_embeddings.weight": torch.ones(3)}, "a name of transformers"),
    ):
        with pytest.raises(ValueError, match=said):
            model.save_pretrained(tmp_path, state_dict=wrong)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda"), "abacus"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(ValueError, match=f"the device {device} cannot be used here, where there is cpu and no cuda"):
        BertForMaskedLM.from_pretrained("minibert-uncased", device=device)


@pytest.mark.slow
def test_loading_while_other_threads_load_and_compute(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    ids, wrong, done = torch.tensor([[3, 4, 5]]), [], threading.Event()
    expected = model(ids).logits

    def load():
        for _ in range(10):
            if not torch.equal(BertForMaskedLM.from_pretrained(tmp_path)(ids).logits, expected):
                wrong.append("loaded")

    def compute():
        while not done.is_set():
            if torch.empty(1).is_meta or torch.nn.Linear(1, 1).weight.is_meta:
                wrong.append("computed")

    threads = [threading.Thread(target=load) for _ in range(8)]
    other = threading.Thread(target=compute)
    other.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not wrong
    assert torch.utils._device.CURRENT_DEVICE is None, "what torch.compile takes for the default device"
