"""The tokenizer against transformers' two (the one in Rust, and Google's Python), and against the notebook's ids."""

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import BertTokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from minibert import load_tokenizer
from minibert.tokenizer import (
    as_files,
    as_tokenizer,
    count_ids,
    decode,
    encode,
    from_vocabulary,
    require_id,
    special_ids,
    words_of,
)

LINCOLN = json.loads((Path(__file__).parents[1] / "lincoln.json").read_text())
BASE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "empty": "",
    "spaces": "  \t two   words \n\r three \u00a0 four\u2003five\u3000six ",
    "case": "HELLO Hello hELLo İstanbul ẞ Ǆ",
    "final sigma": "ΑΣ ΟΔΟΣ",
    "accents": "Crème brûlée, naïve façade, Ångström, Łódź, Điện Biên Phủ, ñ ö ü",
    "combining": "e\u0301 a\u0308\u0323 n\u0303o",
    "lone combining marks": "\u0301 \u0308\u0323 a \u0300",
    "ligatures and widths": "ﬁsh ﬂow ＡＢＣ １２３ ½ ² ™ Ⅷ",
    "chinese": "我爱北京天安门 and 上海2024年",
    "rare ideographs": "𠀀𪛖 㐀 豈 ｶﾀｶﾅ",
    "japanese": "東京タワーは333メートルです。がぎぐ",
    "korean": "안녕하세요 세계",
    "thai and hindi": "สวัสดีชาวโลก नमस्ते दुनिया",
    "arabic": "مرحبا بالعالم، كَيْفَ حَالُك؟",
    "hebrew": "שָׁלוֹם עולם, hello שלום",
    "right-to-left marks": "abc\u202edef\u202c \u200eab\u200f",
    "emoji": "I ❤️ 🍕 👩‍👩‍👧 🇫🇷 👍🏽!",
    "control characters": "a\x00b\x01c\x7fd\x1be\u0085f\ufffdg",
    "zero width": "zero\u200bwidth\u200djoin\u2060er\ufeffbom soft\u00adhyphen",
    "line separators": "a\u2028b\u2029c\x0bd\x0ce",
    "long word": "a" * 100 + " " + "b" * 101 + " " + "ab" * 5000,
    "long subword": "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "punctuation": "don't stop—me now… “quoted” (a)[b]{c} $5.99 50% a_b a-b c++ #1 @me ~^`|<>=&* ¿qué? ¡ay! « » 、。",
    "numbers": "1,234,567.89 1e-5 0xFF +44 20:30 3/4",
    "masks": "[MASK] of[MASK]the [mask] [ MASK ] [MASK][MASK]. [MASK",
    "special tokens": "[CLS] a [SEP] b [PAD] c [UNK] d [UNUSED1] [unused1]",
    "pieces": "##ing ##s # # un##able",
    "unknown": "\U0001f9ff\U0010ffff \ue000",
    "lincoln": LINCOLN["text"],
    "masked lincoln": LINCOLN["text"].replace("election", "[MASK]").replace("attacked", "[MASK]"),
}
SETTINGS = [
    {},
    {"do_lower_case": False},
    {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"tokenize_chinese_chars": False},
    {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True, "model_max_length": 512},
]


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer("minibert-uncased")


@pytest.fixture(scope="module")
def tokens(bundled):
    vocabulary = bundled.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def write_vocabulary(folder, tokens, settings=None):
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    return folder


@pytest.fixture(scope="module", params=SETTINGS, ids=json.dumps)
def family(request, tokens, tmp_path_factory):
    """Ours, transformers' Rust one and transformers' Python one, from one vocab.txt and its settings."""
    folder = write_vocabulary(tmp_path_factory.mktemp("vocabulary"), tokens, request.param)
    settings = {key: value for key, value in request.param.items() if key != "model_max_length"}
    legacy = BertTokenizerLegacy(str(folder / "vocab.txt"), **settings)
    return load_tokenizer(folder), BertTokenizer.from_pretrained(folder), legacy


@pytest.fixture(scope="module")
def hub(tokens, tmp_path_factory):
    return BertTokenizer.from_pretrained(write_vocabulary(tmp_path_factory.mktemp("hub"), tokens, {}))


def test_lincoln_gives_the_notebooks_62_ids(bundled):
    expected = list(LINCOLN["ids"])
    assert len(expected) == 62
    assert bundled.encode(TEXTS["lincoln"]).ids == expected
    expected[9] = expected[43] = 103
    assert bundled.encode(TEXTS["masked lincoln"]).ids == expected


# ------------------------------------------------------------------------------------------- against transformers


