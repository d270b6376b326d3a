"""What is timed: the workloads, minibert in its forms, and the peers. Peers are imported only where they are built.

Every contender starts from the same padded tensors, as a user has them, so that packing is part of our time, and
every one is read from the same folder, as `save_pretrained` writes it.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from minibert.config import BertConfig
from minibert.inference import ConvolvedLinear, PrepackedLinear, prepare_for_inference
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch

SHAPES = ("1x16", "1x128", "8x128", "8x512", "mixed", "normal", "lognormal")
PEERS = ("eager", "sdpa", "compiled", "packed", "onnxruntime", "onnxruntime-int8", "openvino")
TRAINING_PEERS = ("eager", "sdpa", "compiled")
ASKED = 0.15  # of the tokens, as in BERT's loss


class Absent(Exception):
    """A contender that cannot run here, and why."""


@dataclass(frozen=True)
class Workload:
    """One batch. All tensors are (B, S) on the device; lengths are the B numbers of real tokens.

    asked: true where a logit row is wanted; labels: an id there, −100 elsewhere. everywhere: all real tokens are asked.
    """

    name: str
    input_ids: Tensor
    attention_mask: Tensor
    asked: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    everywhere: bool

    @property
    def tokens(self) -> int:
        """Real tokens: the only ones that are credited."""
        return sum(self.lengths)

    def flops(self, config: BertConfig) -> float:
        """Floating-point operations of the matrix products of one forward pass that somebody asked for: real tokens,
        each attending to its own sequence, and the head at the asked positions only."""
        d, f = config.hidden_size, config.intermediate_size
        layer = self.tokens * (8 * d * d + 4 * d * f) + sum(4 * n * n * d for n in self.lengths)
        head = int(self.asked.sum()) * (2 * d * d + 2 * d * config.vocab_size)
        return float(config.num_hidden_layers * layer + head)


def make_workload(name: str, config: BertConfig, device: str, *, everywhere: bool) -> Workload:
    """`name` is "8x128" (rows x tokens, no padding) or "mixed", "normal", "lognormal". The same ids in every run.

    Raises ValueError for a name that is neither, or a row longer than the model allows."""
    generator = torch.Generator().manual_seed(0)
    dense = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if dense:
        lengths = [int(dense[2])] * int(dense[1])
    elif name == "mixed":
        lengths = torch.randint(10, 129, (16,), generator=generator).tolist()
    elif name == "normal":
        lengths = (256 + 64 * torch.randn(8, generator=generator)).round().clamp(32, 512).int().tolist()
    elif name == "lognormal":
        lengths = (20 * (0.6 * torch.randn(32, generator=generator)).exp()).round().clamp(3, 128).int().tolist()
    else:
        raise ValueError(f"there is no shape {name!r}: give rows x tokens, as in 8x128, or mixed, normal, lognormal")
    if max(lengths) > config.max_position_embeddings:
        raise ValueError(
            f"shape {name} has rows of {max(lengths)} tokens, and the model has positions for "
            f"{config.max_position_embeddings}: leave it out of --shapes"
        )
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, config.vocab_size, shape, generator=generator) * mask
    asked = mask.bool()
    if not (dense and everywhere):
        places = asked.flatten().nonzero().flatten()
        chosen = places[torch.randperm(len(places), generator=generator)[: max(1, round(ASKED * len(places)))]]
        asked = torch.zeros(shape[0] * shape[1], dtype=torch.bool).index_fill(0, chosen, True).view(shape)
    targets = torch.randint(1, config.vocab_size, shape, generator=generator)
    labels = torch.where(asked, targets, IGNORE)
    ids, mask, asked, labels = (x.to(device) for x in (ids, mask, asked, labels))
    return Workload(name, ids, mask, asked, labels, tuple(lengths), bool(dense and everywhere))


@dataclass
class Contender:
    """One row of the table. `run` is what is timed; it gives (B, S, V) logits, or (M, V) at the asked positions, or,
    when training, the loss. `check` gives logits for the parity gate, also where `run` is a training step."""

    name: str
    precision: str  # float32, bfloat16 or int8
    run: Callable[[Workload], Tensor]
    check: Callable[[Workload], Tensor]
    note: str = ""


def random_model(layers: int) -> BertForMaskedLM:
    """BERT-base with `layers` layers and random weights; biases too, so that a lost one shows in the parity gate."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def lineup(task: str, peers: tuple[str, ...], precisions: tuple[str, ...]) -> list[tuple[str, str]]:
    """(contender, precision) for every row of the task's table, ours first."""
    if task == "training":
        rows = ["minibert", *(peer for peer in peers if peer in TRAINING_PEERS)]
        return [(name, precision) for precision in precisions for name in rows]
    rows = ["minibert prepared", "minibert plain", *(peer for peer in peers if peer in TRAINING_PEERS)]
    pairs = [(name, precision) for precision in precisions for name in rows]
    fixed = {"packed": "bfloat16", "onnxruntime": "float32", "onnxruntime-int8": "int8", "openvino": "float32"}
    return pairs + [(name, fixed[name]) for name in peers if name in fixed]


