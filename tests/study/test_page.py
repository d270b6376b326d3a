"""The page as a file: what is in it, what is not, how large it is, and when it is written."""

import base64
import hashlib
import json
import re
import zipfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from studied import LONG, PAIR, TEXT, pair_of_models, tokenizer, unpack

import minibert
from minibert.study import study

MOST_BYTES = 3_000_000  # of a page
FETCHES = re.compile(
    r"https?:|//[\w.]+/|url\(|@import|\bsrc=|\bhref=|\bfetch\(|XMLHttpRequest|WebSocket|import\(", re.I
)
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function")


class Elements(HTMLParser):
    """The elements of a page, their attributes, and the text in each script and style."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self.inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("type", tag) if tag in ("script", "style", "title") else None

    def handle_data(self, data):
        if self.inside is not None:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def handle_endtag(self, tag):
        self.inside = None


def test_nothing_can_be_fetched_and_only_this_script_and_this_style_may_run(model, found):
    page = found.to_html()
    assert study(model, tokenizer(), TEXT, PAIR, targets=found.targets).to_html() == page
    elements = Elements(page)
    known = page.replace(elements.texts["application/json"], "")
    known = known.replace('"http://www.w3.org/2000/svg"', "")  # the name of SVG, which nobody opens
    assert not FETCHES.findall(known.replace('href="#', ""))  # a place in this page
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"link", "img", "iframe", "object", "embed", "form", "base", "video", "audio"}
    policy = next(found["content"] for _, found in elements.found if "http-equiv" in found)
    script, style = (
        base64.b64encode(hashlib.sha256(elements.texts[kind].encode()).digest()).decode()
        for kind in ("script", "style")
    )
    assert policy == f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    names = {name for _, attributes in elements.found for name in attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert not MARKUP.findall(elements.texts["script"])  # it sets texts alone


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "\u202ethgir ot tfel\u202c [MASK]",
    "\x1b[31m red \x07 bell \x00 [MASK]",
    "{{script}} {{data}} [MASK]",
    "' onload='x \" & &lt; [MASK]",
    "\u2028 \u2029 \ufeff [MASK]",
]


@settings(max_examples=15, deadline=None)
@given(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    st.booleans(),
)
def test_a_hostile_text_stays_text(text, second):
    ours = pair_of_models()[0]
    texts = ("Paris is [MASK].", text) if second else (f"{text}.", None)
    found = study(ours, tokenizer(), *texts, truncate=True)
    page = found.to_html()
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "<" not in elements.texts["application/json"]
    assert not re.findall(  # controls, and what turns the direction of writing
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", unescape(page) + found.to_text()
    )
    shown = json.loads(elements.texts["application/json"])["reading"]
    assert len(shown["pieces"]) == len(found.reading.pieces)


@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "full"),
    [
        (6, 12, 128, True),
        pytest.param(12, 12, 512, False, marks=pytest.mark.slow),
        pytest.param(24, 16, 256, False, marks=pytest.mark.slow),
    ],
)
def test_a_page_is_never_larger_than_3_mb(layers, heads, tokens, full, monkeypatch):
    monkeypatch.setattr("minibert.study.measures.MOST_TOKENS", 1024)  # fewer passes: they add little to the page
    ours, _ = pair_of_models(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=2 * heads, max_position_embeddings=512
    )
    with torch.no_grad():
        for layer in ours.layers:
            layer.attention.qkv.weight.mul_(2)  # attention that is neither even nor on one token: hard to compress
    found = study(ours, tokenizer(), " ".join(LONG[: tokens - 6]) + " [MASK] [MASK] [MASK] [MASK]")
    assert len(found.reading.ids) == tokens
    assert (found.maps.side == tokens) == full
    assert len(found.to_html().encode()) < MOST_BYTES
    if not full:
        rows = unpack(found.maps.rows).view(layers, heads, -1, tokens)
        assert found.maps.row_places == found.reading.masks[: rows.shape[2]]
        assert (rows.sum(-1) - 1).abs().max() < 0.05  # the root keeps a row of many small weights


def half_written(path, text, **options):
    path.write_bytes(b"half")
    raise OSError("the disk is full")


def test_saving_and_showing_in_a_notebook(found, tmp_path, monkeypatch):
    found.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == found.to_html()
    ((tag, attributes),) = Elements(found._repr_html_()).found  # a frame of its own
    assert tag == "iframe"
    assert (attributes["srcdoc"], attributes["sandbox"]) == (page, "allow-scripts")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half_written)
        with pytest.raises(OSError, match="full"):
            found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    (tmp_path / "page.html").write_text("my notes", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--force"):
        found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "my notes"


@pytest.mark.slow
def test_the_wheel_has_the_page_and_not_the_picture(tmp_path):
    hatchling = pytest.importorskip("hatchling.builders.wheel")
    root = Path(minibert.__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        pytest.skip("installed from a wheel: there is nothing to build")
    (wheel,) = hatchling.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"minibert/study/{name}" for name in ("page.html", "page.css", "heads.js", "page.js")} <= set(names)
    assert not [name for name in names if "picture" in name]
