"""The files of a tokenizer, as they are found: each folder gives the ids that transformers gives, or is refused by the
real cause.
"""

import json
import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from minibert import BertConfig, BertForMaskedLM, FillMask, load_tokenizer
from minibert.checkpoint.tokenizer_files import ROLES
from minibert.tokenizer import (
    as_files,
    as_tokenizer,
    decode,
    encode,
    from_vocabulary,
    own_token,
    require_id,
    special_ids,
)

BASE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a cat dog Cat café cafe Café is in . , un ##able ##s 大 家 大家 paris PARIS i".split()
TOKENS = BASE + WORDS
TEXTS = [
    "The Cat is in PARIS, unable cats. Café 大家 i!",
    "[MASK] the [SEP] dog[MASK] <mask>",
    "covid19 [E1] COVID19 dog[E1]cat <image> </s>",
    "",
]
SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=64)


def flags(content, **changed):
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **plain, "special": True, **changed}


DECODER = {str(number): flags(token) for number, token in enumerate(BASE)}
ADDED = {
    str(len(TOKENS)): flags("covid19", normalized=True, special=False),
    str(len(TOKENS) + 1): flags("[E1]"),
}
OLD_ADDED = {"covid19": len(TOKENS), "[E1]": len(TOKENS) + 1}
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "</s>", "mask_token": "<mask>"}
RENAMED = [NAMES[f"{token.strip('[]').lower()}_token"] for token in BASE] + WORDS


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(TOKENS) + 3, **SIZES}))
    return tmp_path


def write(folder, **files):
    """vocab: a text, or tokens; settings, special_map, added, whole: what is in the other files; config: more of it."""
    names = {"settings": "tokenizer_config", "special_map": "special_tokens_map", "added": "added_tokens"}
    for key, value in files.items():
        if key == "vocab":
            text = value if isinstance(value, str) else "".join(f"{token}\n" for token in value)
            (folder / "vocab.txt").write_bytes(text.encode(errors="surrogateescape"))
        elif key == "whole":
            value.save(str(folder / "tokenizer.json"))
        elif key == "config":
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **value}))
        else:
            (folder / f"{names[key]}.json").write_text(json.dumps(value))
    return folder


BERT = {"tokenizer_class": "BertTokenizer"}
CASED = {"do_lower_case": False}
# vocab.txt, and in tokenizer_config.json the class of BERT and this.
BY_SETTINGS = {
    "a class and nothing else": {},
    "the fast class": {"tokenizer_class": "BertTokenizerFast", **CASED},
    "another name of the class": {"tokenizer_class": "DistilBertTokenizer", **CASED},
    "accents kept": {"strip_accents": False},
    "cased, without accents": {**CASED, "strip_accents": True},
    "Chinese not split": {"tokenize_chinese_chars": False},
    "added tokens": {"added_tokens_decoder": {**DECODER, **ADDED}},
    "added tokens, cased": {**CASED, "added_tokens_decoder": {**DECODER, **ADDED}},
    "only the added ones listed": {"added_tokens_decoder": ADDED},
    "added tokens that strip": {
        "added_tokens_decoder": {**DECODER, "4": flags("[MASK]", lstrip=True, rstrip=True), **ADDED}
    },
    "added tokens, single words": {
        "added_tokens_decoder": {**DECODER, str(len(TOKENS)): flags("[E1]", single_word=True)}
    },
    "a word of the vocabulary as an added token": {
        "added_tokens_decoder": {**DECODER, "7": flags("cat", special=False)}
    },
    "a mask that was added": {
        "mask_token": "<mask>",
        "added_tokens_decoder": {str(len(TOKENS)): flags("<mask>")},
    },
    "extra special tokens": {"extra_special_tokens": ["[E1]", "<image>"]},
    "extra special tokens with names": {"extra_special_tokens": {"entity_token": "[E1]"}},
    "a token of another kind of model": {"image_token": "<image>"},
    "an end that is not in the vocabulary": {"eos_token": "</s>", "extra_special_tokens": ["[E1]"]},
    "special tokens are split": {"split_special_tokens": True},
    "settings that do not matter": {"model_max_length": 5, "padding_side": "left", "do_basic_tokenize": True},
}
FOLDERS = {
    **{name: dict(vocab=TOKENS, settings={**BERT, **settings}) for name, settings in BY_SETTINGS.items()},
    "vocab.txt alone": dict(vocab=TOKENS),
    "settings without a class": dict(vocab=TOKENS, settings=CASED),
    "the class in config.json": dict(vocab=TOKENS, settings=CASED, config=BERT),
    "added_tokens.json": dict(vocab=TOKENS, settings=BERT, added=OLD_ADDED),
    "added_tokens.json without settings": dict(vocab=TOKENS, added=OLD_ADDED),
    "added_tokens.json and special_tokens_map.json": dict(
        vocab=TOKENS, settings=CASED, added=OLD_ADDED, special_map={"additional_special_tokens": ["[E1]"]}
    ),
    "special tokens in the settings": dict(
        vocab=TOKENS, added=OLD_ADDED, settings={**BERT, "additional_special_tokens": ["[E1]"]}
    ),
    "other names in the settings": dict(vocab=RENAMED, settings={**BERT, **NAMES}),
    "other names in special_tokens_map.json": dict(vocab=RENAMED, settings=BERT, special_map=NAMES),
    "other names in both": dict(vocab=RENAMED, settings={**BERT, "mask_token": "[X]"}, special_map=NAMES),
    "other names in special_tokens_map.json alone": dict(vocab=RENAMED, special_map=NAMES),
    "other names with flags in special_tokens_map.json": dict(
        vocab=RENAMED, special_map={**NAMES, "mask_token": {"__type": "AddedToken", **flags("<mask>", lstrip=True)}}
    ),
    "special tokens last": dict(vocab=WORDS + BASE, settings=BERT),
    "lines end as on Windows": dict(vocab="\r\n".join(TOKENS) + "\r\n"),
    "no end of the last line": dict(vocab="\n".join(TOKENS)),
    "spaces after the tokens": dict(vocab="".join(f"{token}  \n" for token in TOKENS)),
    "a blank line at the end": dict(vocab="\n".join(TOKENS) + "\n\n"),
    "a blank line in the middle": dict(vocab="\n".join([*TOKENS[:8], "", *TOKENS[8:]]) + "\n"),
    "separators of lines as tokens": dict(vocab=[*TOKENS, "\u2028", "\x85", "\u3000"], settings=BERT),
}
CLASSES = ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None]
CASES = [{}, CASED, {"do_lower_case": True}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]


