"""What `minibert score` prints, in which order, and what it refuses."""

import json
import sys

import pytest

from minibert import pseudo_log_likelihood
from minibert.cli import main
from minibert.cli.texts import print_pairs
from minibert.score import Pair

TEXTS = ["the rain in spain stays.", "rain rain rain", "Unbelievable", "a zebra"]


@pytest.fixture(scope="module")
def expected(fill):
    return lambda texts: list(pseudo_log_likelihood(fill.model, fill.tokenizer, texts))


def test_json_is_a_list_in_the_order_given(run, expected):
    for result, score in zip(json.loads(run("score", *TEXTS, "--json")), expected(TEXTS), strict=True):
        assert result.keys() == {"text", "pll", "pseudo_perplexity", "tokens"}
        assert result["text"] == score.text
        assert result["pll"] == pytest.approx(score.pll, abs=1e-4)
        assert result["pseudo_perplexity"] == pytest.approx(score.pseudo_perplexity, rel=1e-4)
        for token, right in zip(result["tokens"], score.tokens, strict=True):
            assert token.keys() == {"token", "log_probability", "start", "end"}
            assert (token["token"], token["start"], token["end"]) == (right.token, right.start, right.end)
            assert token["log_probability"] == pytest.approx(right.log_probability, abs=1e-5)


def test_the_table_has_the_likeliest_first_and_all_together_last(run, expected):
    heading, *lines = run("score", "", *TEXTS).splitlines()
    assert heading.split() == ["PLL", "per", "token", "pseudo-perplexity"]
    scores = sorted(expected(TEXTS), key=lambda score: -score.pll)
    for line, score in zip(lines, scores, strict=False):
        pll, per_token, perplexity, text = line.split(maxsplit=3)
        assert text == score.text
        assert float(pll) == pytest.approx(score.pll, abs=6e-4)
        assert float(per_token) == pytest.approx(score.pll / len(score.tokens), abs=6e-4)
        assert float(perplexity) == pytest.approx(score.pseudo_perplexity, rel=1e-3)
    assert len(lines) == len(TEXTS) + 2
    assert lines[-2].endswith("(nothing to score in '')"), "no token is not the likeliest text"
    assert lines[-1].endswith(f"all 5 texts, {sum(len(score.tokens) for score in scores)} tokens")
    assert float(lines[-1].split()[0]) == pytest.approx(sum(score.pll for score in scores), abs=2e-3)
    assert len(run("score", "a plain").splitlines()) == 2, "one text is not summed up"


@pytest.mark.filterwarnings("default::UserWarning")  # as outside pytest
def test_a_mask_in_a_text_is_said_in_one_line(folder, capsys):
    assert main(["score", "the [MASK] stays", "a [MASK]", "--json", "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "'the [MASK] stays' has [MASK] in it" in err
    assert [len(result["tokens"]) for result in json.loads(out)] == [2, 1]


def test_pairs(run, given, expected, tmp_path):
    pairs = [("the rain stays", "rain the stays"), ("a", "A"), ("rain.", "a rain a rain"), ("unbelievable", "play")]
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{good}\t{bad}\n" for good, bad in pairs), encoding="utf-8")
    plls = [[score.pll for score in expected(pair)] for pair in pairs]
    wins = sum(good > bad + 1e-3 for good, bad in plls)
    assert 0 < wins < 3
    out = run("score", "--pairs", str(file))
    assert out.startswith(f"the good one wins {wins} of 4: {wins / 4:.1%}, 95 % interval ")
    assert "\n1 tied" in out
    given(file.read_bytes())
    assert run("score", "--pairs", "-") == out
    assert not sys.stdin.buffer.closed, "it is the caller's"
    found = json.loads(run("score", "--pairs", str(file), "--json"))
    assert (found["pairs"], found["wins"], found["ties"], found["losses"]) == (4, wins, 1, 3 - wins)
    assert found["share"] == wins / 4
    low, high = found["interval"]
    assert 0 < low < wins / 4 < high < 1
    for result, pair, (good_pll, bad_pll) in zip(found["results"], pairs, plls, strict=True):
        assert (result["good"], result["bad"]) == pair
        assert (result["good_pll"], result["bad_pll"]) == pytest.approx((good_pll, bad_pll), abs=1e-4)
        alike = abs(good_pll - bad_pll) < 1e-4
        assert result["outcome"] == ("tie" if alike else "win" if good_pll > bad_pll else "loss")


def test_a_pair_is_printed_before_the_next_is_computed(expected, capsys):
    def pairs():
        yield Pair(*expected(["the rain", "rain the"]))
        assert "rain the" in capsys.readouterr().out
        yield Pair(*expected(["a", "A"]))

    print_pairs(pairs(), as_json=True)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "raw", "said"),
    [
        ("", None, "nothing to score"),
        ("--pairs FILE", None, "--pairs FILE is no file: name one with a good and a bad sentence a line"),
        ("--pairs .", None, "--pairs . is no file"),
        ("--pairs FILE", b"", "nothing to score"),
        ("--pairs FILE", b"a\tb\nc\n", "FILE, line 2: "),
        ("--pairs FILE", b"a\tb\tc\n", "3 columns"),
        ("--pairs FILE", b"a\tb\n\n", "1 columns"),
        ("--pairs FILE", b"the cat\t\n", "nothing to score in one of the pair"),
        ("--pairs FILE", b"a\tb\na\tcaf\xe9\n", "FILE, line 2 is not UTF-8"),
        ("a --pairs FILE", b"a\tb\n", "give one of the two"),
    ],
)
def test_what_is_refused(arguments, raw, said, folder, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if raw is not None:
        (tmp_path / "FILE").write_bytes(raw)
    assert said in fails("score", *arguments.split(), "--model", str(folder))
