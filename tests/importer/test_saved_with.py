"""A model saved with its tokenizer, and as accelerate saves it."""

import os
from concurrent.futures import ThreadPoolExecutor

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
TEXTS = ["The cat sat.", "a [MASK] café, [UNK]!", "unbelievably", "", "zyzzyva zyzzyvas"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat a cafe café , . ! un ##believ ##ably The".split()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


def of_another_name(_):
    """A tokenizer whose tokens have other names, with one that was added, and which keeps upper case."""
    names = {f"{role}_token": f"<{role}>" for role in ("unk", "sep", "pad", "cls", "mask")}
    words = [word.replace("[", "<").replace("]", ">").lower() if word[0] == "[" else word for word in WORDS]
    added = {len(words): tokenizers.AddedToken("zyzzyva", normalized=False)}
    return from_vocabulary(words, {"do_lower_case": False, **names}, added)


def of_transformers(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer(["The cat", "a"], padding=True, truncation=True, max_length=3)  # stays turned on inside of it
    return tokenizer


@pytest.mark.parametrize("make", [lambda _: from_vocabulary(WORDS), of_another_name, of_transformers])
def test_a_tokenizer_saved_with_a_model_gives_the_same_ids_in_both_libraries(make, model, tmp_path):
    tokenizer = make(tmp_path)
    # What an earlier tokenizer left in the folder.
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "the", "cls_token": "cat"}')
    (tmp_path / "added_tokens.json").write_text('{"elephant": 18}')
    (tmp_path / "vocab.txt").write_text("cat\nsat\n[UNK]\n")
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    again, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for pair in (None, "a cat"):
            expected, got = as_tokenizer(tokenizer).encode(text, pair), theirs(text, pair)
            assert again.encode(text, pair).ids == got["input_ids"] == expected.ids
            assert got["token_type_ids"] == expected.type_ids
    assert theirs.mask_token == ("<mask>" if make is of_another_name else "[MASK]")
    assert theirs.pad_token_id == again.token_to_id(theirs.pad_token) == 0
    assert len(theirs("cat " * 40, truncation=True)["input_ids"]) == SIZES["max_position_embeddings"]


def test_a_tokenizer_of_transformers_is_taken_everywhere(model, tmp_path):
    theirs = of_transformers(tmp_path)
    ours, text = as_tokenizer(theirs), "The cat sat , [MASK] a cafe sat !"
    (tmp_path / "text.txt").write_text("\n".join([text.replace("[MASK]", "sat")] * 30))
    for ask in (
        lambda tokenizer: FillMask(model, tokenizer)(text),
        lambda tokenizer: mask_and_guess(model, tokenizer, text),
        lambda tokenizer: list(pseudo_log_likelihood(model, tokenizer, ["a cat sat"])),
        lambda tokenizer: study(model, tokenizer, text).guesses,
        lambda tokenizer: token_files([str(tmp_path / "text.txt")], tokenizer, tmp_path / "tokens")[0].sha256,
    ):
        assert ask(theirs) == ask(ours)
    assert theirs.backend_tokenizer.truncation is not None, "the caller's own stays as it is"


def test_a_save_that_fails_leaves_model_and_tokenizer_as_they_were(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, tokenizer=from_vocabulary(WORDS))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other, replace = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 1})), os.replace
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
                other.save_pretrained(tmp_path, tokenizer=of_another_name(None))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, f"at the {number}th file"


# ----------------------------------------------------------------------------------------------- accelerate's arguments


def test_what_accelerate_gives_is_written_by_the_main_process(model, tmp_path):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", is_main_process=False, state_dict=state, save_function=torch.save)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path, is_main_process=True, state_dict=state, save_function=torch.save)
    again = BertForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


def test_tensors_of_another_model_are_not_written(model, tmp_path):
    state = model.state_dict()
    for wrong, said in (
        ({name: x for name, x in state.items() if name != "head.bias"}, "tensor head.bias is missing"),
        ({**state, "elephant": torch.ones(3)}, "tensor elephant is not the model's"),
        ({**state, "head.bias": torch.ones(3)}, r"head.bias is \(3,\), and the model's is \(99,\)"),
        ({**state, "layers.0.attention.qkv.lora_A.default.weight": torch.ones(3)}, "of an adapter: merge it"),
        ({"bert.embeddings.word_embeddings.weight": torch.ones(3)}, "a name of transformers"),
    ):
        with pytest.raises(ValueError, match=said):
            model.save_pretrained(tmp_path, state_dict=wrong)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_loading_while_other_threads_load_and_compute(model, tmp_path):
    """While it loads, a thread makes tensors without memory: that thread alone."""
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    expected = model(ids).logits

    def load():
        return torch.equal(BertForMaskedLM.from_pretrained(tmp_path)(ids).logits, expected)

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(load) for _ in range(80)]
        while not all(answer.done() for answer in answers):
            assert not torch.empty(1).is_meta
            assert not torch.nn.Linear(1, 1).weight.is_meta
    assert all(answer.result() for answer in answers)
    assert torch.utils._device.CURRENT_DEVICE is None, "what torch.compile takes for the default device"
