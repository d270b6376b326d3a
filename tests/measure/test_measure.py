"""What measures for the READMEs, on tiny models: all are asked the same, and the tables say what they mean."""

import re

import pytest
import torch
from measure import quality, scoring

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.bench import contenders
from minibert.inference.prepare import working_ways
from minibert.training.step import evaluate


@pytest.fixture
def folder(tiny, tmp_path):
    """A model with guesses that differ from place to place."""
    model = BertForMaskedLM.from_pretrained(tiny.start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model", tokenizer=load_tokenizer(tiny.start))
    return tmp_path / "model"


@pytest.mark.slow
def test_quality_has_a_row_for_each_or_says_why_not(tiny, folder, capsys):
    quality.main([str(tiny.text), "--model", str(folder), "--lines", "4"])
    title, _, *table = capsys.readouterr().out.splitlines()
    model, tokenizer, files = BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder), tiny.load()[2]
    expected = evaluate(model, tokenizer, files, max_length=40, lines=4)["all"]
    assert f"{min(4, len(files[0].held_out))} held-out lines, {expected['masked_tokens']:.0f} masked tokens" in title
    rows = {re.split(r"  +", line)[0]: line for line in table if "absent: " not in line}
    assert f" {expected['loss']:.4f} " in rows["minibert float32"], "the rows of `evaluate`"
    assert len(table) == len(quality.LINEUP)
    if working_ways(torch.int8):
        more, error = map(float, re.search(r"([+-]\d\.\d{4}) ± (\d\.\d{4})", rows["minibert int8"]).groups())
        assert 0 < abs(more) < 0.1  # nats, where a guess among all words costs 6
        assert 0 < error < 0.1


def test_a_peer_is_asked_the_same(tiny, folder):
    """Token for token: the same computation has the same losses."""
    _, tokenizer, files = tiny.load()
    works = quality.held_out(files, tokenizer, lines=20, max_length=40)
    assert max(len(work.lengths) for work in works) <= quality.ROWS
    built = (contenders.build(name, "float32", "inference", folder, "cpu") for name in ("minibert prepared", "sdpa"))
    ours, theirs = (quality.measure(one, works) for one in built)
    assert ours[0].std() > 0.3, "or it would show nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_beside_a_difference_stands_its_standard_error(capsys):
    """The mean of 4 differences of 0 and 2 is 1, their standard deviation 2 / √3, and the error half of that."""
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    quality.print_table([("first", zeros), ("second", torch.tensor([[0.0, 2.0, 0.0, 2.0], [0.0, 1.0, 0.0, 1.0]]))])
    expected = "1.0000 +1.0000 ± 0.5774 50.00% +50.00 ± 28.87"
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == expected.split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what transformers has to say
def test_scoring_agrees_with_its_peers_and_times_them(tmp_path, capsys):
    tokenizer = load_tokenizer("minibert-uncased")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    BertForMaskedLM(BertConfig(**sizes, initializer_range=0.3)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    scoring.main(["--model", str(tmp_path), "--texts", "5", "--rounds", "1"])
    out = capsys.readouterr().out
    rows = re.findall(r"^(\w+)(?:, .*)? +\d+ +[\d.]+× +(\S+)$", out, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["minibert", "transformers", "transformers"]
    assert max(float(difference) for _, difference in rows) < 1e-4
    scoring.print_table({"ours": [1.0], "theirs": [3.0]}, {"ours": [[-1.0, -2.0]], "theirs": [[-1.0, -2.1]]}, 1e-3)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"theirs +1 +3.00× +1.0e-01 +more than 1e-03 nats: not the same", last)