def test_same_ids_and_text_as_both_of_transformers(family):
    ours, rust, python = family
    for name, text in TEXTS.items():
        encoding, theirs = ours.encode(text), rust(text)
        ids = theirs["input_ids"]
        assert encoding.tokens == rust.convert_ids_to_tokens(ids), name
        assert encoding.ids == ids, name
        if name != "final sigma":  # Python knows that Σ at the end of a word becomes ς, Rust takes letter by letter
            assert encoding.ids == python(text)["input_ids"], name
        numbers = {}  # words in the order in which they come, from 0
        words = [None if word is None else numbers.setdefault(word, len(numbers)) for word in theirs.word_ids()]
        assert words_of(ours, encoding, text) == words, name
        for skip in (True, False):
            assert decode(ours, ids, skip_special_tokens=skip) == rust.decode(ids, skip_special_tokens=skip), name


words = st.sampled_from("the [MASK] café 北京 un ##able don't İ e\u0301 \u200b 👍🏽 . [SEP] ﬁ ß \u0301 \x00".split(" "))


mixtures = st.builds(lambda parts, between: between.join(parts), st.lists(words), st.sampled_from(["", " ", "\u3000"]))


@settings(deadline=None, max_examples=200)
@given(mixtures | st.text(max_size=60))
def test_any_text_gives_the_same_ids(bundled, hub, text):
    encoding, theirs = bundled.encode(text), hub(text)
    assert (encoding.ids, encoding.type_ids) == (theirs["input_ids"], theirs["token_type_ids"])


def test_pairs_have_two_token_types(family):
    ours, rust, python = family
    for pair in (("How are you?", "Fine, thanks."), ("a [MASK]", "b"), ("", "北京")):
        encoding, theirs = ours.encode(*pair), rust(*pair)
        assert encoding.ids == theirs["input_ids"] == python(*pair)["input_ids"]
        assert encoding.type_ids == theirs["token_type_ids"]
        assert encoding.type_ids.count(0) == len(ours.encode(pair[0]).ids)


def test_tokenizer_json_comes_before_the_vocabulary(bundled, tmp_path):
    bundled.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(write_vocabulary(tmp_path, BASE)).get_vocab() == bundled.get_vocab()


# --------------------------------------------------------------------------------------------------------- length

LONG = "the quick brown fox " * 10


def test_stored_truncation_and_padding_are_switched_off(bundled, tmp_path):
    stored = Tokenizer.from_str(bundled.to_str())
    stored.enable_truncation(8)
    stored.enable_padding(length=64)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert [len(one.ids) for one in tokenizer.encode_batch(["fox", LONG])] == [3, 42]


@pytest.mark.parametrize("length", [41, 8, 3, 2])
def test_what_is_too_long_is_an_error_or_cut(bundled, length):
    with pytest.raises(ValueError, match=rf"42 tokens long and the model takes {length}.*truncate=True"):
        encode(bundled, LONG, length)
    own = Tokenizer.from_str(bundled.to_str())
    own.enable_truncation(20)
    for tokenizer in (bundled, own if length < 20 else bundled):  # a caller's own settings stay as they are
        encoding = encode(tokenizer, LONG, length, truncate=True)
        assert encoding.ids == [*bundled.encode(LONG).ids[: length - 1], require_id(bundled, "[SEP]")][:length]
    assert (own.truncation["max_length"], bundled.truncation) == (20, None)
    for truncate in (True, False):
        assert len(encode(bundled, LONG, 42, truncate=truncate).ids) == 42
        with pytest.raises(ValueError, match="1 has no room for the 2 special tokens"):
            encode(bundled, "", 1, truncate=truncate)


def test_of_two_sentences_the_longer_is_cut_as_transformers_does(bundled, hub):
    texts = ["", "fox", "the quick brown fox", LONG]
    for first, second in itertools.product(texts, texts[1:]):
        for length in (4, 8, 9, 30, 31):
            cut = encode(bundled, first, length, pair=second, truncate=True)
            theirs = hub(first, second, truncation=True, max_length=length)
            assert (cut.ids, cut.type_ids) == (theirs["input_ids"], theirs["token_type_ids"])


def test_a_mask_that_would_be_cut_off_is_an_error(bundled):
    for pair in (None, "fox"):
        with pytest.raises(ValueError, match=r"1 \[MASK\] in .* would be cut off: the model takes 20 tokens"):
            encode(bundled, f"[MASK] {LONG} [MASK]", 20, pair=pair, truncate=True)


# ---------------------------------------------------------------------------------------- tokenizers that others made

WORDS = [*BASE, "[", "]", "mask", "the", "cat", "sat", "on", "a", "mat", "."]


