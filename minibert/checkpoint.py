"""Checkpoints: the names of the tensors, the files that hold them, and where those files are.

This module knows no layer. It is told which tensors of which shape are wanted, and answers with exactly those,
or with an error that names the file and the tensor. It opens safetensors files and never a pickle.
"""

import hashlib
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minibert import atomic
from minibert.config import BertConfig, defaulted_keys, ignored_keys

# The name table: our module, and the module (or the three modules) of the hub's BERT checkpoints. N is a
# layer's number. Loading, saving and layer-by-layer parity all read it.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embeddings.word", ("bert.embeddings.word_embeddings",)),
    ("embeddings.position", ("bert.embeddings.position_embeddings",)),
    ("embeddings.token_type", ("bert.embeddings.token_type_embeddings",)),
    ("embeddings.norm", ("bert.embeddings.LayerNorm",)),
    (
        "layers.N.attention.qkv",
        (
            "bert.encoder.layer.N.attention.self.query",
            "bert.encoder.layer.N.attention.self.key",
            "bert.encoder.layer.N.attention.self.value",
        ),
    ),
    ("layers.N.attention.output", ("bert.encoder.layer.N.attention.output.dense",)),
    ("layers.N.attention_norm", ("bert.encoder.layer.N.attention.output.LayerNorm",)),
    ("layers.N.feed_forward.intermediate", ("bert.encoder.layer.N.intermediate.dense",)),
    ("layers.N.feed_forward.output", ("bert.encoder.layer.N.output.dense",)),
    ("layers.N.feed_forward_norm", ("bert.encoder.layer.N.output.LayerNorm",)),
    ("head.dense", ("cls.predictions.transform.dense",)),
    ("head.norm", ("cls.predictions.transform.LayerNorm",)),
    ("head", ("cls.predictions",)),  # its bias; the decoder's weight is the word embedding
)
TABLE = dict(NAMES)

# Tensors that BERT checkpoints carry and a masked language model has no use for.
IGNORED = (
    (re.compile(r"(bert\.)?embeddings\.position_ids"), "a constant: 0, 1, 2, …"),
    (re.compile(r"(bert\.)?pooler\.dense\.(weight|bias)"), "the pooler serves sentence classification"),
    (re.compile(r"cls\.seq_relationship\.(weight|bias)"), "the next-sentence head"),
)
# Second copies of a tensor that the model holds once.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
HEAD = "cls.predictions."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NEXT = ".config.json.next"  # see _replace_model
BUNDLED = (Path(__file__).parent / "weights", Path(__file__).parent.parent / "weights")  # in the wheel, in a checkout
ALIASES = {"bert-base-uncased": "google-bert/bert-base-uncased"}
# A hub repository can change its files at any time; this one is pinned to what minibert was tested with.
PINNED_REVISION = {"google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594"}
PINNED_SHA256 = {
    ("86b5e0934494bd15c9632b12f734a8a67f723594", "model.safetensors"): (
        "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"
    ),
    ("86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt"): (
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    ),
}


