"""`minibert bench` on a tiny model: the table and the JSON, what is counted, the parity gate. Never speed itself."""

import json
import sys
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from needs import lacking
from products import Products

from minibert import BertConfig, BertForMaskedLM
from minibert.bench import contenders, machine, run, settings
from minibert.bench.report import Report, Row, slower, table
from minibert.bench.settings import Settings
from minibert.bench.workloads import Absent, Contender, make_workload
from minibert.cli import build_parser, main
from minibert.cli.runs import read_settings
from minibert.inference import ways
from minibert.inference.onednn import has_bfloat16

CONFIG = BertConfig(
    vocab_size=131,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=130,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


@pytest.fixture
def bench(folder, capsys, monkeypatch):
    """The command on the tiny model: what it printed."""
    monkeypatch.setattr(run, "SETTLE", 0.0)
    monkeypatch.setattr(machine, "SIZES", (16, 32, 64))  # int8 by oneDNN's reference may take a minute at BERT-base's

    def call(*arguments):
        assert (
            main(["bench", "--traceback", "--model", str(folder), "--rounds", "2", "--device", "cpu", *arguments]) == 0
        )
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def report(folder):
    return run.run(
        Settings(
            model=str(folder),
            dtype=("float32",),
            shapes=("2x5", "mixed"),
            rounds=3,
            peers=("sdpa", "sdpa-asked", "reduce-overhead"),
            device="cpu",
        )
    )


def test_every_row_is_timed_or_says_why_not(report):
    assert {(row.task, row.shape) for row in report.rows} == {
        (task, shape) for task in ("inference", "training") for shape in ("2x5", "mixed")
    }
    for row in report.rows:
        if row.contender == "reduce-overhead":
            assert (row.status, row.median) == ("absent", None)
            assert "CUDA" in row.reason
        else:
            assert row.status == "timed", row.reason
            assert row.difference <= row.tolerance
    names = [row.contender for row in report.rows if row.task == "inference" and row.shape == "mixed"]
    assert names == [
        "minibert prepared",
        "minibert plain",
        "transformers sdpa",
        "transformers sdpa-asked",
        "reduce-overhead",
    ]


def test_the_figures_follow_from_the_times(report):
    for row in report.rows:
        if row.status != "timed":
            continue
        ours = next(
            other
            for other in report.rows
            if (other.task, other.shape) == (row.task, row.shape)
            and other.contender in ("minibert prepared", "minibert")
        )
        assert len(row.seconds) == 3
        assert row.median == median(row.seconds)
        assert min(row.seconds) <= row.quartiles[0] <= row.median <= row.quartiles[1] <= max(row.seconds)
        assert row.ratio == pytest.approx(ours.median / row.median)
        assert row.against == f"{ours.contender} float32"
        assert row.tokens_per_second == pytest.approx(row.tokens / row.median)
        work = make_workload(row.shape, CONFIG, "cpu", everywhere=row.task == "inference")
        done = work.flops(CONFIG) * (3 if row.task == "training" else 1)  # backward: two products for each one
        assert row.share_of_matmul == pytest.approx(done / row.median / report.matmul["float32"])
        assert row.share_of_peak is None, "the CPU is no card"


def test_only_real_tokens_and_asked_logits_are_counted(report):
    work = make_workload("mixed", CONFIG, "cpu", everywhere=True)
    assert {row.tokens for row in report.rows if row.shape == "mixed"} == {int(work.attention_mask.sum())}
    assert {row.tokens for row in report.rows if row.shape == "2x5"} == {10}
    assert work.tokens < work.input_ids.numel()
    assert int(work.asked.sum()) == round(0.15 * work.tokens)
    assert not (work.asked & (work.attention_mask == 0)).any()
    assert torch.equal(work.labels != -100, work.asked)
    one = make_workload("1x1", CONFIG, "cpu", everywhere=True)
    d, f = 24, 37  # one token: q, k, v, output, two feed-forward maps, two products of attention; then the head
    assert one.flops(CONFIG) == 2 * (2 * (4 * d * d + 2 * d * f) + 4 * d) + 2 * (d * d + 131 * d)
    assert make_workload("2x5", CONFIG, "cpu", everywhere=True).asked.all()
    assert int(make_workload("2x5", CONFIG, "cpu", everywhere=False).asked.sum()) == 2


def test_the_shapes_have_the_lengths_they_promise():
    config = BertConfig()
    for name, low, high in (("mixed", 10, 128), ("normal", 32, 512), ("lognormal", 3, 128), ("8x512", 512, 512)):
        work = make_workload(name, config, "cpu", everywhere=True)
        assert low <= min(work.lengths)
        assert max(work.lengths) <= high
        assert torch.equal(work.input_ids, make_workload(name, config, "cpu", everywhere=True).input_ids)
    assert 15 <= median(make_workload("lognormal", config, "cpu", everywhere=True).lengths) <= 25


def test_the_table_is_for_people_and_says_what_is_absent(report):
    text = table(report)
    assert "What this says." in text
    assert "transformers sdpa" in text
    assert "absent: reduce-overhead is CUDA graphs" in text
    assert f"torch {torch.__version__}" in text
    assert "GFLOP/s in float32" in text


def test_the_table_has_milliseconds_mebibytes_and_shares():
    figures = dict(seconds=[0.25], median=0.25, quartiles=(0.125, 0.5), tokens_per_second=40.0, difference=1e-6)
    row = Row("inference", "1x10", "sdpa", "transformers sdpa", "float32", tokens=10, **figures)
    row.peak_memory_bytes, row.share_of_matmul, row.share_of_peak, row.ratio = 3 * 2**30, 0.5, 0.25, 0.75
    work = {"rows": 1, "shortest": 10, "longest": 10, "real_tokens": 10, "padded_tokens": 10, "asked": 10}
    text = table(Report({}, Settings(device="cpu"), {"float32": 2e9}, {"inference 1x10": work}, [row]))
    (line,) = (line.split() for line in text.splitlines() if line.startswith("  transformers sdpa"))
    assert line[3:] == ["250.0", "125.0–500.0", "40", "0.75", "50%", "25%", "1e-06", "3072"]
    assert "2 GFLOP/s in float32" in text


def test_a_card_is_known_by_its_name():
    assert machine.peak_rate("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert machine.peak_rate("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert machine.peak_rate("NVIDIA L4", "bfloat16") < machine.peak_rate("NVIDIA L40S", "bfloat16")
    assert machine.peak_rate("Voodoo 2", "bfloat16") is machine.peak_rate("NVIDIA H100", "int8") is None


def test_a_peer_that_is_faster_is_named(report):
    inference = [row for row in report.rows if row.task == "inference" and row.shape == "mixed"]
    ours, _, peer, *_ = inference
    before = peer.median
    try:
        peer.median = ours.median / 2
        assert slower(inference) == [(ours, peer)]
        assert "Slower than a peer" in table(report)
        peer.precision = "int8"  # a lower precision than ours: no shame
        assert slower(inference) == []
        ours.precision = "int8"
        assert slower(inference) == [(ours, peer)]
        peer.precision = "bfloat16"
        assert slower(inference) == [(ours, peer)]
        ours.precision = "float32"
        peer.precision, peer.median = "float32", ours.median * 2
        assert slower(inference) == []
    finally:
        ours.precision = peer.precision = "float32"
        peer.median = before


def test_a_fast_int8_does_not_hide_a_slow_float32():
    def row(contender, precision, median):
        return Row("inference", "1x3", contender, contender, precision, median=median)

    exact, rounded = row("minibert prepared", "float32", 2.0), row("minibert prepared", "int8", 0.5)
    peer = row("ONNX Runtime", "float32", 1.0)
    assert slower([exact, rounded, peer]) == [(exact, peer)]


@pytest.mark.parametrize(
    ("here", "against"),
    [
        (["float32", "bfloat16", "int8"], "minibert prepared int8"),
        (["float32", "bfloat16"], "minibert prepared bfloat16"),
        (["float32"], "minibert prepared float32"),
    ],
)
def test_int8_stands_beside_our_int8_if_there_is_one(here, against):
    rows = [Row("inference", "1x3", "", "minibert prepared", precision, median=2.0) for precision in here]
    peer = Row("inference", "1x3", "", "ONNX Runtime dynamic", "int8", median=4.0)
    run._ratios([*rows, peer])
    assert (peer.against, peer.ratio) == (against, 0.5)


def timed(name, task, precision, folder):
    return contenders.build(name, precision, task, folder, "cpu"), make_workload("2x5", CONFIG, "cpu", everywhere=False)


@pytest.mark.parametrize("name", ["minibert", "sdpa"])
def test_a_training_step_that_is_timed_is_one(name, folder, monkeypatch):
    """With dropout, the loss where it is asked, and another model after it."""
    models = []
    for owner, function in ((BertForMaskedLM, "from_pretrained"), (contenders, "load_transformers")):
        real = getattr(owner, function)
        keep = lambda *a, real=real, **k: models.append(real(*a, **k)) or models[-1]  # noqa: E731
        monkeypatch.setattr(owner, function, keep)
    contender, work = timed(name, "training", "float32", folder)
    (model,) = models
    before = contender.check(work)
    logits = before if before.dim() == 2 else before[work.asked]
    expected = torch.nn.functional.cross_entropy(logits, work.labels[work.asked]).item()
    losses = {contender.run(work).item() for _ in range(3)}
    assert len(losses) == 3, "dropout, and weights that have moved"
    assert losses.pop() == pytest.approx(expected, rel=0.2)
    assert model.training
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    after = contender.check(work)
    assert not torch.equal(after, before)
    assert torch.equal(after, contender.check(work)), "the gate has no dropout"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "task"), [("minibert", "training"), ("sdpa", "training"), ("sdpa", "inference"),
                                            ("minibert plain", "inference")])  # fmt: skip
