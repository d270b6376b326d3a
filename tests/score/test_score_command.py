"""`minibert score`: what it prints, in which order, and what it refuses."""

import io
import json
import re

import pytest
import torch
from forms import form_or_skip

from minibert import BertConfig, BertForMaskedLM, load_tokenizer, prepare_for_inference, pseudo_log_likelihood
from minibert.cli import main
from minibert.cli import score as command
from minibert.tokenizer import from_vocabulary

WORDS = "the cat sat on mat un play a b c .".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##believ", "##able"]
TEXTS = ["the cat sat on the mat.", "mat mat mat", "Unbelievable", "a zebra"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=37,
        max_position_embeddings=20,
        initializer_range=0.3,  # predictions that differ clearly
    )
    BertForMaskedLM(config).save_pretrained(path)
    from_vocabulary(VOCABULARY).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def run(folder, capsys):
    """The command with the tiny model: (what it printed, what it said on stderr). It must succeed."""

    def call(*arguments):
        assert main(["score", *arguments, "--model", str(folder)]) == 0
        return capsys.readouterr()

    return call


@pytest.fixture
def fails(folder, capsys):
    """The command must fail with status 2, nothing on stdout and one line on stderr: that line."""

    def call(*arguments):
        assert main(["score", *arguments, "--model", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"minibert score: .*\n", err), err
        return err

    return call


@pytest.fixture
def expected(folder):
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    return lambda texts, **options: list(pseudo_log_likelihood(model, tokenizer, texts, **options))


@pytest.fixture
def stdin(monkeypatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("options", [[], ["--within-word", "original"], ["--given", "the cat"]])
def test_json_is_a_list_in_the_order_given(run, expected, options):
    results = json.loads(run(*TEXTS, "--json", *options).out)
    names = {"--within-word": "within_word", "--given": "given"}
    scores = expected(TEXTS, **{names[options[0]]: options[1]} if options else {})
    for result, score in zip(results, scores, strict=True):
        assert result.keys() == {"text", "pll", "pseudo_perplexity", "tokens"}
        assert result["text"] == score.text
        assert result["pll"] == pytest.approx(score.pll, abs=1e-4)
        assert result["pseudo_perplexity"] == pytest.approx(score.pseudo_perplexity, rel=1e-4)
        for token, right in zip(result["tokens"], score.tokens, strict=True):
            assert token.keys() == {"token", "log_probability", "start", "end"}
            assert (token["token"], token["start"], token["end"]) == (right.token, right.start, right.end)
            assert token["log_probability"] == pytest.approx(right.log_probability, abs=1e-5)


def test_the_table_has_the_likeliest_first_and_all_together_last(run, expected):
    heading, *lines = run("", *TEXTS).out.splitlines()
    assert re.findall(r"\S+", heading) == ["PLL", "per", "token", "pseudo-perplexity"]
    scores = sorted(expected(TEXTS), key=lambda score: -score.pll)
    for line, score in zip(lines, scores, strict=False):
        pll, per_token, perplexity, text = line.split(maxsplit=3)
        assert text == score.text
        assert float(pll) == pytest.approx(score.pll, abs=6e-4)
        assert float(per_token) == pytest.approx(score.pll / len(score.tokens), abs=6e-4)
        assert float(perplexity) == pytest.approx(score.pseudo_perplexity, abs=6e-3)
    assert len(lines) == len(TEXTS) + 2
    assert lines[-2].endswith("(nothing to score in '')"), "no token is not the likeliest text"
    tokens = sum(len(score.tokens) for score in scores)
    assert lines[-1].endswith(f"all 5 texts, {tokens} tokens")
    assert float(lines[-1].split()[0]) == pytest.approx(sum(score.pll for score in scores), abs=2e-3)
    assert len(run("a b").out.splitlines()) == 2, "one text is not summed up"


def test_lines_of_standard_input_are_counted(run, stdin):
    stdin("a b\n\n  \r\nthe cat\r\n")
    assert [result["text"] for result in json.loads(run("-", "--json").out)] == ["a b", "", "  ", "the cat"]
    stdin("b\nc")
    assert [result["text"] for result in json.loads(run("a", "-", "mat", "--json").out)] == ["a", "b", "c", "mat"]


@pytest.mark.filterwarnings("default::UserWarning")  # as outside pytest
def test_a_mask_in_a_text_is_said_in_one_line(run):
    out, err = run("the [MASK] sat", "a [MASK]", "--json")
    assert err.count("\n") == 1
    assert "'the [MASK] sat' has [MASK] in it" in err
    assert [len(result["tokens"]) for result in json.loads(out)] == [2, 1]


def test_pairs(run, expected, tmp_path):
    pairs = [("the cat sat", "cat the sat"), ("a", "A"), ("mat.", "a mat a mat"), ("unbelievable", "play")]
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{good}\t{bad}\n" for good, bad in pairs), encoding="utf-8")
    plls = [[score.pll for score in expected(pair)] for pair in pairs]
    wins = sum(good > bad + 1e-3 for good, bad in plls)
    assert 0 < wins < 3
    out = run("--pairs", str(file)).out
    assert out.startswith(f"the good one wins {wins} of 4: {wins / 4:.1%}, 95 % interval ")
    assert "\n1 tied (less than 0.0001 nats apart), which counts as not won" in out
    found = json.loads(run("--pairs", str(file), "--json").out)
    assert (found["pairs"], found["wins"], found["ties"], found["losses"]) == (4, wins, 1, 3 - wins)
    assert found["share"] == wins / 4
    low, high = found["interval"]
    assert 0 < low < wins / 4 < high < 1
    for result, (good, bad), (good_pll, bad_pll) in zip(found["results"], pairs, plls, strict=True):
        assert (result["good"], result["bad"]) == (good, bad)
        assert result["good_pll"] == pytest.approx(good_pll, abs=1e-4)
        assert result["bad_pll"] == pytest.approx(bad_pll, abs=1e-4)
        alike = abs(good_pll - bad_pll) < 1e-4
        assert result["outcome"] == ("tie" if alike else "win" if good_pll > bad_pll else "loss")


def test_pairs_from_standard_input(run, stdin):
    stdin("a b\tb b\r\nc\tthe c")
    assert [(pair["good"], pair["bad"]) for pair in json.loads(run("--pairs", "-", "--json").out)["results"]] == [
        ("a b", "b b"),
        ("c", "the c"),
    ]


def test_a_long_text(run, fails):
    assert "25 tokens long and the model takes 20" in fails("a", "b " * 23)
    (result,) = json.loads(run("b " * 23, "--truncate", "--json").out)
    assert len(result["tokens"]) == 18


def test_what_is_refused(fails, stdin, tmp_path):
    assert "nothing to score" in fails()
    stdin("")
    assert "there was no line on standard input" in fails("-")
    file = tmp_path / "pairs.tsv"
    assert f"--pairs {file}: no such file" in fails("--pairs", str(file))
    assert "it is a folder" in fails("--pairs", str(tmp_path))
    for raw, said in (
        (b"", "nothing to score"),
        (b"a\tb\nc\n", f"{file}, line 2: "),
        (b"a\tb\tc\n", "there are 3 columns"),
        (b"a\tb\n\n", "there are 1 columns"),
        (b"the cat\t\n", "nothing to score in one of the pair"),
        (b"a\tb\na\tcaf\xe9\n", f"{file}, line 2 is not UTF-8"),
    ):
        file.write_bytes(raw)
        assert said in fails("--pairs", str(file))
    assert "give one of the two" in fails("a", "--pairs", str(file))


@pytest.mark.parametrize("number", [command.WORTH_PREPARING - 1, command.WORTH_PREPARING])
def test_many_texts_are_prepared_for(folder, monkeypatch, number, stdin, capsys):
    prepared = []

    def prepare(model, *dtype):
        prepared.append(model)
        return prepare_for_inference(model, *dtype)

    monkeypatch.setattr("minibert.inference.prepare_for_inference", prepare)
    stdin("the cat\n" * number)
    assert main(["score", "-", "--json", "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == number
    assert len(prepared) == (number >= command.WORTH_PREPARING)
    assert err == ""


# nats, of a log-probability of the bundled model: rounding; some tens of roundings to 2^-8 of logits of order 10; and
# of roundings to a 254th of the largest number of a row.
NATS = {"float32": 1e-3, "bfloat16": 0.2, "int8": 0.6}


@pytest.mark.parametrize("dtype", NATS)
def test_a_dtype_scores_nearly_the_same(capsys, dtype):
    """Also two texts alone, and it is that type: the last digits are others than those of float32."""
    form_or_skip({"float32": "torch", "bfloat16": "bfloat16 torch", "int8": "int8"}[dtype])
    texts = ["She has gone home.", "She has go home."]

    def score(*options):
        assert main(["score", *texts, "--json", "--model", "minibert-uncased", *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out)

    plain, results = score(), score("--dtype", dtype)
    for result, expected in zip(results, plain, strict=True):
        found = [token["log_probability"] for token in result["tokens"]]
        wanted = [token["log_probability"] for token in expected["tokens"]]
        assert found == pytest.approx(wanted, abs=NATS[dtype])
        assert result["pll"] == pytest.approx(sum(found))
        assert (found == pytest.approx(wanted, abs=NATS["float32"])) == (dtype == "float32")
    good, bad = (result["pll"] for result in results)
    assert good > bad + 5, "11 nats in float32"
