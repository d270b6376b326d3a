"""The files of a tokenizer, as they are found: each folder gives the ids that transformers gives, or is refused by the
real cause.
"""

import json
import re

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from minibert import load_tokenizer
from minibert.checkpoint.tokenizer_files import ADDED_TOKENS, ROLES, SETTINGS, SPECIAL_TOKENS, TOKENIZER, VOCABULARY
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


def flags(content, **changed):
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **plain, "special": True, **changed}


NEXT = str(len(TOKENS))  # the id of the first token that is added
DECODER = {str(number): flags(token) for number, token in enumerate(BASE)}
ADDED = {NEXT: flags("covid19", normalized=True, special=False), str(len(TOKENS) + 1): flags("[E1]")}
OLD_ADDED = {"covid19": len(TOKENS), "[E1]": len(TOKENS) + 1}
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "</s>", "mask_token": "<mask>"}
RENAMED = [*NAMES.values(), *WORDS]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(TOKENS) + 3}))
    return tmp_path


def write(folder, files):
    """Each file's content: a text, tokens, an object, or a tokenizer. config.json gets more keys."""
    for name, content in files.items():
        if name == "config.json":
            content = {**json.loads((folder / name).read_text()), **content}
        if isinstance(content, Tokenizer):
            content = content.to_str()
        elif isinstance(content, list):
            content = "".join(f"{token}\n" for token in content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    return folder


BERT, CASED = {"tokenizer_class": "BertTokenizer"}, {"do_lower_case": False}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def bert(tokens=TOKENS, more=(), **settings):
    """vocab.txt, the settings of BERT's class and these, and more files."""
    return {VOCABULARY: tokens, SETTINGS: {**BERT, **settings}, **dict(more)}


def other_algorithm():
    whole = from_vocabulary(TOKENS)
    whole.normalizer = normalizers.Sequence([normalizers.Replace("dog", "cat"), normalizers.Lowercase()])
    return whole


LISTED = {**DECODER, **ADDED}
FOLDERS = {
    "a class and nothing else": bert(),
    "the fast class": bert(tokenizer_class="BertTokenizerFast", do_lower_case=False),
    "another name of the class": bert(tokenizer_class="DistilBertTokenizer", do_lower_case=False),
    "accents kept": bert(strip_accents=False),
    "cased, without accents": bert(do_lower_case=False, strip_accents=True),
    "Chinese not split": bert(tokenize_chinese_chars=False),
    "added tokens": bert(added_tokens_decoder=LISTED),
    "added tokens, cased": bert(do_lower_case=False, added_tokens_decoder=LISTED),
    "only the added ones listed": bert(added_tokens_decoder=ADDED),
    "added tokens that strip": bert(added_tokens_decoder={**LISTED, "4": flags("[MASK]", lstrip=True, rstrip=True)}),
    "added tokens, single words": bert(added_tokens_decoder={**DECODER, NEXT: flags("[E1]", single_word=True)}),
    "a word as an added token": bert(added_tokens_decoder={**DECODER, "7": flags("cat", special=False)}),
    "a mask that was added": bert(mask_token="<mask>", added_tokens_decoder={NEXT: flags("<mask>")}),
    "extra special tokens": bert(extra_special_tokens=["[E1]", "<image>"]),
    "extra special tokens with names": bert(extra_special_tokens={"entity_token": "[E1]"}),
    "a token of another kind of model": bert(image_token="<image>"),
    "an end that is not in the vocabulary": bert(eos_token="</s>", extra_special_tokens=["[E1]"]),
    "special tokens are split": bert(split_special_tokens=True),
    "settings that do not matter": bert(model_max_length=5, padding_side="left", do_basic_tokenize=True),
    "vocab.txt alone": {VOCABULARY: TOKENS},
    "settings without a class": {VOCABULARY: TOKENS, SETTINGS: CASED},
    "the class in config.json": {VOCABULARY: TOKENS, SETTINGS: CASED, "config.json": BERT},
    "added_tokens.json": bert(more={ADDED_TOKENS: OLD_ADDED}),
    "added_tokens.json and special_tokens_map.json": bert(
        do_lower_case=False, more={ADDED_TOKENS: OLD_ADDED, SPECIAL_TOKENS: {"additional_special_tokens": ["[E1]"]}}
    ),
    "added_tokens.json, and which are special": bert(
        additional_special_tokens=["[E1]"], more={ADDED_TOKENS: OLD_ADDED}
    ),
    "other names in the settings": bert(RENAMED, **NAMES),
    "other names in special_tokens_map.json": {VOCABULARY: RENAMED, SPECIAL_TOKENS: NAMES},
    "other names in both": bert(RENAMED, mask_token="[X]", more={SPECIAL_TOKENS: NAMES}),
    "other names with flags": bert(
        RENAMED,
        more={SPECIAL_TOKENS: {**NAMES, "mask_token": {"__type": "AddedToken", **flags("<mask>", lstrip=True)}}},
    ),
    "special tokens last": bert(WORDS + BASE),
    "lines end as on Windows": {VOCABULARY: "\r\n".join(TOKENS) + "\r\n"},
    "no end of the last line": {VOCABULARY: "\n".join(TOKENS)},
    "spaces after the tokens": {VOCABULARY: "".join(f"{token}  \n" for token in TOKENS)},
    "a blank line at the end": {VOCABULARY: "\n".join(TOKENS) + "\n\n"},
    "a blank line in the middle": {VOCABULARY: "\n".join([*TOKENS[:8], "", *TOKENS[8:]]) + "\n"},
    "separators of lines as tokens": bert([*TOKENS, "\u2028", "\x85", "\u3000"]),
    "added to tokenizer.json": {TOKENIZER: from_vocabulary(TOKENS), SETTINGS: {**BERT, "added_tokens_decoder": LISTED}},
    "added to one that stands": {
        TOKENIZER: from_vocabulary(TOKENS),
        SETTINGS: {**FAST, "added_tokens_decoder": LISTED},
    },
    "another algorithm": {TOKENIZER: other_algorithm(), SETTINGS: FAST},
}


def same_ids(folder):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text).ids == expected, text
        for skip in (True, False):
            text = theirs.decode(expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(expected, skip_special_tokens=skip) == text
    pair, expected = ours.encode(TEXTS[0], TEXTS[1]), theirs(TEXTS[0], TEXTS[1], return_token_type_ids=True)
    assert (pair.ids, pair.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    for role in ROLES:
        if (token := getattr(theirs, f"{role}_token")) is not None:
            assert own_token(ours, f"[{role.upper()}]") == token
    assert set(special_ids(ours)) >= set(theirs.all_special_ids) - {None}
    return ours


@pytest.mark.parametrize("name", FOLDERS)
def test_same_ids(folder, name):
    same_ids(write(folder, FOLDERS[name]))


CLASSES = ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None]
CASES = [{}, CASED, {"do_lower_case": True}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("stored", CASES[:2], ids=json.dumps)
def test_two_files_that_contradict_each_other(folder, cls, stored):
    for settings in CASES:
        write(folder, {TOKENIZER: from_vocabulary(TOKENS, stored), SETTINGS: {"tokenizer_class": cls, **settings}})
        notes = " ".join(same_ids(folder).load_report.notes)
        as_it_stands = cls in ("PreTrainedTokenizerFast", "TokenizersBackend")
        assert ("stands as it is" in notes) == as_it_stands
        if not as_it_stands and settings.get("do_lower_case", True) != stored.get("do_lower_case", True):
            assert f"tokenizer.json has {stored.get('do_lower_case', True)}" in notes


def test_where_transformers_reads_them_otherwise(folder):
    """It puts its class's lower case over a tokenizer.json alone, and what editors leave behind into tokens."""
    write(folder, {TOKENIZER: from_vocabulary(TOKENS, CASED)})
    assert load_tokenizer(folder).encode("Cat").tokens == ["[CLS]", "Cat", "[SEP]"]
    assert load_tokenizer(folder).load_report.notes == ("pieces from tokenizer.json", "tokenizer.json stands as it is")
    (folder / TOKENIZER).unlink()
    write(folder, {VOCABULARY: "\ufeff" + "\n".join(TOKENS) + "\n \n"})
    assert load_tokenizer(folder).to_str() == from_vocabulary(TOKENS).to_str()


def test_the_report_says_what_was_read(folder):
    files = {SETTINGS: CASED, SPECIAL_TOKENS: {"mask_token": "[MASK]"}, ADDED_TOKENS: OLD_ADDED, VOCABULARY: TOKENS}
    report = load_tokenizer(write(folder, files)).load_report
    assert {path.name for path in report.files} == files.keys()
    said = "; ".join(report.notes)
    assert re.search(r"pieces from vocab\.txt.*strip_accents None \(BERT's default\).*2 added tokens", said)
    assert "do_lower_case False (tokenizer_config.json)" in said


# ---------------------------------------------------------------------------------------------------------------- saved


def files_in(folder, files):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return write(folder, files)


MORE = {
    "sides": {"padding_side": "left", "truncation_side": "left"},
    "a length": {"model_max_length": 17},
    "spaces are cleaned up": {"clean_up_tokenization_spaces": True},
    "inputs": {"model_input_names": ["input_ids"]},
    "what nobody knows": {"chat_template": "{{ x }}", "of_theirs": [1, {"a": 2}]},
}
BY_ROLE = {f"{role}_token": f"[{role.upper()}]" for role in ROLES}
SAID = {
    **{name: files for name, files in FOLDERS.items() if VOCABULARY in files and SETTINGS in files},
    **{name: bert(**settings) for name, settings in MORE.items()},
    "as it stands": {TOKENIZER: from_vocabulary(TOKENS, CASED), SETTINGS: {**FAST, "padding_side": "left", **BY_ROLE}},
}
del SAID["other names in both"]  # there another file says otherwise
ATTRIBUTES = (
    *("padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names", "all_special_tokens"),
    *("extra_special_tokens", "do_lower_case", "split_special_tokens", *(f"{role}_token" for role in ROLES)),
)


@pytest.mark.parametrize("name", SAID)
def test_a_save_keeps_all_that_was_said(folder, tmp_path, name):
    """By us, of our tokenizer and of transformers'; and by transformers."""
    theirs, ours = AutoTokenizer.from_pretrained(write(folder, SAID[name])), load_tokenizer(folder)
    said = {key: value for key, value in SAID[name][SETTINGS].items() if key != "added_tokens_decoder"}
    for number, given in enumerate((ours, theirs)):
        again = files_in(tmp_path / str(number), as_files(given, 64))
        saved, loaded = AutoTokenizer.from_pretrained(again), load_tokenizer(again)
        for key in ATTRIBUTES:
            assert str(getattr(saved, key, None)) == str(getattr(theirs, key, None)), key
        assert saved.model_max_length == said.get("model_max_length", 64)
        for text in TEXTS:
            assert loaded.encode(text).ids == saved(text)["input_ids"] == theirs(text)["input_ids"]
        if given is ours:
            assert loaded.get_vocab() == ours.get_vocab()
            assert {key: loaded.load_report.settings.get(key) for key in said} == said
    again = files_in(tmp_path / "theirs", {})
    theirs.save_pretrained(again)
    for cls in CLASSES[:4]:
        write(again, {SETTINGS: {**json.loads((again / SETTINGS).read_text()), "tokenizer_class": cls}})
        same_ids(again)


def test_a_tokenizer_that_was_changed_after_loading_is_saved_as_it_is(folder, tmp_path):
    tokenizer = load_tokenizer(write(folder, bert()))
    tokenizer.add_special_tokens(["[NEW]"])
    tokenizer.normalizer = normalizers.Replace("dog", "cat")
    again = files_in(tmp_path / "again", as_files(tokenizer, 64))
    for one in (load_tokenizer(again).encode, AutoTokenizer.from_pretrained(again)._tokenizer.encode):
        assert one("dog [NEW]").tokens == ["[CLS]", "cat", "[NEW]", "[SEP]"]
    assert AutoTokenizer.from_pretrained(again).extra_special_tokens == ["[NEW]"]


SPACED = "it ' s a [MASK] day , is it ? do n't ! we ' re . i 'm they 've you 're"


@pytest.mark.parametrize(
    "settings", [{}, *({"clean_up_tokenization_spaces": value} for value in (True, False))], ids=str
)
def test_spaces_before_a_full_stop_are_the_pipelines(folder, settings):
    write(folder, bert([*BASE, *dict.fromkeys(re.findall(r"\w+|[^\w ]", SPACED))], **settings))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(SPACED)["input_ids"]
    for tokenizer in (load_tokenizer(folder), as_tokenizer(theirs)):
        for skip in (True, False):
            assert decode(tokenizer, ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


# -------------------------------------------------------------------------------------------------------------- refused


def template(change):
    """A tokenizer.json in whose template something was changed, at which the library would panic."""
    values = json.loads(from_vocabulary(TOKENS).to_str())
    change(values["post_processor"])
    return {TOKENIZER: values}


JAPANESE = {"tokenizer_class": "BertJapaneseTokenizer"}
NO_MASK, NO_JSON = r"mask_token '<mask>' is not in the vocabulary", r"tokenizer\.json: not a tokenizer file"
STANDS = {
    TOKENIZER: from_vocabulary(TOKENS),
    SETTINGS: {"tokenizer_class": "TokenizersBackend", "mask_token": "<mask>"},
}
# What is in the files, and the cause: the file comes first if the case is of one file.
REFUSED = {
    "Japanese": (bert(**JAPANESE, word_tokenizer_type="mecab"), "BertJapaneseTokenizer"),
    "Japanese, by its settings": ({VOCABULARY: TOKENS, SETTINGS: {"mecab_kwargs": {}}}, "mecab_kwargs"),
    "Japanese, said in config.json": ({VOCABULARY: TOKENS, "config.json": JAPANESE}, "BertJapaneseTokenizer"),
    "Japanese with a tokenizer.json": (
        {TOKENIZER: from_vocabulary(TOKENS), SETTINGS: JAPANESE},
        "BertJapaneseTokenizer",
    ),
    "another class": (bert(tokenizer_class="AlbertTokenizer"), "AlbertTokenizer"),
    "no class": (bert(tokenizer_class=7), "tokenizer_class must be a name, not 7"),
    "a token twice": (bert([*TOKENS, "cat"]), r"vocab\.txt: 'cat' stands there 2 times, in lines 8 and 27"),
    "two blank lines": (bert([*TOKENS, "", "", "x"]), r"'' stands there 2 times, in lines 27 and 28"),
    "not UTF-8": (bert("[PAD]\n[UNK]\ncaf\udce9\n"), r"vocab\.txt: .*line 3 has the byte 0xe9"),
    "nothing": (bert(""), "unk_token .* not in the vocabulary of 0 tokens"),
    "no mask": (bert(TOKENS[:4] + WORDS), r"mask_token '\[MASK\]' is not in the vocabulary of 25 tokens"),
    "another mask that is not there": (bert(mask_token="<mask>"), NO_MASK),
    "a mask that is not in tokenizer.json": (STANDS, NO_MASK),
    "an added token with another id": (bert(more={ADDED_TOKENS: {"x": 31}}), "'x' has the id 31, but would get 26"),
    "the id of another": (bert(added_tokens_decoder={"7": flags("x")}), "'x' has the id 7, but would get"),
    "added tokens in a list": (bert(added_tokens_decoder=["x"]), "must map ids to tokens"),
    "an id that is none": (bert(more={ADDED_TOKENS: {"x": "y"}}), r"added_tokens\.json: 'y' is no id"),
    "a token that is none": (bert(mask_token=5), r"tokenizer_config\.json: 5 is no token"),
    "more tokens that are none": (bert(extra_special_tokens=5), r"tokenizer_config\.json: a list of tokens"),
    "more than are listed": (bert(extra_special_tokens=5, added_tokens_decoder={}), r"_config\.json: a list of tokens"),
    "flags that are none": (
        bert(more={SPECIAL_TOKENS: {"mask_token": {"content": "[MASK]", "lstrip": "yes"}}}),
        r"special_tokens_map\.json: lstrip of the token '\[MASK\]' must",
    ),
    "a token that is not listed": (template(lambda post: post["special_tokens"].pop("[SEP]")), NO_JSON),
    "no token": (template(lambda post: post["special_tokens"]["[SEP]"].update(tokens=["[END]"])), NO_JSON),
    "an id beyond all": (template(lambda post: post["special_tokens"]["[SEP]"].update(ids=[99999])), NO_JSON),
    "another token's id": (template(lambda post: post["special_tokens"]["[SEP]"].update(ids=[7])), NO_JSON),
    "another name": (
        template(lambda post: post["single"].append({"SpecialToken": {"id": "[E]", "type_id": 0}})),
        NO_JSON,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_real_cause(folder, name):
    files, cause = REFUSED[name]
    with pytest.raises(ValueError, match=cause) as caught:
        load_tokenizer(write(folder, files))
    assert str(folder) in str(caught.value)


# ----------------------------------------------------------------------------------------------------- no hard brackets


def test_special_tokens_of_other_names(folder):
    tokenizer = load_tokenizer(write(folder, bert(RENAMED, **NAMES)))
    again = Tokenizer.from_str(tokenizer.to_str())  # no settings: the names are those of the tokenizer itself
    for one in (tokenizer, again):
        assert [own_token(one, usual) for usual in BASE] == RENAMED[:5]
        assert [require_id(one, usual) for usual in BASE] == special_ids(one) == [0, 1, 2, 3, 4]
        assert encode(one, "the [MASK]", 9).ids == encode(one, "the <mask>", 9).ids  # it could mean no other
    tokenizer = load_tokenizer(write(folder, bert([*RENAMED, "[MASK]"], **NAMES)))
    assert require_id(tokenizer, "[MASK]") == RENAMED.index("<mask>")
    assert RENAMED.index("<mask>") not in encode(tokenizer, "the [MASK]", 9).ids  # here it is another token
    names = {"mask_token": "<blank>", "pad_token": "<void>"}
    tokenizer = load_tokenizer(write(folder, bert(["<void>", *BASE[1:4], "<blank>", *WORDS], **names)))
    assert [require_id(tokenizer, usual) for usual in BASE] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"no \[MASK\] token.*mask_token"):
        require_id(Tokenizer.from_str(tokenizer.to_str()), "[MASK]")