def test_a_row_is_computed_in_the_precision_that_it_names(name, task, precision, folder, monkeypatch):
    monkeypatch.setattr(contenders, "has_bfloat16", lambda: True)
    contender, work = timed(name, task, precision, folder)
    assert contender.precision == precision
    with Products() as products:
        contender.run(work)
    assert products.dtypes == {getattr(torch, precision)}


def test_contenders_take_turns_and_first_calls_do_not_count(monkeypatch):
    calls, now = [], [0.0]

    def contender(name, seconds):
        def run_(work):
            calls.append(name)
            now[0] += 100.0 if calls.count(name) <= 2 else seconds

        return Contender(name, "float32", run_, run_)

    monkeypatch.setattr(run, "SETTLE", 0.0)
    monkeypatch.setattr(run, "SHORT", 1000.0)
    monkeypatch.setattr(run, "perf_counter", lambda: now[0])
    rows = [Row("inference", "1x3", name, name, "float32", tokens=3) for name in "ab"]
    pairs = list(zip(rows, [contender("a", 2.0), contender("b", 4.0)], strict=True))
    run._time(pairs, None, Settings(rounds=3, device="cpu"))
    assert "".join(calls) == "aabb" + "aabb" * 3, "short ones: a call before each that is not timed"
    assert [row.seconds for row in rows] == [[2.0] * 3, [4.0] * 3]
    assert [row.tokens_per_second for row in rows] == [1.5, 0.75]
    calls.clear()
    monkeypatch.setattr(run, "SHORT", 0.0)
    run._time(pairs, None, Settings(rounds=2, device="cpu"))
    assert "".join(calls) == "aabb" + "ab" * 2


