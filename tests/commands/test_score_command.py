"""`minibert score`: what it prints, in which order, and what it refuses."""

import json

import pytest
import torch
from forms import form_or_skip

from minibert import BertForMaskedLM, load_tokenizer, pseudo_log_likelihood
from minibert.cli import main
from minibert.cli.score import WORTH_PREPARING

TEXTS = ["the rain in spain stays.", "rain rain rain", "Unbelievable", "a zebra"]


@pytest.fixture(scope="module")
def expected(folder):
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    return lambda texts, **options: list(pseudo_log_likelihood(model, tokenizer, texts, **options))


@pytest.mark.parametrize("options", [{}, {"within_word": "original"}, {"given": "the play"}])
def test_json_is_a_list_in_the_order_given(run, expected, options):
    typed = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    results = json.loads(run("score", *TEXTS, "--json", *typed))
    for result, score in zip(results, expected(TEXTS, **options), strict=True):
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


def test_lines_of_standard_input_are_texts_blank_ones_too(run, given):
    given("rain\n\n  \r\nthe play\r\n")
    results = json.loads(run("score", "a", "-", "plain", "--json"))
    assert [result["text"] for result in results] == ["a", "rain", "", "  ", "the play", "plain"]
    given("a plain\tplain a\r\nrain\tthe rain")
    results = json.loads(run("score", "--pairs", "-", "--json"))["results"]
    assert [(pair["good"], pair["bad"]) for pair in results] == [("a plain", "plain a"), ("rain", "the rain")]


@pytest.mark.filterwarnings("default::UserWarning")  # as outside pytest
def test_a_mask_in_a_text_is_said_in_one_line(folder, capsys):
    assert main(["score", "the [MASK] stays", "a [MASK]", "--json", "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "'the [MASK] stays' has [MASK] in it" in err
    assert [len(result["tokens"]) for result in json.loads(out)] == [2, 1]


def test_pairs(run, expected, tmp_path):
    pairs = [("the rain stays", "rain the stays"), ("a", "A"), ("rain.", "a rain a rain"), ("unbelievable", "play")]
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{good}\t{bad}\n" for good, bad in pairs), encoding="utf-8")
    plls = [[score.pll for score in expected(pair)] for pair in pairs]
    wins = sum(good > bad + 1e-3 for good, bad in plls)
    assert 0 < wins < 3
    out = run("score", "--pairs", str(file))
    assert out.startswith(f"the good one wins {wins} of 4: {wins / 4:.1%}, 95 % interval ")
    assert "\n1 tied (less than 0.0001 nats apart), which counts as not won" in out
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


def test_what_is_refused(folder, fails, given, tmp_path):
    def refused(*arguments):
        return fails("score", *arguments, "--model", str(folder))

    assert "nothing to score" in refused()
    given("")
    assert "there was no line on standard input" in refused("-")
    file = tmp_path / "pairs.tsv"
    assert f"--pairs {file}: no such file" in refused("--pairs", str(file))
    assert "it is a folder" in refused("--pairs", str(tmp_path))
    for raw, said in (
        (b"", "nothing to score"),
        (b"a\tb\nc\n", f"{file}, line 2: there should be a good and a bad sentence"),
        (b"a\tb\tc\n", "there are 3 columns"),
        (b"a\tb\n\n", "there are 1 columns"),
        (b"the cat\t\n", "nothing to score in one of the pair"),
        (b"a\tb\na\tcaf\xe9\n", f"{file}, line 2 is not UTF-8"),
    ):
        file.write_bytes(raw)
        assert said in refused("--pairs", str(file))
    assert "give one of the two" in refused("a", "--pairs", str(file))


def test_many_texts_are_prepared_for(run, given, prepared):
    for number, expected in ((WORTH_PREPARING - 1, []), (WORTH_PREPARING, [torch.float32])):
        given("the rain\n" * number)
        assert len(json.loads(run("score", "-", "--json"))) == number
        assert prepared == expected


# nats, of a log-probability of the bundled model: rounding; some tens of roundings to 2^-8 of logits of order 10; and
# of roundings to a 254th of the largest number of a row.
NATS = {"float32": 1e-3, "bfloat16": 0.2, "int8": 0.6}


@pytest.mark.parametrize("dtype", NATS)
def test_a_dtype_scores_nearly_the_same(capsys, dtype):
    """Also two texts alone, and it is that type: the last digits are others than those of float32."""
    form_or_skip({"float32": "torch", "bfloat16": "bfloat16 torch", "int8": "int8"}[dtype])

    def score(*options):
        texts = ["She has gone home.", "She has go home."]
        assert main(["score", *texts, "--json", "--model", "minibert-uncased", *options]) == 0
        results = json.loads(capsys.readouterr().out)
        assert results[0]["pll"] > results[1]["pll"] + 5, "11 nats in float32"
        return [token["log_probability"] for result in results for token in result["tokens"]]

    found, wanted = score("--dtype", dtype), score()
    assert found == pytest.approx(wanted, abs=NATS[dtype])
    assert (found == pytest.approx(wanted, abs=NATS["float32"])) == (dtype == "float32")
