"""Which of two sentences wins, and how sure one can be of a share of wins."""

import pytest

from minibert.score import Pair, Score, TokenScore, WinRate


@pytest.mark.parametrize(("bad", "outcome"), [(-5.00003, "tie"), (-4.99997, "tie"), (-5.001, "win"), (-4.999, "loss")])
def test_rounding_wins_nothing(bad, outcome):
    sides = [Score(text, (TokenScore(text, value, 0, 1),)) for text, value in (("a", -5.0), ("b", bad))]
    assert Pair(*sides).outcome == outcome


@pytest.mark.parametrize(
    ("wins", "pairs", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval(wins, pairs, low, high):
    for rate in (WinRate(wins, 0, pairs - wins), WinRate(wins, pairs - wins, 0)):  # a tie is no win
        assert rate.share == wins / rate.pairs
        assert rate.interval == pytest.approx((low, high), abs=5e-5)
    other = WinRate(pairs - wins, 0, wins)
    assert other.interval == pytest.approx((1 - high, 1 - low), abs=5e-5)
