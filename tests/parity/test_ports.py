"""A port that has nothing to do with us or transformers, with the quirks of public ones, goes the whole way: it writes
a .npz, and the instrument says that it is right, or what is wrong.
"""

import pytest
from numpy_port import NumpyBert
from planted import SIZES
from twins import twins

from minibert.parity import TraceFile, diagnose, diff, trace
from minibert.trace import standard_inputs


def ported(tmp_path, **quirks):
    ours, _ = twins(SIZES[1])
    inputs = standard_inputs(ours.config)
    NumpyBert(ours, **quirks).write(tmp_path / "theirs.npz", inputs)
    return ours, trace(ours, **inputs), TraceFile(tmp_path / "theirs.npz")


@pytest.mark.parametrize("merged", [True, False], ids=["heads merged", "heads split"])
def test_a_right_port_is_right(tmp_path, merged):
    ours, own, theirs = ported(tmp_path, merged_heads=merged)
    for model in (None, ours):
        report = diff(own, theirs, model, everything=True)
        assert report.ok, "\n".join(report.lines())
        assert {"layers.1.query", "loss", "logits"} <= {row.name for row in report.rows}
    assert diagnose(theirs, ours).ok


@pytest.mark.parametrize(
    ("quirks", "place", "found"),
    [
        # a port in jax, whose gelu is the tanh form
        (dict(tanh=True, merged_heads=False), "layers.0.feed_forward_norm", ["tanh-GELU"]),
        # keras-hub#642: Keras' own eps in the layers, BERT's in the embeddings and in the head
        (dict(eps=1e-5), "layers.0.feed_forward_norm", ["LayerNorm eps 1e-5, in the layers alone"]),
        # codertimo/BERT-pytorch: torch's std in LayerNorm, which comes before each block
        (dict(sample_std=True), "embeddings.norm", ["LayerNorm divides by n - 1"]),
        (dict(sample_std=True, pre_norm=True), "embeddings.norm", ["LayerNorm divides by n - 1", "pre-LayerNorm"]),
    ],
    ids=["jax", "keras", "codertimo's norm", "codertimo"],
)
def test_a_quirk_is_named(tmp_path, quirks, place, found):
    ours, _, theirs = ported(tmp_path, **quirks)
    diagnosis = diagnose(theirs, ours)
    assert diagnosis.first_wrong == place, "\n".join(diagnosis.lines)
    assert [sorted(each) for each in diagnosis.found] == [found], "\n".join(diagnosis.lines)
