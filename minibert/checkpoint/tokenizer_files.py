"""What a checkpoint's files say about its tokenizer. There are up to six of them, and any may be missing:

    tokenizer.json            everything, as the `tokenizers` library writes it
    vocab.txt                 one token a line; the first has id 0
    tokenizer_config.json     the class, upper and lower case, the names of the special tokens, tokens added later
    special_tokens_map.json   names of special tokens, in older checkpoints
    added_tokens.json         tokens added later, in older checkpoints
    config.json               the class, where tokenizer_config.json does not say it

They are read as transformers reads them (version 5.23: models/auto/tokenization_auto.py chooses the class,
tokenization_utils_base.py collects the settings). minibert/checkpoints.md says which one holds where two differ.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from minibert.checkpoint.files import naming, read_json
from minibert.checkpoint.hub import CONFIG, Source

TOKENIZER, VOCABULARY, SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"

# Classes of transformers, without "Fast", that are BERT's tokenizer under one name or another.
BERT_CLASSES = frozenset(
    f"{model}Tokenizer" for model in ("Bert", "DistilBert", "Electra", "ConvBert", "MobileBert", "SqueezeBert")
)
# Settings of a tokenizer that first cuts Japanese into words, which needs a program and a dictionary of its own.
JAPANESE = ("word_tokenizer_type", "subword_tokenizer_type", "mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs")
ROLES = ("unk", "sep", "pad", "cls", "mask")
NAMED = ("bos", "eos", *ROLES)
CASE = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}  # and BERT's defaults


@dataclass
class TokenizerFiles:
    """All that was found."""

    whole: dict[str, Any] | None = None  # tokenizer.json
    vocabulary: dict[str, int] | None = None  # token → id, from vocab.txt
    settings: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json, special_tokens_map.json over it
    added: dict[int, AddedToken] = field(default_factory=dict)
    as_it_stands: bool = False  # tokenizer.json is not put together anew from its vocabulary and the settings
    paths: dict[str, Path] = field(default_factory=dict)  # file name → path, of those that were read

    def path(self) -> Path:
        """The file that holds the vocabulary."""
        return self.paths.get(TOKENIZER) or self.paths[VOCABULARY]

    def read(self, source: Source, filename: str) -> dict[str, Any] | None:
        """What is in a JSON file; None if there is none."""
        path = source.file(filename)
        if path is None:
            return None
        self.paths[filename] = path
        return read_json(path)


def read_tokenizer_files(source: Source) -> TokenizerFiles:
    """Raises FileNotFoundError if there is neither a tokenizer.json nor a vocab.txt; ValueError, naming the file, if
    one is not what it should be, or if the class is a tokenizer that minibert does not have.
    """
    found = TokenizerFiles()
    found.whole = found.read(source, TOKENIZER)
    if found.whole is None and (path := source.file(VOCABULARY)):
        found.paths[VOCABULARY] = path
        found.vocabulary = read_vocabulary(path)
    found.settings = found.read(source, SETTINGS) or {}
    _choose(source, found)
    if not found.paths.keys() & {TOKENIZER, VOCABULARY}:
        raise FileNotFoundError(f"{source.name}: there is neither a {TOKENIZER} nor a {VOCABULARY}{source.only_cached}")
    _collect_tokens(source, found)
    return found


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token → id. What editors leave behind is no part of a token: a byte-order mark, spaces at the end of a line,
    blank lines at the end of the file. (Google's tokenization.py strips each line, too.)

    Raises ValueError if a token is there twice: only one of the two ids would ever be used.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: not a vocabulary of one token a line in UTF-8: line {line} has the byte "
            f"{error.object[error.start]:#04x}"
        ) from error
    lines = [line.rstrip(" \t\r") or line[:1] for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    for token, count in Counter(lines).items():
        if count > 1:
            numbers = [number for number, line in enumerate(lines, start=1) if line == token][:2]
            raise ValueError(f"{path}: {token!r} stands there {count} times, in lines {numbers[0]} and {numbers[1]}")
    return {token: number for number, token in enumerate(lines)}


def _choose(source: Source, found: TokenizerFiles) -> None:
    """Whether it is BERT's tokenizer, or one that stands in tokenizer.json. Raises ValueError if it is neither."""
    name, said_in = found.settings.get("tokenizer_class"), found.paths.get(SETTINGS)
    if name is None and (path := source.file(CONFIG)):
        name, said_in = read_json(path).get("tokenizer_class"), path
    if japanese := [key for key in JAPANESE if found.settings.get(key) is not None]:
        name, said_in = name or f"one with a {japanese[0]}", found.paths[SETTINGS]
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{said_in}: tokenizer_class must be a name, not {name!r}")
    known = is_berts(name) and not japanese
    if not known and (found.whole is None or japanese or name == "BertJapaneseTokenizer"):
        raise ValueError(
            f"{said_in}: its tokenizer is {name}, which cuts words in another way than BERT's. minibert does not have "
            "it, and BERT's own would give other ids. Tokenize with transformers, and give the ids to the model"
        )
    if found.whole is not None:
        if not isinstance(model := found.whole.get("model"), dict):
            raise ValueError(f"{found.path()}: not a tokenizer file: there is no model in it")
        word_pieces = model.get("type") in (None, "WordPiece")
        found.as_it_stands = not known or not word_pieces or SETTINGS not in found.paths


