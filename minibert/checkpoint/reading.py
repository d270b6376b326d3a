"""Files → tensors: a checkpoint is read into exactly the tensors that are wanted. (writing.py writes one.)

This module knows no layer. It is told which tensors of which shape are wanted, and answers with exactly those,
or with an error that names the file and the tensor. It opens safetensors files and never a pickle.
"""

import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from minibert.checkpoint.files import looks_like, naming, parse_json, read_json, sha256, stamp
from minibert.checkpoint.hub import CONFIG, INDEX, NEXT, WEIGHTS, Source
from minibert.checkpoint.names import (
    HEAD,
    OWN_KEYS,
    Spelling,
    hub_names,
    layers,
    nearest,
    other_keys,
    read_names,
    require_equal_copies,
    several,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
STORED = {**DTYPES, **INTEGERS, "BOOL": torch.bool}
TRIES = 100  # to open a model's files while another process saves there


@dataclass
class LoadReport:
    """What `from_pretrained` read. Names are those in the file unless said otherwise."""

    name: str
    files: tuple[Path, ...]
    file_dtypes: dict[str, int]  # dtype as the file names it → how many tensors
    dtype: str  # of the weights in memory
    loaded: tuple[str, ...]
    commit: str | None = None  # of a hub repository
    prefix: str = ""  # what stands before every name in the file
    renamed: dict[str, str] = field(default_factory=dict)  # other spelling in the file → the name it stands for
    tied: dict[str, str] = field(default_factory=dict)  # second copy → the tensor it equals
    ignored: dict[str, str] = field(default_factory=dict)  # name → why it is not needed
    initialised: tuple[str, ...] = ()  # our names, with init_missing_head=True
    non_finite: tuple[str, ...] = ()  # our names of tensors with a NaN or an infinity in them
    ignored_config_keys: tuple[str, ...] = ()  # in config.json, and known to have no effect
    unknown_config_keys: tuple[str, ...] = ()  # in config.json, and nobody's BERT reads them
    defaulted_config_keys: tuple[str, ...] = ()  # not in config.json: BertConfig's defaults hold
    stamps: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name → SHA-256, read when asked for. Raises ValueError if a file has changed since it was loaded."""
        for path, before in zip(self.files, self.stamps, strict=True):
            if stamp(path) != before:
                raise ValueError(f"{path} has changed since it was loaded")
        return {path.name: sha256(path) for path in self.files}


@dataclass(frozen=True)
class FoundTensors:
    """A checkpoint whose files are open, before any tensor is read."""

    source: Source
    config: Any  # what `config_of` has made of config.json
    config_values: Mapping[str, Any]  # all that is in it
    files: list["SafetensorsFile"]
    entries: dict[str, "SafetensorsFile"]  # name → its file
    spelling: Spelling
    where: Path  # what an error about all of them names: the one file, or their folder


@contextmanager
def opened(source: Source, config_of: Callable[[Source], tuple[Any, dict[str, Any]]]) -> Iterator[FoundTensors]:
    """The files of one model, open: its configuration and weights were in the folder at one moment, whatever another
    process saves there. What is read later is read from them. config_of: gives the configuration, and all that is in
    its file. It is asked first, so no other architecture's weights are downloaded.

    Raises as `config_of` and `find_tensors` do, and OSError if there is never such a moment.
    """
    for _ in range(TRIES):
        with ExitStack() as files:
            before = _stamps(source)
            try:
                config, values = config_of(source)
                found = find_tensors(source, config, values, files)
            except (ValueError, OSError):
                if before == _stamps(source):
                    raise
                continue
            # Nothing has been put in the place of anything meanwhile, so all of it was there at once.
            if before == _stamps(source) and all(stamp(file.path) == file.stamp for file in found.files):
                yield found
                return
    raise OSError(f"{source.name}: another process writes there all the time: try again")


def _stamps(source: Source) -> list[tuple[int, ...]]:
    return [stamp(source.folder / name) for name in (CONFIG, NEXT, WEIGHTS, INDEX)] if source.folder else []


# ------------------------------------------------------------------------------------------- which tensors are in which


def find_tensors(source: Source, config: Any, config_values: dict[str, Any], opening: ExitStack) -> FoundTensors:
    """Open the files (`opening` closes them), and read their heads, and what the names in them mean.

    Raises ValueError for a file that is not whole, for tensors that are twice there or not where the index says, and
    for fewer layers than the configuration has; FileNotFoundError if there are no weights.
    """
    paths, index = weight_files(source)
    files = [opening.enter_context(SafetensorsFile(path)) for path in paths]
    entries: dict[str, SafetensorsFile] = {}
    for file in files:
        if twice := [key for key in file.header if key in entries]:
            raise ValueError(f"{file.path}: {twice[0]} is also in {entries[twice[0]].path.name}")
        entries.update(dict.fromkeys(file.header, file))
    if index is not None:
        weight_map = read_json(index)["weight_map"]
        found = {key: file.path.name for key, file in entries.items()}
        if wrong := [key for key in weight_map.keys() | found.keys() if weight_map.get(key) != found.get(key)]:
            raise ValueError(f"{index}: {several('tensor', sorted(wrong))} not where the index says")
    where = paths[0] if len(paths) == 1 else paths[0].parent
    with naming(where):
        spelling = read_names(entries)
        # Before the model is made: a config.json may say a billion.
        count = layers(spelling.spelled)
        said = config_values["num_hidden_layers"]
        if 0 < count < said:
            raise ValueError(f"layer {count} is missing (num_hidden_layers in {CONFIG} is {said}, from 0)")
        if not count:
            like = nearest("bert.encoder.layer.0.attention.self.query.weight", entries)
            first = ", ".join([*entries][:3]) or "nothing: it is empty"
            raise ValueError(f"no tensor in it is of a layer of BERT. The names in the file look like {first}{like}")
    return FoundTensors(source, config, config_values, files, entries, spelling, where)


def weight_files(source: Source) -> tuple[list[Path], Path | None]:
    """The safetensors files; and if there are several, the index that says which tensor is in which. Raises
    FileNotFoundError if there is none, ValueError for an index that is no index.
    """
    single = source.file(WEIGHTS)
    if single is not None:
        return [single], None
    index = source.file(INDEX)
    if index is None:
        raise FileNotFoundError(_no_weights(source))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: there is no weight_map in it")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: the shard {name!r} is not a plain file name: shards stand beside their index")
    return [source.require(name) for name in sorted(set(weight_map.values()))], index


def _no_weights(source: Source) -> str:
    """There is none; and if there may be a pickle: a shell command that makes a model.safetensors of it."""
    if source.folder is not None and not list(source.folder.glob("pytorch_model*.bin")):
        return f"{source.folder / WEIGHTS}: there is no such file, and no {INDEX}"
    if source.only_cached:
        return f"{source.name}: there is no {WEIGHTS}{source.only_cached}"
    folder, fetch = str(source.folder or "converted"), ""
    if source.folder is None:
        fetch = (
            f"from huggingface_hub import snapshot_download; snapshot_download({source.repo_id!r}, "
            f"revision={source.commit!r}, local_dir='converted', "
            "allow_patterns=['*.json', '*.txt', 'pytorch_model*.bin']); "
        )
    program = (
        f"{fetch}import glob, torch; from safetensors.torch import save_file; t = {{}}; d = {folder!r}; "
        "[t.update(torch.load(f, map_location='cpu', weights_only=True)) "
        "for f in glob.glob(glob.escape(d) + '/pytorch_model*.bin')]; "
        f"save_file({{k: v.clone().contiguous() for k, v in t.items()}}, d + '/{WEIGHTS}', metadata={{'format': 'pt'}})"
    )
    return (
        f"{source.name}: there is no {WEIGHTS}. A pytorch_model.bin is a pickle, which can run any program when "
        "it is opened, so minibert does not open it. Convert it where you trust it, and then load the folder "
        f"{folder}: python -c {shlex.quote(program)}"
    )


# ------------------------------------------------------------------------------------------------------- their contents


def read_weights(
    found: FoundTensors,
    shapes: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    init_missing_head: bool = False,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that `shapes` asks for (our names → shapes), and the report of how they were found.

    Raises ValueError, naming file and tensor, unless the checkpoint holds these tensors, in these shapes, and
    nothing else but the leftovers in `names.IGNORED` and equal copies of tied tensors.
    """
    entries, spelling, config_values = found.entries, found.spelling, found.config_values
    file_dtypes = Counter(file.header[name]["dtype"] for name, file in entries.items())
    dtype = as_dtype(dtype, config_values, file_dtypes)
    with naming(found.where):
        initialised = _require_the_wanted(shapes, spelling, config_values, init_missing_head)
        _require_shapes(shapes, spelling.spelled, entries)
        require_equal_copies(spelling, lambda name: entries[name].read(name))
    state: dict[str, Tensor] = {}
    for ours, shape in tqdm(shapes.items(), "loading", unit=" tensors", disable=None, delay=1, leave=False):
        if ours in initialised:
            state[ours] = _initial(ours, shape, dtype, device)
        else:
            state[ours] = torch.empty(shape, dtype=dtype, device=device)
            parts = [spelling.spelled[hub] for hub in hub_names(ours)]  # one under the other
            for name, part in zip(parts, state[ours].chunk(len(parts)), strict=True):
                entries[name].fill(part, name)
    for file in found.files:
        if stamp(file.file.fileno()) != file.stamp:
            raise ValueError(f"{file.path} was changed while it was read: try again")
    harmless, unknown = other_keys(config_values)
    report = LoadReport(
        name=found.source.name,
        files=tuple(file.path for file in found.files),
        file_dtypes=dict(file_dtypes),
        dtype=str(dtype).removeprefix("torch."),
        loaded=tuple(sorted(spelling.spelled.values())),
        commit=found.source.commit,
        prefix=spelling.prefix,
        renamed=spelling.renamed,
        tied=spelling.tied,
        ignored=spelling.ignored,
        initialised=initialised,
        non_finite=tuple(name for name, tensor in state.items() if _has_non_finite(tensor)),
        ignored_config_keys=harmless,
        unknown_config_keys=unknown,
        defaulted_config_keys=tuple(key for key in OWN_KEYS if key not in config_values),
        stamps=tuple(file.stamp for file in found.files),
    )
    if report.non_finite:
        warnings.warn(f"{found.where}: NaN or infinite weights in {', '.join(report.non_finite)}", stacklevel=3)
    if unknown:
        path, said = found.files[0].path.parent / CONFIG, ", ".join(map(repr, unknown))
        warnings.warn(f"{path}: as far as minibert knows, no BERT reads {said}: without effect here", stacklevel=3)
    return state, report


def as_dtype(dtype: torch.dtype | str | None, config_values: Mapping[str, Any], stored: Counter[str]) -> torch.dtype:
    """What a caller means: a dtype, its name ("bfloat16"), or "auto", which is the one that config.json names or else
    the one that the tensors are stored in. None is float32. Raises ValueError for what is no floating-point type.
    """
    names = {str(each).removeprefix("torch."): each for each in DTYPES.values()}
    if dtype == "auto":
        said = config_values.get("dtype") or config_values.get("torch_dtype")
        most = next((DTYPES[name] for name, _ in stored.most_common() if name in DTYPES), torch.float32)
        return names.get(str(said).removeprefix("torch."), most)
    found = torch.float32 if dtype is None else names.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f'dtype must be a floating-point type such as torch.float32, its name, or "auto", not {dtype!r}'
        )
    return found


