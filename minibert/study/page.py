"""The page: one HTML file that opens from the disk and loads nothing.

page.html is its frame, page.css its looks; heads.js and page.js, one script, draw what the JSON says. The
Content-Security-Policy lets only this script and this style run, by their hashes. Texts get into the page as JSON, and
from there as text, never as markup.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html import escape
from importlib.resources import files
from inspect import getsourcelines
from os import PathLike
from pathlib import Path
from textwrap import dedent
from typing import Any

from minibert.attention import equation_1
from minibert.checkpoint.files import whole_file, writable_place
from minibert.model import Embeddings, EncoderLayer, MLMHead, SelfAttention
from minibert.study.text import plain

OURS = '<meta name="generator" content="minibert study">'  # how a page of ours is told from other files
HEAD = 1000  # characters in which OURS stands
CODE: dict[str, Callable[..., Any]] = {  # what the page shows of the program
    "embeddings": Embeddings.forward,
    "attention": equation_1,
    "output": SelfAttention.forward,
    "layer": EncoderLayer.forward,
    "head": MLMHead.forward,
}


def to_html(data: dict[str, Any], title: str) -> str:
    """The page from `Study.to_dict()`. The same data give the same bytes."""
    room = files("minibert.study")
    names = ("page.html", "page.css", "heads.js", "page.js")
    frame, style, *scripts = (room.joinpath(name).read_text(encoding="utf-8") for name in names)
    script = "".join(scripts)
    parts = {
        **{f"see_{name}": f'<a href="#code-{name}">{_place(function)}</a>' for name, function in CODE.items()},
        "code": "".join(_listing(name, function) for name, function in CODE.items()),
        "title": escape(plain(title)),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        # No < in it: so no </script> and no <!-- can end or change the element that it stands in.
        "data": json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def require_writable(path: str | PathLike[str], *, force: bool = False) -> None:
    """Raise OSError if no page can be written there, or FileExistsError if `path` is a file that is no such page, and
    `force` is not given.
    """
    target = Path(path)
    if writable_place(target).exists() and not force:
        with open(target, encoding="utf-8", errors="replace") as file:
            if OURS not in file.read(HEAD):
                raise FileExistsError(f"{target} is there and is no page of minibert study: --force replaces it")


def save(html: str, path: str | PathLike[str], *, force: bool = False) -> None:
    """Write a page: the whole file or none. Raises OSError as `require_writable` does."""
    require_writable(path, force=force)
    with whole_file(Path(path)) as scratch:
        scratch.write_text(html, encoding="utf-8", newline="\n")


def in_a_notebook(html: str) -> str:
    """The page as an element of another page, which it cannot reach."""
    size = 'width="100%" height="900" frameborder="0"'
    return f'<iframe srcdoc="{escape(html)}" sandbox="allow-scripts" {size}></iframe>'


def _place(function: Callable[..., Any]) -> str:
    return f"{function.__module__.split('.')[-1]}.py, line {getsourcelines(function)[1]}"


def _listing(name: str, function: Callable[..., Any]) -> str:
    """A function as it stands in its file, under its place."""
    lines = "".join(getsourcelines(function)[0])
    title = f"{_place(function)}: {function.__qualname__}"
    return f'<div id="code-{name}"><h3>{title}</h3><pre>{escape(dedent(lines))}</pre></div>'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value
