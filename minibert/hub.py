"""A model's name → the paths of its files: in a folder, in the package, or in the hub's ordinary cache.

Nothing here reads a tensor or needs torch: a tokenizer finds its file without them.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minibert.files import read_json, sha256

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NEXT = ".config.json.next"  # see checkpoint._replace_model
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


def read_config(source: Source) -> tuple[Path, dict[str, Any]]:
    """The path of config.json and what is in it; or of NEXT, if a save was cut off after the new weights were in place,
    and before their configuration was.
    """
    if source.folder is not None and (source.folder / NEXT).is_file() and (source.folder / WEIGHTS).is_file():
        following = read_json(source.folder / NEXT)
        if following.get("weights_sha256") == sha256(source.folder / WEIGHTS):
            return source.folder / NEXT, following["config"]
    path = source.require(CONFIG)
    return path, read_json(path)


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint."""

    name: str  # of the checkpoint, as it was given
    paths: tuple[Path, ...]
    index: Path | None = None  # if there are several: the file that says which tensor is in which

    @property
    def where(self) -> Path:
        """What an error about all of them names: the one file, or their folder."""
        return self.paths[0] if len(self.paths) == 1 else self.paths[0].parent


def weight_files(source: Source) -> WeightFiles:
    """Raises FileNotFoundError if there is none, ValueError for an index that is no index."""
    single = source.file(WEIGHTS)
    if single is not None:
        return WeightFiles(source.name, (single,))
    index = source.file(INDEX)
    if index is None:
        raise FileNotFoundError(_no_weights(source))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: there is no weight_map in it")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: the shard {name!r} is not a plain file name: shards stand beside their index")
    return WeightFiles(source.name, tuple(source.require(name) for name in sorted(set(weight_map.values()))), index)


def _no_weights(source: Source) -> str:
    if source.folder is not None and not (source.folder / "pytorch_model.bin").exists():
        return f"{source.folder / WEIGHTS}: there is no such file, and no {INDEX}"
    if source.only_cache:
        return f"{source.name}: there is no {WEIGHTS}{source.only_cache}"
    return (
        f"{source.name}: there is no {WEIGHTS}. A pytorch_model.bin is a pickle, which can run any program when "
        "it is opened, so minibert does not open it. Convert it where you trust it: "
        'python -c "from transformers import '
        f"AutoModelForMaskedLM as M; M.from_pretrained({source.name!r}).save_pretrained('converted')\""
    )