def hub_names(name: str) -> list[str]:
    """The name, or the three names, under which a checkpoint holds our tensor `name`."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    template = re.sub(r"\.\d+\.", ".N.", module)
    return [f"{hub.replace('.N.', number.group(0)) if number else hub}.{parameter}" for hub in TABLE[template]]


# ---------------------------------------------------------------------------------------------------- where files are


@dataclass(frozen=True)
class Source:
    """Where the files of one checkpoint are: a folder, or a repository on the hub."""

    name: str
    folder: Path | None = None
    repo_id: str = ""
    revision: str | None = None
    local_files_only: bool = False

    def file(self, filename: str) -> Path | None:
        """The path of one file, downloaded into the hub's ordinary cache if need be; None if the checkpoint has
        none.
        """
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        return _download(self, filename)

    def require(self, filename: str) -> Path:
        path = self.file(filename)
        if path is None:
            raise FileNotFoundError(f"{self.folder or self.name}: there is no {filename}{self.only_cache}")
        return path

    @property
    def only_cache(self) -> str:
        """What to add to "there is no …" if the hub may not be asked; "" otherwise."""
        if self.folder is not None:
            return ""
        from huggingface_hub import constants

        offline = "local_files_only" if self.local_files_only else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
        return f" in the local cache, and because of {offline} the hub was not asked" if offline else ""


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Source:
    """What a name means: an existing folder, else a bundled checkpoint, else "bert-base-uncased", else
    "owner/name" on the hub.

    Raises FileNotFoundError if it is none of them, ValueError for a revision of something that is not on the hub.
    """
    name = os.fspath(name_or_path)
    folders = [Path(name), *(parent / name for parent in BUNDLED)] if name else []
    for folder in folders:
        if folder.is_dir():
            if revision is not None:
                raise ValueError(f"revision {revision!r} was given, but {name} is a folder: revisions are the hub's")
            return Source(name, folder=folder)
    repo_id = ALIASES.get(name, name)
    # "models/bert" beside an existing folder "models" is a mistyped path, and no reason to ask the network.
    is_path = not isinstance(name_or_path, str) or ("/" in name and Path(name).parent.is_dir())
    if not is_path and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        return Source(name, None, repo_id, revision or PINNED_REVISION.get(repo_id), local_files_only)
    bundled = sorted({folder.parent.name for parent in BUNDLED for folder in parent.glob(f"*/{CONFIG}")})
    what = "is a file" if Path(name).is_file() else "is no folder"
    raise FileNotFoundError(
        f"{name!r} {what}. A model is a folder with {CONFIG} and {WEIGHTS}; a bundled name "
        f"({', '.join(bundled) or 'none is installed'}); {', '.join(ALIASES)}; "
        "or a hub id such as google-bert/bert-base-cased"
    )


def _download(source: Source, filename: str) -> Path | None:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = Path(
            huggingface_hub.hf_hub_download(
                source.repo_id, filename, revision=source.revision, local_files_only=source.local_files_only
            )
        )
    except errors.LocalEntryNotFoundError as error:
        known = huggingface_hub.try_to_load_from_cache(source.repo_id, filename, revision=source.revision)
        if source.only_cache or known is huggingface_hub._CACHED_NO_EXIST:  # the hub has said before that it has none
            return None
        raise ConnectionError(
            f"{source.name}: {filename} is not in the local cache and the hub cannot be reached: "
            f"{error.__cause__ or error}"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{source.name}: the hub has no revision {source.revision!r} of {source.repo_id}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source.name}: the hub has no repository {source.repo_id}, or it is private and you are not logged in"
        ) from error
    except errors.HFValidationError:  # no possible name of a repository
        raise
    except Exception as error:  # also those of the HTTP library, which depends on huggingface_hub's version
        raise ConnectionError(f"{source.name}: {filename} could not be downloaded: {error}") from error
    expected = PINNED_SHA256.get((source.revision or "", filename))
    if expected and (found := sha256(path)) != expected:
        path.resolve().unlink()  # the cached bytes, so that the next try downloads them again
        path.unlink(missing_ok=True)  # and the link to them
        raise ValueError(
            f"{path}: SHA-256 is {found}, but {source.name} at {source.revision} has {expected}: "
            "the download came back wrong and was deleted; try again"
        )
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------- what they hold


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError if it is not one, or gives a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"the key {key!r} stands there {count} times")
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: not a proper JSON file: {_looks_like(path) or error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def config_values(source: Source) -> dict[str, Any]:
    """What is in config.json; or in NEXT, if a save was cut off after the new weights were in place, and before their
    configuration was.
    """
    if source.folder is not None and (source.folder / NEXT).is_file() and (source.folder / WEIGHTS).is_file():
        following = read_json(source.folder / NEXT)
        if following.get("weights_sha256") == sha256(source.folder / WEIGHTS):
            values: dict[str, Any] = following["config"]
            return values
    return read_json(source.require(CONFIG))


def read_config(source: Source) -> BertConfig:
    """config.json as a BertConfig. Raises ValueError, naming the file and the key, if it is not a BERT we can
    compute.
    """
    return _config(source.folder / CONFIG if source.folder else source.require(CONFIG), config_values(source))


def read_config_file(path: Path) -> BertConfig:
    """The same from a file under any name."""
    return _config(path, read_json(path))


def _config(path: Path, values: dict[str, Any]) -> BertConfig:
    try:
        return BertConfig.from_dict(values)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


@dataclass
class LoadReport:
    """What `from_pretrained` read. Names are those in the file unless said otherwise."""

    name: str
    files: tuple[Path, ...]
    file_dtypes: dict[str, int]  # dtype as the file names it → how many tensors
    dtype: str  # of the weights in memory
    loaded: tuple[str, ...]
    renamed: dict[str, str] = field(default_factory=dict)  # older spelling in the file → the name it stands for
    tied: dict[str, str] = field(default_factory=dict)  # second copy → the tensor it equals
    ignored: dict[str, str] = field(default_factory=dict)  # name → why it is not needed
    initialised: tuple[str, ...] = ()  # our names, with init_missing_head=True
    non_finite: tuple[str, ...] = ()  # our names of tensors with a NaN or an infinity in them
    ignored_config_keys: tuple[str, ...] = ()  # in config.json, and without effect
    defaulted_config_keys: tuple[str, ...] = ()  # not in config.json: BertConfig's defaults hold
    stamps: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name → SHA-256, read from the disk at the first time of asking. Raises ValueError if a file is
        no longer the one that was loaded.
        """
        for path, stamp in zip(self.files, self.stamps, strict=True):
            if _stamp(path) != stamp:
                raise ValueError(f"{path} has changed since it was loaded")
        return {path.name: sha256(path) for path in self.files}


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_weights(
    source: Source,
    shapes: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    init_missing_head: bool = False,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that `shapes` asks for (our names → shapes), and the report of how they were found.

    Raises ValueError, naming file and tensor, unless the checkpoint holds these tensors, in these shapes, and
    nothing else but the leftovers in `IGNORED` and equal copies of tied tensors.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as torch.float32, not {dtype!r}")
    files = _weight_files(source)
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in files:
        for key, entry in read_header(path).items():
            if key in entries:
                raise ValueError(f"{path}: {key} is also in {entries[key][0].name}")
            entries[key] = (path, entry)
    where = files[0] if len(files) == 1 else files[0].parent

    values = config_values(source)
    report = LoadReport(
        name=source.name,
        files=files,
        file_dtypes=dict(Counter(entry["dtype"] for _, entry in entries.values())),
        dtype=str(dtype).removeprefix("torch."),
        loaded=(),
        ignored_config_keys=tuple(ignored_keys(values)),
        defaulted_config_keys=tuple(defaulted_keys(values)),
        stamps=tuple(_stamp(path) for path in files),
    )
    spelled = _resolve_names(where, entries, report)
    _require_the_wanted(where, source, shapes, spelled, report, init_missing_head)
    _require_equal_copies(where, entries, spelled, report)
    state: dict[str, Tensor] = {}
    for ours, shape in shapes.items():
        if ours in report.initialised:
            state[ours] = _initial(ours, shape, dtype, device)
        else:
            state[ours] = torch.empty(shape, dtype=dtype, device=device)
            _fill(state[ours], [(spelled[hub], *entries[spelled[hub]]) for hub in hub_names(ours)])
    report.loaded = tuple(sorted(spelled[hub] for ours in shapes for hub in hub_names(ours) if hub in spelled))
    report.non_finite = tuple(name for name, tensor in state.items() if _has_non_finite(tensor))
    if report.non_finite:
        warnings.warn(f"{where}: NaN or infinite weights in {', '.join(report.non_finite)}", stacklevel=3)
    return state, report


def _require_the_wanted(
    where: Path,
    source: Source,
    shapes: Mapping[str, torch.Size],
    spelled: Mapping[str, str],
    report: LoadReport,
    init_missing_head: bool,
) -> None:
    """Raise ValueError for a tensor too few or too many. A missing head, where that is allowed, goes on the report."""
    wanted = {hub: ours for ours in shapes for hub in hub_names(ours)}
    absent = [hub for hub in wanted if hub not in spelled]
    has_head = any(hub.startswith(HEAD) for hub in spelled)
    if absent and not has_head and all(hub.startswith(HEAD) for hub in absent):
        if not init_missing_head:
            raise ValueError(
                f"{where}: this is an encoder without the masked-language-model head ({len(absent)} tensors, {HEAD}*). "
                "Name a checkpoint that has one, or start with an untrained one: `minibert train` does, and in Python "
                "from_pretrained(…, init_missing_head=True)"
            )
        report.initialised = tuple(sorted({wanted[hub] for hub in absent}))
    elif absent:
        raise ValueError(f"{where}: {_several('tensor', absent)} missing{_layer_hint(source, absent)}")
    if extra := [spelled[hub] for hub in spelled if hub not in wanted]:
        raise ValueError(f"{where}: {_several('tensor', extra)} not expected{_layer_hint(source, extra)}")


def _require_equal_copies(
    where: Path, entries: Mapping[str, tuple[Path, Any]], spelled: Mapping[str, str], report: LoadReport
) -> None:
    """Raise ValueError if a second copy of a tied tensor is not the same as the first. NaN counts as equal to NaN."""
    for copy, original in report.tied.items():
        one = _read_tensor(entries[copy][0], copy)
        other = _read_tensor(entries[spelled[original]][0], spelled[original])
        same = torch.equal(one, other) or (
            torch.equal(one.isnan(), other.isnan()) and torch.equal(one[~one.isnan()], other[~other.isnan()])
        )
        if not same:
            raise ValueError(f"{where}: {copy} and {spelled[original]} must be the same tensor, but they differ")


def _fill(target: Tensor, parts: list[tuple[str, Path, dict[str, Any]]]) -> None:
    """Copy the parts (name in the file, file, dtype and shape) into `target`, one under the other."""
    shape = [target.shape[0] // len(parts), *target.shape[1:]]
    for (name, path, entry), part in zip(parts, target.chunk(len(parts)), strict=True):
        if entry["shape"] != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(entry['shape'])}, and {CONFIG} asks for {tuple(shape)}: "
                "one of the two files belongs to another model"
            )
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        part.copy_(_read_tensor(path, name))


