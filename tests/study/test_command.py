"""`minibert study`, as it is typed."""

import json
import re
from pathlib import Path

import pytest
from studied import SIZES, tokenizer

import minibert
from minibert import BertForMaskedLM, load_tokenizer
from minibert.cli import main
from minibert.study import study


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


def test_the_text_view_answers_the_newcomer(capsys):
    """After which layer was the answer first, which words carried it, which head looks at the previous token?"""
    assert main(["study", "Paris is the [MASK] of France.", "--targets", "city"]) == 0
    text = capsys.readouterr().out
    assert "From layer 4 attention on, “capital” is the best guess." in " ".join(text.split())
    assert "Alone, “of” helps the most" in " ".join(text.split())
    assert re.search(r"\n  paris +\S+ capital +\S+ paris\n", text), (
        "which word wins with it hidden, and which with it alone"
    )
    assert re.search(r"\n  of +\S+ capital +\S+ state\n", text)
    assert "by weight:   3 on the previous token: 1.3 (100 %)" in text
    for title in ("The answer", *(f"{number} · " for number in range(1, 7))):
        assert f"\n{title}" in f"\n{text}"
    assert max(map(len, text.splitlines())) < 130


def test_json_and_page_hold_the_same(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    question = ["study", "It is cold. " * 20, "--pair", "She drank [MASK].", "--targets", "tea,water", "--truncate"]
    assert main([*question, "--top-k", "3", "--model", folder, "--json", "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["targets"] == ["tea", "water"]
    assert data["model"]["layers"] == SIZES["num_hidden_layers"]
    assert len(data["reading"]["ids"]) == SIZES["max_position_embeddings"]
    assert data["reading"]["pair"] == "She drank [MASK]."
    assert len(data["answers"][0]["best"]) == len(data["guesses"][0]["steps"][0]["best"]) == 3
    assert f"{page}: open it in a browser" in err
    assert json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]) == data


def test_a_trace_is_shown(folder, tmp_path, capsys):
    recorded, page = str(tmp_path / "t.safetensors"), tmp_path / "page.html"
    main(["trace", "--text", "Paris is cold.", "--text", "She drank [MASK].", "--model", folder, "--out", recorded])
    second = ["study", "--trace", recorded, "--row", "1"]
    assert main([*second, "--model", folder, "--out", str(page)]) == 0
    assert page.exists()
    assert main(second) == 0
    assert "(not here: it needs the weights: give the model)" in capsys.readouterr().out
    assert main([*second, "--model", folder, "--targets", "tea", "--top-k", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["reading"]["pieces"][1:4] == ["she", "drank", "[MASK]"]
    assert (data["targets"], len(data["answers"][0]["best"])) == (["tea"], 2)
    assert main(["study", "--trace", recorded]) == 2
    assert "has 2 texts: say which with --row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" \n"], "the text is empty"),
        ([], "give a text, or --trace with a file"),
        (["cold", "--trace", "t.safetensors"], "one of the two"),
        (["cold", "--row", "1"], "--row belongs to --trace"),
        (["--trace", "t.safetensors", "--pair", "cold"], "--pair belongs to a text"),
        (["cold", "--force"], "--force belongs to --out"),
        (["cold " * 60], "62 tokens long and the model takes 40"),
        (["cold [MASK]", "--targets", "unbelievably"], "take a word that is one token"),
        (["cold [MASK]", "--targets", ","], "targets must be a word or a list of words, not ()"),
        (["cold", "--targets", "tea"], "targets are words for a mask"),
        (["cold [MASK]", "--top-k", "0"], "top_k must be 1 to 20, not 0"),
        (["cold [MASK]", "--top-k", "21"], "top_k must be 1 to 20, not 21"),
        (["cold [MASK]", "--out", "nowhere/page.html"], "there is no folder nowhere"),
        (["cold [MASK]", "--out", "notes.txt"], "--force replaces it"),
        (["cold [MASK]", "--out", "."], "is a folder"),
        (["--trace", "notes.txt"], "notes.txt"),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(folder, tmp_path, monkeypatch, fails, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("my notes", encoding="utf-8")
    model = [] if "--trace" in arguments else ["--model", folder]
    assert message in fails("study", *arguments, *model)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "my notes"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_a_file_and_a_page_needs_none(folder, tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("my notes", encoding="utf-8")
    for text, force in (("cold [MASK]", ["--force"]), ("cold water", [])):
        assert main(["study", text, "--model", folder, "--out", str(target), *force]) == 0
        page = target.read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert f"<title>BERT reads: {text.split()[0]}" in page
    assert "water" in page
    assert list(tmp_path.iterdir()) == [target]


def test_the_readmes_picture_shows_what_the_model_guesses():
    """The drawing is kept, and its numbers must stay the model's: the best guess after the sum and after each layer."""
    folder, name = Path(minibert.__file__).parent / "study", "minibert-uncased"
    drawn = (folder / "picture.svg").read_text(encoding="utf-8")
    model = BertForMaskedLM.from_pretrained(name)
    shown = study(model, load_tokenizer(name), "Paris is the capital of [MASK].")
    best = [step.best[0] for step in shown.guesses[0].steps if not step.after.endswith("attention")]
    found = re.findall(r'font-size="14px">(.+)</text>\n<rect .*/>\n<text .*>(.+) %</text>', drawn)
    assert [token for token, _ in found] == [guess.token for guess in best]
    percents = [100 * guess.probability for guess in best]
    assert [float(percent) for _, percent in found] == pytest.approx(percents, abs=0.51)
    assert (folder / "picture.png").stat().st_size <= 200_000
    assert not re.findall("https?:", drawn.replace("http://www.w3.org/2000/svg", ""))
