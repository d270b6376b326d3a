"""Text to token ids and back, with the `tokenizers` library.

BERT's tokenizer cleans the text, splits it at spaces and punctuation, and cuts each word into the longest
pieces that the vocabulary has (WordPiece; all but a word's first piece start with ##). Source:
google-research/bert, tokenization.py.
"""

import os
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from minibert import hub
from minibert.files import read_json


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Tokenizer:
    """The tokenizer of a checkpoint, named as for `BertForMaskedLM.from_pretrained`: from its tokenizer.json,
    or else from its vocab.txt and the settings in its tokenizer_config.json, if any.

    `.encode(text).ids` gives the ids, [CLS] and [SEP] included. Nothing is truncated or padded, whatever the
    file says: ask for it with `encode(..., truncate=True)` here or the library's own `enable_truncation`.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    source = hub.locate(name_or_path, revision=revision, local_files_only=local_files_only)
    if path := source.file("tokenizer.json"):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{path}: not a tokenizer file: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    path = source.file("vocab.txt")
    if path is None:
        raise FileNotFoundError(f"{source.name}: there is neither a tokenizer.json nor a vocab.txt{source.only_cache}")
    settings_path = source.file("tokenizer_config.json")
    settings = read_json(settings_path) if settings_path else {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a vocabulary of one token a line in UTF-8: {error}") from error
    tokens = text.removesuffix("\n").split("\n")
    try:
        return from_vocabulary(tokens, settings)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{settings_path or path}: the tokenizer cannot be made: {error}") from error


def from_vocabulary(tokens: list[str], settings: dict[str, Any] | None = None) -> Tokenizer:
    """BERT's tokenizer for a vocabulary, token i having id i. `settings` are the keys of tokenizer_config.json."""
    settings = settings or {}
    vocabulary = {token: number for number, token in enumerate(tokens)}
    special = {}
    for role in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = settings.get(role, f"[{role.removesuffix('_token').upper()}]")
        special[role] = token["content"] if isinstance(token, dict) else token  # a dict is an AddedToken, written out
        if special[role] not in vocabulary:
            raise ValueError(f"the {role} {special[role]!r} is not in the vocabulary of {len(tokens)} tokens")
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(special.values()))
    cls, sep = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, max_length: int, *, truncate: bool = False) -> Encoding:
    """The encoding of one text, at most `max_length` tokens with [CLS] and [SEP].

    A longer text is cut (before [SEP]) if `truncate` is given, and otherwise a ValueError that gives both numbers.
    """
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length < special:
        raise ValueError(f"a length of {max_length} has no room for the {special} special tokens, [CLS] and [SEP]")
    try:
        text.encode()  # bytes on the command line that are no UTF-8 arrive as lone surrogates
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {text[:60]!r} is not Unicode: {error.reason}") from error
    encoding = tokenizer.encode(text)
    if len(encoding.ids) <= max_length:
        return encoding
    if not truncate:
        raise ValueError(
            f"the text is {len(encoding.ids)} tokens long and the model takes {max_length}: "
            "shorten it (truncate=True, and --truncate of fill-mask and mlm, cut it)"
        )
    body = tokenizer.encode(
        text, add_special_tokens=False
    )  # not enable_truncation: it would stay on the caller's tokenizer
    body.truncate(max_length - special)
    return tokenizer.post_process(body)


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the special tokens ([PAD], [UNK], [CLS], [SEP], [MASK]): never masked, never predicted by
    BERT's recipe.
    """
    return sorted(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def count_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id that the tokenizer gives. A model may have more rows than that, to fill up its
    vocabulary to a multiple of 8 or 64.
    """
    return max(tokenizer.get_vocab().values()) + 1


def require_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there, such as "[MASK]". Raises ValueError if it is not."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"this tokenizer has no {token} token: it is not a BERT tokenizer")
    return number
