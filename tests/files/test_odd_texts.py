"""Odd texts: what fill-mask answers, where score and study find the tokens, and which words mlm masks are those of
transformers' fast tokenizer, for some 200 texts.
"""

import itertools

import pytest
from small import VOCAB, assert_same_answers
from test_tokenizer import TEXTS as ODD
from transformers import BertForMaskedLM as HubBert
from transformers import BertTokenizer, pipeline

from minibert import BertForMaskedLM, FillMask, load_tokenizer, pseudo_log_likelihood
from minibert.mlm import mask_and_guess
from minibert.study.reading import read_text
from minibert.tokenizer import words_of

JOINED = "{} [MASK]|a {} [MASK]|[MASK] {} .|{}[MASK]{}|  {}   [MASK]  rain  |[MASK]{} [MASK]|{} is [MASK]\t".split("|")
TEXTS = [join.replace("{}", part[:40]) for part, join in itertools.product(ODD.values(), JOINED)]


@pytest.mark.slow
def test_odd_texts_are_read_as_transformers_reads_them(checkpoint):
    ours, tokenizer = BertForMaskedLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    hub = HubBert.from_pretrained(checkpoint).eval()
    theirs = BertTokenizer(vocab={token: number for number, token in enumerate(VOCAB)})
    fill, pipe = FillMask(ours, tokenizer), pipeline("fill-mask", model=hub, tokenizer=theirs, device="cpu")
    limit, seen = ours.config.max_position_embeddings, 0
    assert len(TEXTS) >= 200
    for text in TEXTS:
        expected = theirs(text, return_offsets_mapping=True)
        if len(expected["input_ids"]) > limit:
            for ask in (fill, lambda text: read_text(tokenizer, ours.config, text)):
                with pytest.raises(ValueError, match=f"tokens long and the model takes {limit}"):
                    ask(text)
            continue
        seen += 1
        mine, other = fill(text, top_k=3), pipe(text, top_k=3)
        assert_same_answers(mine, other)
        reading = read_text(tokenizer, ours.config, text)
        assert reading.ids == expected["input_ids"], text
        assert reading.words == words_of(tokenizer, tokenizer.encode(text), text) == renumbered(expected.word_ids())
        guessed = mask_and_guess(ours, tokenizer, text)
        assert (guessed.ids, guessed.input_ids) == (reading.ids, reading.ids), text
        (score,) = pseudo_log_likelihood(ours, tokenizer, [plain := text.replace("[MASK]", "a")])
        expected = theirs(plain, return_offsets_mapping=True)
        places = zip(expected["input_ids"], expected["offset_mapping"], strict=True)
        scored = [
            place for token, place in places if token == theirs.unk_token_id or token not in theirs.all_special_ids
        ]
        assert [(one.start, one.end) for one in score.tokens] == scored, text
    assert seen > 150


def renumbered(words):
    """Words in the order in which they come, from 0."""
    numbers = {}
    return [None if word is None else numbers.setdefault(word, len(numbers)) for word in words]
