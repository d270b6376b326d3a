"""A model's name → the paths of its files: in a folder, in the package, or in the hub's ordinary cache.

Nothing here reads a tensor or needs torch: a tokenizer finds its file without them.
"""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minibert.checkpoint.files import read_json, sha256

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NEXT = ".config.json.next"  # see writing._replace_model
BUNDLED = (Path(__file__).parents[1] / "weights", Path(__file__).parents[2] / "weights")  # in the wheel, in a checkout
# Google's BERTs had no owner in their names once.
SHORT_NAMES = {
    name: f"google-bert/{name}"
    for name in """
    bert-base-uncased bert-base-cased bert-large-uncased bert-large-cased
    bert-base-multilingual-uncased bert-base-multilingual-cased bert-base-chinese bert-base-german-cased
    bert-base-german-dbmdz-cased bert-base-german-dbmdz-uncased bert-base-cased-finetuned-mrpc
    bert-large-uncased-whole-word-masking bert-large-uncased-whole-word-masking-finetuned-squad
    bert-large-cased-whole-word-masking bert-large-cased-whole-word-masking-finetuned-squad
    """.split()
}
# Names that end like this are those of files, and no reason to ask the network.
FILES = re.compile(r".*\.(bin|json|safetensors|txt|pt|pth|ckpt|h5|onnx|msgpack|model|gz|zip|tar)")
ASK_SECONDS = 5  # for the one question to the hub whether it is there; hf_hub_download's own may take minutes
# A hub repository can change its files at any time; this one is pinned to what minibert was tested with.
PINNED_REVISION = {"google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594"}
PINNED_SHA256 = {
    WEIGHTS: "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


@dataclass(frozen=True)
class Source:
    """Where the files of one checkpoint are: a folder, or one commit of a repository on the hub."""

    name: str  # as it was given
    folder: Path | None = None
    repo_id: str = ""
    revision: str | None = None
    commit: str | None = None  # the one that the revision is
    only_cached: str = ""  # if the hub is not asked: what to add to "there is no …", with the reason

    def file(self, filename: str) -> Path | None:
        """The path of one file, downloaded into the hub's ordinary cache if need be; None if there is none."""
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        if self.is_pinned and filename != CONFIG and filename not in PINNED_SHA256:
            return None  # what cannot be checked is not read; what can (the vocabulary) says the same
        return _download(self, filename)

    def require(self, filename: str) -> Path:
        path = self.file(filename)
        if path is None:
            raise FileNotFoundError(f"{self.folder or self.name}: there is no {filename}{self.only_cached}")
        return path

    @property
    def is_pinned(self) -> bool:
        """Whether its files are known, by PINNED_SHA256 or, of config.json, by its values; no other is read then."""
        return self.commit in PINNED_REVISION.values()


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Source:
    """What a name means: an existing folder, else a bundled checkpoint, else one of Google's short names such as
    "bert-base-uncased", else "owner/name" on the hub.

    Raises FileNotFoundError if it is none of them, ValueError for a revision of something that is not on the hub, and
    ConnectionError if the hub does not answer and nothing is in its cache.
    """
    name = os.fspath(name_or_path)
    folders = [Path(name), *(parent / name for parent in BUNDLED)] if name else []
    for folder in folders:
        if folder.is_dir():
            if revision is not None:
                raise ValueError(f"revision {revision!r} was given, but {name} is a folder: revisions are the hub's")
            return Source(name, folder=folder)
    repo_id = SHORT_NAMES.get(name, name)
    # "models/bert" beside an existing folder "models" is a mistyped path, and so is "bert/model.bin".
    is_path = not isinstance(name_or_path, str) or ("/" in name and Path(name).parent.is_dir()) or FILES.fullmatch(name)
    if not is_path and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        return _on_hub(Source(name, None, repo_id), revision, local_files_only)
    bundled = sorted({folder.parent.name for parent in BUNDLED for folder in parent.glob(f"*/{CONFIG}")})
    what = "is a file" if Path(name).is_file() else "is no folder"
    raise FileNotFoundError(
        f"{name!r} {what}. A model is a folder with {CONFIG} and {WEIGHTS}; a bundled name "
        f"({', '.join(bundled) or 'none is installed'}); bert-base-uncased, or another of Google's; "
        "or a hub id such as google-bert/bert-base-cased"
    )


# ------------------------------------------------------------------------------------------------------------- the hub


def _on_hub(source: Source, revision: str | None, local_files_only: bool) -> Source:
    """The source with the commit that is meant, so that all of its files are of one.

    It is asked for once. A pinned commit that is in the cache needs no question. If the hub does not answer, what is in
    the cache is taken, under the names under which transformers looks for it.
    """
    from huggingface_hub import constants

    pinned = PINNED_REVISION.get(source.repo_id)
    wanted = replace(source, revision=revision or pinned)
    offline = "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    if not offline and not revision and pinned and _cached_commit(wanted.repo_id, pinned):
        return replace(wanted, commit=pinned)
    why = f"because of {offline} the hub was not asked" if offline else "the hub cannot be reached"
    cached = _in_cache(wanted, revision, f" in the local cache, and {why}")
    if not offline:
        weights = cached and _cached_commit(cached.repo_id, cached.commit, (WEIGHTS, INDEX))
        try:
            return replace(wanted, commit=_ask_for_commit(wanted, again=not weights))
        except ConnectionError as error:
            if cached.commit is None:
                raise ConnectionError(
                    f"{error}. Without a connection: give a folder, or a bundled name; or load it once where there is "
                    "one, and copy the cache (HF_HOME)"
                ) from error
    if pinned and not revision and cached.commit not in (pinned, None):
        warnings.warn(
            f"{cached.name}: the cache has commit {cached.commit}, which is read; minibert was tested with {pinned}",
            stacklevel=2,
        )
    return cached


def _ask_for_commit(source: Source, *, again: bool) -> str:
    """The commit that a revision is now. Raises FileNotFoundError if the hub has no such repository or revision, and
    ConnectionError if it does not answer in ASK_SECONDS. again: huggingface_hub may ask five times more.
    """
    import huggingface_hub
    from huggingface_hub import errors

    url = huggingface_hub.hf_hub_url(source.repo_id, CONFIG, revision=source.revision)
    try:
        commit = huggingface_hub.get_hf_file_metadata(url, timeout=ASK_SECONDS, retry_on_errors=again).commit_hash
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{source.name}: the hub has no revision {source.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        said = f"{source.name}: the hub has no repository {source.repo_id}, or it is private and you are not logged in"
        raise FileNotFoundError(said) from error
    except errors.EntryNotFoundError as error:  # no config.json, perhaps a repository of tokenizers
        response = getattr(error, "response", None)
        commit = None if response is None else response.headers.get("X-Repo-Commit")
    except Exception as error:  # also those of the HTTP library, which depends on huggingface_hub's version
        raise ConnectionError(f"{source.name}: {CONFIG}: the hub cannot be reached: {error}") from error
    if not commit:
        raise ConnectionError(f"{source.name}: {CONFIG}: the answer does not come from the hub: it names no commit")
    return str(commit)


def _in_cache(source: Source, revision: str | None, why: str) -> Source:
    """The source, read from the cache alone: the wanted revision; or, if the user has named none, what is there under
    the short name too, or at another commit than the pinned one. Its commit is None if nothing is there.
    """
    names = [source.repo_id, *([source.name] if source.name in SHORT_NAMES else [])]
    revisions = [source.revision] if revision or not source.revision else [source.revision, None]
    for wanted in revisions:
        for repo_id in names:
            if commit := _cached_commit(repo_id, wanted):
                return replace(source, repo_id=repo_id, revision=commit, commit=commit, only_cached=why)
    return replace(source, only_cached=why)


def _cached_commit(
    repo_id: str, revision: str | None, filenames: Sequence[str] = (CONFIG, WEIGHTS, "tokenizer.json", "vocab.txt")
) -> str | None:
    """The commit of a revision (None: the main one), if any of these files of it is in the cache."""
    import huggingface_hub

    for filename in filenames:
        path = huggingface_hub.try_to_load_from_cache(repo_id, filename, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _download(source: Source, filename: str) -> Path | None:
    import huggingface_hub
    from huggingface_hub import errors

    # A commit does not change: what the cache has of it, and what the hub has said it has not, is not asked for again.
    known: Any = huggingface_hub.try_to_load_from_cache(
        source.repo_id, filename, revision=source.commit or source.revision
    )
    if not isinstance(known, str) and (source.only_cached or known is huggingface_hub._CACHED_NO_EXIST):
        return None
    for last in (False, True):  # it asks again itself, but not after a connection that was reset
        if isinstance(known, str):
            break
        try:
            known = huggingface_hub.hf_hub_download(source.repo_id, filename, revision=source.revision)
        except errors.EntryNotFoundError as error:
            if not isinstance(error, errors.LocalEntryNotFoundError):
                return None
            cause = error.__cause__ or error
            raise ConnectionError(f"{source.name}: {filename}: the hub cannot be reached: {cause}") from error
        except Exception as error:  # also those of the HTTP library, which depends on huggingface_hub's version
            if last:
                raise ConnectionError(f"{source.name}: {filename} could not be downloaded: {error}") from error
    path = Path(known)
    if source.commit and path.parent.name != source.commit:
        raise ConnectionError(f"{source.name}: the hub has just got another commit of it: load it again")
    expected = PINNED_SHA256.get(filename) if source.is_pinned else None
    if expected and (found := sha256(path)) != expected:
        said = f"{path}: SHA-256 is {found}, but {source.name} at {source.commit} has {expected}: "
        if source.only_cached:
            raise ValueError(f"{said}this file of the cache has changed; load it again where the hub can be reached")
        path.resolve().unlink()  # the cached bytes, so that the next try downloads them again
        path.unlink(missing_ok=True)  # and the link to them
        raise ValueError(f"{said}the download came back wrong and was deleted; try again")
    return path


# -------------------------------------------------------------------------------------------------------- config.json


def read_config(source: Source) -> tuple[Path, dict[str, Any]]:
    """The path of config.json and what is in it; or of NEXT, if a save was cut off after the new weights were in place,
    and before their configuration was.
    """
    if source.folder is not None and (following := unfinished_config(source.folder)) is not None:
        return source.folder / NEXT, following
    path = source.require(CONFIG)
    return path, read_json(path)


def unfinished_config(folder: Path) -> dict[str, Any] | None:
    """What is in NEXT, if it belongs to the weights that are there; None if there is none, or one of other weights."""
    if not (folder / NEXT).is_file() or not (folder / WEIGHTS).is_file():
        return None
    try:
        following = read_json(folder / NEXT)
    except ValueError:  # nobody's save wrote this: it is whole when it appears
        return None
    config = following.get("config")
    if not isinstance(config, dict) or following.get("weights_sha256") != sha256(folder / WEIGHTS):
        return None
    return config
