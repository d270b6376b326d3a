"""A study in words: the sentence of each view, and all views as text for a terminal."""

from collections import Counter
from collections.abc import Iterator
from math import exp
from statistics import fmean
from textwrap import wrap

from minibert.study.heads import with_habit
from minibert.study.measures import Answer, Facts, Guesses

PREVIOUS = "the previous token"
UNSURE = 0.2  # a best word with less than this is nothing to be sure of


def percent(share: float) -> str:
    """0.4636 → "46 %", 0.0171 → "1.7 %", 0.00031 → "0.03 %"."""
    value = 100 * share
    digits = 0 if value >= 9.95 else 1 if value >= 0.095 else 2
    return f"{value:.{digits}f} %" if value >= 0.005 else "< 0.01 %"


# What could harm the place where a text is shown: control characters (a terminal obeys them), and those that turn the
# direction of writing (what stands around them would turn too).
HARMFUL = {
    **dict.fromkeys([*range(32), *range(127, 160)]),
    **dict.fromkeys([0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]),
    **{ord(space): " " for space in "\n\t\r"},
}


def plain(text: str) -> str:
    """A text on one line that can do nothing to the place where it is shown."""
    return text.translate(HARMFUL)


def signed(nats: float) -> str:
    """−0.68, +4.52: with a real minus, as the page has it."""
    return f"{nats:+.2f}".replace("-", "−")


def quoted(facts: Facts, places: list[int]) -> str:
    pieces = [facts.reading.pieces[place] for place in places]
    return f"“{' '.join(pieces)}”" if len(pieces) <= 6 else f"“{' '.join(pieces[:3])} … {pieces[-1]}”"


def says(facts: Facts) -> dict[str, list[str]]:
    """For each view its sentence: one for each followed mask where the view is about a mask, else a single one. A view
    that is left out has none.
    """
    masks = range(len(facts.guesses))
    places: list[int | None] = [*facts.reading.masks[: max(1, len(masks))]] or [None]
    found = {
        "answer": [_say_answer(facts, answer) for answer in facts.answers],
        "reading": [_say_reading(facts)] if facts.shares else [],
        "guesses": [_say_guesses(one) for one in facts.guesses],
        "influence": [_say_influence(facts, number) for number in masks] if facts.influence else [],
        "looks": [_say_heads(facts)] if facts.looks else [],
        "changes": [_say_changes(facts, place) for place in places] if facts.changes else [],
        "cost": [_say_cost(facts)],
    }
    return {view: sentences for view, sentences in found.items() if sentences}


def _say_answer(facts: Facts, answer: Answer) -> str:
    best, others = answer.best[0], answer.best[1:]
    said = f"“{best.token}” is the likeliest word, with a probability of {percent(best.probability)}"
    if best.probability < UNSURE:
        said = f"The model is sure of no word here. The likeliest is “{best.token}”, with {percent(best.probability)}"
    if others:
        said += f"; next comes “{others[0].token}”, with {percent(others[0].probability)}"
    if best.token.startswith("##"):
        said += ". A piece that begins with ## goes on with the word before it"
    if len(facts.answers) > 1:
        said = f"At token {answer.position}: {said[0].lower()}{said[1:]}. "
        said += "Each mask is guessed without knowing what stands at the others"
    return f"{said}."


def _say_reading(facts: Facts) -> str:
    word, reading = facts.shares["word"], facts.reading
    lowest = word.index(min(word))
    return (
        "What BERT first knows of a token comes from its word, its position and its segment. On average the word makes "
        f"{percent(fmean(word))} of the sum. It makes the least at “{reading.pieces[lowest]}” (token {lowest}): "
        f"{percent(word[lowest])}."
    )


def _say_guesses(one: Guesses) -> str:
    names = [step.after for step in one.steps]
    number = names.index(one.first)
    if number == 0:
        return f"“{one.answer.token}” is the best guess from the embeddings on: no layer changes it."
    before = one.steps[number - 1]
    said = f"From {one.first} on, “{one.answer.token}” is the best guess"
    if number == len(names) - 1:
        said = f"Only the last step, {one.first}, makes “{one.answer.token}” the best guess"
    return (
        f"{said}. One step earlier it has rank {before.answer.rank:,} and a probability of "
        f"{percent(before.answer.probability)}, and “{before.best[0].token}” is the best."
    )


def _say_influence(facts: Facts, number: int) -> str:
    answer = facts.guesses[number].answer.token
    hidden = min(facts.influence, key=lambda one: one.hidden[number].nats)
    alone = max(facts.influence, key=lambda one: one.alone[number].nats)
    lost, brought = hidden.hidden[number].nats, alone.alone[number].nats
    said = f"“{answer}” needs {quoted(facts, hidden.places)} the most: with it hidden, the probability falls to "
    said += f"{percent(exp(lost))} of what it was ({signed(lost)} nats)"
    if lost >= 0:
        said = f"No word is needed for “{answer}”: whichever is hidden, it becomes no less probable"
    if brought <= 0:
        return f"{said}. No word alone makes it more probable than it is without any word."
    times = f"{exp(brought):.1f}" if exp(brought) < 10 else f"{exp(brought):,.0f}"
    return (
        f"{said}. Alone, {quoted(facts, alone.places)} helps the most: it makes the answer {times} times as probable "
        f"as no word at all ({signed(brought)} nats)."
    )


