"""tests/measure/quality.py on a tiny text: what it prints, and that all contenders are asked the same."""

import re

import pytest
import torch
from measure import quality

from minibert import BertForMaskedLM, load_tokenizer
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
def test_the_table_has_a_row_for_each_or_says_why_not(tiny, folder, capsys):
    quality.main([str(tiny.text), "--model", str(folder), "--lines", "4"])
    title, _, *table = capsys.readouterr().out.splitlines()
    _, _, files = tiny.load()
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    expected = evaluate(model, tokenizer, files, max_length=40, lines=4)["all"]
    lines = min(4, len(files[0].held_out))
    assert f"{lines} held-out lines, {expected['masked_tokens']:.0f} masked tokens" in title
    rows = {re.split(r"  +", line)[0]: line for line in table if "absent: " not in line}
    assert f" {expected['loss']:.4f} " in rows["minibert float32"], "the rows of `evaluate`"
    absent = [line for line in table if "absent: " in line]
    assert len(rows) + len(absent) == len(quality.LINEUP)
    if working_ways(torch.int8):
        more, error = re.search(r"([+-]\d\.\d{4}) ± (\d\.\d{4})", rows["minibert int8"]).groups()
        assert 0 < abs(float(more)) < 0.1  # nats, where a guess among all words costs 6
        assert 0 < float(error) < 0.1


def test_a_peer_is_asked_the_same(tiny, folder):
    """Token for token: the same computation has the same losses."""
    _, tokenizer, files = tiny.load()
    works = quality.held_out(files, tokenizer, lines=20, max_length=40)
    assert max(len(work.lengths) for work in works) <= quality.ROWS
    ours, theirs = (
        quality.measure(contenders.build(name, "float32", "inference", folder, "cpu"), works)
        for name in ("minibert prepared", "sdpa")
    )
    assert ours[0].std() > 0.3, "or it would show nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_beside_a_difference_stands_its_standard_error(capsys):
    """The mean of 4 differences of 0 and 2 is 1, their standard deviation 2 / √3, and the error half of that."""
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    quality.print_table([("first", zeros), ("second", torch.tensor([[0.0, 2.0, 0.0, 2.0], [0.0, 1.0, 0.0, 1.0]]))])
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == [
        *("1.0000", "+1.0000", "±", "0.5774", "50.00%", "+50.00", "±", "28.87"),
    ]
