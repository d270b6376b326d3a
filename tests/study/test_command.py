"""`minibert study`, as it is typed."""

import json
import re

import pytest
from measure import picture
from studied import SIZES, pair_of_models, tokenizer

from minibert.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pair_of_models()[0].save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


def test_the_text_view_answers_the_newcomer(capsys):
    """After which layer was the answer first, which words carried it, which head looks at the previous token?"""
    assert main(["study", "Paris is the [MASK] of France.", "--targets", "city"]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert "From layer 4 attention on, “capital” is the best guess." in flat
    assert "Alone, “of” helps the most" in flat
    assert "by weight:   3 on the previous token: 1.3 (100 %)" in text
    for title in ("The answer", *(f"{number} · " for number in range(1, 7))):
        assert f"\n{title}" in f"\n{text}"
    assert max(map(len, text.splitlines())) < 130


def test_json_and_page_hold_the_same(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    question = [
        "study",
        "It is cold. " * 20,
        "--pair",
        "She drank [MASK].",
        "--targets",
        "tea,water",
        "--model",
        folder,
    ]
    assert main([*question, "--truncate", "--top-k", "3", "--json", "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["targets"] == ["tea", "water"]
    assert data["model"]["layers"] == SIZES["num_hidden_layers"]
    assert len(data["reading"]["ids"]) == SIZES["max_position_embeddings"]
    assert data["reading"]["pair"] == "She drank [MASK]."
    assert len(data["answers"][0]["best"]) == len(data["guesses"][0]["steps"][0]["best"]) == 3
    assert f"{page}: open it in a browser" in err
    written = page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    assert json.loads(written) == data


def test_a_trace_is_shown(folder, tmp_path, capsys):
    recorded, page = str(tmp_path / "t.safetensors"), str(tmp_path / "page.html")
    main(["trace", "--text", "Paris is cold.", "--text", "She drank [MASK].", "--model", folder, "--out", recorded])
    assert main(["study", "--trace", recorded, "--row", "1", "--model", folder, "--out", page]) == 0
    assert main(["study", "--trace", recorded, "--row", "1"]) == 0
    assert "(not here: it needs the weights: give the model)" in capsys.readouterr().out
    options = ["--row", "1", "--model", folder, "--targets", "tea", "--top-k", "2", "--json"]
    assert main(["study", "--trace", recorded, *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["reading"]["pieces"][1:4] == ["she", "drank", "[MASK]"]
    assert (data["targets"], len(data["answers"][0]["best"])) == (["tea"], 2)
    assert main(["study", "--trace", recorded]) == 2
    assert "has 2 texts: say which with --row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the text is empty"),
        ([], "give a text, or --trace with a file"),
        (["cold", "--trace", "t.safetensors"], "one of the two"),
        (["cold", "--row", "1"], "--row belongs to --trace"),
        (["--trace", "t.safetensors", "--pair", "cold"], "--pair belongs to a text"),
        (["cold", "--force"], "--force belongs to --out"),
        (["cold " * 60], "62 tokens long and the model takes 40"),
        (["cold [MASK]", "--targets", "nonsense"], "not one token"),
        (["cold [MASK]", "--targets", ","], "targets must be a word or a list of words, not ()"),
        (["cold [MASK]", "--top-k", "0"], "top_k must be 1 to 20"),
        (["cold [MASK]", "--out", "nowhere/page.html"], "there is no folder nowhere"),
        (["cold [MASK]", "--out", "notes.txt"], "--force replaces it"),
        (["cold [MASK]", "--out", "."], "is a folder"),
        (["--trace", "notes.txt"], "notes.txt"),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("my notes", encoding="utf-8")
    model = [] if "--trace" in arguments else ["--model", folder]
    assert main(["study", *arguments, *model]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "my notes"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_a_file(folder, tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("my notes", encoding="utf-8")
    assert main(["study", "cold [MASK]", "--model", folder, "--out", str(target), "--force"]) == 0
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_readmes_picture_is_drawn_from_the_models_numbers(tmp_path):
    """The picture in the project is what the program draws today: the same words, and nearly the same numbers."""
    picture.draw_to(tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    kept = (picture.FOLDER / "picture.svg").read_text(encoding="utf-8")
    number = re.compile(r"-?\d+(?:\.\d+)?")
    assert number.sub("0", drawn) == number.sub("0", kept)
    for one, other in zip(number.findall(drawn), number.findall(kept), strict=True):
        assert float(one) == pytest.approx(float(other), abs=1.01)
    assert (picture.FOLDER / "picture.png").stat().st_size <= 200_000
    assert not re.findall("https?:", drawn.replace("http://www.w3.org/2000/svg", ""))