def _require_the_wanted(
    shapes: Mapping[str, torch.Size], spelling: Spelling, config_values: Mapping[str, Any], init_missing_head: bool
) -> tuple[str, ...]:
    """Raise ValueError for a tensor too few or too many. Returns our names of those of a missing head, if that is
    allowed.
    """
    spelled = spelling.spelled
    wanted = {hub: ours for ours in shapes for hub in hub_names(ours)}
    absent = [hub for hub in wanted if hub not in spelled]
    extra = [spelled[hub] for hub in spelled if hub not in wanted]

    def hint(names: list[str]) -> str:
        count = config_values["num_hidden_layers"]
        return f" (num_hidden_layers in {CONFIG} is {count})" if any(".layer." in name for name in names) else ""

    if absent and not any(hub.startswith(HEAD) for hub in spelled) and all(hub.startswith(HEAD) for hub in absent):
        if not init_missing_head:
            others = [name for name, reason in spelling.ignored.items() if reason.startswith("another task")]
            beside = f", with another task's head ({', '.join(others[:3])})" if others else ""
            raise ValueError(
                f"this is an encoder without the masked-language-model head ({len(absent)} tensors, {HEAD}*){beside}. "
                "Name a checkpoint that has one, or start with an untrained one: `minibert train` does, and in Python "
                "from_pretrained(…, init_missing_head=True)"
            )
    elif absent:
        look = f". The names in the file look like {', '.join(extra[:3])}" if extra else ""
        raise ValueError(f"{several('tensor', absent)} missing{hint(absent)}{look}{nearest(absent[0], extra)}")
    if extra:
        raise ValueError(f"{several('tensor', extra)} not expected{hint(extra)}{nearest(extra[0], wanted)}")
    return tuple(sorted({wanted[hub] for hub in absent}))


