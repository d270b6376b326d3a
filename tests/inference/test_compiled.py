"""`linear="compiled"`: which batches go through the program, its numbers, and when it is compiled."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forms import TOLERANCE, form_or_skip
from twins import CONFIGS, twins

from minibert import PackedBatch, prepare_for_inference
from minibert.attention import use_kernel
from minibert.inference import compiled
from minibert.inference.prepare import WAYS

SIZES = {**CONFIGS["batch 13, gelu"], "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 140}
FORMS = {"product": torch.float32, "bfloat16 product": torch.bfloat16, "int8": torch.int8}
MIXES = [[5], [7, 3], [1, 0, 2], [60, 60], [128], [100, 29], [1]]  # the last two are not for the program


def batch_of(lengths):
    generator = torch.Generator().manual_seed(0)
    return PackedBatch.from_lists([torch.randint(5, 99, (length,), generator=generator).tolist() for length in lengths])


def assert_same_answers(fast, plain, dtype):
    near = dict(rtol=0, atol=TOLERANCE[dtype])
    for lengths in MIXES:
        batch = batch_of(lengths)
        everywhere = torch.arange(batch.num_tokens).flip(0)
        torch.testing.assert_close(fast.predict(batch, everywhere).float(), plain.predict(batch, everywhere), **near)
        torch.testing.assert_close(fast.encode(batch).float(), plain.encode(batch), **near)
    assert fast.predict(batch, everywhere[:0]).shape == (0, 99)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(fast(ids).logits.float(), plain(ids).logits, **near)


@pytest.fixture
def model():
    return twins(SIZES)[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "programs")
    return tmp_path / "programs"


@pytest.fixture
def recording(folder, monkeypatch):
    """In place of the compiler: what it would compile is run as it is. Gives the tokens of each run."""
    programs, runs = {}, []

    class Runner:
        def __init__(self, path, models):
            self.layers = programs[path]

        def run(self, given):
            runs.append(len(given[0]))
            return [self.layers(*given)]

    def compile_it(model, dtype, path):
        programs[str(path)] = compiled.recorded(model, dtype)
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(compiled, "_compile", compile_it)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", Runner)
    return runs


def test_what_it_was_not_made_for_goes_the_usual_way(model, recording):
    """The program has its own attention, and waits for threads that a forked process has not."""
    fast, batch = prepare_for_inference(model, linear="compiled"), batch_of([7, 3])
    with use_kernel("formula"):
        fast.encode(batch)
    for name, other in (("torch.get_num_threads", 77), ("os.getpid", -1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, lambda other=other: other)
            fast.encode(batch)
    assert not recording
    fast.encode(batch)
    assert recording == [10]


def test_a_damaged_program_is_named(model, folder):
    path = compiled.program_path(model, torch.float32)
    path.parent.mkdir()
    path.write_bytes(b"half a program")
    with pytest.raises(ValueError, match=rf"{path.name}.*delete it"):
        prepare_for_inference(model)


def test_it_is_compiled_once_and_then_auto_takes_it(model, recording, folder, capsys):
    assert prepare_for_inference(model).linear in WAYS, "not there, so nobody waits for it"
    assert not folder.exists()
    prepare_for_inference(model, linear="compiled")
    prepare_for_inference(model, linear="compiled")
    assert capsys.readouterr().err.count("minibert: compiling") == 1, "a line, so that one knows why it takes so long"
    assert len(list(folder.iterdir())) == 1
    assert prepare_for_inference(model).linear == "compiled"
    assert prepare_for_inference(model, linear="torch").linear == "torch"


def test_other_layers_are_another_program(model, monkeypatch):
    """Were it found by its sizes alone, it would give the answers of other weights."""
    paths = {compiled.program_path(model, dtype) for dtype in (torch.float32, torch.int8)}
    for other in ({"hidden_act": "gelu_new"}, {"num_attention_heads": 2}):
        paths.add(compiled.program_path(twins({**SIZES, **other})[0], torch.float32))
    with torch.no_grad():
        model.layers[1].feed_forward.output.weight[3, 4] += 1e-3
    paths.add(compiled.program_path(model, torch.float32))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    paths.add(compiled.program_path(model, torch.float32))
    assert len(paths) == 6
    with torch.no_grad():
        model.embeddings.word.weight[3, 4] += 1
    assert compiled.program_path(model, torch.float32) in paths, "the program holds the layers alone"


def test_without_a_compiler(model, folder):
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ValueError, match=r"there is none: install g\+\+ or clang, or leave linear out"):
            prepare_for_inference(model, linear="compiled")
        assert prepare_for_inference(model).linear in WAYS
    assert not list(folder.glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_program(form, model, folder):
    """By the real compiler. In float32 also from several threads."""
    form_or_skip(form)
    try:
        fast = prepare_for_inference(model, FORMS[form], linear="compiled")
    except ValueError as error:
        pytest.skip(str(error))
    assert [path.suffix for path in folder.iterdir()] == [".so"], "and nothing else is left"
    assert_same_answers(fast, model, FORMS[form])
    again = prepare_for_inference(model, FORMS[form])
    assert again.linear == "compiled", "loaded"
    batch, first = batch_of([7, 3]), torch.tensor([0])
    expected = fast.predict(batch, first)
    assert torch.equal(again.predict(batch, first), expected)
    if form == "product":
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(got, expected) for got in pool.map(lambda _: fast.predict(batch, first), range(40)))


@pytest.mark.usefixtures("exact_products")  # they stay until the end of the module, so this test is the last one
@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_go_through_it(form, model, recording):
    form_or_skip(form)
    fast = prepare_for_inference(model, FORMS[form], linear="compiled")
    assert fast.linear == "compiled"
    assert_same_answers(fast, model, FORMS[form])
    assert recording == [*(tokens for tokens in (5, 10, 3, 120, 128) for _ in range(2)), 3]
