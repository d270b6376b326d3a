"""The golden trace: what transformers makes of the bundled weights, for machines on which it is not installed.

    python -m minibert.parity.golden        writes it anew, after the bundled weights have changed

It holds every tensor of a trace with gradients, in float64 and in float32. Of each there are only some entries, evenly
spread. It also holds what the collator makes of some ids. It belongs to one file of weights, whose SHA-256 it knows.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibert.checkpoint import hub
from minibert.checkpoint.files import sha256
from minibert.masked_lm import BertForMaskedLM
from minibert.parity.check import Reference, collator_masks
from minibert.parity.yardstick import measures
from minibert.trace import Trace, standard_inputs, trace
from minibert.trace.table import INPUTS, expected_names

PATH = Path(__file__).parents[2] / "tests" / "golden.safetensors"  # in a checkout; a wheel does not have it
REMAKE = "python -m minibert.parity.golden"
BUNDLED = "minibert-uncased"
ENTRIES = 128  # of each tensor


def sample(x: Tensor) -> Tensor:
    """At most about 128 entries of a tensor. The step is odd, so that it meets all columns of an even width."""
    return x.reshape(-1)[:: (x.numel() // ENTRIES) | 1]


def write(path: Path = PATH) -> None:
    """Needs transformers. Computes on the CPU."""
    theirs = transformers_model(BUNDLED, torch.float32, torch.device("cpu"))
    config = BertForMaskedLM.from_pretrained(BUNDLED).config
    inputs = standard_inputs(config)
    tensors = dict(inputs)
    for prefix, dtype in (("float32.", torch.float32), ("float64.", torch.float64)):
        made: Trace = trace(theirs.to(dtype), **inputs, grad=True)
        tensors |= {prefix + name: sample(x).contiguous() for name, x in made.tensors.items() if name not in INPUTS}
    tensors["masked.input_ids"], tensors["masked.labels"] = collator_masks(config.vocab_size)
    weights = hub.locate(BUNDLED).require(hub.WEIGHTS)
    metadata = {"backend": made.metadata["backend"], "torch": torch.__version__, "sha256": sha256(weights)}
    save_file(tensors, path, metadata=metadata)


def read(model: BertForMaskedLM) -> Reference:
    """The reference for `model`. Raises FileNotFoundError if there is no golden trace, ValueError if it is of other
    weights or not float32."""
    none = "transformers is not installed, and"
    if not PATH.is_file():
        raise FileNotFoundError(
            f"{none} there is no golden trace at {PATH} (a checkout of minibert has one, an installed package has "
            "not): pip install transformers"
        )
    dtype = next(model.parameters()).dtype
    with safe_open(PATH, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    report = model.load_report
    if report is None or metadata["sha256"] not in report.sha256.values():
        raise ValueError(
            f"{none} the golden trace {PATH} is of other weights than these (SHA-256 {metadata['sha256'][:12]}…): pip "
            f"install transformers. If the bundled weights have changed: {REMAKE}"
        )
    if dtype != torch.float32:
        raise ValueError(f"{none} the golden trace is float32, not {dtype}: pip install transformers")
    names = [name for name in expected_names(model.config) if name not in INPUTS]
    pairs = ((name, tensors["float64." + name], tensors["float32." + name]) for name in names)
    return Reference(
        f"a golden trace, for transformers is not installed ({metadata['backend']}, torch {metadata['torch']}, "
        f"{ENTRIES} entries of each tensor)",
        {name: tensors[name] for name in INPUTS},
        list(measures(pairs, dtype)),
        (tensors["masked.input_ids"], tensors["masked.labels"]),
        sample,
    )


def transformers_model(
    name: str, dtype: torch.dtype, device: torch.device, *, revision: str | None = None
) -> torch.nn.Module:
    """transformers' own model, read by transformers' own code from the files that we read."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is not installed: pip install transformers") from error
    source = hub.locate(name, revision=revision)
    folder = source.require(hub.CONFIG).parent
    source.file(hub.WEIGHTS)  # into the same folder of the cache, checked
    transformers.utils.logging.disable_progress_bar()
    model: torch.nn.Module = transformers.BertForMaskedLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


if __name__ == "__main__":
    write()
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