def _say_heads(facts: Facts) -> str:
    previous = with_habit(facts.looks, PREVIOUS)
    said = f"None of the {len(facts.looks)} heads looks mainly at the previous token."
    if previous:
        best, one = previous[0], len(previous) == 1
        said = (
            f"Of {len(facts.looks)} heads, {len(previous)} {'looks' if one else 'look'} mainly at the previous token. "
            f"{'It' if one else 'The clearest'} is head {best.head} of layer {best.layer}: "
            f"{percent(best.habits[PREVIOUS])} of its weight goes there, a diagonal just below the middle of its map."
        )
    ordinary = facts.reading.added.count(False)
    if ordinary < 3:
        said += f" But with {ordinary} token{'s' * (ordinary > 1)} in the text, there is little else to look at."
    common = Counter(head.name for head in facts.looks if head.name).most_common(1)
    if not common or common[0][0] == PREVIOUS:
        return said
    name, count = common[0]
    said += f" {count} {'head rests' if count == 1 else 'heads rest'} mainly on {name}"
    if not facts.takes:
        return f"{said}."
    takes = len(with_habit(facts.takes, name))
    but = f", but it has little to give: only {takes or 'none'}" if 2 * takes < count else f"; {takes}"
    return f"{said}{but} of all heads really {'takes' if takes < 2 else 'take'} mainly from there."


def at(values: list[float], place: int | None) -> float:
    """A number at a token, or the mean over all of them."""
    return fmean(values) if place is None else values[place]


def _say_changes(facts: Facts, place: int | None) -> str:
    where = "On average" if place is None else f"At “{facts.reading.pieces[place]}” (token {place})"
    turns = [at(layer.cosine, place) for layer in facts.changes]
    mixing = [at(layer.mixing, place) for layer in facts.changes if layer.mixing is not None]
    if len(mixing) == len(turns):
        most = max(mixing)
        said = (
            f"brings in the most from other tokens in layer {1 + mixing.index(most)}: {percent(most)} of what it leaves"
        )
    else:
        added = [at(layer.attention, place) for layer in facts.changes]
        most = max(added)
        said = f"adds the most in layer {1 + added.index(most)}: a vector {most:.2f} times as long as the one it reads"
    turn = 1 + turns.index(min(turns))
    return (
        f"{where}, attention {said}. The vector turns the furthest in layer {turn}, with a cosine of {min(turns):.2f}."
    )


def _say_cost(facts: Facts) -> str:
    total, parameters = sum(part.multiply_adds for part in facts.cost), facts.model.parameters
    dear = max(facts.cost, key=lambda part: part.multiply_adds)
    large = max(facts.cost, key=lambda part: part.parameters)
    return (
        f"To read these {len(facts.reading.ids)} tokens takes {total / 1e6:,.1f} million multiply-adds, and "
        f"{percent(dear.multiply_adds / total)} of them are in the step “{dear.name}”. The model has "
        f"{parameters / 1e6:,.1f} million parameters, and {percent(large.parameters / parameters)} of them are in "
        f"“{large.name}”."
    )


COLUMNS = 100  # of a sentence
WIDTH = 24  # of the longest bar
SHOWN_WORDS = 40  # of view 3, those that matter most


def bar(share: float) -> str:
    eighths = round(8 * WIDTH * share)
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
        if body or why is not None:
            said = wrap(" ".join(sentences.get(key, [])[:1]), COLUMNS)
            lines += ["", title, *said, *(body or [f"(not here: {why})"])]
    return "".join(f"{plain(line).rstrip()}\n" for line in lines[1:])


def filled(facts: Facts) -> str:
    """The text with the answer at each mask, "[…]" if it is not known."""
    words = [answer.best[0].token for answer in facts.answers] or ["…"] * len(facts.reading.masks)
    start, *parts = facts.reading.filling
    return start + "".join(f"[{word}]{part}" for word, part in zip(words, parts, strict=True))


def _answer(facts: Facts) -> Iterator[str]:
    yield filled(facts)
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
        yield "  This is the logit lens: the head has learned to read the last layer only, and is asked about each."


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
        yield "  (layer.head, and the share that goes there, mean over the text's ordinary tokens; both count from 1:"
        yield "  1.3 is head 3 of layer 1, which is layers[0], and index 2 of its heads)"


def _changes(facts: Facts) -> Iterator[str]:
    place = facts.reading.masks[0] if facts.reading.masks else None
    if facts.changes:
        where = "all tokens" if place is None else f"token {place}"
        yield f"  layer  from others  attention  feed-forward  cosine   ({where})"
    for number, layer in enumerate(facts.changes, start=1):
        first = "–" if layer.mixing is None else percent(at(layer.mixing, place))
        attention, worked, turn = (at(row, place) for row in (layer.attention, layer.feed_forward, layer.cosine))
        yield f"  {number:>5}  {first:>11}  {attention:>9.2f}  {worked:>12.2f}  {turn:>6.2f}"


def _cost(facts: Facts) -> Iterator[str]:
    for part in facts.cost:
        name = f"{part.times} × {part.name}" if part.times > 1 else part.name
        yield f"  {name:<48} {part.shapes:<40} {part.parameters / 1e6:>7.1f} M {part.multiply_adds / 1e6:>9.1f} M"
