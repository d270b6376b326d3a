"""Odd texts: what fill-mask answers, where score and study find the tokens, and which words mlm masks are those of
transformers' fast tokenizer, for some 200 texts.
"""

import itertools

import pytest
import torch
from small import VOCAB
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
def test_odd_texts_are_read_as_transformers_reads_them(checkpoint, tmp_path):
    ours, tokenizer = BertForMaskedLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    hub = HubBert.from_pretrained(checkpoint).eval()
    theirs = BertTokenizer(vocab={token: number for number, token in enumerate(VOCAB)})
    fill, pipe = FillMask(ours, tokenizer), pipeline("fill-mask", model=hub, tokenizer=theirs, device="cpu")
    assert len(TEXTS) >= 200
    seen = 0
    limit = ours.config.max_position_embeddings
    for text in TEXTS:
        expected = theirs(text, return_offsets_mapping=True, truncation=True, max_length=limit)
        fits = len(theirs(text)["input_ids"]) <= limit
        if not fits:
            for ask in (fill, lambda text: read_text(tokenizer, ours.config, text)):
                with pytest.raises(ValueError, match=f"tokens long and the model takes {limit}"):
                    ask(text)
            continue
        for mine, other in zip(fill(text, top_k=3), pipe(text, top_k=3), strict=True):
            for one, two in zip(*([mine], [other]) if isinstance(mine, dict) else (mine, other), strict=True):
                assert (one["sequence"], one["token_str"]) == (two["sequence"], two["token_str"]), text
                assert one["score"] == pytest.approx(two["score"], rel=1e-4), text
        seen += 1
        reading = read_text(tokenizer, ours.config, text)
        assert reading.ids == expected["input_ids"], text
        encoding = tokenizer.encode(text)
        assert words_of(tokenizer, encoding, text) == renumbered(expected.word_ids()), text
        assert reading.words == words_of(tokenizer, encoding, text)
        guessed = mask_and_guess(ours, tokenizer, text)
        assert (guessed.ids, guessed.input_ids) == (reading.ids, reading.ids), text
        plain = text.replace("[MASK]", "rain")
        if len(theirs(plain)["input_ids"]) <= limit:
            expected = theirs(plain, return_offsets_mapping=True)
            (score,) = pseudo_log_likelihood(ours, tokenizer, [plain], within_word="original")
            special = set(theirs.all_special_ids) - {theirs.unk_token_id}
            places = [place for place, token in enumerate(expected["input_ids"]) if token not in special]
            assert [(one.start, one.end) for one in score.tokens] == [expected["offset_mapping"][at] for at in places]
            ids = torch.tensor([expected["input_ids"]] * len(places))
            ids[torch.arange(len(places)), places] = theirs.mask_token_id
            with torch.inference_mode():
                logits = hub(ids).logits.log_softmax(-1)
            found = [logits[row, at, expected["input_ids"][at]].item() for row, at in enumerate(places)]
            assert [one.log_probability for one in score.tokens] == pytest.approx(found, abs=1e-4), plain
    assert seen > 150


@pytest.mark.slow
def test_a_hundred_thousand_characters_without_a_space(checkpoint):
    """BERT makes one [UNK] of a word above 100 characters."""
    ours, tokenizer = BertForMaskedLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    text = "x" * 100_000
    assert FillMask(ours, tokenizer)(f"{text} [MASK]")[0]["sequence"].split()
    assert [one.token for one in next(pseudo_log_likelihood(ours, tokenizer, [text])).tokens] == ["[UNK]"]
    assert mask_and_guess(ours, tokenizer, f"{text} [MASK]").tokens == ["[CLS]", "[UNK]", "[MASK]", "[SEP]"]


def renumbered(words):
    """Words in the order in which they come, from 0."""
    numbers = {}
    return [None if word is None else numbers.setdefault(word, len(numbers)) for word in words]