def test_other_programs_on_the_machine_are_warned_of():
    for load, warned in (("0.1", False), ("1000.0", True)):
        text = table(Report({"load": load}, Settings(device="cpu"), {}, {}, []))
        assert ("WARNING" in text) == warned


def require_int8():
    if not ways.has_int8_products():
        lacking("int8", "this CPU cannot multiply 8-bit numbers")


def test_ours_in_int8_is_a_row(bench):
    require_int8()
    out = bench("--json", "--task", "inference", "--shapes", "1x3,mixed", "--dtype", "int8", "--peers", "none")
    answer = json.loads(out)
    assert answer["matmul"].keys() == {"int8"}
    for row, shape in zip(answer["rows"], ("1x3", "mixed"), strict=True):
        assert (row["contender"], row["precision"], row["shape"]) == ("minibert prepared", "int8", shape)
        assert row["status"] == "timed"
        assert row["tolerance"] is None
        assert 1e-4 < row["difference"] < 0.2, "it is int8, and still the same model"
        assert row["share_of_matmul"] > 0
        assert (row["against"], row["ratio"]) == ("minibert prepared int8", 1)


@pytest.mark.parametrize("missing", ["has_int8", "working_ways"])
def test_without_int8_it_is_absent_and_all_else_goes_on(bench, monkeypatch, missing):
    real = ways.working_ways  # of the other types it is asked as before
    lack = {"has_int8": lambda: False, "working_ways": lambda dtype: real(dtype) if dtype != torch.int8 else ()}
    monkeypatch.setattr(ways, missing, lack[missing])
    arguments = ("--task", "inference", "--shapes", "1x3", "--peers", "none", "--memory")
    out = bench(*arguments, "--dtype", "float32,int8")
    assert "int8      absent: this CPU, or this torch, cannot multiply 8-bit numbers" in out
    assert "matmul: " in out
    assert "in int8 (its best" not in out
    report = json.loads(bench(*arguments, "--dtype", "float32,int8", "--json"))
    assert report["matmul"]["int8"] == 0
    assert [row["status"] for row in report["rows"]] == ["timed", "timed", "absent"]
    assert report["rows"][2]["peak_memory_bytes"] is None
    assert "matmul: no such products here" in bench(*arguments, "--dtype", "int8")