def by_hand(vocabulary=WORDS, declared=()):
    """A WordPiece tokenizer as somebody puts it together who has read the library's page."""
    made = Tokenizer(WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(list(declared))
    return made


@pytest.mark.parametrize("declared", [(), ("[PAD]",), ("[CLS]", "[SEP]", "[UNK]")])
def test_tokens_of_berts_roles_are_never_cut(declared, tmp_path):
    made, text = by_hand(declared=declared), "the [MASK] sat [SEP]"
    assert "[" in made.encode(text).tokens
    used = as_tokenizer(made)
    assert used.encode(text).tokens == ["[CLS]", "the", "[MASK]", "sat", "[SEP]", "[SEP]"]
    assert special_ids(used) == [0, 1, 2, 3, 4]
    assert used.decode(used.encode(text).ids) == "the sat"
    assert "[" in made.encode(text).tokens, "the caller's own stays as it is"
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(text).ids == used.encode(text).ids
    with pytest.raises(ValueError, match=r"not special.*add_special_tokens"):
        as_files(made, 9)
    made.add_special_tokens(BASE)
    assert as_tokenizer(made) is made


def test_what_a_caller_has_set_neither_cuts_nor_pads(bundled):
    own = Tokenizer.from_str(bundled.to_str())
    own.enable_truncation(8)
    own.enable_padding(length=64)
    for used in (as_tokenizer(own), as_tokenizer(PreTrainedTokenizerFast(tokenizer_object=own, mask_token="[MASK]"))):
        for text in (LONG, "fox"):
            assert used.encode(text).ids == bundled.encode(text).ids
    assert own.truncation["max_length"] == 8
    for wrong, cause in ((WordPiece(), "computed in Python"), ("bert-base-uncased", "load_tokenizer")):
        with pytest.raises(TypeError, match=cause):
            as_tokenizer(wrong)


def test_special_tokens_are_split_where_the_settings_say_so(tmp_path):
    tokenizer = load_tokenizer(write_vocabulary(tmp_path, WORDS, {"split_special_tokens": True}))
    tokenizer.enable_truncation(20)  # so that a copy is made
    for one in (tokenizer, as_tokenizer(tokenizer)):
        assert one.encode("a [MASK]").tokens == ["[CLS]", "a", "[", "mask", "]", "[SEP]"]


def test_an_extra_special_token_that_was_added_as_an_ordinary_one(tmp_path):
    added = {str(len(WORDS)): {"content": "[E1]", "special": False}}
    settings = {"added_tokens_decoder": added, "extra_special_tokens": ["[E1]"]}
    assert special_ids(load_tokenizer(write_vocabulary(tmp_path, WORDS, settings))) == [0, 1, 2, 3, 4, len(WORDS)]


def test_ids_of_a_vocabulary_with_gaps_are_counted_to_the_last():
    assert count_ids(from_vocabulary({**{token: n for n, token in enumerate(BASE)}, "fox": 40})) == 41


# ▁ in front of a word: the same pieces, of which the first tokenizer says which belong together.
PIECES = "▁the ▁cat ▁sat ▁un bel iev able ▁dog s ▁on ▁a ▁mat . ▁ ▁it ▁of▁the".split()
SENTENCES = ["the dogs unbelievable cat. sat on a mat.", "unbelievable", "the [MASK] sat on[MASK]able dogs", "of the a"]


@pytest.mark.parametrize("kind", ["metaspace", "no pre-tokenizer", "by hand"])
def test_words_are_found_where_the_tokenizer_tells_none(kind):
    pieces = [(piece, -float(n)) for n, piece in enumerate([*BASE, *PIECES])]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=1, byte_fallback=False))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if kind == "by hand":
            tokenizer.pre_tokenizer = pre_tokenizers.Split("xyz", "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(BASE)
    for text in SENTENCES:
        encoding, groups = tokenizer.encode(text, "the cats"), {}
        for word, token in zip(words_of(tokenizer, encoding, text, "the cats"), encoding.tokens, strict=True):
            groups[word] = groups.get(word, "") + token
        assert groups.pop(None) == "[CLS][SEP][SEP]"
        expected = [part for one in (text, "the cats") for part in re.findall(r"\[MASK\]|[^ \[]+", one)]
        found = [group.strip("▁") for group in groups.values() if group != "▁"]
        assert found == (expected if text != "of the a" else ["of▁the", "a", "the", "cats"])


def test_words_of_bytes_are_those_of_the_same_tokenizer_that_cuts():
    made = []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for cuts in (True, False):
        tokenizer = Tokenizer(BPE({token: n for n, token in enumerate([*BASE, *alphabet])}, [], unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts)
        tokenizer.add_special_tokens(BASE)
        made.append(tokenizer)
    text = "don't é 北 sat 1860. the end!"
    cutting, whole = (words_of(tokenizer, tokenizer.encode(text), text) for tokenizer in made)
    assert cutting == whole
    assert len(set(whole)) == 10


# --------------------------------------------------------------------------------------------------------- errors


def test_text_that_is_not_unicode_is_a_value_error(bundled):
    """Bytes on the command line that are no UTF-8 arrive as lone surrogates."""
    with pytest.raises(ValueError, match="surrogates"):
        encode(bundled, "caf\udce9", 512)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: .*neither a tokenizer.json nor a vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(tmp_path, name):
    write_vocabulary(tmp_path, BASE)
    for text in ("", "{", "[]", "\x00\x01", *(['{"version": "1.0"}'] if name == "tokenizer.json" else [])):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path / name}: not a (tokenizer|proper JSON) file"):
            load_tokenizer(tmp_path)
