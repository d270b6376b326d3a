"""CTranslate2 as a peer, where it is installed."""

import pytest
from twins import CONFIGS, twins

from minibert.bench import contenders
from minibert.bench.run import _expected
from minibert.bench.workloads import Absent, make_workload


@pytest.mark.parametrize("name", ["ctranslate2", "ctranslate2-int8"])
@pytest.mark.parametrize("shape", ["2x5", "lognormal"])
def test_ctranslate2_computes_this_model(name, shape, tmp_path):
    """In int8 it must not be as exact as in float32: then it would be float32."""
    pytest.importorskip("ctranslate2")
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})
    ours.save_pretrained(tmp_path)
    precision = contenders.PRECISION[name]
    contender = contenders.build(name, precision, "inference", tmp_path, "cpu")
    work = make_workload(shape, ours.config, "cpu", everywhere=True)
    expected = _expected(ours, work)
    difference = float((contender.check(work).float() - expected).abs().max() / expected.abs().max())
    # float32: the same sums in another order; int8: some roundings to 1/254, and a head in bfloat16.
    assert difference < (1e-4 if precision == "float32" else 0.1)
    assert (difference > 1e-4) == (precision == "int8")


def test_without_it_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr("minibert.bench.peers.find_spec", lambda package: None)
    with pytest.raises(Absent, match="ctranslate2 is not installed"):
        contenders.build("ctranslate2", "float32", "inference", tmp_path, "cpu")


def test_it_is_a_peer_of_inference_and_not_of_training():
    assert ("ctranslate2-int8", "int8") in contenders.lineup("inference", ("ctranslate2-int8",), ("float32",))
    assert contenders.lineup("training", ("ctranslate2",), ("float32",)) == [("minibert", "float32")]
