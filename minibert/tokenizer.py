"""Text to token ids and back, with the `tokenizers` library.

BERT's tokenizer cleans the text, splits it at spaces and punctuation, and cuts each word into the longest
pieces that the vocabulary has (WordPiece; all but a word's first piece start with ##). Source:
google-research/bert, tokenization.py.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from minibert.checkpoint import hub
from minibert.checkpoint.files import naming, read_json
from minibert.checkpoint.tokenizer_files import (
    CASE,
    ROLES,
    SETTINGS,
    TOKENIZER,
    TokenizerFiles,
    extra_tokens,
    is_berts,
    notes,
    read_tokenizer_files,
    require_template,
    special_tokens,
)

SPACE = re.compile(r"[^\S\x0b\x0c\x1c-\x1f\x85]")  # no control characters, which BERT leaves out of a word
# transformers, tokenization_utils_base.py, clean_up_tokenization
CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)


@dataclass(frozen=True)
class TokenizerReport:
    """What `load_tokenizer` read. The tokenizer has it as `load_report`."""

    name: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]  # which file said what, and what another one said that was not taken
    roles: Mapping[str, str] = field(default_factory=dict)  # "mask" → "[MASK]", …
    settings: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json; a save writes it back


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Tokenizer:
    """The tokenizer of a checkpoint, named as for `BertForMaskedLM.from_pretrained`. Which files are read, and which
    one holds where two differ, stands in checkpoints.md; `tokenizer.load_report` says what was found.

    `.encode(text).ids` gives the ids, [CLS] and [SEP] included. Nothing is truncated or padded, whatever the
    file says: ask for it with `encode(..., truncate=True)` here or the library's own `enable_truncation`.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    source = hub.locate(name_or_path, revision=revision, local_files_only=local_files_only)
    found = read_tokenizer_files(source)
    with naming(found.path()):
        try:
            tokenizer = _as_it_stands(found) if found.as_it_stands else _bert(found)
        except BaseException as error:  # the library's are no more special, and its own faults are PanicExceptions
            if isinstance(error, ValueError | KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"not a tokenizer file: the tokenizers library cannot use it: {error}") from error
    roles = {role: token.content for role, token in special_tokens(found.settings).items() if role in ROLES}
    report = TokenizerReport(
        name=source.name,
        files=tuple(found.paths.values()),
        notes=tuple(notes(found)),
        roles=roles,
        settings={**found.settings, "added_tokens_decoder": _added(tokenizer)},
    )
    tokenizer.load_report = report  # type: ignore[attr-defined]
    tokenizer.add_special_tokens(_undeclared(tokenizer))
    return tokenizer


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer that minibert computes with: a tokenizers.Tokenizer, or the one inside a fast tokenizer of
    transformers. It neither cuts nor pads, and [MASK] and the other tokens of BERT's roles are special in it, so that
    none is cut into `[ mask ]`. The caller's own stays as it is: where something has to change, this is a copy.

    Raises TypeError for anything else.
    """
    inside = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(inside, Tokenizer):
        raise TypeError(
            "a tokenizers.Tokenizer is needed (load_tokenizer makes one of a name), or a fast one of transformers "
            f"(not one that is computed in Python), not {type(tokenizer).__name__} {str(tokenizer)[:60]!r}"
        )
    if inside is tokenizer and inside.truncation is None and inside.padding is None and not _undeclared(inside):
        return inside
    copy = Tokenizer.from_str(inside.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = inside.encode_special_tokens
    report = getattr(inside, "load_report", None) if inside is tokenizer else _report_of(tokenizer)
    if report is not None:
        copy.load_report = report  # type: ignore[attr-defined]
    copy.add_special_tokens(_undeclared(copy))
    return copy


def _report_of(tokenizer: Any) -> TokenizerReport:
    """What a fast tokenizer of transformers says of itself, in the settings that it would save."""
    named = {role: getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    roles = {role: str(token) for role, token in named.items() if token is not None}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = {**read_json(Path(folder) / SETTINGS), "added_tokens_decoder": _added(tokenizer.backend_tokenizer)}
    name = str(getattr(tokenizer, "name_or_path", ""))
    return TokenizerReport(name, (), ("from transformers",), roles, settings)


def _undeclared(tokenizer: Tokenizer) -> list[AddedToken]:
    """The tokens of BERT's roles that are in the vocabulary, and that nobody has declared special."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names = [own_token(tokenizer, f"[{role.upper()}]") for role in ROLES]
    wanted = [name for name in names if name is not None and name not in special]
    return [
        AddedToken(name, special=True, normalized=False) for name in wanted if tokenizer.token_to_id(name) is not None
    ]


