"""`minibert bench` on a tiny model: the table and the JSON, what is counted, the parity gate. Never speed itself."""

import json
import sys
from itertools import chain, count, repeat
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from needs import lacking
from products import Products

from minibert import BertConfig, BertForMaskedLM
from minibert.bench import contenders, report, run
from minibert.bench.contenders import Absent, Contender
from minibert.bench.report import BenchReport, Row, slower, table
from minibert.bench.settings import PEERS, BenchSettings
from minibert.bench.workloads import make_workload
from minibert.cli import build_parser, main
from minibert.cli.runs import read_settings
from minibert.inference import prepare
from minibert.inference.onednn import has_bfloat16
from minibert.training import step

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37)
CONFIG = BertConfig(vocab_size=131, max_position_embeddings=130, **SIZES)
SMALL = ("--task", "inference", "--shapes", "1x3", "--dtype", "float32")


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


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SETTLE", 0.0)
        patch.setattr(report, "SIZES", (16, 32, 64))  # int8 by oneDNN's reference may take a minute at BERT-base's
        yield


@pytest.fixture
def bench(folder, capsys):
    """The command on the tiny model: what it printed."""

    def call(*arguments):
        options = ("--traceback", "--model", str(folder), "--rounds", "2", "--device", "cpu")
        assert main(["bench", *options, *arguments]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def measured(folder, quick):
    settings = dict(dtype=("float32",), shapes=("2x5", "mixed"), rounds=3, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        clock = count()
        patch.setattr(run, "perf_counter", clock.__next__)  # for the first answer: a second from look to look
        loaded = set()

        def build(name, *given):
            if name not in loaded:
                next(clock)
            return contenders.build(name, *given)

        # A library takes a second to import, where it is first needed. That does not count.
        patch.setattr(run, "load_library", lambda name: loaded.add(name) or next(clock))
        patch.setattr(run, "build", build)
        return run.run(BenchSettings(model=str(folder), peers=("sdpa", "sdpa-asked", "reduce-overhead"), **settings))


def timed(name, task, precision, folder):
    return contenders.build(name, precision, task, folder, "cpu"), workload("2x5", everywhere=False)


def workload(name, config=CONFIG, everywhere=True):
    return make_workload(name, config, "cpu", everywhere=everywhere)


# ------------------------------------------------------------------------------------------------- what stands in a row


def test_every_row_is_timed_or_says_why_not(measured):
    ours = {"inference": ["minibert prepared", "minibert plain"], "training": ["minibert"]}
    theirs = {"inference": ["transformers sdpa", "transformers sdpa-asked"], "training": ["transformers sdpa"]}
    for task, shape in ((task, shape) for task in ours for shape in ("2x5", "mixed")):
        *timed, absent = (row for row in measured.rows if (row.task, row.shape) == (task, shape))
        assert {row.contender for row in timed} == {*ours[task], *theirs[task]}
        assert all(row.status == "timed" and row.difference <= row.tolerance for row in timed), timed
        assert (absent.contender, absent.status, absent.median) == ("reduce-overhead", "absent", None)
        assert "CUDA" in absent.reason
    (note,) = {row.reason for row in measured.rows if row.contender == "minibert prepared"}
    assert note.startswith("linear layers: ")
    assert {row.first_answer for row in measured.rows if row.median} == {2}, "built, and then the first call"


def test_the_figures_follow_from_the_times(measured):
    for row in (row for row in measured.rows if row.status == "timed"):
        here = [other for other in measured.rows if (other.task, other.shape) == (row.task, row.shape)]
        ours = next(other for other in here if other.contender in ("minibert prepared", "minibert"))
        assert len(row.seconds) == 3
        assert row.median == median(row.seconds)
        assert min(row.seconds) <= row.quartiles[0] <= row.median <= row.quartiles[1] <= max(row.seconds)
        assert row.ratio == pytest.approx(ours.median / row.median)
        assert row.against == f"{ours.contender} float32"
        assert row.tokens_per_second == pytest.approx(row.tokens / row.median)
        work = workload(row.shape, everywhere=row.task == "inference")
        done = work.flops(CONFIG) * (3 if row.task == "training" else 1)  # backward: two products for each one
        assert row.share_of_matmul == pytest.approx(done / row.median / measured.matmul["float32"])
        assert row.peak_memory_bytes is None, "--memory was not given"


def test_only_real_tokens_and_asked_logits_are_counted(measured):
    work = workload("mixed")
    assert {row.tokens for row in measured.rows if row.shape == "mixed"} == {int(work.attention_mask.sum())}
    assert {row.tokens for row in measured.rows if row.shape == "2x5"} == {10}
    assert work.tokens < work.input_ids.numel()
    assert int(work.asked.sum()) == round(0.15 * work.tokens)
    assert not (work.asked & (work.attention_mask == 0)).any()
    assert torch.equal(work.labels != -100, work.asked)
    d, f = 24, 37  # one token: q, k, v, output, two feed-forward maps, two products of attention; then the head
    assert workload("1x1").flops(CONFIG) == 2 * (2 * (4 * d * d + 2 * d * f) + 4 * d) + 2 * (d * d + 131 * d)
    assert workload("2x5").asked.all()
    assert int(workload("2x5", everywhere=False).asked.sum()) == 2
    for name, low, high in (("mixed", 10, 128), ("normal", 32, 512), ("lognormal", 3, 128), ("8x512", 512, 512)):
        work = workload(name, BertConfig())
        assert low <= min(work.lengths)
        assert max(work.lengths) <= high
        assert torch.equal(work.input_ids, workload(name, BertConfig()).input_ids)
    assert 15 <= median(workload("lognormal", BertConfig()).lengths) <= 25


def row_of(contender, precision, median, **more):
    return Row("inference", "1x3", contender, contender, precision, median=median, **more)


@pytest.mark.parametrize(
    ("peer", "its_median", "ours", "lost"),
    [
        ("float32", 1.0, "float32", True),
        ("float32", 3.0, "float32", False),
        ("int8", 1.0, "float32", False),  # a lower precision than ours: no shame
        ("int8", 1.0, "int8", True),
        ("bfloat16", 1.0, "int8", True),
    ],
)
def test_a_peer_of_the_same_or_a_higher_precision_that_is_faster_is_named(peer, its_median, ours, lost):
    mine, its = row_of("minibert prepared", ours, 2.0), row_of("ONNX Runtime", peer, its_median)
    fast = row_of("minibert prepared", "int8", 0.1)
    assert slower([mine, its, fast]) == ([(mine, its, 2.0)] if lost else []), "a fast int8 hides no slow float32"
    text = table(BenchReport({}, BenchSettings(device="cpu"), {}, {}, [mine, its]))
    assert ("Slower than a peer" in text) == ("takes 2.00 of ONNX Runtime" in text) == lost


def test_int8_stands_beside_our_int8_if_there_is_one():
    for here in (["float32", "bfloat16", "int8"], ["float32", "bfloat16"], ["float32"]):
        rows = [row_of("minibert prepared", one, 2.0) for one in here]
        peer = row_of("ONNX Runtime dynamic", "int8", 4.0)
        run._ratios([*rows, peer])
        assert (peer.against, peer.ratio) == (f"minibert prepared {here[-1]}", 0.5)


# --------------------------------------------------------------------------------------------------------- how it times


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
    modes, norm = [], next(part for part in model.modules() if isinstance(part, torch.nn.LayerNorm))
    norm.register_forward_hook(lambda part, *_: modes.append(part.training))
    before = contender.check(work)
    logits = before if before.dim() == 2 else before[work.asked]
    expected = torch.nn.functional.cross_entropy(logits, work.labels[work.asked]).item()
    losses = {contender.run(work).item() for _ in range(3)}
    assert len(losses) == 3, "dropout, and weights that have moved"
    assert modes == [False, True, True, True], "the gate has no dropout, the steps have"
    assert losses.pop() == pytest.approx(expected, rel=0.2)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    after = contender.check(work)
    assert not torch.equal(after, before)
    assert torch.equal(after, contender.check(work))


@pytest.mark.parametrize("where_train_compiles", [True, False])
def test_our_training_step_is_compiled_where_train_would_compile_it(where_train_compiles, folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(step, "compiles", lambda settings, device: where_train_compiles)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    contender, work = timed("minibert", "training", "float32", folder)
    contender.run(work)
    assert len(compiled) == (2 if where_train_compiles else 0), "its layers"


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


def test_each_form_of_transformers_is_what_its_name_says(folder, monkeypatch):
    for name, everywhere in (("sdpa", True), ("sdpa-asked", False), ("minibert prepared", False)):
        contender, work = timed(name, "inference", "float32", folder)
        assert contender.run(work).shape == ((2, 5, 131) if everywhere else (2, 131)), "the head where it is asked"
    for name, attention in (("eager", "eager"), ("sdpa", "sdpa"), ("sdpa-asked", "sdpa")):
        model = contenders.load_transformers(name, folder, torch.float32, "cpu")
        assert model.config._attn_implementation == attention
    asked = []
    model.cls.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape))
    monkeypatch.setattr(contenders, "load_transformers", lambda *_: model)
    timed("sdpa-asked", "inference", "float32", folder)[0].run(work)
    assert asked == [(2, 24)], "not everywhere, to throw the rest away"
    monkeypatch.setattr(torch, "compile", lambda model, **settings: (model, settings))
    assert contenders.compiled("model", "sdpa") == "model"
    assert contenders.compiled("model", "compiled") == ("model", {})
    assert contenders.compiled("model", "reduce-overhead") == ("model", {"mode": "reduce-overhead"})


def test_contenders_take_turns_and_first_calls_do_not_count(monkeypatch):
    calls, now = [], [0.0]

    def contender(name, takes):
        def run_(work):
            calls.append(name)
            now[0] += 100.0 if calls.count(name) <= 2 else takes

        return Contender(name, "float32", run_, run_)

    monkeypatch.setattr(report, "perf_counter", lambda: now[0])
    for short, turns in ((1000.0, "aabb" * 3), (0.0, "ab" * 3)):  # short ones: a call before each that is not timed
        calls.clear()
        rows = [Row("inference", "1x3", name, name, "float32", tokens=3) for name in "ab"]
        monkeypatch.setattr(run, "SHORT", short)
        pairs = list(zip(rows, [contender("a", 2.0), contender("b", 4.0)], strict=True))
        run._time(pairs, None, BenchSettings(rounds=3, device="cpu"))
        assert "".join(calls) == "aabb" + turns
        assert [row.seconds for row in rows] == [[2.0] * 3, [4.0] * 3]
        assert [row.tokens_per_second for row in rows] == [1.5, 0.75]


def test_changed_weights_are_refused_and_not_timed(bench, monkeypatch):
    load = contenders.load_transformers

    def spoilt(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.bias[0] += 0.1  # to all, LayerNorm would undo it
        return model

    monkeypatch.setattr(contenders, "load_transformers", spoilt)
    out = bench("--shapes", "3x7", "--dtype", "float32", "--peers", "sdpa")
    lines = [line for line in out.splitlines() if " sdpa " in line and "float32" in line]
    assert len(lines) == 2, "one for inference, one for training"
    assert all("refused: its logits differ by" in line and "more than 1e-04" in line for line in lines)


@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_a_peer_that_breaks_is_a_row_and_not_the_end(calls_before, bench, monkeypatch):
    """Where it is built, where its logits are checked, and where it is timed. Of ours it is the end."""
    built, calls = contenders.build_transformers, []

    def broken(name, precision, folder, device):
        calls.append(name)
        if len(calls) > calls_before:
            raise RuntimeError("no such kernel\nand much more")
        one = built(name, precision, folder, device)
        return Contender(one.name, precision, *[lambda work: broken(name, precision, folder, device).run(work)] * 2)

    monkeypatch.setattr(contenders, "build_transformers", broken)
    assert "failed: RuntimeError: no such kernel\n" in bench(*SMALL, "--peers", "eager")
    monkeypatch.setattr(contenders, "build_ours", lambda *_: broken(*_))
    calls.clear()
    with pytest.raises(RuntimeError, match="no such kernel"):
        bench(*SMALL, "--peers", "none")


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(bench):
    rows = json.loads(bench(*SMALL, "--peers", "none", "--memory", "--json"))["rows"]
    assert rows
    for row in rows:
        assert row["peak_memory_bytes"] > 50e6, "Python and torch alone take more"


# ------------------------------------------------------------------------------------------------- what cannot be timed


def test_ours_in_int8_is_a_row(bench):
    if not prepare.has_int8_products():
        lacking("int8", "this CPU cannot multiply 8-bit numbers")
    out = bench("--json", "--task", "inference", "--shapes", "1x3,mixed", "--dtype", "int8", "--peers", "none")
    answer = json.loads(out)
    assert answer["matmul"].keys() == {"int8"}
    for row, shape in zip(answer["rows"], ("1x3", "mixed"), strict=True):
        assert (row["contender"], row["precision"], row["shape"]) == ("minibert prepared", "int8", shape)
        assert (row["status"], row["tolerance"]) == ("timed", None)
        assert 1e-4 < row["difference"] < 0.2, "it is int8, and still the same model"
        assert row["share_of_matmul"] > 0
        assert (row["against"], row["ratio"]) == ("minibert prepared int8", 1)


def test_without_int8_it_is_absent_and_all_else_goes_on(bench, monkeypatch):
    real = prepare.working_ways  # of the other types it is asked as before
    monkeypatch.setattr(prepare, "working_ways", lambda dtype: real(dtype) if dtype != torch.int8 else ())
    out = bench("--shapes", "1x3", "--peers", "none", "--dtype", "float32,int8")
    assert "int8      absent: this CPU, or this torch, cannot multiply 8-bit numbers" in out
    assert "training, 1x3: nothing is trained in int8" in out
    assert "in float32 (its best" in out, "no rate of int8"
    assert out.count("minibert prepared ") == 2, "one timed, one absent"
    assert "matmul: no such products here" in bench(*SMALL[:4], "--peers", "none", "--dtype", "int8")


def test_what_cannot_run_here_says_why(bench, monkeypatch):
    monkeypatch.setattr(contenders, "has_bfloat16", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(contenders, "require", lambda *packages: None)
        for name, precision, device, why in (
            ("minibert prepared", "int8", "cuda", "int8 is for CPUs"),
            ("onnxruntime", "float32", "cuda", "only its CPU form"),
            ("sdpa", "bfloat16", "cpu", "no instructions for bfloat16"),
            ("reduce-overhead", "float32", "cpu", "needs CUDA"),
        ):
            with pytest.raises(Absent, match=why):
                contenders.build(name, precision, "inference", None, device)
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    out = bench("--shapes", "1x3", "--dtype", "float32")
    for name in ("transformers", "onnxruntime", "openvino"):
        assert f"absent: {name} is not installed" in out
    assert out.count("transformers is not installed") == 4 + 3, "in inference and training; one needs CUDA"


@pytest.mark.parametrize(("name", "tolerance"), [("onnxruntime", 1e-4), ("onnxruntime-int8", 0.2), ("openvino", 1e-4),
                                                 ("openvino-bfloat16", 5e-2), ("openvino-int8", 0.3)])  # fmt: skip
def test_the_other_engines_agree(name, tolerance, folder, tmp_path, capsys, monkeypatch):
    """Where they are installed: other lengths than the export's, and padding. In a lower precision one must not be
    as exact as in float32: then it would be float32.
    """
    package, precision = PEERS[name].package, PEERS[name].precision
    for needed in ("onnx", package, *(["nncf"] if name == "openvino-int8" else [])):
        pytest.importorskip(needed)
    if precision == "bfloat16" and not has_bfloat16():
        lacking("bfloat16", "this CPU has no instructions for it")
    work, model = workload("mixed"), BertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    expected = run._expected(model, work)
    threads = []
    if package == "onnxruntime":
        import onnxruntime

        real = onnxruntime.InferenceSession
        keep = lambda path, options, **more: threads.append(options.intra_op_num_threads) or real(path, options, **more)  # noqa: E731
        monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    contender = contenders.build(name, precision, "inference", tmp_path, "cpu")
    assert threads == [torch.get_num_threads()] * (package == "onnxruntime"), "as many as all others"
    assert contender.precision == precision
    assert package == "openvino" or "Attention" in contender.note
    difference = (contender.run(work)[work.asked] - expected).abs().max() / expected.abs().max()
    assert difference < tolerance
    assert (difference > 1e-4) == (precision != "float32")
    assert capsys.readouterr().out == "", "a table or one line of JSON stands there"


def test_openvino_in_another_precision_than_asked_is_absent(monkeypatch, tmp_path):
    """It falls back by itself: a float32 row must not stand under the name of bfloat16."""
    asked = []

    class Core:
        def compile_model(self, path, device, settings):
            asked.append((settings["INFERENCE_PRECISION_HINT"], settings["INFERENCE_NUM_THREADS"]))
            return self

        def get_property(self, name):
            return self

        def get_type_name(self):
            return "f32"

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    monkeypatch.setattr(contenders, "export", lambda folder: folder)
    assert contenders.build_openvino("float32", tmp_path).precision == "float32"
    with pytest.raises(Absent, match="OpenVINO computes in f32 on this CPU, though it was told bf16"):
        contenders.build_openvino("bfloat16", tmp_path)
    assert asked == [("f32", torch.get_num_threads()), ("bf16", torch.get_num_threads())]


# ----------------------------------------------------------------------------------------------- the table, the options


def test_the_table_is_for_people(measured):
    text = table(measured)
    for said in ("What this says.", "absent: reduce-overhead is CUDA graphs", f"torch {torch.__version__}"):
        assert said in text
    figures = dict(seconds=[0.25], quartiles=(0.125, 0.5), tokens_per_second=40.0, difference=1e-6, reason="a note")
    figures |= dict(peak_memory_bytes=3 * 2**30, share_of_matmul=0.5, ratio=0.75, first_answer=1.5)
    work = {"rows": 1, "shortest": 10, "longest": 10, "real_tokens": 10, "padded_tokens": 10, "asked": 10}

    def shown(load, *rows):
        settings = BenchSettings(device="cpu")
        return table(BenchReport({"load": load}, settings, {"float32": 2e9}, {"inference 1x3": work}, list(rows)))

    text = shown("0.1", row_of("sdpa", "float32", 0.25, **figures))
    (line,) = (line.split() for line in text.splitlines() if line.startswith("  sdpa"))
    assert line[2:] == ["1.50", "250.0", "125.0–500.0", "40", "0.75", "50%", "1e-06", "3072", "a", "note"]
    assert "2 GFLOP/s in float32" in text
    assert "WARNING" not in text
    assert "WARNING" in shown("1000.0"), "a busy machine"


def test_the_command_prints_one_line_of_json(bench):
    out = bench("--json", *SMALL, "--peers", "openvino")
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["machine"]["torch"] == torch.__version__
    assert answer["matmul"]["float32"] > 0
    assert answer["workloads"]["inference 1x3"]["real_tokens"] == 3
    assert [row["contender"] for row in answer["rows"]][:2] == ["minibert prepared", "minibert plain"]


def test_the_rate_of_the_machine_is_that_of_its_best_product(monkeypatch):
    times = chain([0.5, 0.25], repeat(1.0))
    monkeypatch.setattr(report, "seconds", lambda call, device: call() is None or next(times))
    assert report.matmul_rate("float32", "cpu") == 2 * 16 * 32 * 64 / 0.25


def test_every_peer_has_its_row():
    pairs = contenders.lineup("inference", tuple(PEERS), ("float32", "bfloat16", "int8"))
    assert {name for name, _ in pairs} == {"minibert prepared", "minibert plain", *PEERS}
    assert len(set(pairs)) == len(pairs)
    assert {("openvino-bfloat16", "bfloat16"), ("sdpa", "bfloat16")} <= set(pairs)
    in_int8 = [name for name, precision in pairs if precision == "int8"]
    assert in_int8 == ["minibert prepared", "onnxruntime-int8", "openvino-int8"]
    trained = contenders.lineup("training", ("sdpa", "sdpa-asked", "openvino"), ("float32", "int8"))
    assert trained == [("minibert", "float32"), ("sdpa", "float32")]


def test_every_option_arrives():
    def read(*words):
        return read_settings(build_parser().parse_args(["bench", *words]), BenchSettings)

    assert read() == BenchSettings()
    assert (read().peers, read().tasks) == (tuple(PEERS), ("inference", "training"))
    assert read().precisions == ("float32", "bfloat16", "int8")
    assert read("--task", "training").precisions == ("float32", "bfloat16"), "nothing is trained in int8"
    words = "--model m --revision r --device cpu --dtype bfloat16,int8 --task inference --shapes 1x2,mixed --rounds 4"
    expected = dict(model="m", revision="r", device="cpu", dtype=("bfloat16", "int8"), task="inference", rounds=4)
    expected |= dict(shapes=("1x2", "mixed"), peers=("sdpa", "onnxruntime"), memory=True, compile_layers=True)
    words += " --peers sdpa,onnxruntime --memory --compile-layers"
    assert read(*words.split()) == BenchSettings(**expected)
    assert read("--random", "--layers", "3", "--peers", "none") == BenchSettings(layers=3, peers=())


def test_a_run_has_the_model_the_shapes_and_the_compiled_layers_that_were_asked_for(folder, monkeypatch, capsys):
    asked, tiny = [], BertForMaskedLM.from_pretrained(folder)
    monkeypatch.setattr(run, "random_model", lambda layers: asked.append(layers) or tiny)
    monkeypatch.setattr(run.BertForMaskedLM, "from_pretrained", lambda name, **more: asked.append((name, more)) or tiny)
    monkeypatch.setattr(run, "prepare_for_inference", lambda model, dtype, linear: asked.append((dtype, linear)))
    monkeypatch.setattr(run, "matmul_rate", lambda *_: 0.0)
    monkeypatch.setattr(run, "_run_task", lambda *_: [])
    assert main(["bench", "--layers", "3", *SMALL]) == 0
    assert main(["bench", "--model", "some/model", "--revision", "v2", *SMALL, "--compile-layers"]) == 0
    assert asked == [3, ("some/model", {"revision": "v2"}), (torch.float32, "compiled")]
    made = []
    monkeypatch.setattr(run, "make_workload", lambda name, *_, everywhere: made.append((name, everywhere)) or work)
    work = workload("1x3")
    run.run(BenchSettings(model=str(folder), device="cpu"))
    names = ("1x16", "1x128", "8x128", "8x512", "mixed", "normal", "lognormal")
    assert made == [*((name, True) for name in names), ("8x128", False), ("mixed", False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--peers", "sdpa,tensorrt"], "--peers does not know 'tensorrt'"),
        (["--dtype", "float16"], "--dtype does not know 'float16'"),
        (["--dtype", ","], "--dtype does not know ''"),
        (["--task", "training", "--dtype", "float32,int8"], "--dtype float32,int8: nothing is trained in int8"),
        (["--shapes", "8by8"], "there is no shape '8by8'"),
        (["--shapes", "1x131"], "131 tokens, and the model has positions for 130"),
        (["--layers", "2"], "--layers 2 is for the random model"),
        (["--model", "nowhere/at/all/here"], "nowhere"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_a_mistake_is_one_line(folder, fails, arguments, message):
    model = [] if "--model" in arguments else ["--model", str(folder)]
    assert message in fails("bench", *model, *arguments)
