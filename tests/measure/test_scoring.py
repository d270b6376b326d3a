"""What times scoring beside its peers: it runs, on the same texts each time, and the peers agree."""

import re

import pytest
from measure import scoring

from minibert import BertConfig, BertForMaskedLM, load_tokenizer


def test_the_texts_are_the_same_in_every_run_and_of_mixed_length():
    tokenizer = load_tokenizer("minibert-uncased")
    texts = scoring.make_texts(tokenizer, 200)
    assert texts == scoring.make_texts(tokenizer, 200)
    words = [len(text.split()) for text in texts]
    assert min(words) < 6
    assert 50 < max(words) <= 60
    encodings = tokenizer.encode_batch(texts)
    assert not any("[UNK]" in encoding.tokens for encoding in encodings)
    assert sum(token.startswith("##") for encoding in encodings for token in encoding.tokens) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what transformers has to say
def test_peers_agree_and_are_timed(tmp_path, capsys):
    tokenizer = load_tokenizer("minibert-uncased")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    BertForMaskedLM(BertConfig(**sizes, initializer_range=0.3)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    scoring.main(["--model", str(tmp_path), "--texts", "5", "--rounds", "1"])
    out = capsys.readouterr().out
    for name in (
        "minibert",
        "transformers, a text at a time",
        "transformers, and its head at the masked positions only",
    ):
        (row,) = re.findall(rf"^{name} +(\d+) +([\d.]+)× +(\S+)$", out, flags=re.MULTILINE)
        assert float(row[2]) < 1e-4
    assert "not the same" not in out


def test_a_peer_that_computes_something_else_is_named(capsys):
    scoring.print_table({"ours": [1.0], "theirs": [3.0]}, {"ours": [[-1.0, -2.0]], "theirs": [[-1.0, -2.1]]}, 1e-3)
    first, ours, theirs = capsys.readouterr().out.splitlines()
    assert "2 tokens" in first
    assert "not the same" not in ours
    assert re.search(r"theirs +1 +3.00× +1.0e-01 +more than 1e-03 nats: not the same", theirs)