def _require_shapes(
    shapes: Mapping[str, torch.Size], spelled: Mapping[str, str], entries: Mapping[str, "SafetensorsFile"]
) -> None:
    """Raise ValueError for a tensor of another shape, or of whole numbers, before there is memory for any."""
    for ours, shape in shapes.items():
        hubs = hub_names(ours)
        wanted = [shape[0] // len(hubs), *shape[1:]]
        for name in (spelled[hub] for hub in hubs if hub in spelled):
            path, entry = entries[name].path, entries[name].header[name]
            if entry["shape"] != wanted:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(entry['shape'])}, and {CONFIG} asks for {tuple(wanted)}: "
                    "one of the two files belongs to another model"
                )
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")


def _has_non_finite(tensor: Tensor) -> bool:
    # The sum is quick and makes no copy; it can overflow where no entry does, so it only says where to look closely.
    return not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all())


def _initial(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """An untrained head: the transformation is the identity, the scores are dot products with the word vectors."""
    if name == "head.dense.weight":
        return torch.eye(shape[0], dtype=dtype, device=device)
    return (torch.ones if name == "head.LayerNorm.weight" else torch.zeros)(shape, dtype=dtype, device=device)


class SafetensorsFile:
    """A safetensors file, opened once. What another process puts in its place later is not read. Raises ValueError for
    a file that is not whole.

    The library checks the file. It would map it into memory, too, and a file that is cut off meanwhile would end this
    process: so the tensors are read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = open(path, "rb")  # noqa: SIM115
        try:
            self.stamp = stamp(self.file.fileno())
            self.header, self.metadata, self.start = self._read_header()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _read_header(self) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
        """Tensor name → its dtype, shape and place; the metadata; and where the tensors begin."""
        path, start = self.path, self.file.read(8)
        length = int.from_bytes(start, "little")
        try:
            with safe_open(path, framework="pt"):  # the library's own checks: offsets, sizes, the end of the file
                header = parse_json(self.file.read(length))  # and that no name stands there twice
        except (ValueError, OSError, SafetensorError) as error:
            what = f"{path}: not a whole safetensors file ({self.stamp[1]} bytes, it starts with {start!r})"
            raise ValueError(f"{what}: {looks_like(path) or error}") from error
        if stamp(path) != self.stamp:
            raise ValueError(f"{path}: another file was put in its place while it was opened: try again")
        return header, header.pop("__metadata__", {}), 8 + length

    def fill(self, target: Tensor, name: str, first_row: int = 0) -> None:
        """Read a tensor, or as many rows of it as `target` has, into `target`."""
        entry = self.header[name]
        if entry["dtype"] not in STORED:
            raise ValueError(f"{self.path}: {name} is {entry['dtype']}, expected one of {', '.join(STORED)}")
        stored = target
        if not target.is_cpu or not target.is_contiguous() or target.dtype != STORED[entry["dtype"]]:
            stored = torch.empty(target.shape, dtype=STORED[entry["dtype"]])
        row = prod(entry["shape"][1:]) * stored.element_size()
        self.file.seek(self.start + entry["data_offsets"][0] + first_row * row)
        memory = stored.detach().reshape(-1).view(torch.uint8).numpy()
        if self.file.readinto(memory) != memory.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{self.path}: it was cut off while it was read")
        if stored is not target:
            target.copy_(stored)

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """A tensor, or some rows of it, in the dtype in which it is stored."""
        entry = self.header[name]
        shape = entry["shape"] if rows is None else [len(rows), *entry["shape"][1:]]
        tensor = torch.empty(shape, dtype=STORED.get(entry["dtype"]))
        self.fill(tensor, name, 0 if rows is None else rows.start)
        return tensor


# ----------------------------------------------------------------- a model that has shapes, before its weights are read


def shapes_only() -> TorchFunctionMode:
    """Within this block modules have shapes, but no memory and no initial values. In this thread only: torch's own
    `with torch.device("meta")` also writes a variable that all threads share.
    """
    return _NoMemory()


class _NoMemory(TorchFunctionMode):
    """Makes tensors on the meta device, and leaves out what would fill one: torch would import sympy for that, which
    takes a second, and twice the memory of the bundled weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        # Which of torch.nn.init's functions come here whole, and which as the steps that they take, depends on torch.
        if in_place or getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **{**kwargs, "device": "meta"} if func in (torch.empty, torch.zeros, torch.ones) else kwargs)