def _has_non_finite(tensor: Tensor) -> bool:
    # The sum is quick and makes no copy; it can overflow where no entry does, so it only says where to look closely.
    return not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all())


def _resolve_names(where: Path, entries: Mapping[str, Any], report: LoadReport) -> dict[str, str]:
    """Canonical hub name → the name in the file. Notes on the report what was renamed, tied and ignored."""
    spelled: dict[str, str] = {}
    for key in entries:
        reason = next((why for pattern, why in IGNORED if pattern.fullmatch(key)), None)
        if reason:
            report.ignored[key] = reason
            continue
        name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", key)
        name = re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)
        if name.startswith(("embeddings.", "encoder.")):
            name = "bert." + name
        if name == "cls.predictions.decoder.bias" and TIED[name] not in entries:
            name = TIED[name]  # the only copy of the bias, under its other name
        if name in TIED:
            report.tied[key] = TIED[name]
            continue
        if name in spelled:
            raise ValueError(f"{where}: {spelled[name]} and {key} are two spellings of the same tensor")
        spelled[name] = key
        if name != key:
            report.renamed[key] = name
    for copy, original in report.tied.items():
        if original not in spelled:
            raise ValueError(f"{where}: there is {copy}, but not {original}, which it is a copy of")
    return spelled


def _weight_files(source: Source) -> tuple[Path, ...]:
    single = source.file(WEIGHTS)
    if single is not None:
        return (single,)
    index = source.file(INDEX)
    if index is None:
        if source.folder is not None and not (source.folder / "pytorch_model.bin").exists():
            raise FileNotFoundError(f"{source.folder / WEIGHTS}: there is no such file, and no {INDEX}")
        if source.only_cache:
            raise FileNotFoundError(f"{source.name}: there is no {WEIGHTS}{source.only_cache}")
        raise FileNotFoundError(
            f"{source.name}: there is no {WEIGHTS}. A pytorch_model.bin is a pickle, which can run any program when "
            "it is opened, so minibert does not open it. Convert it where you trust it: "
            'python -c "from transformers import '
            f"AutoModelForMaskedLM as M; M.from_pretrained({source.name!r}).save_pretrained('converted')\""
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: there is no weight_map in it")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: the shard {name!r} is not a plain file name: shards stand beside their index")
    files = tuple(source.require(name) for name in sorted(set(weight_map.values())))
    found = {key: path.name for path in files for key in read_header(path)}
    if wrong := [key for key in weight_map.keys() | found.keys() if weight_map.get(key) != found.get(key)]:
        raise ValueError(f"{index}: {_several('tensor', sorted(wrong))} not where the index says")
    return files


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → its dtype and shape, from the head of a safetensors file. Raises ValueError for a file that
    is not whole.

    The library makes the same checks but the one for a name that stands there twice; here each has a sentence
    of its own.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) == 8 and 0 not in start and not _looks_like(path):  # no header has 2^56 bytes
            raise ValueError(f"{path}: not a safetensors file: it starts with {start!r}")
        if len(start) < 8 or length > size - 8 or length > 100_000_000:
            other = _looks_like(path) or f"its header claims {length} bytes" if len(start) == 8 else "it is cut off"
            raise ValueError(
                f"{path}: not a whole safetensors file: of {size} bytes, {other if size else 'it is empty'}"
            )
        raw = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"the header names {key} {count} times")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
        with safe_open(path, framework="pt"):  # the library's own checks: offsets, sizes, the end of the file
            pass
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({size} bytes): {error}") from error
    return {key: entry for key, entry in header.items() if key != "__metadata__"}


