"""Pseudo-log-likelihoods of models in other types than float32."""

from math import log

import pytest
import torch
from forms import FORMS, TOLERANCE, form_or_skip
from test_score import LONGEST, NATS, TEXTS, VOCABULARY, values
from twins import CONFIGS, twins

from minibert import BertForMaskedLM, FillMask, prepare_for_inference, pseudo_log_likelihood
from minibert.tokenizer import from_vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return from_vocabulary(VOCABULARY)


@pytest.fixture(scope="module")
def ours():
    return twins({**CONFIGS["batch 13, gelu"], "vocab_size": len(VOCABULARY), "max_position_embeddings": LONGEST})[0]


def in_another_dtype(model, form):
    if form in FORMS:
        dtype, linear = form_or_skip(form)
        return prepare_for_inference(model, dtype, linear=linear)
    copy = BertForMaskedLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy.to(getattr(torch, form.split()[1]))


@pytest.mark.parametrize("form", ["plain bfloat16", "plain float64", "float64", "bfloat16 product", "int8"])
def test_other_dtypes(ours, tokenizer, form):
    """The log-probabilities of a model in bfloat16 are computed in float32 from its logits, those in float64 stay."""
    exact = list(pseudo_log_likelihood(ours, tokenizer, TEXTS))
    model = in_another_dtype(ours, form)
    # A log-probability is a logit and the logarithm of the sum of all: each is off by what forms.py says of a logit.
    nats = NATS if "float64" in form else 2 * TOLERANCE[torch.int8 if form == "int8" else torch.bfloat16]
    differences = []
    for score, expected in zip(pseudo_log_likelihood(model, tokenizer, TEXTS), exact, strict=True):
        assert values(score) == pytest.approx(values(expected), abs=nats)
        assert score.pll == pytest.approx(sum(values(score)), abs=1e-9)
        differences += [abs(a - b) for a, b in zip(values(score), values(expected), strict=True)]
        rounded = torch.tensor(values(score), dtype=torch.float64).bfloat16().tolist()
        assert not values(score) or values(score) != rounded, "computed in float32"
    assert (max(differences) > NATS) == ("float64" not in form)


@pytest.mark.parametrize("form", ["bfloat16 product", "int8"])
def test_a_score_is_the_probability_that_fill_mask_gives(ours, tokenizer, form):
    """Whatever the type, both read one distribution, and it adds up to 1."""
    model = in_another_dtype(ours, form)
    found = {row["token_str"]: row["score"] for row in FillMask(model, tokenizer)("the [MASK] sat", top_k=10**6)}
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    words = ["cat", "mat", "a", "?", "it"]
    scores = pseudo_log_likelihood(model, tokenizer, [f"the {word} sat" for word in words])
    for word, score in zip(words, scores, strict=True):
        # bfloat16: batches of other sizes are added up in another order, and a logit may be rounded the other way
        assert score.tokens[1].log_probability == pytest.approx(log(found[word]), abs=0.05)
