"""The views as text, for a terminal."""

from collections.abc import Iterator
from textwrap import wrap

from minibert.study.facts import Facts
from minibert.study.heads import with_habit
from minibert.study.says import percent, plain, says, signed

COLUMNS = 100  # of a sentence
WIDTH = 24  # of the longest bar
SHOWN_WORDS = 40  # of view 3, those that matter most


def bar(share: float, width: int = WIDTH) -> str:
    eighths = round(8 * width * max(0.0, min(1.0, share)))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def to_text(facts: Facts) -> str:
    """All views, as far as they can be told without a picture."""
    sentences = says(facts)
    lines: list[str] = []
    for title, key, view in (
        ("The answer", "answer", _answer),
        ("1 · What BERT reads", "reading", _reading),
        ("2 · The guess, layer by layer", "guesses", _guesses),
        ("3 · Which words matter", "influence", _influence),
        ("4 · Attention: what the heads look at", "looks", _heads),
        ("5 · How much each layer changes", "changes", _changes),
        ("6 · Shapes and cost", "cost", _cost),
    ):
        body = list(view(facts))
        why = facts.left_out.get({"reading": "shares", "looks": "attention"}.get(key, key))
        if not body and why is None:
            continue
        said = wrap(" ".join(sentences.get(key, [])[:1]), COLUMNS)
        lines += ["", title, *said, *(body or [f"(not here: {why})"])]
    return "".join(f"{plain(line).rstrip()}\n" for line in lines[1:])


def _answer(facts: Facts) -> Iterator[str]:
    filling = facts.reading.filling
    words = [f"[{answer.best[0].token}]" for answer in facts.answers] or [""] * (len(filling) - 1)
    yield "".join(part + word for part, word in zip(filling, [*words, ""], strict=True))
    for answer in facts.answers:
        if len(facts.answers) > 1:
            yield f"  token {answer.position}"
        for guess in answer.best:
            yield f"  {guess.token:<14} {percent(guess.probability):>8}  {bar(guess.probability)}"


def _reading(facts: Facts) -> Iterator[str]:
    reading = facts.reading
    yield "    #  piece           id      segment" + "  word  position  segment" * bool(facts.shares)
    for place, piece in enumerate(reading.pieces):
        parts = [percent(values[place]) for values in facts.shares.values()]
        row = f"  {reading.positions[place]:>3}  {piece:<14} {reading.ids[place]:>6}  {reading.segments[place]:>7}"
        yield row + "".join(f"{part:>{width}}" for part, width in zip(parts, (6, 10, 9), strict=False))


def _guesses(facts: Facts) -> Iterator[str]:
    for one in facts.guesses:
        yield f"  at token {one.position}         rank of {one.answer.token}, its p   best words"
        for step in one.steps:
            best = ", ".join(guess.token for guess in step.best)
            yield f"  {step.after:<21} {step.answer.rank:>7,} {percent(step.answer.probability):>9}   {best}"
            for word, followed in zip(facts.targets, step.targets, strict=True):
                yield f"    {word:<19} {followed.rank:>7,} {percent(followed.probability):>9}"
    if facts.guesses:
        yield "  The head was trained on the last layer only: how it reads an earlier one is a view, not a measurement."


def _influence(facts: Facts) -> Iterator[str]:
    for number, one in enumerate(facts.guesses if facts.influence else []):
        yield f"  at token {one.position}, for {one.answer.token}: hidden (nats, who wins), alone (nats, who wins)"
        order = sorted(facts.influence, key=lambda word: word.hidden[number].nats)
        for word in order[:SHOWN_WORDS]:
            hidden, alone = word.hidden[number], word.alone[number]
            pieces = " ".join(facts.reading.pieces[place] for place in word.places)
            yield f"  {pieces:<20} {signed(hidden.nats):>7} {hidden.winner:<14} {signed(alone.nats):>7} {alone.winner}"
        if len(order) > SHOWN_WORDS:
            yield f"  … and {len(order) - SHOWN_WORDS} more, which matter less when hidden"


def _heads(facts: Facts) -> Iterator[str]:
    for title, heads in (("by weight", facts.looks), ("by what is taken", facts.takes)):
        for name in dict.fromkeys(habit for head in heads for habit in head.habits):
            found = with_habit(heads, name)
            if found:
                listed = ", ".join(f"{head.layer}.{head.head} ({percent(head.habits[name])})" for head in found[:5])
                yield f"  {title}: {len(found):>3} on {name}: {listed}{', …' * (len(found) > 5)}"
    if facts.looks:
        yield "  (layer.head, and the share that goes there, mean over the text's ordinary tokens)"


def _changes(facts: Facts) -> Iterator[str]:
    place = facts.reading.masks[0] if facts.reading.masks else None
    where = "all tokens" if place is None else f"token {place}"
    if facts.changes:
        yield f"  layer  from others  attention  feed-forward  cosine   ({where})"
    for number, layer in enumerate(facts.changes, start=1):
        rows = [layer.mixing or [], layer.attention, layer.feed_forward, layer.cosine]
        values = [sum(row) / len(row) if place is None and row else row[place or 0] if row else None for row in rows]
        first = "–" if values[0] is None else percent(values[0])
        others = [f"{value:.2f}" for value in values[1:] if value is not None]
        yield f"  {number:>5}  {first:>11}  {others[0]:>9}  {others[1]:>12}  {others[2]:>6}"


def _cost(facts: Facts) -> Iterator[str]:
    for part in facts.cost:
        times = f"{part.times} × " if part.times > 1 else ""
        name = f"{times}{part.name}"
        yield f"  {name:<48} {part.shapes:<40} {part.parameters / 1e6:>7.1f} M {part.multiply_adds / 1e6:>9.1f} M"
