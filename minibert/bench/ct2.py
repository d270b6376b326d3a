"""CTranslate2 as a peer: an engine for Transformers on CPUs, with weights of 8 bits among its types.

It has BERT's encoder and not its head, so the head is transformers', in torch, and at the asked positions only.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibert.bench.peers import load_transformers, require
from minibert.bench.workloads import Contender, Workload
from minibert.inference.onednn import has_bfloat16


def build_ctranslate2(precision: str, folder: Path) -> Contender:
    """float32, or int8 with the sums in float32. The head is in float32, or beside int8 in bfloat16 where the CPU has
    instructions for it.
    """
    require("ctranslate2", "transformers")
    import ctranslate2

    model = load_transformers("eager", folder, torch.float32, "cpu")
    path = _converted(model, precision, folder)
    encoder = ctranslate2.Encoder(
        str(path), device="cpu", compute_type=precision, intra_threads=torch.get_num_threads(), inter_threads=1
    )
    half = precision == "int8" and has_bfloat16()
    head = model.cls.to(torch.bfloat16 if half else torch.float32)

    @torch.inference_mode()
    def run(work: Workload) -> Tensor:
        ids = ctranslate2.StorageView.from_array(work.input_ids.int().numpy())
        lengths = ctranslate2.StorageView.from_array(work.attention_mask.sum(1).int().numpy())
        hidden = torch.from_numpy(_array(encoder.forward_batch(ids, lengths).last_hidden_state))  # (B, S, D)
        logits: Tensor = head(hidden[work.asked].to(head.predictions.decoder.weight.dtype))
        return logits  # (M, V)

    taken = encoder.compute_type
    return Contender("CTranslate2", precision, run, run, f"compute type {taken}; the head is transformers'")


def _array(view: Any) -> Any:
    import numpy

    return numpy.array(view)


def _converted(model: Any, precision: str, folder: Path) -> Path:
    """The encoder in CTranslate2's own format, written once."""
    from ctranslate2.converters.transformers import BertLoader
    from transformers import BertModel

    path = folder / f"ctranslate2-{precision}"
    if not path.exists():
        config = model.config
        with_pooler = BertModel(config).eval()  # its pooler is random, and nobody reads it
        missing, unknown = with_pooler.load_state_dict(model.bert.state_dict(), strict=False)
        assert not unknown, unknown
        assert all(name.startswith("pooler.") for name in missing), missing
        config.position_embedding_type = "absolute"
        spec = BertLoader().get_model_spec(with_pooler)
        spec.register_vocabulary([str(number) for number in range(config.vocab_size)])
        spec.config.unk_token = "1"
        spec.config.layer_norm_epsilon = config.layer_norm_eps
        spec.validate()
        spec.optimize(quantization=None if precision == "float32" else precision)
        unfinished = path.with_suffix(".unfinished")
        unfinished.mkdir(exist_ok=True)
        spec.save(str(unfinished))
        unfinished.rename(path)
    return path
