"""Pseudo-log-likelihood, token by token, against transformers: one masked copy at a time, and padded copies."""

import gc
import random
from contextlib import nullcontext
from math import exp

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import BertTokenizerFast
from twins import CONFIGS, twins

from minibert import BertForMaskedLM, prepare_for_inference, pseudo_log_likelihood
from minibert.score import WITHIN_WORD, EncodedText, Score, pseudo_perplexity, score_pairs
from minibert.tokenizer import from_vocabulary

WORDS = "the cat sat on mat un play it is s t don ' . , ! ? a b café".split()
PIECES = ["##believ", "##able", "##ing", "##s", "##ly"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
LONGEST = 40
TEXTS = [
    "the cat sat on the mat.",
    "Unbelievingly, the cats don't play!",  # words of several pieces, capitals, an apostrophe
    "the zebra sat ☃",  # [UNK], twice
    "mat",
    "?",
    "unbelievable",
    "playing unbelievingly playings",
    ("the cat sat.", "it is unbelievable, playing."),
    ("a", "b"),
    "",
    " ",
]
# nats: what the issue asks for. The log-probabilities here are of order 3, and rounding is some tens of 2e-7.
NATS = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    return from_vocabulary(VOCABULARY)


@pytest.fixture(scope="module")
def pair_of_models():
    return twins({**CONFIGS["batch 13, gelu"], "vocab_size": len(VOCABULARY), "max_position_embeddings": LONGEST})


@pytest.fixture(scope="module", params=["plain", "prepared"])
def ours(request, pair_of_models):
    return pair_of_models[0] if request.param == "plain" else prepare_for_inference(pair_of_models[0])


@pytest.fixture(scope="module")
def hub_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY), encoding="utf-8")
    return BertTokenizerFast(vocab=str(path), vocab_file=str(path))


