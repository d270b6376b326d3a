"""The pictures of the READMEs, from the bundled model's own numbers. Both are written into minibert/study/.

    python tests/measure/picture.py          picture.svg: text → pieces → sum → layers → guess
    python tests/measure/picture.py page     picture.png: the first views of a page, as Chromium shows them

An SVG is text: it is small, GitHub shows it, and a change of a number is a readable diff.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch

import minibert
from minibert import BertForMaskedLM, load_tokenizer
from minibert.study import Study, study
from minibert.study.heads import taken, written
from minibert.study.text import percent
from minibert.trace.recorder import trace

FOLDER = Path(minibert.__file__).parent / "study"
TEXT = "Paris is the capital of [MASK]."
SCALE = "--force-device-scale-factor=0.8"  # as wide as a README, and small enough for one
PAGE_TEXT, PAGE_SIZE = "She drank a cup of [MASK] before breakfast.", (1440, 1090)  # pixels of the page
WIDTH, LEFT, RIGHT = 960, 132, 712  # the tokens' columns lie between LEFT and RIGHT
TOP, SUM, FIRST, STEP = 72, 150, 212, 50  # heights: of the pieces, of the sum, of layer 1, from a layer to the next
BAR, BARS = 112, 816  # the longest bar of a guess, and where bars begin

STYLE = """
svg{--ink:#1c1e26;--dim:#646a78;--card:#fff;--edge:#d9dce4;--word:#2f5fd0;--place:#d98a1f;--part:#8b93a5;--chosen:#c2255c}
@media(prefers-color-scheme:dark){svg{--ink:#e9eaf0;--dim:#a2a8b8;--card:#15171e;--edge:#363b48;--word:#84a9ff;
--place:#f0b35a;--part:#78819a;--chosen:#ff7aa8}}
text{font-family:ui-sans-serif,system-ui,"Segoe UI",Helvetica,Arial,sans-serif;font-size:13px;fill:var(--ink)}
.piece{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;text-anchor:middle}
.dim{fill:var(--dim);font-size:11.5px}.big{font-size:22px;font-weight:600}.middle{text-anchor:middle}
.within{text-anchor:end;font-weight:700;font-size:11.5px;fill:var(--card)}.asked{fill:var(--chosen);font-weight:700}
.card{fill:var(--card);stroke:var(--edge)}.box{fill:none;stroke:var(--edge)}.box.of-asked{stroke:var(--chosen);stroke-width:2}
.word{fill:var(--word)}.position{fill:var(--place)}.segment{fill:var(--part)}.bar{fill:var(--chosen)}
.flow{fill:none;stroke:var(--word);stroke-linecap:round;opacity:.75}.stem{stroke:var(--edge);stroke-width:1.5}
.dot{fill:var(--card);stroke:var(--dim);stroke-width:1.5}.dot.of-asked{fill:var(--chosen);stroke:var(--chosen)}
"""


def text(x: float, y: float, words: str, kind: str = "", **more: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{extra}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 2) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{kind}"/>'


def columns(shown: Study) -> list[float]:
    """The middle of each token's column."""
    width = (RIGHT - LEFT) / len(shown.reading.pieces)
    return [LEFT + width * (number + 0.5) for number in range(len(shown.reading.pieces))]


def draw_pieces(shown: Study) -> Iterator[str]:
    """The text, its pieces with their ids, and what word, position and segment give to each sum."""
    reading, middles = shown.reading, columns(shown)
    asked, width = reading.masks[0], middles[1] - middles[0] - 6
    size = f"{min(13.0, 1.6 * width / max(map(len, reading.pieces))):.1f}px"
    yield text((LEFT + RIGHT) / 2, 44, reading.text or "", "big middle")
    yield text(24, TOP + 19, "pieces") + text(24, TOP + 35, "and their ids", "dim")
    yield text(24, SUM + 4, "sum") + text(58, SUM + 4, "of vectors", "dim")
    for place, (x, piece) in enumerate(zip(middles, reading.pieces, strict=True)):
        of_asked = " of-asked" if place == asked else ""
        yield f'<path d="M{x:.1f} {SUM + 12}V{FIRST + STEP * (shown.model.layers - 1)}" class="stem"/>'
        yield rect(x - width / 2, TOP, width, 28, f"box{of_asked}", 6)
        yield text(x, TOP + 18.5, piece, "piece asked" if of_asked else "piece", font_size=size)
        yield text(x, TOP + 44, str(reading.ids[place]), "dim middle")
        left = x - width / 2
        for part, values in shown.shares.items():
            yield rect(left, SUM - 7, max(0.0, values[place]) * width, 12, part, 0)
            left += max(0.0, values[place]) * width


def draw_layers(shown: Study, takes: list[list[float]]) -> Iterator[str]:
    """The layers, and what the asked token takes from the others in each: lines as wide as its share (head mean)."""
    middles, asked = columns(shown), shown.reading.masks[0]
    for number, shares in enumerate(takes):
        y, above = FIRST + STEP * number, (FIRST + STEP * (number - 1)) if number else SUM + 8
        for place, share in enumerate(shares):
            if place != asked:
                x, goal, bend = middles[place], middles[asked], (above + y) / 2
                path = f"M{x:.1f} {above}C{x:.1f} {bend:.1f} {goal:.1f} {bend:.1f} {goal:.1f} {y}"
                yield f'<path d="{path}" class="flow" stroke-width="{24 * share:.1f}"/>'
    for number in range(len(takes)):
        y = FIRST + STEP * number
        yield text(24, y + 4, f"layer {number + 1}")
        for place, x in enumerate(middles):
            yield f'<circle cx="{x:.1f}" cy="{y}" r="5" class="dot{" of-asked" if place == asked else ""}"/>'


def draw_guesses(shown: Study) -> Iterator[str]:
    """What would be answered after the sum, and after each layer."""
    found = shown.guesses[0]
    yield text(RIGHT + 14, TOP + 19, "the best guess") + text(RIGHT + 14, TOP + 35, "after each step", "dim")
    steps = [step for step in found.steps if not step.after.endswith("attention")]
    for number, step in enumerate(steps):
        best = step.best[0]
        y = (FIRST + STEP * (number - 1)) if number else SUM
        yield text(RIGHT + 14, y + 4, best.token, "asked" if best.id == found.answer.id else "", font_size="14px")
        yield rect(BARS, y - 6, max(1.0, BAR * best.probability), 12, "bar")
        end = BARS + BAR * best.probability
        if best.probability > 0.5:  # the number has room within the bar
            yield text(end - 6, y + 4.5, percent(best.probability), "within")
        else:
            yield text(end + 6, y + 4.5, percent(best.probability), "dim")


def draw(shown: Study, takes: list[list[float]]) -> str:
    """The whole picture. takes: for each layer, what the asked token takes from each token (shares of 1)."""
    height = FIRST + STEP * (shown.model.layers - 1) + 84
    answer = shown.guesses[0].answer
    said = f"BERT reads “{shown.reading.text}” and guesses “{answer.token}” with {percent(answer.probability)}"
    asked = shown.reading.pieces[shown.reading.masks[0]]
    legend = []
    for number, part in enumerate(shown.shares):
        legend += [
            rect(RIGHT + 14 + 78 * number, height - 32, 10, 10, part),
            text(RIGHT + 29 + 78 * number, height - 23, part, "dim"),
        ]
    size = f"{shown.model.layers} layers × {shown.model.heads} heads × {shown.model.hidden_size}"
    pieces = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(said)}</title>",
        f"<style>{STYLE}</style>",
        rect(0.5, 0.5, WIDTH - 1, height - 1, "card", 12),
        *draw_pieces(shown),
        *draw_layers(shown, takes),
        *draw_guesses(shown),
        text(
            24,
            height - 40,
            f"A line says how much {asked} takes from a token in that layer (mean over its heads).",
            "dim",
        ),
        text(24, height - 22, f"{shown.model.name}: {size}. All numbers are the model's own.", "dim"),
        *legend,
        "</svg>",
    ]
    return "\n".join(pieces) + "\n"


@torch.inference_mode()
def takes_of_the_mask(model: BertForMaskedLM, shown: Study) -> list[list[float]]:
    """For each layer, what the first mask takes from each token (`heads.taken`), the mean over the heads."""
    recorded = trace(model, torch.tensor([shown.reading.ids]), None, torch.tensor([shown.reading.segments]))
    found = []
    for number in range(shown.model.layers):
        weight = model.get_parameter(f"layers.{number}.attention.output.weight")
        given = written(recorded.read(f"layers.{number}.value")[0], weight)  # (H, S, D)
        shares = taken(recorded.read(f"layers.{number}.probabilities")[0], given.norm(dim=-1))  # (H, S, S)
        found.append(shares[:, shown.reading.masks[0]].mean(0).tolist())
    return found


def study_of(text: str) -> tuple[BertForMaskedLM, Study]:
    name = "minibert-uncased"
    model = BertForMaskedLM.from_pretrained(name)
    return model, study(model, load_tokenizer(name), text, name=name)


def draw_to(path: Path) -> None:
    model, shown = study_of(TEXT)
    path.write_text(draw(shown, takes_of_the_mask(model, shown)), encoding="utf-8")


def photograph_to(path: Path) -> None:
    """The top of a page, as a PNG. Needs Chromium."""
    _, shown = study_of(PAGE_TEXT)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        shown.save(page)
        options = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=5000",
            SCALE,
        )
        size = f"--window-size={PAGE_SIZE[0]},{PAGE_SIZE[1]}"
        target = [f"--user-data-dir={folder}/profile", size, f"--screenshot={path.absolute()}", page.as_uri()]
        subprocess.run(["chromium", *options, *target], check=True, capture_output=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["page"]:
        photograph_to(FOLDER / "picture.png")
    else:
        draw_to(FOLDER / "picture.svg")
