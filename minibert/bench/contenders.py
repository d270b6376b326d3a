"""Who is timed: minibert in its forms, and the peers, each imported only where it is built. All read one folder, as
`save_pretrained` writes it.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from minibert.bench.settings import PEERS
from minibert.bench.workloads import Workload
from minibert.config import BertConfig
from minibert.inference import PreparedBert, prepare_for_inference
from minibert.inference.onednn import has_bfloat16
from minibert.inference.prepare import has_int8_products
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch

CALIBRATION = 4  # batches of random ids, for OpenVINO in int8


class Absent(Exception):
    """A contender that cannot run here, and why."""


@dataclass
class Contender:
    """One row of the table."""

    name: str
    precision: str  # float32, bfloat16 or int8
    run: Callable[[Workload], Tensor]  # what is timed: logits (B, S, V), or (M, V) at the asked positions; or a loss
    check: Callable[[Workload], Tensor]  # logits for the parity gate, also where `run` is a training step
    note: str = ""  # how it was built


def lineup(task: str, names: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """(contender, precision) for every row of the task's table, ours first. In int8 nothing is trained."""
    floating = [precision for precision in precisions if precision != "int8"]
    if task == "training":
        rows = ["minibert", *(name for name in names if PEERS[name].trains)]
        return [(name, precision) for precision in floating for name in rows]
    rows = ["minibert prepared", "minibert plain", *(name for name in names if PEERS[name].precision is None)]
    pairs = [(name, precision) for precision in floating for name in rows]
    if "int8" in precisions:
        pairs.append(("minibert prepared", "int8"))
    return pairs + [(name, only) for name in names if (only := PEERS[name].precision)]


def build(name: str, precision: str, task: str, folder: Path, device: str) -> Contender:
    """The contender `name` from the weights in `folder`. Raises Absent where it cannot run."""
    if name == "reduce-overhead" and not device.startswith("cuda"):
        raise Absent("reduce-overhead is CUDA graphs: it needs CUDA")
    if precision == "bfloat16" and device == "cpu" and not has_bfloat16():
        raise Absent("this CPU has no instructions for bfloat16")
    if precision == "int8" and device != "cpu":
        raise Absent("int8 is for CPUs")
    if task == "training":
        return build_training(name, precision, folder, device)
    if name not in PEERS:
        return build_ours(name, precision, folder, device)
    package = PEERS[name].package
    require(package)
    if package == "transformers":
        return build_transformers(name, precision, folder, device)
    if device != "cpu":
        raise Absent("only its CPU form is run here")
    return build_onnxruntime(precision, folder) if package == "onnxruntime" else build_openvino(precision, folder)


def require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise Absent(f"{package} is not installed")


def load_library(name: str) -> None:
    """Import a peer's library, if it is there: what comes first would count seconds of it otherwise."""
    if name in PEERS and find_spec(package := PEERS[name].package):
        import_module("transformers.models.bert.modeling_bert" if package == "transformers" else package)


# ----------------------------------------------------------------------------------------------------------------- ours


def random_model(layers: int) -> BertForMaskedLM:
    """BERT-base with `layers` layers and random weights. Biases are random too: if one of 0 got lost, the parity gate
    would not notice.
    """
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def packed(work: Workload) -> tuple[PackedBatch, Tensor]:
    """The batch and the positions in it that are asked, (M,)."""
    batch = PackedBatch.from_padded(work.input_ids, work.attention_mask)
    return batch, batch.pack(work.asked).nonzero().flatten()


def build_ours(name: str, precision: str, folder: Path, device: str) -> Contender:
    if precision == "int8" and not has_int8_products():
        raise Absent("this CPU, or this torch, cannot multiply 8-bit numbers")
    dtype = getattr(torch, precision)
    model = BertForMaskedLM.from_pretrained(folder, device=device)
    model = prepare_for_inference(model, dtype) if name == "minibert prepared" else model.to(dtype)

    @torch.inference_mode()
    def run(work: Workload) -> Tensor:
        if work.everywhere:
            return model(work.input_ids, work.attention_mask).logits  # (B, S, V)
        return model.predict(*packed(work))  # (M, V)

    note = f"linear layers: {model.linear}" if isinstance(model, PreparedBert) and device == "cpu" else ""
    return Contender(name, precision, run, run, note)


