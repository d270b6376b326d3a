"""The peers: transformers, ONNX Runtime and OpenVINO, each imported only where it is built. All read one folder, as
`save_pretrained` writes it.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from minibert.bench.workloads import Absent, Contender, Workload
from minibert.config import BertConfig
from minibert.packing import PackedBatch

# --------------------------------------------------------------------------------------------------------- transformers


def require_packed(device: str) -> None:
    require("transformers")
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not device.startswith("cuda"):
        raise Absent("transformers packs only with flash attention, which needs CUDA")
    if not is_flash_attn_2_available():
        raise Absent("transformers packs only with flash attention: the package flash-attn is not installed")


def load_transformers(name: str, folder: Path, dtype: torch.dtype, device: str) -> Any:
    require("transformers")
    import transformers

    attention = {"compiled": "sdpa", "packed": "flash_attention_2"}.get(name, name)
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.BertForMaskedLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def build_transformers(name: str, precision: str, dtype: torch.dtype, folder: Path, device: str) -> Contender:
    model = load_transformers(name, folder, dtype, device)
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


# ------------------------------------------------------------------------------------------- ONNX Runtime and OpenVINO


def require(*packages: str) -> None:
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

        config = BertConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
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


def _feed(work: Workload) -> dict[str, Any]:
    return {"input_ids": work.input_ids.numpy(), "attention_mask": work.attention_mask.numpy()}


def build_onnxruntime(name: str, folder: Path) -> Contender:
    require("onnxruntime")
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
        return torch.from_numpy(session.run(None, _feed(work))[0])  # (B, S, V)

    if name == "onnxruntime-int8":
        return Contender("ONNX Runtime dynamic", "int8", run, run, note)
    return Contender("ONNX Runtime", "float32", run, run, note)


def build_openvino(precision: str, folder: Path) -> Contender:
    """From the plain graph: OpenVINO fuses it by itself. By default it takes bfloat16 wherever the CPU has it, so the
    precision is always given. Raises Absent if OpenVINO computes in another one. In int8 it is left to OpenVINO what it
    does with the parts that are not quantised.
    """
    require("openvino")
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16", "int8": None}[precision]
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # for one batch at a time
        **({} if hint is None else {"INFERENCE_PRECISION_HINT": hint}),
    }
    path = _quantised(folder) if precision == "int8" else _export(folder)
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != (hint or taken):
        raise Absent(f"OpenVINO computes in {taken} on this CPU, though it was told {hint}")

    def run(work: Workload) -> Tensor:
        return torch.from_numpy(compiled(_feed(work))[0])  # (B, S, V)

    note = f"INFERENCE_PRECISION_HINT {taken}"
    if precision == "int8":
        note = f"nncf.quantize for transformers, calibrated on {CALIBRATION} batches of random ids; the rest in {taken}"
    return Contender("OpenVINO", precision, run, run, note)


CALIBRATION = 4  # batches


def _quantised(folder: Path) -> Path:
    """The graph in int8, calibrated on random ids, unless it is there already."""
    path = folder / "openvino-int8.xml"
    if not path.exists():
        config = BertConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        generator = torch.Generator().manual_seed(0)
        length = min(64, config.max_position_embeddings)
        batches = [torch.randint(1, config.vocab_size, (4, length), generator=generator) for _ in range(CALIBRATION)]
        quantise_for_openvino(folder, [(ids, torch.ones_like(ids)) for ids in batches])
    return path


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
        graph = openvino.Core().read_model(str(_export(folder)))
        quantised = nncf.quantize(
            graph, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)
        )
        openvino.save_model(quantised, str(folder / "openvino-int8.xml"), compress_to_fp16=False)
