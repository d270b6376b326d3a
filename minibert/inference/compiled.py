"""`linear="compiled"`: for a few tokens, all layers as one compiled program. One short text is answered faster by it.

A short text takes hardly any arithmetic. What takes the time is reading the weights, and many small steps, each of them
a call from Python. So torch.export records what the layers do to up to 128 tokens, and torch's compiler makes one
program of it, which holds the weights. For each product it tries its own code and oneDNN's, and takes the faster.

That takes about a minute, once on a machine: the program is kept beside the hub's cache, under a name that is made of
all that it depends on, the weights too. Another process loads it in a fraction of a second, by a private class as seen
in torch 2.13: the public way first imports the compiler, which takes longer than a hundred answers.
"""

import ctypes
import hashlib
import os
import platform
import sys
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from warnings import catch_warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.attention import forced_kernel, has_amx
from minibert.checkpoint.files import whole_file
from minibert.inference.int8 import to_int8
from minibert.inference.onednn import has_bfloat16, multiply_int8, order_int8
from minibert.masked_lm import BertForMaskedLM
from minibert.model import EncoderLayer
from minibert.packing import PackedBatch

MOST = 128  # tokens; with more of them, one program is no faster than its steps
TRIED = 32  # tokens with which the compiler tries which product is faster
VERSION = 1  # of what this file compiles: another one is another program
FOLDER = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "minibert"
OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}


# ---------------------------------------------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class Few:
    """In place of a PackedBatch, while the layers are recorded. mask (T, T): 0 where a token sees another, else −∞."""

    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: object = None) -> Tensor:
        """Attention of query, key and value, each (T, H, K), in the type of the mask: (T, H, K)."""
        q, k, v = (x.to(self.mask.dtype).transpose(0, 1)[None] for x in (query, key, value))  # each (1, H, T, K)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)[0].transpose(0, 1).to(query.dtype)


class Layers(nn.Module):
    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, Few(mask))  # (T, D)
        return x


class RecordedInt8(nn.Module):
    """Int8Linear, but its weights are ordered while it runs: the compiler does that beforehand, in its own way."""

    weight: Tensor
    step: Tensor
    zero_points: Tensor
    bias: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        rounded, step = to_int8(plain.weight)
        self.register_buffer("weight", rounded)  # (outputs, inputs)
        self.register_buffer("step", step.flatten())  # (outputs,)
        self.register_buffer("zero_points", torch.zeros(len(step), dtype=torch.int32))
        self.register_buffer("bias", plain.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        rounded, step = to_int8(x)
        y = multiply_int8(rounded, order_int8(self.weight), self.step, self.zero_points)  # (T, outputs)
        return y * step + self.bias


def recorded(model: BertForMaskedLM, dtype: torch.dtype) -> Layers:
    """The layers of `model`, in `dtype`, as they are compiled."""
    layers = Layers([deepcopy(layer) for layer in model.layers]).requires_grad_(False).eval()
    if dtype != torch.int8:
        return layers.to(dtype)
    layers.float()
    for part in list(layers.modules()):
        for name, plain in part.named_children():
            if isinstance(plain, nn.Linear):
                setattr(part, name, RecordedInt8(plain))
    return layers


def attention_type(dtype: torch.dtype) -> torch.dtype:
    if dtype != torch.int8:
        return dtype
    return torch.bfloat16 if has_bfloat16() else torch.float32


# ------------------------------------------------------------------------------------------------ the compiled program


def program_path(model: BertForMaskedLM, dtype: torch.dtype) -> Path:
    """Where the program of these layers is, or will be."""
    config = model.config
    facts = [VERSION, MOST, dtype, torch.__version__, sys.platform, platform.machine(), torch.get_num_threads()]
    facts += [torch.backends.cpu.get_cpu_capability(), has_amx(), has_bfloat16(), OPTIONS]
    facts += [config.hidden_act, config.layer_norm_eps, config.num_attention_heads]
    digest = hashlib.sha256(repr(facts).encode())
    for name, x in model.get_submodule("layers").state_dict().items():
        x = x.contiguous()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update((ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr()))
    return FOLDER / f"layers-{digest.hexdigest()[:32]}.so"


def load_program(model: BertForMaskedLM, dtype: torch.dtype, compile_it: bool) -> "CompiledLayers | None":
    """The program of these layers. If it is not there: compile it first, or None."""
    if not compile_it and not any(FOLDER.glob("layers-*.so")):
        return None  # before the weights are read
    path = program_path(model, dtype)
    if compile_it and not path.exists():
        compile_program(model, dtype, path)
    return CompiledLayers(path, dtype) if path.exists() else None


def compile_program(model: BertForMaskedLM, dtype: torch.dtype, path: Path) -> None:
    """Compile the layers, and put the program at `path`. Raises ValueError where there is no compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        get_cpp_compiler()
        what = f"the layers for up to {MOST} tokens in {str(dtype).removeprefix('torch.')}"
        print(f"minibert: compiling {what}: a minute or two, once on this machine", file=sys.stderr, flush=True)
        _compile(model, dtype, path)
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise ValueError(
            'linear="compiled" needs a C++ compiler that works, and there is none: install g++ or clang, or leave '
            f"linear out ({str(error)[-300:]})"
        ) from None


def _compile(model: BertForMaskedLM, dtype: torch.dtype, path: Path) -> None:
    import torch._inductor.config

    with suppress(RuntimeError):  # torch does not know what shape `order_int8` gives; or it has been told
        torch.library.register_fake("onednn::qlinear_prepack", lambda weight, shape: weight.t().contiguous())
    tokens = torch.export.Dim("tokens", min=2, max=MOST)
    x = torch.randn(TRIED, model.config.hidden_size).to(torch.float32 if dtype == torch.int8 else dtype)
    mask = torch.zeros(TRIED, TRIED, dtype=attention_type(dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=path.parent) as folder,
        torch.no_grad(),
        torch._inductor.config.patch(freezing=True),
        redirect_stderr(StringIO()),  # a table for each product that was tried
        catch_warnings(action="ignore"),
    ):
        program = torch.export.export(
            recorded(model, dtype), (x, mask), dynamic_shapes=({0: tokens}, {0: tokens, 1: tokens})
        )
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/layers.pt2", inductor_configs=dict(OPTIONS)
        )
        with zipfile.ZipFile(package) as files:
            library = next(name for name in files.namelist() if name.endswith(".so"))
            with whole_file(path) as new:
                os.replace(files.extract(library, folder), new)


class CompiledLayers:
    """A compiled program. Several threads may call it at once: then one waits for the other."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        try:
            self.runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        except RuntimeError as error:
            raise ValueError(f"{path} is no compiled program that torch can load ({error}): delete it") from None
        self.mask_type = attention_type(dtype)
        self.threads, self.process = torch.get_num_threads(), os.getpid()

    def takes(self, batch: PackedBatch) -> bool:
        """Whether it is for this batch. The program was made for a number of threads, and in a process that was forked
        off it would wait for those of its parent.
        """
        here = torch.get_num_threads() == self.threads and os.getpid() == self.process
        return here and 2 <= batch.num_tokens <= MOST and forced_kernel() is None

    def __call__(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """What the last layer gives for the embeddings x (T, D): (T, D)."""
        mask = torch.zeros(len(x), len(x), dtype=self.mask_type)
        if batch.num_sequences > 1:
            row = torch.arange(batch.num_sequences).repeat_interleave(torch.tensor(batch.lengths))
            mask.masked_fill_(row[:, None] != row, -torch.inf)
        result: Tensor = self.runner.run([x, mask])[0]
        return result
