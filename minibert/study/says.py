"""The sentence of each view: what to look for, with numbers that are true of this text."""

from collections import Counter
from math import exp

from minibert.study.facts import Answer, Facts
from minibert.study.guesses import Guesses, Step
from minibert.study.heads import with_habit
from minibert.study.words import Influence

PREVIOUS = "the previous token"


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
        "answer": [_answer(facts, answer) for answer in facts.answers],
        "reading": [_reading(facts)] if facts.shares else [],
        "guesses": [_guesses(one) for one in facts.guesses],
        "influence": [_influence(facts, number) for number in masks] if facts.influence else [],
        "looks": [_heads(facts)] if facts.looks else [],
        "changes": [_changes(facts, place) for place in places] if facts.changes else [],
        "cost": [_cost(facts)],
    }
    return {view: sentences for view, sentences in found.items() if sentences}


def _answer(facts: Facts, answer: Answer) -> str:
    best = answer.best[0]
    said = f"The model gives “{best.token}” a probability of {percent(best.probability)}"
    if len(answer.best) > 1 and answer.best[1].probability > 0:
        times = best.probability / answer.best[1].probability
        said += f", {times:,.1f} times that of “{answer.best[1].token}”"
    if len(facts.answers) > 1:
        said += f". Each of the {len(facts.answers)} masks is guessed by itself, with the others still hidden"
    return f"{said}."


def _reading(facts: Facts) -> str:
    word, reading = facts.shares["word"], facts.reading
    lowest = min(range(len(word)), key=lambda place: word[place])
    mean = sum(word) / len(word)
    return (
        f"Look for tokens whose word says little: it gives {percent(word[lowest])} of the sum at "
        f"“{reading.pieces[lowest]}” (token {lowest}), and {percent(mean)} on average."
    )


def _before(steps: list[Step], name: str) -> Step | None:
    number = [step.after for step in steps].index(name)
    return steps[number - 1] if number else None


def _guesses(one: Guesses) -> str:
    before = _before(one.steps, one.first)
    if before is None:
        return f"“{one.answer.token}” is the best guess from the embeddings on: no layer changes it."
    return (
        f"“{one.answer.token}” is the best guess after {one.first}, and stays it to the end. One step earlier it is "
        f"number {before.answer.rank:,}, with {percent(before.answer.probability)}, and “{before.best[0].token}” leads."
    )


def _influence(facts: Facts, number: int) -> str:
    def hides(one: Influence) -> float:
        return one.hidden[number].nats

    def brings(one: Influence) -> float:
        return one.alone[number].nats

    hidden, alone = min(facts.influence, key=hides), max(facts.influence, key=brings)
    said = f"Hiding {quoted(facts, hidden.places)} costs “{facts.guesses[number].answer.token}” the most"
    said += f" ({signed(hides(hidden))} nats: its probability is multiplied by {exp(hides(hidden)):.2f})"
    if hides(hidden) >= 0:
        said = f"Hiding no single word makes “{facts.guesses[number].answer.token}” less probable"
    if brings(alone) <= 0:
        return f"{said}; no word alone makes it more probable than no word at all."
    return f"{said}; {quoted(facts, alone.places)} alone brings the most ({signed(brings(alone))} over no word at all)."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _heads(facts: Facts) -> str:
    previous = with_habit(facts.looks, PREVIOUS)
    if previous:
        best, looks = previous[0], "head looks" if len(previous) == 1 else "heads look"
        said = (
            f"{len(previous)} of {len(facts.looks)} {looks} at the previous token, layer {best.layer} head {best.head} "
        )
        said += f"the most ({percent(best.habits[PREVIOUS])} of its weight): a diagonal just below the middle"
    else:
        said = f"None of the {len(facts.looks)} heads looks mainly at the previous token"
    common = Counter(head.name for head in facts.looks if head.name).most_common(1)
    if common and common[0][0] != PREVIOUS:
        name, count = common[0]
        said += f". {_count(count, 'head')} rest on {name}"
        if facts.takes:
            said += f"; counted by what they really take, {len(with_habit(facts.takes, name))}"
    return f"{said}."


def _changes(facts: Facts, place: int | None) -> str:
    def of(values: list[float]) -> float:
        return values[place] if place is not None else sum(values) / len(values)

    where = "on average" if place is None else f"at {facts.reading.pieces[place]}"
    if all(layer.mixing is not None for layer in facts.changes):
        values = [of(layer.mixing or []) for layer in facts.changes]
        said = "Other tokens count the most in layer {layer}: {share} of what attention leaves {where} comes from them"
    else:
        values = [of(layer.attention) for layer in facts.changes]
        said = "Attention adds the most in layer {layer}: {value:.2f} times the length of what it reads {where}"
    most = max(range(len(values)), key=lambda number: values[number])
    turns = [of(layer.cosine) for layer in facts.changes]
    turn = min(range(len(turns)), key=lambda number: turns[number])
    first = said.format(layer=most + 1, share=percent(values[most]), value=values[most], where=where)
    return f"{first}. Layer {turn + 1} turns the vector the furthest (cosine {turns[turn]:.2f})."


def _cost(facts: Facts) -> str:
    total = sum(part.multiply_adds for part in facts.cost)
    dear = max(facts.cost, key=lambda part: part.multiply_adds)
    large = max(facts.cost, key=lambda part: part.parameters)
    all_of_them = facts.model.parameters
    return (
        f"{len(facts.reading.ids)} tokens cost {total / 1e6:,.1f} million multiply-adds, "
        f"{percent(dear.multiply_adds / total)} of them in “{dear.name}”. Of {all_of_them / 1e6:,.1f} million "
        f"parameters {percent(large.parameters / all_of_them)} are in “{large.name}”."
    )
