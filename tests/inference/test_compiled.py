"""`linear="compiled"`: which batches go through the program, its numbers, and when it is compiled."""

import os
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
    for lengths in MIXES:
        batch = batch_of(lengths)
        everywhere = torch.arange(batch.num_tokens).flip(0)
        near = dict(rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(fast.predict(batch, everywhere).float(), plain.predict(batch, everywhere), **near)
        torch.testing.assert_close(fast.encode(batch).float(), plain.encode(batch), **near)
    assert fast.predict(batch, everywhere[:0]).shape == (0, 99)


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


def test_a_kernel_or_a_number_of_threads_of_ones_own(recording, monkeypatch):
    """The program has its own attention, and was made for a number of threads."""
    fast, batch = prepare_for_inference(twins(SIZES)[0], linear="compiled"), batch_of([7, 3])
    with use_kernel("formula"):
        fast.encode(batch)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        fast.encode(batch)
    assert not recording
    fast.encode(batch)
    assert recording == [10]


def test_a_damaged_program_is_named(folder):
    model = twins(SIZES)[0]
    path = compiled.program_path(model, torch.float32)
    path.parent.mkdir()
    path.write_bytes(b"half a program")
    with pytest.raises(ValueError, match=rf"{path.name}.*delete it"):
        prepare_for_inference(model)


def test_it_is_compiled_once_and_then_auto_takes_it(recording, folder, capsys):
    model = twins(SIZES)[0]
    assert prepare_for_inference(model).linear in WAYS, "not there, so nobody waits for it"
    assert not folder.exists()
    prepare_for_inference(model, linear="compiled")
    prepare_for_inference(model, linear="compiled")
    assert capsys.readouterr().err.count("minibert: compiling") == 1, "a line, so that one knows why it takes so long"
    assert len(list(folder.iterdir())) == 1
    assert prepare_for_inference(model).linear == "compiled"
    assert prepare_for_inference(model, linear="torch").linear == "torch"
    if compiled.has_bfloat16():
        assert prepare_for_inference(model, torch.bfloat16).linear in WAYS, "another type is another program"


def test_other_layers_are_another_program(folder, monkeypatch):
    """Were it found by its sizes alone, it would give the answers of other weights."""
    model = twins(SIZES)[0]
    paths = {compiled.program_path(model, torch.float32), compiled.program_path(model, torch.int8)}
    with torch.no_grad():
        model.layers[1].feed_forward.output.weight[3, 4] += 1e-3
    paths.add(compiled.program_path(model, torch.float32))
    paths.add(compiled.program_path(twins({**SIZES, "hidden_act": "gelu_new"})[0], torch.float32))
    paths.add(compiled.program_path(twins({**SIZES, "num_attention_heads": 2})[0], torch.float32))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    paths.add(compiled.program_path(model, torch.float32))
    assert len(paths) == 6
    with torch.no_grad():
        model.embeddings.word.weight[3, 4] += 1
    assert compiled.program_path(model, torch.float32) in paths, "the program holds the layers alone"


def test_without_a_compiler(folder):
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ValueError, match=r"there is none: install g\+\+ or clang, or leave linear out"):
            prepare_for_inference(twins(SIZES)[0], linear="compiled")
        assert prepare_for_inference(twins(SIZES)[0]).linear in WAYS
    assert not list(folder.glob("*"))


def test_types_and_devices_that_it_is_not_for():
    with pytest.raises(ValueError, match=r"'compiled' cannot be had in torch\.float64 on this cpu: .*torch"):
        prepare_for_inference(twins(SIZES)[0], torch.float64, linear="compiled")


# ------------------------------------------------------------------------------------------------- the real compiler


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_program(form, folder):
    """In float32 also from several threads."""
    form_or_skip(form)
    dtype, plain = FORMS[form], twins(SIZES)[0]
    try:
        fast = prepare_for_inference(plain, dtype, linear="compiled")
    except ValueError as error:
        pytest.skip(str(error))
    assert [path.suffix for path in folder.iterdir()] == [".so"], "and nothing else is left"
    assert_same_answers(fast, plain, dtype)
    again = prepare_for_inference(plain, dtype)
    assert again.linear == "compiled", "loaded"
    batch, first = batch_of([7, 3]), torch.tensor([0])
    expected = fast.predict(batch, first)
    assert torch.equal(again.predict(batch, first), expected)
    if form != "product":
        return
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: fast.predict(batch, first), range(40)):
            assert torch.equal(got, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert not fast.program.takes(batch), "in a forked process it would wait for the threads of its parent"


# --------------------------------------------------- on exact products, which stay until the end of the module: so last


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_go_through_it(form, recording):
    form_or_skip(form)
    plain = twins(SIZES)[0]
    fast = prepare_for_inference(plain, FORMS[form], linear="compiled")
    assert fast.linear == "compiled"
    assert_same_answers(fast, plain, FORMS[form])
    assert recording == [tokens for tokens in (5, 10, 3, 120, 128) for _ in range(2)]
    torch.testing.assert_close(
        fast(torch.tensor([[5, 6, 7]])).logits.float(),
        plain(torch.tensor([[5, 6, 7]])).logits,
        rtol=0,
        atol=TOLERANCE[FORMS[form]],
    )
    assert recording[-1] == 3
