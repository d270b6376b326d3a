"""See what BERT does with a sentence: all numbers of one text, as a page, as text, or as JSON.

    study(model, tokenizer, "Paris is the capital of [MASK].").save("page.html")

reading.py: what BERT reads. measures.py and heads.py: the numbers of each view, with their formulas and sources.
result.py takes them from a trace; text.py and page.py show them.
"""

from minibert.study.result import Study, study, study_trace

__all__ = ["Study", "study", "study_trace"]