def build(name: str, precision: str, task: str, folder: Path, device: str) -> Contender:
    """The contender `name` from the weights in `folder`. Raises Absent where it cannot run."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if name == "packed":
        _require_packed(device)
    if precision == "bfloat16" and device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Absent("this CPU has no instructions for bfloat16")
    if task == "training":
        return _training(name, precision, folder, device)
    if name.startswith("minibert"):
        return _ours(name, precision, dtype, folder, device)
    if name in ("eager", "sdpa", "compiled", "packed"):
        return _transformers(name, precision, dtype, folder, device)
    if device != "cpu":
        raise Absent("only its CPU form is run here")
    return _onnxruntime(name, folder) if name.startswith("onnxruntime") else _openvino(folder)


def _ours(name: str, precision: str, dtype: torch.dtype, folder: Path, device: str) -> Contender:
    model = BertForMaskedLM.from_pretrained(folder, device=device)
    model = prepare_for_inference(model, dtype) if name == "minibert prepared" else model.to(dtype)

    @torch.inference_mode()
    def run(work: Workload) -> Tensor:
        if work.everywhere:
            return model(work.input_ids, work.attention_mask).logits  # (B, S, V)
        batch = PackedBatch.from_padded(work.input_ids, work.attention_mask)
        return model.predict(batch, batch.pack(work.asked).nonzero().flatten())  # (M, V)

    return Contender(
        name, precision, run, run, _linear_kind(model) if device == "cpu" and name == "minibert prepared" else ""
    )


def _linear_kind(model: BertForMaskedLM) -> str:
    """Which linear layers `prepare_for_inference` found to be the fastest here."""
    qkv = model.layers[0].get_submodule("attention.qkv")
    if isinstance(qkv, ConvolvedLinear):
        return "linear layers as oneDNN's convolutions"
    if isinstance(qkv, PrepackedLinear):
        return "linear layers as oneDNN's products"
    return "linear layers as torch has them: nothing faster was found here"


# --------------------------------------------------------------------------------------------------------- transformers


def _require_packed(device: str) -> None:
    _require("transformers")
    from transformers.utils.import_utils import is_flash_attn_2_available

    if device == "cpu":
        raise Absent("transformers packs only with flash attention, which needs CUDA")
    if not is_flash_attn_2_available():
        raise Absent("transformers packs only with flash attention: the package flash-attn is not installed")


def _load_transformers(name: str, folder: Path, dtype: torch.dtype, device: str) -> Any:
    _require("transformers")
    import transformers

    attention = {"compiled": "sdpa", "packed": "flash_attention_2"}.get(name, name)
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.BertForMaskedLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def _transformers(name: str, precision: str, dtype: torch.dtype, folder: Path, device: str) -> Contender:
    model = _load_transformers(name, folder, dtype, device)
    call = torch.compile(model) if name == "compiled" else model

    @torch.inference_mode()
    def run(work: Workload) -> Tensor:
        logits: Tensor = call(input_ids=work.input_ids, attention_mask=work.attention_mask).logits
        return logits  # (B, S, V)

    @torch.inference_mode()
    def packed(work: Workload) -> Tensor:
        batch = PackedBatch.from_padded(work.input_ids, work.attention_mask)
        bounds = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
        longest = {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
        out = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], **bounds, **longest)
        return batch.unpack(out.logits[0])  # (B, S, V)

    chosen = packed if name == "packed" else run
    return Contender(f"transformers {name}", precision, chosen, chosen)


# ------------------------------------------------------------------------------------------------------------- training


def _training(name: str, precision: str, folder: Path, device: str) -> Contender:
    """A step: forward, loss at the asked positions, backward, AdamW. float32 weights; in bfloat16 under autocast.
    Dropout as the configuration has it. Ours is packed, and as `minibert train` runs it; transformers is padded, since
    that is how it is trained."""
    from minibert.training.step import LossSum, wrapped_layers

    model: Any
    if name == "minibert":
        model = BertForMaskedLM.from_pretrained(folder, device=device)
    else:
        model = _load_transformers(name, folder, torch.float32, device)
    call = torch.compile(model) if name == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def cast() -> Any:
        return torch.autocast(device, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()

    objective = LossSum(model)

    def run(work: Workload) -> Tensor:
        _set_training(model, True)
        if name == "minibert":
            with wrapped_layers(model):
                batch = PackedBatch.from_padded(work.input_ids, work.attention_mask)
                positions = batch.pack(work.asked).nonzero().flatten()
                targets = batch.pack(work.labels)[positions]
                with cast():
                    loss = objective(batch, positions, targets) / len(targets)
                loss.backward()
        else:
            with cast():
                loss = call(input_ids=work.input_ids, attention_mask=work.attention_mask, labels=work.labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def check(work: Workload) -> Tensor:
        _set_training(model, False)
        with cast():
            if name == "minibert":
                batch = PackedBatch.from_padded(work.input_ids, work.attention_mask)
                return model.predict(batch, batch.pack(work.asked).nonzero().flatten())  # (M, V)
            logits: Tensor = model(input_ids=work.input_ids, attention_mask=work.attention_mask).logits
            return logits

    label = name if name == "minibert" else f"transformers {name}"
    return Contender(label, precision, run, check, "autocast" if precision == "bfloat16" else "")


def _set_training(model: nn.Module, training: bool) -> None:
    if model.training != training:
        model.train(training)


# ------------------------------------------------------------------------------------------- ONNX Runtime and OpenVINO


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise Absent(f"{package} is not installed")


def _export(folder: Path) -> Path:
    """The transformers model as an ONNX graph, written once for all that read it. Attention is written as in BERT's
    own code, scores / √K + (1 − mask) · lowest: transformers 5's own mask does not survive tracing, and the optimizer
    of ONNX Runtime, which looks for that sum, takes a multiplied 1 / √K for the mask.
    """
    path = folder / "model.onnx"
    if path.exists():
        return path
    _require("transformers", "onnx")
    model = _load_transformers("eager", folder, torch.float32, "cpu")
    from transformers.models.bert import modeling_bert

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + mask  # (B, H, S, S)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    class Traced(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            logits: Tensor = model(input_ids=input_ids, attention_mask=hidden).logits
            return logits

    traced = Traced()
    traced.model = model
    ids, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    axes = {0: "rows", 1: "columns"}
    with warnings.catch_warnings(), mock.patch.object(modeling_bert, "eager_attention_forward", attention):
        warnings.simplefilter("ignore")  # the tracer warns of every Python number that it sees
        torch.onnx.export(
            traced.eval(),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": axes},
            opset_version=17,
            dynamo=False,
        )
    return path


def _fused(folder: Path) -> tuple[Path, str]:
    """The graph after onnxruntime.transformers' BERT optimizer, and what it fused."""
    path, notes = folder / "fused.onnx", folder / "fused.txt"
    if not path.exists():
        exported = _export(folder)
        if find_spec("onnxruntime.transformers") is None:
            return exported, "graph not fused: onnxruntime.transformers is not there"
        from onnxruntime.transformers import optimizer

        config = BertForMaskedLM.from_pretrained(folder).config
        model = optimizer.optimize_model(
            str(exported),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        model.save_model_to_file(str(path))
        fused = {name: count for name, count in model.get_fused_operator_statistics().items() if count}
        notes.write_text("fused: " + (", ".join(f"{count} {name}" for name, count in fused.items()) or "nothing"))
    return path, notes.read_text()


def _onnxruntime(name: str, folder: Path) -> Contender:
    _require("onnxruntime")
    import onnxruntime

    path, note = _fused(folder)
    if name == "onnxruntime-int8":
        path = folder / "int8.onnx"
        if not path.exists():
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(str(_fused(folder)[0]), str(path), extra_options={"DefaultTensorType": 1})  # 1: FLOAT
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(work: Workload) -> Tensor:
        feed = {"input_ids": work.input_ids.numpy(), "attention_mask": work.attention_mask.numpy()}
        return torch.from_numpy(session.run(None, feed)[0])  # (B, S, V)

    if name == "onnxruntime-int8":
        return Contender("ONNX Runtime dynamic", "int8", run, run, note)
    return Contender("ONNX Runtime", "float32", run, run, note)


def _openvino(folder: Path) -> Contender:
    _require("openvino")
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(_export(folder)), "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})

    def run(work: Workload) -> Tensor:
        feed = {"input_ids": work.input_ids.numpy(), "attention_mask": work.attention_mask.numpy()}
        return torch.from_numpy(compiled(feed)[0])  # (B, S, V)

    return Contender("OpenVINO", "float32", run, run)
