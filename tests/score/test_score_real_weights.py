"""A published score, on the real bert-base-cased."""

import pytest
from needs import lacking

from minibert import BertForMaskedLM, load_tokenizer, pseudo_log_likelihood


@pytest.mark.real_weights
def test_hello_world_as_mlm_scoring_documents_it():
    """https://github.com/awslabs/mlm-scoring, README: bert-base-cased, the per-token scores of "Hello world!"."""
    try:
        model = BertForMaskedLM.from_pretrained("google-bert/bert-base-cased", local_files_only=True)
        tokenizer = load_tokenizer("google-bert/bert-base-cased", local_files_only=True)
    except OSError:
        lacking("real-weights", "google-bert/bert-base-cased is not in the hub's cache")
    (score,) = pseudo_log_likelihood(model, tokenizer, ["Hello world!"], within_word="original")
    assert [token.log_probability for token in score.tokens] == pytest.approx([-6.1267, -5.5014, -0.7826], abs=1e-3)