def is_berts(name: str | None) -> bool:
    """Whether a tokenizer_class is BERT's, as it is where there is none."""
    return name is None or name.removesuffix("Fast") in BERT_CLASSES


def _collect_tokens(source: Source, found: TokenizerFiles) -> None:
    """Tokens that were added to the vocabulary, and the names of the special ones, from all files that have some."""
    said, listed = found.settings, found.settings.get("added_tokens_decoder")
    if listed is None:  # older than added_tokens_decoder
        over = {key: value for key, value in (found.read(source, SPECIAL_TOKENS) or {}).items() if value is not None}
        found.settings = {**said, **over}
        for name, values in ((SETTINGS, said), (SPECIAL_TOKENS, over)):
            with naming(found.paths.get(name, Path(name))):
                special_tokens(values)
                extra_tokens(values)
        # As in transformers, where additional_special_tokens of special_tokens_map.json come too late for this.
        extra = {**found.settings, "additional_special_tokens": said.get("additional_special_tokens")}
        special = {token.content for token in special_tokens(found.settings).values()} | set(extra_tokens(extra))
        for token, number in (found.read(source, ADDED_TOKENS) or {}).items():
            with naming(found.paths[ADDED_TOKENS]):
                found.added[_id(number)] = AddedToken(token, normalized=token not in special, special=token in special)
    else:
        with naming(found.paths[SETTINGS]):
            special_tokens(said)
            extra_tokens(said)
            if not isinstance(listed, dict):
                raise ValueError(f"added_tokens_decoder must map ids to tokens, not {listed!r}")
            for number, token in listed.items():
                found.added[_id(number)] = added_token(token)
    if found.whole is not None:
        with naming(found.path()):
            for entry in _list(found.whole.get("added_tokens")):
                if not isinstance(entry, dict):
                    raise ValueError(f"not a tokenizer file: the added token {entry!r} is no object")
                new = added_token(entry)
                if new.content not in {token.content for token in found.added.values()}:
                    found.added.setdefault(_id(entry.get("id")), new)


def special_tokens(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Role → token, of the roles that are named in the settings; among them bos and eos, which BERT does not use."""
    named = {role: settings.get(f"{role}_token") for role in NAMED}
    return {role: added_token(token, special=True) for role, token in named.items() if token is not None}


def extra_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role, or with one that BERT does not know ("image_token": "<image>")."""
    value = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    entries = list(value.values()) if isinstance(value, dict) else _list(value)
    known = {f"{role}_token" for role in NAMED}
    entries += [x for key, x in settings.items() if key.endswith("_token") and key not in known and isinstance(x, str)]
    return [added_token(entry).content for entry in entries]


def added_token(value: Any, *, special: bool | None = None) -> AddedToken:
    """A token from its text, or from what the files have for it: {"content": "[MASK]", "lstrip": false, …}. Raises
    ValueError for anything else.
    """
    if isinstance(value, str):
        value = {"content": value, "normalized": False, "special": True}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise ValueError(f"{value!r} is no token: a text is expected, or an object with its content")
    flags = {flag: value.get(flag, False) for flag in ("single_word", "lstrip", "rstrip")}
    is_special = value.get("special", False) if special is None else special
    flags |= {"special": is_special, "normalized": value.get("normalized", not is_special)}
    if wrong := [flag for flag, on in flags.items() if not isinstance(on, bool)]:
        raise ValueError(f"{wrong[0]} of the token {value['content']!r} must be true or false, not {flags[wrong[0]]!r}")
    return AddedToken(value["content"], **flags)


def _id(value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 11 else value
    if type(number) is not int or not 0 <= number < 2**32:
        raise ValueError(f"{value!r} is no id of an added token")
    return number


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise ValueError(f"a list of tokens was expected, not {value!r}")
    return value or []


def require_template(tokenizer: Tokenizer) -> None:
    """Raise ValueError if [CLS], [SEP] or what else is put around a text has another id in the vocabulary. The library
    takes it from a file as it is, and gives ids of other tokens, or panics, here already.
    """
    for encoding in (tokenizer.encode("a"), tokenizer.encode("a", "b")):
        for token, number, special in zip(encoding.tokens, encoding.ids, encoding.special_tokens_mask, strict=True):
            if special and (known := tokenizer.token_to_id(token)) != number:
                raise ValueError(
                    f"not a tokenizer file: its template gives {token!r} the id {number}, and the vocabulary {known}"
                )
        tokenizer.decode(encoding.ids)


def notes(found: TokenizerFiles) -> list[str]:
    """What was taken from which file, and what was not taken."""
    pieces = found.path().name
    notes = [f"pieces from {pieces}"]
    stored = (found.whole or {}).get("normalizer") or {}
    if found.as_it_stands:
        notes.append(f"{TOKENIZER} stands as it is")
        notes += [f"{key} {found.settings[key]} in {SETTINGS} has no effect" for key in CASE if key in found.settings]
        return notes
    names = {"do_lower_case": "lowercase", "tokenize_chinese_chars": "handle_chinese_chars"}
    for key, default in CASE.items():
        origin = SETTINGS if key in found.settings else "BERT's default"
        value = found.settings.get(key, default)
        other = stored.get(names.get(key, key), value) if isinstance(stored, dict) else value
        notes.append(f"{key} {value} ({origin}" + (f"; {TOKENIZER} has {other})" if value != other else ")"))
    if found.added:
        notes.append(f"{len(found.added)} added tokens")
    return notes
