"""Who is timed: minibert in its forms, and the peers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minibert.bench import peers
from minibert.bench.ct2 import build_ctranslate2
from minibert.bench.workloads import Absent, Contender, Workload
from minibert.config import BertConfig
from minibert.inference import PreparedBert, prepare_for_inference
from minibert.inference.onednn import has_bfloat16
from minibert.inference.ways import has_int8_products
from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch

PEERS = (
    *("eager", "sdpa", "compiled", "packed"),
    *("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bfloat16", "openvino-int8"),
    *("ctranslate2", "ctranslate2-int8"),
)
TRAINING_PEERS = ("eager", "sdpa", "compiled")
# The peers that have one precision, whatever --dtype says.
PRECISION = {
    "packed": "bfloat16",
    "onnxruntime": "float32",
    "onnxruntime-int8": "int8",
    "openvino": "float32",
    "openvino-bfloat16": "bfloat16",
    "openvino-int8": "int8",
    "ctranslate2": "float32",
    "ctranslate2-int8": "int8",
}
# What `prepare_for_inference` found to be the fastest here.
LINEAR_LAYERS = {
    "torch": "linear layers as torch has them: nothing faster was found here",
    "product": "linear layers as oneDNN's products",
    "convolution": "linear layers as oneDNN's convolutions",
}


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


def lineup(task: str, names: tuple[str, ...], precisions: tuple[str, ...]) -> list[tuple[str, str]]:
    """(contender, precision) for every row of the task's table, ours first. In int8 nothing is trained."""
    floating = [precision for precision in precisions if precision != "int8"]
    if task == "training":
        rows = ["minibert", *(peer for peer in names if peer in TRAINING_PEERS)]
        return [(name, precision) for precision in floating for name in rows]
    rows = ["minibert prepared", "minibert plain", *(peer for peer in names if peer in TRAINING_PEERS)]
    pairs = [(name, precision) for precision in floating for name in rows]
    if "int8" in precisions:
        pairs.append(("minibert prepared", "int8"))
    return pairs + [(name, PRECISION[name]) for name in names if name in PRECISION]


def build(name: str, precision: str, task: str, folder: Path, device: str) -> Contender:
    """The contender `name` from the weights in `folder`. Raises Absent where it cannot run."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[precision]
    if name == "packed":
        peers.require_packed(device)
    if precision == "bfloat16" and device == "cpu" and not has_bfloat16():
        raise Absent("this CPU has no instructions for bfloat16")
    if (name, precision) == ("minibert prepared", "int8"):
        if device != "cpu":
            raise Absent("int8 is for CPUs")
        if not has_int8_products():
            raise Absent("this CPU, or this torch, cannot multiply 8-bit numbers")
    if task == "training":
        return _training(name, precision, folder, device)
    if name.startswith("minibert"):
        return _ours(name, precision, dtype, folder, device)
    if name in ("eager", "sdpa", "compiled", "packed"):
        return peers.build_transformers(name, precision, dtype, folder, device)
    if device != "cpu":
        raise Absent("only its CPU form is run here")
    if name.startswith("onnxruntime"):
        return peers.build_onnxruntime(name, folder)
    if name.startswith("ctranslate2"):
        return build_ctranslate2(precision, folder)
    return peers.build_openvino(precision, folder)


def _ours(name: str, precision: str, dtype: torch.dtype, folder: Path, device: str) -> Contender:
    model = BertForMaskedLM.from_pretrained(folder, device=device)
    model = prepare_for_inference(model, dtype) if name == "minibert prepared" else model.to(dtype)

    @torch.inference_mode()
    def run(work: Workload) -> Tensor:
        if work.everywhere:
            return model(work.input_ids, work.attention_mask).logits  # (B, S, V)
        batch = PackedBatch.from_padded(work.input_ids, work.attention_mask)
        return model.predict(batch, batch.pack(work.asked).nonzero().flatten())  # (M, V)

    note = LINEAR_LAYERS[model.linear] if isinstance(model, PreparedBert) and device == "cpu" else ""
    return Contender(name, precision, run, run, note)


# ------------------------------------------------------------------------------------------------------------- training


def _training(name: str, precision: str, folder: Path, device: str) -> Contender:
    """A step: forward, loss at the asked positions, backward, AdamW. The weights are float32, and bfloat16 is autocast.
    Dropout is as the configuration has it. Ours is packed, as `minibert train` runs it. transformers is padded, as
    people train it.
    """
    from minibert.training.step import LossSum, wrapped_layers

    model: Any
    if name == "minibert":
        model = BertForMaskedLM.from_pretrained(folder, device=device)
    else:
        model = peers.load_transformers(name, folder, torch.float32, device)
    call = torch.compile(model) if name == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def cast() -> Any:
        return (
            torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
            if precision == "bfloat16"
            else nullcontext()
        )

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