def test_int8_is_for_cpus():
    with pytest.raises(Absent, match="int8 is for CPUs"):
        contenders.build("minibert prepared", "int8", "inference", None, "cuda")


def test_in_int8_nothing_is_trained(bench, monkeypatch):
    monkeypatch.setattr(ways, "has_int8", lambda: False)  # so that nothing is timed
    out = bench("--shapes", "1x3", "--dtype", "int8", "--peers", "none")
    assert "training, 1x3: nothing is trained in int8" in out
    assert out.count("minibert prepared") == 2, "a row for inference, and what is said below"


def test_the_command_prints_one_line_of_json(bench):
    out = bench("--json", "--task", "inference", "--shapes", "1x3", "--dtype", "float32", "--peers", "openvino")
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["machine"]["torch"] == torch.__version__
    assert answer["matmul"]["float32"] > 0
    assert answer["workloads"]["inference 1x3"]["real_tokens"] == 3
    assert [row["contender"] for row in answer["rows"]][:2] == ["minibert prepared", "minibert plain"]


def test_a_package_that_is_not_installed_is_said(bench, monkeypatch):
    there = contenders.find_spec
    monkeypatch.setattr(
        contenders,
        "find_spec",
        lambda name: None if name in ("transformers", "onnxruntime", "openvino", "nncf") else there(name),
    )
    out = bench("--task", "inference", "--shapes", "1x3", "--dtype", "float32")
    for name in ("transformers", "onnxruntime", "openvino"):
        assert f"absent: {name} is not installed" in out
    assert "minibert prepared" in out