def _looks_like(path: Path) -> str:
    """What a file is that should have been something else; "" if it is nothing well known."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip()
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git-LFS pointer, not the file itself: run `git lfs pull`"
    if start[:1] == b"<":
        return "it is an HTML page: the download was answered with an error or a log-in page"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickle under another name, which minibert does not open"
    return ""


def _read_tensor(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: the pages of a memory-mapped file count as ours until it is closed, and would
    # double the peak.
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this block modules have shapes, but no memory and no initial values."""
    with torch.device("meta"), _NoInitialValues():
        yield


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what would fill a tensor. It would change nothing on the meta device, but torch does some of it there
    in Python, and imports sympy and torch.compile for that: a second, and twice the memory of the bundled weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        # Which of torch.nn.init's functions come here whole, and which as the steps that they take, depends on torch.
        if in_place or getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _initial(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """An untrained head: the transformation is the identity, the scores are dot products with the word
    embeddings.
    """
    if name == "head.dense.weight":
        return torch.eye(shape[0], dtype=dtype, device=device)
    return (torch.ones if name == "head.norm.weight" else torch.zeros)(shape, dtype=dtype, device=device)


def _several(noun: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{noun}{'s' if len(names) > 1 else ''} {shown} {'are' if len(names) > 1 else 'is'}"


def _layer_hint(source: Source, names: list[str]) -> str:
    if not any(".layer." in name for name in names):
        return ""
    return f" (num_hidden_layers in {CONFIG} is {read_config(source).num_hidden_layers})"


# ------------------------------------------------------------------------------------------------------------- writing


def write(folder: str | os.PathLike[str], config: BertConfig, state: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors in `folder`, which is made if need be.

    Raises OSError if they cannot be written. Then, and also if the process is killed, a model that was in `folder`
    before still loads as it did. Other files in `folder` are not touched.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        hubs = hub_names(name)
        for hub, part in zip(hubs, tensor.detach().cpu().chunk(len(hubs)), strict=True):
            tensors[hub] = part.clone() if len(hubs) > 1 else part.contiguous()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {**config.to_dict(), "dtype": dtype}
    try:
        with atomic.scratch_folder(target) as scratch:
            (scratch / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
            (scratch / WEIGHTS).chmod(stat.S_IMODE((scratch / CONFIG).stat().st_mode))  # save_file makes it private
            _replace_model(scratch, target, values)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{target / WEIGHTS}: could not be written: {error}") from error


def _replace_model(scratch: Path, target: Path, values: dict[str, Any]) -> None:
    """Move the two files of a model from `scratch` to `target`, as if it were one step.

    A file is renamed in one step, but there are two of them, and the weights of one model with the configuration of
    another may even load. If `target` has this very configuration, only the weights are replaced. If it has none, it
    comes last: without it, nobody takes `target` for a model. If it has another, the new one is first put beside it as
    NEXT, with the SHA-256 of the weights that it belongs to; `config_values` reads it there once they are in place.
    """
    old = (target / CONFIG).read_bytes() if (target / CONFIG).is_file() else None
    names = [WEIGHTS] if old == (scratch / CONFIG).read_bytes() else [WEIGHTS, CONFIG]
    journal = old is not None and len(names) == 2
    if journal:
        belongs = {"weights_sha256": sha256(scratch / WEIGHTS), "config": values}
        (scratch / NEXT).write_text(json.dumps(belongs), encoding="utf-8")
    atomic.to_disk(scratch)
    before, had_weights = scratch / "before", (target / WEIGHTS).exists()
    if journal:
        with suppress(OSError):  # a file system without second names: then NEXT has to do alone
            os.link(target / WEIGHTS, before)
        os.replace(scratch / NEXT, target / NEXT)
    try:
        for name in names:
            os.replace(scratch / name, target / name)
    except BaseException:
        if before.exists():
            os.replace(before, target / WEIGHTS)
        elif not had_weights:
            (target / WEIGHTS).unlink(missing_ok=True)
        else:
            raise  # NEXT stays, and says which configuration belongs to the weights that are there now
        (target / NEXT).unlink(missing_ok=True)
        raise
    (target / NEXT).unlink(missing_ok=True)
    atomic.to_disk(target, files=False)