def same_ids(folder):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = theirs(text)
        assert ours.encode(text).ids == expected["input_ids"], text
        for skip in (True, False):
            assert ours.decode(expected["input_ids"], skip_special_tokens=skip) == theirs.decode(
                expected["input_ids"], skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    pair, expected = ours.encode(TEXTS[0], TEXTS[1]), theirs(TEXTS[0], TEXTS[1], return_token_type_ids=True)
    assert (pair.ids, pair.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    for role in ("unk", "sep", "pad", "cls", "mask"):
        if (token := getattr(theirs, f"{role}_token")) is not None:
            assert own_token(ours, f"[{role.upper()}]") == token
    assert set(special_ids(ours)) >= set(theirs.all_special_ids) - {None}
    return ours


@pytest.mark.parametrize("name", FOLDERS)
def test_same_ids(folder, name):
    same_ids(write(folder, **FOLDERS[name]))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("settings", CASES, ids=json.dumps)
@pytest.mark.parametrize("stored", CASES[:2], ids=json.dumps)
def test_two_files_that_contradict_each_other(folder, cls, settings, stored):
    named = {} if cls is None else {"tokenizer_class": cls}
    write(folder, whole=from_vocabulary(TOKENS, stored), settings={**named, **settings})
    tokenizer = same_ids(folder)
    notes = " ".join(tokenizer.load_report.notes)
    as_it_stands = cls in ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert ("stands as it is" in notes) == as_it_stands
    if not as_it_stands and settings.get("do_lower_case", True) != stored.get("do_lower_case", True):
        assert f"tokenizer.json has {stored.get('do_lower_case', True)}" in notes


@pytest.mark.parametrize("cls", CLASSES[:4])
@pytest.mark.parametrize("name", [name for name in FOLDERS if "added" in name or "names" in name or "strip" in name])
def test_what_transformers_saves(folder, tmp_path_factory, name, cls):
    """The same tokenizer after AutoTokenizer has saved it, with a tokenizer.json."""
    again = tmp_path_factory.mktemp("again")
    theirs = AutoTokenizer.from_pretrained(write(folder, **FOLDERS[name]))
    theirs.save_pretrained(again)
    (again / "config.json").write_bytes((folder / "config.json").read_bytes())
    path = again / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": cls}))
    same_ids(again)


def test_added_tokens_of_the_settings_and_of_tokenizer_json(folder):
    write(folder, whole=from_vocabulary(TOKENS))
    for cls in ("BertTokenizer", "PreTrainedTokenizerFast"):
        write(folder, settings={"tokenizer_class": cls, "added_tokens_decoder": {**DECODER, **ADDED}})
        same_ids(folder)


def test_tokenizer_json_alone_stands_as_it_is(folder):
    """transformers puts the defaults of its class, lower case for one, in the place of what the file says."""
    write(folder, whole=from_vocabulary(TOKENS, CASED))
    assert load_tokenizer(folder).encode("Cat").tokens == ["[CLS]", "Cat", "[SEP]"]
    assert load_tokenizer(folder).load_report.notes == ("pieces from tokenizer.json", "tokenizer.json stands as it is")


def test_another_algorithm_in_tokenizer_json_stands_as_it_is(folder):
    whole = from_vocabulary(TOKENS)
    whole.normalizer = normalizers.Sequence([normalizers.Replace("dog", "cat"), normalizers.Lowercase()])
    write(folder, whole=whole, settings={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert same_ids(folder).encode("dog").tokens == ["[CLS]", "cat", "[SEP]"]


def test_a_byte_order_mark_is_no_part_of_the_first_token(folder):
    """transformers takes it for one: [PAD] then gets a new id, beyond the model."""
    expected = load_tokenizer(write(folder, vocab=TOKENS)).to_str()
    assert load_tokenizer(write(folder, vocab="\ufeff" + "\n".join(TOKENS) + "\n")).to_str() == expected


def test_the_report_says_what_was_read(folder):
    write(folder, vocab=TOKENS, settings={**CASED}, special_map={"mask_token": "[MASK]"}, added=OLD_ADDED)
    report = load_tokenizer(folder).load_report
    assert {path.name for path in report.files} == {
        *("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    said = "; ".join(report.notes)
    assert "pieces from vocab.txt" in said
    assert "do_lower_case False (tokenizer_config.json)" in said
    assert "strip_accents None (BERT's default)" in said
    assert "2 added tokens" in said


# ---------------------------------------------------------------------------------------------------------------- saved

MORE = {
    "sides": {"padding_side": "left", "truncation_side": "left"},
    "a length": {"model_max_length": 17},
    "spaces are cleaned up": {"clean_up_tokenization_spaces": True},
    "spaces are left": {"clean_up_tokenization_spaces": False},
    "inputs": {"model_input_names": ["input_ids"]},
    "what nobody knows": {"chat_template": "{{ x }}", "of_theirs": [1, {"a": 2}]},
}
BY_ROLE = {f"{role}_token": f"[{role.upper()}]" for role in ROLES}
SAID = {
    **{name: files for name, files in FOLDERS.items() if "settings" in files and "both" not in name},
    **{name: dict(vocab=TOKENS, settings={**BERT, **settings}) for name, settings in MORE.items()},
    "tokenizer.json as it stands": dict(
        whole=from_vocabulary(TOKENS, CASED),
        settings={"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **BY_ROLE},
    ),
}
ATTRIBUTES = (
    *("padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names", "all_special_tokens"),
    *("extra_special_tokens", "do_lower_case", "split_special_tokens", *(f"{role}_token" for role in ROLES)),
)


@pytest.mark.parametrize("way", ["ours", "transformers'"])
@pytest.mark.parametrize("name", SAID)
def test_a_save_keeps_all_that_was_said(folder, tmp_path_factory, name, way):
    theirs = AutoTokenizer.from_pretrained(write(folder, **SAID[name]))
    given = load_tokenizer(folder) if way == "ours" else theirs
    again = tmp_path_factory.mktemp("again")
    (again / "config.json").write_bytes((folder / "config.json").read_bytes())
    for file, text in as_files(given, 64).items():
        (again / file).write_text(text)
    saved = AutoTokenizer.from_pretrained(again)
    for key in ATTRIBUTES:
        assert str(getattr(saved, key, None)) == str(getattr(theirs, key, None)), key
    said = SAID[name]["settings"]
    assert saved.model_max_length == said.get("model_max_length", 64)
    assert way != "ours" or load_tokenizer(again).get_vocab() == load_tokenizer(folder).get_vocab()
    for text in TEXTS:
        assert load_tokenizer(again).encode(text).ids == saved(text)["input_ids"] == theirs(text)["input_ids"]
    written = load_tokenizer(again).load_report.settings
    assert way != "ours" or {key: written.get(key) for key in said if key != "added_tokens_decoder"} == {
        key: value for key, value in said.items() if key != "added_tokens_decoder"
    }


def test_a_tokenizer_that_was_changed_after_loading_is_saved_as_it_is(folder, tmp_path):
    tokenizer = load_tokenizer(write(folder, vocab=TOKENS, settings=BERT))
    tokenizer.add_special_tokens(["[NEW]"])
    tokenizer.normalizer = normalizers.Replace("dog", "cat")
    for file, text in as_files(tokenizer, 64).items():
        (tmp_path / file).write_text(text)
    for one in (load_tokenizer(tmp_path).encode, AutoTokenizer.from_pretrained(tmp_path)._tokenizer.encode):
        assert one("dog [NEW]").tokens == ["[CLS]", "cat", "[NEW]", "[SEP]"]
    assert AutoTokenizer.from_pretrained(tmp_path).extra_special_tokens == ["[NEW]"]


SPACED = "it ' s a [MASK] day , is it ? do n't ! we ' re . i 'm they 've you 're"


@pytest.mark.parametrize("value", [None, True, False])
def test_spaces_before_a_full_stop_are_the_pipelines(folder, value):
    write(folder, vocab=[*BASE, *dict.fromkeys(re.findall(r"\w+|[^\w ]", SPACED))], settings={**BERT})
    if value is not None:
        write(folder, settings={**BERT, "clean_up_tokenization_spaces": value})
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(SPACED)["input_ids"]
    for tokenizer in (load_tokenizer(folder), as_tokenizer(theirs)):
        for skip in (True, False):
            assert decode(tokenizer, ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


# -------------------------------------------------------------------------------------------------------------- refused

JAPANESE = {"tokenizer_class": "BertJapaneseTokenizer"}
WHOLE, NO_MASK = from_vocabulary(TOKENS), r"mask_token '<mask>' is not in the vocabulary"
LSTRIP = {"mask_token": {"content": "[MASK]", "lstrip": "yes"}}
AT_SEVEN = {"added_tokens_decoder": {"7": flags("covid19")}}
# What is in the files, and the cause: the file comes first if the case is of one file.
REFUSED = {
    "Japanese": (dict(settings={**JAPANESE, "word_tokenizer_type": "mecab"}), "BertJapaneseTokenizer"),
    "Japanese, by its settings": (dict(settings={"subword_tokenizer_type": "character"}), "subword_token"),
    "Japanese, said in config.json": (dict(settings=CASED, config=JAPANESE), "BertJapaneseTokenizer"),
    "Japanese with a tokenizer.json": (dict(whole=WHOLE, settings=JAPANESE), "BertJapaneseTokenizer"),
    "another class": (dict(settings={"tokenizer_class": "AlbertTokenizer"}), "AlbertTokenizer"),
    "no class": (dict(settings={"tokenizer_class": 7}), "tokenizer_class must be a name, not 7"),
    "a token twice": (dict(vocab=[*TOKENS, "cat"]), r"vocab\.txt: 'cat' stands there 2 times, in lines 8 and 27"),
    "two blank lines": (dict(vocab=[*TOKENS, "", "", "x"]), r"'' stands there 2 times, in lines 27 and 28"),
    "not UTF-8": (dict(vocab="[PAD]\n[UNK]\ncaf\udce9\n"), r"vocab\.txt: .*line 3 has the byte 0xe9"),
    "nothing": (dict(vocab=""), "unk_token .* not in the vocabulary of 0 tokens"),
    "no mask": (dict(vocab=TOKENS[:4] + WORDS), r"mask_token '\[MASK\]' is not in the vocabulary of 25 tokens"),
    "another mask that is not there": (dict(settings={"mask_token": "<mask>"}), NO_MASK),
    "a mask that is not in tokenizer.json": (
        dict(whole=WHOLE, settings={"tokenizer_class": "TokenizersBackend", "mask_token": "<mask>"}),
        NO_MASK,
    ),
    "an added token with another id": (dict(added={"covid19": 31}), "'covid19' has the id 31, but would get 26"),
    "an added token with the id of another": (dict(settings=AT_SEVEN), "'covid19' has the id 7, but would get"),
    "added tokens in a list": (dict(settings={"added_tokens_decoder": ["x"]}), "must map ids to tokens"),
    "an id that is none": (dict(added={"x": "y"}), r"added_tokens\.json: 'y' is no id"),
    "a token that is none": (dict(settings={"mask_token": 5}), r"tokenizer_config\.json: 5 is no token"),
    "flags that are none": (
        dict(special_map=LSTRIP),
        r"special_tokens_map\.json: lstrip of the token '\[MASK\]' must",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_real_cause(folder, name):
    files, cause = REFUSED[name]
    write(folder, **({} if "whole" in files else {"vocab": TOKENS}), **{k: v for k, v in files.items() if k != "vocab"})
    if "vocab" in files:
        write(folder, vocab=files["vocab"])
    with pytest.raises(ValueError, match=cause) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def spoil_template(folder, change):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values["post_processor"])
    path.write_text(json.dumps(values))


TEMPLATES = {
    "a token that it does not list": lambda post: post["special_tokens"].pop("[SEP]"),
    "a token that is not in the vocabulary": lambda post: post["special_tokens"]["[SEP]"].update(tokens=["[END]"]),
    "another id": lambda post: post["special_tokens"]["[SEP]"].update(ids=[99999]),
    "the id of another token": lambda post: post["special_tokens"]["[SEP]"].update(ids=[7]),
    "another name": lambda post: post["single"].append({"SpecialToken": {"id": "[END]", "type_id": 0}}),
}


@pytest.mark.parametrize("change", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_the_library_would_panic_at(folder, change):
    write(folder, whole=from_vocabulary(TOKENS))
    spoil_template(folder, change)
    with pytest.raises(ValueError, match="not a tokenizer file") as caught:
        load_tokenizer(folder)
    assert str(folder / "tokenizer.json") in str(caught.value)


# ----------------------------------------------------------------------------------------------------- no hard brackets


@pytest.fixture
def renamed(folder):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(RENAMED), **SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return write(folder, vocab=RENAMED, settings={**BERT, **NAMES})


def answers(folder, text, tokenizer=None):
    fill = FillMask(BertForMaskedLM.from_pretrained(folder), tokenizer or load_tokenizer(folder))
    return [(each["token"], each["token_str"], each["sequence"], each["score"]) for each in fill(text)]


def test_fill_mask_with_the_models_own_mask(renamed):
    theirs = transformers.BertForMaskedLM.from_pretrained(renamed)
    fill = transformers.pipeline("fill-mask", model=theirs, tokenizer=AutoTokenizer.from_pretrained(renamed))
    found = answers(renamed, "the cat is in <mask> .")
    for mine, other in zip(found, fill("the cat is in <mask> ."), strict=True):
        assert mine[:3] == (other["token"], other["token_str"], other["sequence"])
        assert mine[3] == pytest.approx(other["score"], abs=1e-6)
    assert answers(renamed, "the cat is in [MASK] .") == found  # there is no other token that it could mean
    with pytest.raises(ValueError, match="there is no <mask> in 'the cat'"):
        answers(renamed, "the cat")


def test_a_mask_in_brackets_that_is_another_token(folder):
    tokenizer = load_tokenizer(write(folder, vocab=[*RENAMED, "[MASK]"], settings={**BERT, **NAMES}))
    assert require_id(tokenizer, "[MASK]") == RENAMED.index("<mask>")
    assert require_id(tokenizer, "[MASK]") not in encode(tokenizer, "the [MASK]", 9).ids


def test_the_names_survive_in_tokenizer_json(renamed):
    """What `train` saves has no tokenizer_config.json: the names are those of the tokenizer itself."""
    expected = answers(renamed, "the cat is in <mask> .")
    again = Tokenizer.from_str(load_tokenizer(renamed).to_str())
    assert answers(renamed, "the cat is in [MASK] .", again) == expected
    for usual, own in zip(BASE, RENAMED, strict=False):
        assert own_token(again, usual) == own
        assert require_id(again, usual) == again.token_to_id(own)
    assert special_ids(again) == special_ids(load_tokenizer(renamed)) == [0, 1, 2, 3, 4]


def test_names_that_nobody_can_guess(folder):
    names = {"mask_token": "<blank>", "pad_token": "<void>"}
    vocabulary = ["<void>", "[UNK]", "[CLS]", "[SEP]", "<blank>", *WORDS]
    tokenizer = load_tokenizer(write(folder, vocab=vocabulary, settings={**BERT, **names}))
    assert [require_id(tokenizer, usual) for usual in BASE] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"no \[MASK\] token.*mask_token"):
        require_id(Tokenizer.from_str(tokenizer.to_str()), "[MASK]")


# --------------------------------------------------------------------------------------------------- ids without a word


def test_a_tokenizer_of_a_larger_model(folder):
    model = BertForMaskedLM(BertConfig(vocab_size=len(TOKENS), **SIZES)).eval()
    tokenizer = load_tokenizer(write(folder, vocab=TOKENS, settings={"added_tokens_decoder": ADDED}))
    with pytest.raises(ValueError, match=re.escape(f"{len(TOKENS) + 2} tokens and the model {len(TOKENS)}")):
        FillMask(model, tokenizer)
