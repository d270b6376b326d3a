"""See what BERT does with a sentence: all numbers of one text, as a page, as text, or as JSON.

    study(model, tokenizer, "Paris is the capital of [MASK].").save("page.html")

Each view has a room of its own, with its formulas and sources, usable alone: reading and sums (what BERT reads),
guesses (layer by layer), words (which of them matter), heads (attention), changes (how much each layer does), cost.
"""

from minibert.study.result import Study, study, study_trace

__all__ = ["Study", "study", "study_trace"]