def _bert(found: TokenizerFiles) -> Tokenizer:
    """BERT's tokenizer, from a vocabulary and settings."""
    vocabulary = found.vocabulary if found.whole is None else found.whole["model"].get("vocab")
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise ValueError("not a tokenizer file: its vocab must be an object of tokens and their ids")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two tokens of the vocabulary have the same id")
    return from_vocabulary(vocabulary, found.settings, found.added)


def from_vocabulary(
    tokens: Sequence[str] | Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
    added: Mapping[int, AddedToken] | None = None,
) -> Tokenizer:
    """BERT's tokenizer for a vocabulary: tokens in the order of their ids, or token → id. `settings` are the keys of
    tokenizer_config.json; `added` are tokens that are never cut, with their ids.

    Raises ValueError if a special token is in neither, or if an added token cannot have its id.
    """
    settings = settings or {}
    vocabulary = dict(tokens) if isinstance(tokens, Mapping) else {token: n for n, token in enumerate(tokens)}
    roles = {role: AddedToken(f"[{role.upper()}]", special=True) for role in ROLES} | special_tokens(settings)
    content = {role: token.content for role, token in roles.items()}
    case = {key: settings.get(key, default) for key, default in CASE.items()}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=content["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=case["tokenize_chinese_chars"],
        strip_accents=case["strip_accents"],
        lowercase=case["do_lower_case"],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    _add_tokens(tokenizer, added or {}, roles, extra_tokens(settings))
    cls, sep = content["cls"], content["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[
            {"id": "[CLS]", "ids": [tokenizer.token_to_id(cls)], "tokens": [cls]},
            {"id": "[SEP]", "ids": [tokenizer.token_to_id(sep)], "tokens": [sep]},
        ],
    )
    tokenizer.encode_special_tokens = settings.get("split_special_tokens", False)
    return tokenizer


def _as_it_stands(found: TokenizerFiles) -> Tokenizer:
    """The tokenizer in tokenizer.json, with the tokens that the other files add."""
    tokenizer = Tokenizer.from_file(str(found.path()))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    require_template(tokenizer)
    missing = {number: token for number, token in found.added.items() if tokenizer.token_to_id(token.content) is None}
    _add_tokens(tokenizer, missing, special_tokens(found.settings), extra_tokens(found.settings))
    if "split_special_tokens" in found.settings:
        tokenizer.encode_special_tokens = found.settings["split_special_tokens"]
    return tokenizer


def _add_tokens(
    tokenizer: Tokenizer, added: Mapping[int, AddedToken], named: Mapping[str, AddedToken], extra: Sequence[str]
) -> None:
    """Tokens that are never cut: those in `added` with their ids, then the special ones: `named` by their role, and the
    extra ones. A token that is in the vocabulary keeps its id there; others get the next ones.

    Raises ValueError if one of `added` gets another id, or if the mask token, or another one that BERT needs, is
    neither in the vocabulary nor added.
    """
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([added[number] for number in sorted(added)])
    for role, token in named.items():
        if role in ROLES and tokenizer.token_to_id(token.content) is None:
            raise ValueError(f"the {role}_token {token.content!r} is not in the vocabulary of {size} tokens")
    for number, token in added.items():
        if (got := tokenizer.token_to_id(token.content)) != number:
            raise ValueError(
                f"the added token {token.content!r} has the id {number}, but would get {got}: the vocabulary has "
                f"{tokenizer.get_vocab_size()} tokens with it, and added ones follow without a gap"
            )
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    special = [*named.values(), *(AddedToken(text, special=True) for text in extra)]
    tokenizer.add_special_tokens([token for token in special if token.content not in there])


# ------------------------------------------------------------------------------------------------------- special tokens


def own_token(tokenizer: Tokenizer, usual: str) -> str | None:
    """What this tokenizer calls the token that is usually called [UNK], [SEP], [PAD], [CLS] or [MASK]. None if it has
    none.

    It is what the checkpoint's files call so. For a tokenizer that came without such files, it is what the tokenizer
    itself does: the token for unknown words, those that it puts around a text; and for the rest, the one special token
    with that name, whatever its brackets: [MASK], <mask>, …
    """
    role = usual.strip("[]").lower()
    report = getattr(tokenizer, "load_report", None)
    if report is not None and role in report.roles:
        return str(report.roles[role])
    if role == "unk" and getattr(tokenizer.model, "unk_token", None):
        return str(tokenizer.model.unk_token)
    if role in ("cls", "sep") and tokenizer.num_special_tokens_to_add(False) == 2:
        return str(tokenizer.encode("").tokens[0 if role == "cls" else -1])
    for name in (usual, f"<{role}>"):
        if tokenizer.token_to_id(name) is not None:
            return name
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    named = [token for token in special if token.strip("[]<>|_ ").lower() == role]
    return named[0] if len(named) == 1 else None


