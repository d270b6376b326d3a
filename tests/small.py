"""A tiny model's vocabulary and texts in it, and what it is to give the same answers."""

import pytest

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the capital of france is paris london berlin rain in spain stays mainly plain play un a . , ! '".split()
VOCAB = [*SPECIAL, *WORDS, "##ing", "##s", "##believ", "##able"]
LONGEST = 64
TEXT = "the capital of france is paris, the unbelievable rain in spain stays mainly in the plain playing."
LONG = "the rain in spain " * 30


def assert_same_answers(ours, theirs):
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_answers(one, other)
        return
    assert ours.keys() == theirs.keys()
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
    assert {key: ours[key] for key in ("token", "token_str", "sequence")} == {
        key: theirs[key] for key in ("token", "token_str", "sequence")
    }