def build_training(name: str, precision: str, folder: Path, device: str) -> Contender:
    """A step: forward, loss at the asked positions, backward, AdamW. The weights are float32, and bfloat16 is autocast.
    Dropout is as the configuration has it. Ours is packed, as `minibert train` runs it. transformers is padded, as
    people train it.
    """
    from minibert.training.settings import Settings
    from minibert.training.step import LossSum, compiles, wrapped_layers

    ours = name == "minibert"
    model: Any
    if ours:
        model = BertForMaskedLM.from_pretrained(folder, device=device)
    else:
        require(PEERS[name].package)
        model = load_transformers(name, folder, torch.float32, device)
    call, objective = compiled(model, name), LossSum(model)
    compile_ours = compiles(Settings(steps=1), torch.device(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    cast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def loss_of(work: Workload) -> Tensor:
        if not ours:
            return call(input_ids=work.input_ids, attention_mask=work.attention_mask, labels=work.labels).loss
        batch, positions = packed(work)
        return objective(batch, positions, batch.pack(work.labels)[positions]) / len(positions)

    def run(work: Workload) -> Tensor:
        model.train()
        with wrapped_layers(model, compile=compile_ours) if ours else nullcontext():
            with cast:
                loss = loss_of(work)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def check(work: Workload) -> Tensor:
        model.eval()
        with cast:
            if ours:
                return model.predict(*packed(work))  # (M, V)
            return model(input_ids=work.input_ids, attention_mask=work.attention_mask).logits

    label = name if ours else f"transformers {name}"
    return Contender(label, precision, run, check, "autocast" if precision == "bfloat16" else "")


# --------------------------------------------------------------------------------------------------------- transformers


def load_transformers(name: str, folder: Path, dtype: torch.dtype, device: str) -> Any:
    import transformers

    attention = "eager" if name == "eager" else "sdpa"
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.BertForMaskedLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def compiled(model: Any, name: str) -> Any:
    """The model as the peer `name` calls it."""
    if name == "compiled":
        return torch.compile(model)
    return torch.compile(model, mode="reduce-overhead") if name == "reduce-overhead" else model


def build_transformers(name: str, precision: str, folder: Path, device: str) -> Contender:
    """sdpa-asked: the head is called by hand at the asked positions only, as a careful user would."""
    model = load_transformers(name, folder, getattr(torch, precision), device)
    call = compiled(model, name)

    @torch.inference_mode()
    def run(work: Workload) -> Tensor:
        if name == "sdpa-asked":
            hidden = model.bert(input_ids=work.input_ids, attention_mask=work.attention_mask).last_hidden_state
            return model.cls(hidden[work.asked])  # (M, V)
        return call(input_ids=work.input_ids, attention_mask=work.attention_mask).logits  # (B, S, V)

    return Contender(f"transformers {name}", precision, run, run)


# -------------------------------------------------------------------------------------------- ONNX Runtime and OpenVINO


def export(folder: Path) -> Path:
    """The transformers model as an ONNX graph, written once for all that read it. Attention is written as in BERT's
    own code, scores / √K + (1 − mask) · lowest: transformers 5's own mask does not survive tracing, and the optimizer
    of ONNX Runtime, which looks for that sum, takes a multiplied 1 / √K for the mask.
    """
    path = folder / "model.onnx"
    if path.exists():
        return path
    require("transformers", "onnx")
    model = load_transformers("eager", folder, torch.float32, "cpu")
    from transformers.models.bert import modeling_bert

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + mask  # (B, H, S, S)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    class Traced(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            return model(input_ids=input_ids, attention_mask=hidden).logits

    traced = Traced()
    traced.model = model
    names, axes = ["input_ids", "attention_mask"], {0: "rows", 1: "columns"}
    with warnings.catch_warnings(), mock.patch.object(modeling_bert, "eager_attention_forward", attention):
        warnings.simplefilter("ignore")  # the tracer warns of every Python number that it sees
        torch.onnx.export(
            traced.eval(),
            (torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)),
            str(path),
            input_names=names,
            output_names=["logits"],
            dynamic_axes=dict.fromkeys([*names, "logits"], axes),
            opset_version=17,
            dynamo=False,
        )
    return path


def fused(folder: Path) -> tuple[Path, str]:
    """The graph after onnxruntime.transformers' BERT optimizer, and what it fused."""
    path, notes = folder / "fused.onnx", folder / "fused.txt"
    if not path.exists():
        from onnxruntime.transformers import optimizer

        config = BertConfig.from_json_file(folder / "config.json")
        sizes = dict(num_heads=config.num_attention_heads, hidden_size=config.hidden_size)
        model = optimizer.optimize_model(str(export(folder)), "bert", **sizes, opt_level=0)
        model.save_model_to_file(str(path))
        done = [f"{count} {name}" for name, count in model.get_fused_operator_statistics().items() if count]
        notes.write_text(f"fused: {', '.join(done) or 'nothing'}")
    return path, notes.read_text()


def feed(work: Workload) -> dict[str, Any]:
    return {"input_ids": work.input_ids.numpy(), "attention_mask": work.attention_mask.numpy()}


def build_onnxruntime(precision: str, folder: Path) -> Contender:
    """In int8 by its dynamic quantisation: each call finds the steps of its activations."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    path, note = fused(folder)
    if precision == "int8":
        path, exact = folder / "int8.onnx", path
        quantize_dynamic(str(exact), str(path), extra_options={"DefaultTensorType": 1})  # 1: FLOAT
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(work: Workload) -> Tensor:
        return torch.from_numpy(session.run(None, feed(work))[0])  # (B, S, V)

    return Contender("ONNX Runtime dynamic" if precision == "int8" else "ONNX Runtime", precision, run, run, note)


def build_openvino(precision: str, folder: Path) -> Contender:
    """From the plain graph: OpenVINO fuses it by itself. By default it takes bfloat16 wherever the CPU has it, so the
    precision is always given. Raises Absent if OpenVINO computes in another one. In int8 it is left to OpenVINO what it
    does with the parts that are not quantised.
    """
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16", "int8": None}[precision]
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # for one batch at a time
        **({} if hint is None else {"INFERENCE_PRECISION_HINT": hint}),
    }
    path = folder / "openvino-int8.xml" if precision == "int8" else export(folder)
    if not path.exists():
        config = BertConfig.from_json_file(folder / "config.json")
        generator = torch.Generator().manual_seed(0)
        shape = (4, min(64, config.max_position_embeddings))
        batches = [torch.randint(1, config.vocab_size, shape, generator=generator) for _ in range(CALIBRATION)]
        quantise_for_openvino(folder, [(ids, torch.ones_like(ids)) for ids in batches])
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != (hint or taken):
        raise Absent(f"OpenVINO computes in {taken} on this CPU, though it was told {hint}")

    def run(work: Workload) -> Tensor:
        return torch.from_numpy(compiled(feed(work))[0])  # (B, S, V)

    note = f"INFERENCE_PRECISION_HINT {taken}"
    if precision == "int8":
        note = f"nncf.quantize for transformers, calibrated on {CALIBRATION} batches of random ids; the rest in {taken}"
    return Contender("OpenVINO", precision, run, run, note)


def quantise_for_openvino(folder: Path, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write the graph with weights and activations in 8 bits for `build_openvino`, as OpenVINO's documentation has it
    for transformers: by nncf, which looks at the activations of some batches beforehand, ids and mask (B, S) each.
    """
    require("openvino", "nncf")
    with redirect_stdout(StringIO()):  # it draws progress bars, also where one line of JSON is wanted
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        feeds = [{"input_ids": ids.numpy(), "attention_mask": mask.numpy()} for ids, mask in batches]
        graph = openvino.Core().read_model(str(export(folder)))
        settings = dict(model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
        quantised = nncf.quantize(graph, nncf.Dataset(feeds), **settings)
        openvino.save_model(quantised, str(folder / "openvino-int8.xml"), compress_to_fp16=False)