def require_id(tokenizer: Tokenizer, usual: str) -> int:
    """The id of the token that is usually called [UNK], [SEP], [PAD], [CLS] or [MASK], whatever it is called here.
    Raises ValueError if there is none.
    """
    token = own_token(tokenizer, usual)
    number = None if token is None else tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(
            f"this tokenizer has no {usual} token: it is not a BERT tokenizer, or it has another name for it and no "
            f'tokenizer_config.json that says so ("{usual.strip("[]").lower()}_token": "…")'
        )
    return number


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the special tokens ([PAD], [UNK], [CLS], [SEP], [MASK], and others that were added as special): never
    masked, never predicted by BERT's recipe.
    """
    ids = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = [own_token(tokenizer, f"[{role.upper()}]") for role in ROLES] + extra_tokens(_said(tokenizer))
    numbers = [tokenizer.token_to_id(token) for token in named if token is not None]
    return sorted(ids.union(number for number in numbers if number is not None))


def count_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id that the tokenizer gives. A model may have more rows than that, to fill up its
    vocabulary to a multiple of 8 or 64.
    """
    return max(tokenizer.get_vocab().values()) + 1


def as_files(tokenizer: Any, max_length: int) -> dict[str, str]:
    """File name → text: what `load_tokenizer` and transformers' AutoTokenizer read as this tokenizer. What its own
    files said is said again; what they left open is added. max_length: the positions that the model has, to which
    AutoTokenizer truncates if it is asked to and nothing else was said.

    Raises ValueError for a tokenizer in which [MASK] or another token of BERT's is not special: what is read again
    would be another one.
    """
    inside, tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer), as_tokenizer(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    before = {token.content for token in inside.get_added_tokens_decoder().values() if token.special}
    if names := [token.content for token in added.values() if token.special and token.content not in before]:
        raise ValueError(
            f"{names[-1]} is in the vocabulary of this tokenizer and not special in it, so it is cut into pieces: call "
            f"its add_special_tokens({names}) before it is saved"
        )
    settings: dict[str, Any] = {**_said(tokenizer)}
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for key, part in zip(CASE, ("lowercase", "strip_accents", "handle_chinese_chars"), strict=True):
            settings.setdefault(key, getattr(tokenizer.normalizer, part))
    length = settings.get("model_max_length")
    if not isinstance(length, int | float) or length > 1e20:  # transformers writes 10^30 for none
        settings["model_max_length"] = max_length
    for role in ROLES:
        if (token := own_token(tokenizer, f"[{role.upper()}]")) is not None:
            settings.setdefault(f"{role}_token", token)
    said = {*extra_tokens(settings), *(token.content for token in special_tokens(settings).values())}
    said |= {token["content"] for token in settings.get("added_tokens_decoder", {}).values()}
    if more := [token.content for token in added.values() if token.special and token.content not in said]:
        settings["extra_special_tokens"] = [*extra_tokens(settings), *more]
    if settings.get("split_special_tokens", False) != tokenizer.encode_special_tokens:
        settings["split_special_tokens"] = tokenizer.encode_special_tokens
    # With these here, files of an earlier tokenizer that lie in the folder (added_tokens.json, …) are not read.
    settings["added_tokens_decoder"] = _added(tokenizer)
    kind = settings.get("tokenizer_class")
    if is_berts(kind):  # of BERT's class the vocabulary is read, and these settings; of others tokenizer.json as it is
        settings["tokenizer_class"] = kind or "BertTokenizer"
        if not _is_bert(tokenizer, settings):
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {TOKENIZER: tokenizer.to_str(pretty=True), SETTINGS: json.dumps(settings, indent=2) + "\n"}


def _added(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder, as tokenizer_config.json has it."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {str(number): {flag: getattr(token, flag) for flag in flags} for number, token in added}


def _is_bert(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> bool:
    """Whether BERT's class makes this tokenizer of its vocabulary and these settings."""
    if not isinstance(tokenizer.model, WordPiece):
        return False
    try:
        made = from_vocabulary(tokenizer.get_vocab(False), settings, tokenizer.get_added_tokens_decoder())
    except ValueError:
        return False

    def parts(one: Tokenizer) -> list[Any]:
        values = json.loads(one.to_str())
        both = one.encode("a", "b")
        return [*(values[key] for key in ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens")), both.ids]

    return parts(tokenizer) == parts(made)


# ---------------------------------------------------------------------------------------------------------------- texts


def encode(
    tokenizer: Tokenizer, text: str, max_length: int, *, pair: str | None = None, truncate: bool = False
) -> Encoding:
    """The encoding of one text, or of two sentences (`pair` is the second), at most `max_length` tokens with [CLS] and
    [SEP]. They may say [MASK] where the tokenizer has another name for it.

    What is longer is cut if `truncate` is given: at the end of the text, or of the longer of two sentences until both
    fit, as transformers does. Otherwise it is a ValueError that gives both numbers. So is a cut that would take a
    [MASK] away: nobody would answer it.
    """
    sentences = [text] if pair is None else [text, pair]
    special = tokenizer.num_special_tokens_to_add(pair is not None)
    if max_length < special:
        raise ValueError(f"a length of {max_length} has no room for the {special} special tokens, [CLS] and [SEP]")
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise TypeError(f"a text must be a str, not {type(sentence).__name__} {sentence!r}")
        try:
            sentence.encode()  # bytes on the command line that are no UTF-8 arrive as lone surrogates
        except UnicodeEncodeError as error:
            raise ValueError(f"the text {sentence[:60]!r} is not Unicode: {error.reason}") from error
    sentences = [own_mask(tokenizer, sentence) for sentence in sentences]
    encoding = tokenizer.encode(sentences[0], None if pair is None else sentences[1])
    if len(encoding.ids) <= max_length:
        return encoding
    if not truncate:
        raise ValueError(
            f"the text is {len(encoding.ids)} tokens long and the model takes {max_length}: "
            "shorten it (truncate=True, or --truncate of a command, cuts it)"
        )
    # Not enable_truncation: it would stay on the caller's tokenizer.
    bodies = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in sentences]
    room, mask = max_length - special, own_token(tokenizer, "[MASK]") or ""
    there = sum(body.tokens.count(mask) for body in bodies)
    *shorter, longer = sorted(bodies, key=lambda body: len(body.ids))
    for body in shorter:
        body.truncate(room // 2)
        room -= len(body.ids)
    longer.truncate(room)
    if lost := there - sum(body.tokens.count(mask) for body in bodies):
        raise ValueError(f"{lost} {mask} in {text[:60]!r} would be cut off: the model takes {max_length} tokens")
    return tokenizer.post_process(bodies[0], None if pair is None else bodies[1])


def words_of(tokenizer: Tokenizer, encoding: Encoding, text: str, pair: str | None = None) -> list[int | None]:
    """Which word each token belongs to, counted through text and pair; None for what was put around them. text, pair:
    what `encode` was given.

    A word is what the tokenizer says, and ends at a space: a tokenizer that leaves the cutting to its pieces (▁the,
    Ġthe) takes a whole sentence for one word.
    """
    sentences = [own_mask(tokenizer, sentence) for sentence in (text, pair or "")]
    starts: list[set[int]] = [set(), set()]
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and not tokenizer.pre_tokenizer.use_regex:
        cutting = pre_tokenizers.ByteLevel(add_prefix_space=False)  # it says where words start, if it is asked to
        starts = [{start for _, (start, _) in cutting.pre_tokenize_str(sentence)} for sentence in sentences]
    words: list[int | None] = []
    before: tuple[int, int | None] | None = None
    piece, end, count = "", 0, -1
    for sentence, word, (start, stop) in zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True):
        if sentence is None:
            words.append(None)
            continue
        if before != (sentence, word):
            count += 1
        else:
            spaces = SPACE.search(sentences[sentence][end : start + 1]) or (piece.strip() and SPACE.match(piece[-1]))
            count += bool(spaces) or (start >= end and start in starts[sentence])
        before, piece, end = (sentence, word), sentences[sentence][start:stop], stop
        words.append(count)
    return words


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of these ids, as transformers writes it: where clean_up_tokenization_spaces is set in the tokenizer's
    settings, without the space before a full stop and the like.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    settings = _said(tokenizer)
    if settings.get("clean_up_tokenization_spaces") and (
        not isinstance(tokenizer.model, BPE)
        or settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    ):
        for spaced, clean in CLEAN_UP:
            text = text.replace(spaced, clean)
    return text


def _said(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """What the settings of its files say; nothing, if it came without."""
    report = getattr(tokenizer, "load_report", None)
    return report.settings if report else {}


def own_mask(tokenizer: Tokenizer, text: str) -> str:
    """The text with the tokenizer's own mask token where it says [MASK], unless [MASK] is a token of its own."""
    if "[MASK]" not in text or tokenizer.token_to_id("[MASK]") is not None:
        return text
    mask = own_token(tokenizer, "[MASK]")
    return text if mask is None else text.replace("[MASK]", mask)