def test_a_precision_the_processor_has_not_is_said(bench, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    out = bench("--task", "training", "--shapes", "2x3", "--peers", "none")
    assert "absent: this CPU has no instructions for bfloat16" in out


def test_changed_weights_are_refused_and_not_timed(bench, monkeypatch):
    load = contenders.load_transformers

    def spoilt(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.bias[0] += 0.1  # to all, LayerNorm would undo it
        return model

    monkeypatch.setattr(contenders, "load_transformers", spoilt)
    out = bench("--shapes", "3x7", "--dtype", "float32", "--peers", "sdpa")
    lines = [line for line in out.splitlines() if "transformers sdpa" in line]
    assert len(lines) == 2, "one for inference, one for training"
    assert all("refused: its logits differ by" in line and "more than 1e-04" in line for line in lines)


def test_a_peer_that_breaks_is_a_row_and_not_the_end(bench, monkeypatch):
    def broken(name, precision, dtype, folder, device):
        def no(work):
            raise RuntimeError("no such kernel")

        return Contender(f"transformers {name}", precision, no, no)

    monkeypatch.setattr(contenders, "build_transformers", broken)
    out = bench("--task", "inference", "--shapes", "1x3", "--dtype", "float32", "--peers", "eager")
    assert "failed: RuntimeError: no such kernel" in out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_memory_is_that_of_a_process_of_its_own(bench, dtype):
    if dtype == "int8":
        require_int8()
    out = bench(*("--task", "inference", "--shapes", "2x3", "--dtype", dtype, "--peers", "none", "--memory", "--json"))
    rows = json.loads(out)["rows"]
    assert rows
    for row in rows:
        assert row["peak_memory_bytes"] > 50e6, "Python and torch alone take more"


def test_onnx_runtime_agrees(folder, tmp_path):
    """Where it is installed: lengths that differ from those of the export, and padding."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    work = make_workload("mixed", CONFIG, "cpu", everywhere=True)
    model = BertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    expected = run._expected(model, work)
    for name in ("onnxruntime", "onnxruntime-int8"):
        contender = contenders.build(name, "float32", "inference", tmp_path, "cpu")
        assert "Attention" in contender.note
        difference = (contender.run(work)[work.asked] - expected).abs().max() / expected.abs().max()
        assert difference < (1e-4 if name == "onnxruntime" else 0.2)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("openvino", 1e-4), ("openvino-bfloat16", 5e-2), ("openvino-int8", 0.3)]
)
def test_openvino_agrees(name, tolerance, folder, tmp_path, capsys):
    """Where it is installed. In a lower precision it must not be as exact as in float32: then it would be float32."""
    for package in ("openvino", "onnx", *(["nncf"] if name == "openvino-int8" else [])):
        pytest.importorskip(package)
    precision = contenders.PRECISION[name]
    if precision == "bfloat16" and not has_bfloat16():
        lacking("bfloat16", "this CPU has no instructions for it")
    work = make_workload("mixed", CONFIG, "cpu", everywhere=True)
    model = BertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    expected = run._expected(model, work)
    contender = contenders.build(name, precision, "inference", tmp_path, "cpu")
    assert (contender.name, contender.precision) == ("OpenVINO", precision)
    difference = (contender.run(work)[work.asked] - expected).abs().max() / expected.abs().max()
    assert difference < tolerance
    assert (difference > 1e-4) == (precision != "float32")
    assert capsys.readouterr().out == "", "a table or one line of JSON stands there"


def test_openvino_in_another_precision_than_asked_is_absent(monkeypatch, tmp_path):
    """It falls back by itself: a float32 row must not stand under the name of bfloat16."""
    asked = []

    class Core:
        def compile_model(self, path, device, settings):
            asked.append(settings["INFERENCE_PRECISION_HINT"])
            return self

        def get_property(self, name):
            return self

        def get_type_name(self):
            return "f32"

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    monkeypatch.setattr(contenders, "require", lambda *packages: None)
    monkeypatch.setattr(contenders, "_export", lambda folder: folder / "model.onnx")
    monkeypatch.setattr(contenders, "has_bfloat16", lambda: True)
    assert contenders.build("openvino", "float32", "inference", tmp_path, "cpu").precision == "float32"
    with pytest.raises(Absent, match="OpenVINO computes in f32 on this CPU, though it was told bf16"):
        contenders.build("openvino-bfloat16", "bfloat16", "inference", tmp_path, "cpu")
    assert asked == ["f32", "bf16"]


def test_every_peer_has_its_row():
    pairs = contenders.lineup("inference", settings.PEERS, ("float32", "bfloat16", "int8"))
    assert {name for name, _ in pairs} == {"minibert prepared", "minibert plain", *settings.PEERS}
    assert len(set(pairs)) == len(pairs)
    assert ("openvino-bfloat16", "bfloat16") in pairs
    assert ("sdpa", "bfloat16") in pairs
    eights = [name for name, precision in pairs if precision == "int8"]
    assert eights == ["minibert prepared", *(name for name in settings.PEERS if name.endswith("-int8"))]
    trained = contenders.lineup("training", ("sdpa", "sdpa-asked", "openvino"), ("float32", "int8"))
    assert trained == [("minibert", "float32"), ("sdpa", "float32")]


def test_every_option_arrives():
    def read(*words):
        return read_settings(build_parser().parse_args(["bench", *words]), Settings)

    assert read() == Settings()
    assert (read().peers, read().tasks) == (settings.PEERS, ("inference", "training"))
    assert read().precisions == ("float32", "bfloat16", "int8")
    assert read("--task", "training").precisions == ("float32", "bfloat16"), "nothing is trained in int8"
    words = "--model m --revision r --device cpu --dtype bfloat16,int8 --task inference --shapes 1x2,mixed --rounds 4"
    expected = Settings(
        model="m",
        revision="r",
        device="cpu",
        dtype=("bfloat16", "int8"),
        task="inference",
        shapes=("1x2", "mixed"),
        rounds=4,
        peers=("sdpa", "onnxruntime"),
        memory=True,
    )
    assert read(*words.split(), "--peers", "sdpa,onnxruntime", "--memory") == expected
    assert read("--random", "--layers", "3", "--peers", "none") == Settings(layers=3, peers=())


def test_the_random_model_has_the_layers_that_were_asked_for(folder, monkeypatch, capsys):
    asked = []
    tiny = BertForMaskedLM.from_pretrained(folder)
    monkeypatch.setattr(run, "random_model", lambda layers: asked.append(layers) or tiny)
    monkeypatch.setattr(machine, "SIZES", (16, 32, 64))
    small = ("--task", "inference", "--dtype", "float32", "--shapes", "1x3", "--peers", "none", "--rounds", "1")
    assert main(["bench", "--layers", "3", "--device", "cpu", *small]) == 0
    assert asked == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--peers", "sdpa,tensorrt"], "--peers does not know 'tensorrt'"),
        (["--dtype", "float16"], "--dtype does not know 'float16'"),
        (["--dtype", ","], "--dtype is empty"),
        (["--task", "training", "--dtype", "int8"], "--dtype int8: nothing is trained in int8"),
        (["--task", "training", "--dtype", "float32,int8"], "--dtype float32,int8: nothing is trained in int8"),
        (["--shapes", "8by8"], "there is no shape '8by8'"),
        (["--shapes", "1x131"], "shape 1x131 has rows of 131 tokens, and the model has positions for 130"),
        (["--layers", "2"], "--layers 2 is for the random model"),
        (["--model", "nowhere/at/all/here"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, arguments, message):
    model = [] if "--model" in arguments else ["--model", str(folder)]
    assert main(["bench", *model, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_the_other_engines_run_on_the_cpu_only():
    with pytest.raises(Absent, match="only its CPU form"):
        contenders.build("onnxruntime", "float32", "inference", None, "cuda")