class Loop:
    """What someone writes who has only transformers: for each token a masked copy, and its log-probability there."""

    def __init__(self, model, tokenizer, within_word, padded):
        self.model, self.tokenizer, self.within_word, self.padded = model, tokenizer, within_word, padded

    def __call__(self, text, given=None):
        sentences = [given, text] if given is not None else [text] if isinstance(text, str) else list(text)
        encoding = self.tokenizer(*sentences)
        ids, types = encoding["input_ids"], encoding["token_type_ids"]
        ignored = {self.tokenizer.convert_tokens_to_ids(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
        scored = [
            place
            for place, token in enumerate(ids)
            if token not in ignored and (given is None or encoding.sequence_ids()[place] == 1)
        ]
        copies = []
        for place in scored:
            copy = list(ids)
            copy[place] = self.tokenizer.mask_token_id
            for right in range(place + 1, len(ids)) if self.within_word == "l2r" else []:
                if encoding.token_to_word(place) != encoding.token_to_word(right):
                    break
                copy[right] = self.tokenizer.mask_token_id
            copies.append(copy)
        logits = self.in_one_batch(copies, types) if self.padded else self.one_by_one(copies, types)
        return [logits[row][place].log_softmax(-1)[ids[place]].item() for row, place in enumerate(scored)]

    @torch.no_grad()
    def one_by_one(self, copies, types):
        return [
            self.model(input_ids=torch.tensor([copy]), token_type_ids=torch.tensor([types])).logits[0]
            for copy in copies
        ]

    @torch.no_grad()
    def in_one_batch(self, copies, types):
        if not copies:
            return []
        filled = [0] * (LONGEST - len(types))
        rows = len(copies)
        return self.model(
            input_ids=torch.tensor([copy + filled for copy in copies]),
            token_type_ids=torch.tensor([types + filled] * rows),
            attention_mask=torch.tensor([[1] * len(types) + filled] * rows),
        ).logits


def score_one(model, tokenizer, text, **options):
    (score,) = pseudo_log_likelihood(model, tokenizer, [text], **options)
    return score


def values(score):
    return [token.log_probability for token in score.tokens]


# ----------------------------------------------------------------------------------------------------- against the loop


@pytest.mark.parametrize("padded", [False, True], ids=["one at a time", "padded"])
@pytest.mark.parametrize("within_word", WITHIN_WORD)
def test_token_by_token_as_the_plain_loop(ours, pair_of_models, tokenizer, hub_tokenizer, within_word, padded):
    loop = Loop(pair_of_models[1], hub_tokenizer, within_word, padded)
    scores = list(pseudo_log_likelihood(ours, tokenizer, TEXTS, within_word=within_word))
    assert [score.text for score in scores] == TEXTS
    for score in scores:
        expected = loop(score.text)
        assert values(score) == pytest.approx(expected, abs=NATS)
        assert score.pll == pytest.approx(sum(expected), abs=NATS * max(1, len(expected)))


@pytest.mark.parametrize("within_word", WITHIN_WORD)
def test_what_is_given_is_seen_and_not_scored(ours, pair_of_models, tokenizer, hub_tokenizer, within_word):
    loop = Loop(pair_of_models[1], hub_tokenizer, within_word, padded=False)
    texts = [text for text in TEXTS if isinstance(text, str)]
    alone = list(pseudo_log_likelihood(ours, tokenizer, texts, within_word=within_word))
    scores = list(pseudo_log_likelihood(ours, tokenizer, texts, within_word=within_word, given="the unbelievable cat."))
    for score, without in zip(scores, alone, strict=True):
        assert values(score) == pytest.approx(loop(score.text, given="the unbelievable cat."), abs=NATS)
        places = [(token.token, token.start, token.end, token.sentence) for token in score.tokens]
        assert places == [(token.token, token.start, token.end, 0) for token in without.tokens]
        if score.tokens:
            assert abs(score.pll - without.pll) > 100 * NATS, "the context must matter"


def test_words_end_with_their_sentence_where_no_separator_stands_between(ours, tokenizer):
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.post_processor = processors.TemplateProcessing(single="$A", pair="$A:0 $B:1", special_tokens=[])
    left_to_right, original = (
        score_one(ours, bare, ("the", "unbelieving"), within_word=variant).tokens for variant in ("l2r", "original")
    )
    assert [token.token for token in original] == ["the", "un", "##believ", "##ing"]
    assert left_to_right[0].log_probability == pytest.approx(original[0].log_probability, abs=NATS)
    assert left_to_right[1].log_probability != pytest.approx(original[1].log_probability, abs=10 * NATS)


def test_the_two_variants_differ_in_words_of_several_pieces_only(ours, tokenizer):
    left_to_right, original = (
        next(pseudo_log_likelihood(ours, tokenizer, ["the unbelievingly playing cat"], within_word=variant)).tokens
        for variant in ("l2r", "original")
    )
    assert [token.token for token in original] == ["the", "un", "##believ", "##ing", "##ly", "play", "##ing", "cat"]
    differ = [
        abs(a.log_probability - b.log_probability) > 10 * NATS for a, b in zip(left_to_right, original, strict=True)
    ]
    assert differ == [False, True, True, True, False, True, False, False], "all but the last piece of a word"


# ------------------------------------------------------------------------------------------ how the copies are computed


def many_texts():
    generator = random.Random(0)
    return [" ".join(generator.choices(["unbelievable", *WORDS], k=generator.randint(0, 9))) for _ in range(60)]


@pytest.mark.parametrize(("window", "batch_tokens"), [(1, 1), (7, 30), (13, 10_000)])
def test_neither_order_nor_batch_size_matters(ours, tokenizer, monkeypatch, window, batch_tokens):
    texts = many_texts()
    together = list(pseudo_log_likelihood(ours, tokenizer, texts))
    monkeypatch.setattr("minibert.score.WINDOW", window)
    monkeypatch.setattr("minibert.score.BATCH_TOKENS", batch_tokens)
    alone = list(pseudo_log_likelihood(ours, tokenizer, texts))
    backwards = list(pseudo_log_likelihood(ours, tokenizer, reversed(texts)))[::-1]
    for other in (alone, backwards):
        assert [score.text for score in other] == texts
        for a, b in zip(together, other, strict=True):
            assert values(a) == pytest.approx(values(b), abs=NATS)


def test_only_the_masked_position_is_predicted_and_nothing_is_padded(pair_of_models, tokenizer, monkeypatch):
    model, asked = pair_of_models[0], []
    predict = model.predict

    def spy(batch, positions):
        asked.append((batch.num_tokens, batch.input_ids[positions].tolist()))
        return predict(batch, positions)

    monkeypatch.setattr(model, "predict", spy)
    texts = many_texts()
    scores = list(pseudo_log_likelihood(model, tokenizer, texts))
    tokens = [len(score.tokens) for score in scores]
    assert sum(number for number, _ in asked) == sum(n * (n + 2) for n in tokens)  # n copies, with [CLS] and [SEP]
    assert sum(len(masked) for _, masked in asked) == sum(tokens)
    assert {token for _, masked in asked for token in masked} == {VOCABULARY.index("[MASK]")}


def test_short_texts_do_not_make_a_huge_batch_of_logits(pair_of_models, tokenizer, monkeypatch):
    model, rows = pair_of_models[0], []
    predict = model.predict
    monkeypatch.setattr(
        model, "predict", lambda batch, positions: rows.append(len(positions)) or predict(batch, positions)
    )
    list(pseudo_log_likelihood(model, tokenizer, ["a b"] * 200))
    assert sum(rows) == 400
    assert max(rows) == 256  # × V: 31 MB in float32 for BERT's vocabulary


def test_memory_does_not_grow_with_the_number_of_texts(pair_of_models, tokenizer, monkeypatch):
    """While the 400th text is answered, nothing is left of the first ones, and no logits of an earlier batch."""
    monkeypatch.setattr("minibert.score.WINDOW", 8)
    monkeypatch.setattr("minibert.score.BATCH_TOKENS", 100)
    taken = []

    def reading():
        for number in range(400):
            taken.append(number)
            yield f"the cat sat on {WORDS[number % 10]}"

    stream = pseudo_log_likelihood(pair_of_models[0], tokenizer, reading())
    next(stream)
    assert len(taken) == 8, "the first answer comes when one window has been read"
    for number, _ in enumerate(stream, start=1):
        assert len(taken) - number <= 8
    del stream
    before = {id(one) for one in gc.get_objects()}
    stream = pseudo_log_likelihood(pair_of_models[0], tokenizer, reading())
    for _ in range(397):
        next(stream)
    alive = gc.get_objects()
    assert sum(type(one) is EncodedText for one in alive) <= 8
    assert sum(type(one) is Score for one in alive) <= 8
    tensors = [one for one in alive if type(one) is torch.Tensor and id(one) not in before and one.dim() == 2]
    assert not [one for one in tensors if one.shape[1] == len(VOCABULARY) and one.is_floating_point()]


# ---------------------------------------------------------------------------------------------------- texts and numbers


@pytest.mark.parametrize("text", ["The  CAT, unbelievable!", "☃ Café the", "don't", "a [MASK] b", "中cat a"])
def test_places_are_those_in_the_text(ours, tokenizer, text):
    with pytest.warns(match="MASK") if "[MASK]" in text else nullcontext():
        score = score_one(ours, tokenizer, text)
    for token in score.tokens:
        written = text[token.start : token.end].lower().replace("é", "e")
        assert token.token == "[UNK]" or token.token.removeprefix("##") == written
    covered = "".join(text[token.start : token.end] for token in score.tokens)
    assert covered == text.replace("[MASK]", "").replace(" ", "")


def test_a_mask_in_the_text_is_seen_and_counts_as_no_token(ours, pair_of_models, tokenizer, hub_tokenizer):
    texts = ["the [MASK] sat", "the cat sat", "[MASK] sat on [SEP] a [MASK]"]
    with pytest.warns(UserWarning, match=r"'the \[MASK\] sat' has \[MASK\] in it") as said:
        scores = list(pseudo_log_likelihood(ours, tokenizer, texts))
    assert len(said) == 1, "once for all texts"
    assert [[token.token for token in score.tokens] for score in scores] == [
        ["the", "sat"],
        ["the", "cat", "sat"],
        ["sat", "on", "a"],
    ]
    loop = Loop(pair_of_models[1], hub_tokenizer, "l2r", padded=False)
    for score in scores:
        assert values(score) == pytest.approx(loop(score.text), abs=NATS)
        assert score.pseudo_perplexity == pytest.approx(exp(-score.pll / len(score.tokens)))


@pytest.mark.filterwarnings("ignore:.*in it")
@pytest.mark.parametrize("text", ["[MASK] cat[MASK]sat", ("the [MASK] cat", "a [MASK] un [MASK] mat"), "the cat"])
def test_special_tokens_of_other_names(ours, tokenizer, text):
    """The same scores and places, whether the tokenizer's own mask is written or [MASK]."""
    names = {f"{role}_token": f"<<{role}>>" for role in ("pad", "unk", "cls", "sep", "mask")}
    other = from_vocabulary([*names.values(), *VOCABULARY[5:]], names)
    expected, got = score_one(ours, tokenizer, text), score_one(ours, other, text)
    assert values(got) == pytest.approx(values(expected), abs=NATS)
    assert [token[2:] for token in got.tokens] == [token[2:] for token in expected.tokens]
    if isinstance(text, str):
        assert values(score_one(ours, other, text.replace("[MASK]", "<<mask>>"))) == values(got)


def test_a_word_that_is_unknown_is_scored_as_unknown(ours, tokenizer):
    score = score_one(ours, tokenizer, "the zebra sat")
    assert [(token.token, token.start, token.end) for token in score.tokens][1] == ("[UNK]", 4, 9)


@pytest.mark.parametrize("text", ["", "  ", ("", "")])
def test_no_token_is_no_sum_and_no_perplexity(ours, tokenizer, text):
    assert score_one(ours, tokenizer, text) == Score(text, ())
    assert score_one(ours, tokenizer, text).pll == 0
    assert score_one(ours, tokenizer, text).pseudo_perplexity is None


def test_no_texts_are_no_scores(ours, tokenizer):
    assert list(pseudo_log_likelihood(ours, tokenizer, [])) == []


def test_the_perplexity_of_a_corpus(ours, tokenizer):
    scores = list(pseudo_log_likelihood(ours, tokenizer, TEXTS))
    everything = [value for score in scores for value in values(score)]
    got = pseudo_perplexity(sum(score.pll for score in scores), sum(len(score.tokens) for score in scores))
    assert got == pytest.approx(exp(-sum(everything) / len(everything)))


# --------------------------------------------------------------------------------------------------------------- errors


LONG = "the cat sat " * 20


def test_a_long_text_is_an_error_or_cut(ours, tokenizer):
    with pytest.raises(ValueError, match=rf"'the cat.*…': the text is 62 tokens long and the model takes {LONGEST}"):
        list(pseudo_log_likelihood(ours, tokenizer, ["a b", LONG]))
    cut = score_one(ours, tokenizer, LONG, truncate=True)
    assert cut.tokens == score_one(ours, tokenizer, " ".join(LONG.split()[: LONGEST - 2])).tokens
    assert cut.text == LONG


def test_of_two_sentences_the_longer_is_cut(ours, tokenizer):
    with pytest.raises(ValueError, match=f"66 tokens long and the model takes {LONGEST}"):
        score_one(ours, tokenizer, LONG, given="a b c")
    cut = score_one(ours, tokenizer, LONG, given="a b .", truncate=True)
    assert cut.tokens == score_one(ours, tokenizer, " ".join(LONG.split()[: LONGEST - 6]), given="a b .").tokens
    cut = score_one(ours, tokenizer, "a b .", given=LONG, truncate=True)
    assert cut.tokens == score_one(ours, tokenizer, "a b .", given=" ".join(LONG.split()[: LONGEST - 6])).tokens


def test_arguments_that_do_not_fit(ours, tokenizer):
    with pytest.raises(ValueError, match="put it into a list"):
        pseudo_log_likelihood(ours, tokenizer, "the cat")
    with pytest.raises(ValueError, match="must be one of l2r, original, not 'r2l'"):
        pseudo_log_likelihood(ours, tokenizer, [], within_word="r2l")
    with pytest.raises(ValueError, match="two sentences, and a third is given"):
        list(pseudo_log_likelihood(ours, tokenizer, [("a", "b")], given="c"))
    with pytest.raises(ValueError, match=f"tokenizer has {len(VOCABULARY) + 1} tokens and the model {len(VOCABULARY)}"):
        pseudo_log_likelihood(ours, from_vocabulary([*VOCABULARY, "dog"]), [])


@pytest.mark.parametrize("wrong", [5, None, ("a",), ("a", "b", "c")])
def test_what_is_no_text_gets_a_sentence(ours, tokenizer, wrong):
    with pytest.raises(TypeError, match=f"must be a str, or a tuple of two, not {type(wrong).__name__} "):
        list(pseudo_log_likelihood(ours, tokenizer, ["a", wrong]))
    with pytest.raises(TypeError, match="a text must be a str, not int 5"):
        list(pseudo_log_likelihood(ours, tokenizer, [("a", 5)]))


def test_dropout_and_nan_are_errors(pair_of_models, tokenizer):
    model = BertForMaskedLM(pair_of_models[0].config)
    with pytest.raises(ValueError, match="dropout"):
        pseudo_log_likelihood(model, tokenizer, [])
    with torch.no_grad():
        model.eval().head.bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not a number"):
        list(pseudo_log_likelihood(model, tokenizer, ["a"]))


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_pairs(ours, tokenizer):
    # The sides differ in length, and a token costs about log 30 nats: no random weights make a tie of them.
    pairs = [("the cat sat", "the cat"), ("a b", "b b a"), ("The cat", "the CAT"), ("unbelievable", "play")]
    scored = list(score_pairs(ours, tokenizer, iter(pairs), given="mat"))
    assert [(pair.good.text, pair.bad.text) for pair in scored] == pairs
    for pair in scored:
        for side in (pair.good, pair.bad):
            assert side.pll == pytest.approx(score_one(ours, tokenizer, side.text, given="mat").pll, abs=1e-4)
        if pair.good.text.lower() == pair.bad.text.lower():
            assert pair.outcome == "tie"
        else:
            assert pair.outcome == ("win" if pair.good.pll > pair.bad.pll else "loss")
    turned = [pair.outcome for pair in score_pairs(ours, tokenizer, [(bad, good) for good, bad in pairs], given="mat")]
    assert turned == [{"win": "loss", "loss": "win", "tie": "tie"}[pair.outcome] for pair in scored]


def test_a_pair_with_nothing_on_one_side_is_an_error(ours, tokenizer):
    with pytest.raises(ValueError, match=r"nothing to score in one of the pair 'the cat \| '"):
        list(score_pairs(ours, tokenizer, [("the cat", "")]))
