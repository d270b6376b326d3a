"""Two tokenizers on texts that are hard to split: the first text on which they differ, and the step that does it."""

from pathlib import Path

from tokenizers import Encoding, Tokenizer

from minibert.parity.report import Report
from minibert.trace.stores import shown

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Don't stop: it's 3.5 % of $1,000 (e.g. 7/8)!",
    "Café naïve, Zürich, Ångström, façade, coöperate",  # accents, composed …
    "Cafe\u0301 Zu\u0308rich A\u030angstro\u0308m",  # … and as combining marks
    "ﬁne ﬂuﬀ, Ⅳ, ①, ½, ＦＵＬＬ",  # compatibility forms
    "İstanbul ISPARTA ıssız ẞ ß ŒUVRE",  # letters that change their number when they are made small
    "北京是中国的首都。東京タワー 한국어 カタカナ",
    "नमस्ते दुनिया ไทยไม่มีช่องว่าง مرحبا بالعالم שלום",
    "😀 👩‍👩‍👧 🇩🇪 ☃️ ©",
    "a\u0000b c\ufffdd e\u200bf g\u00adh i\u00a0j k\u2028l m\tn\r\no",  # controls, and blanks of all kinds
    "pneumonoultramicroscopicsilicovolcanoconiosis " + "x" * 120,
    "[CLS] [MASK] [SEP] [mask] [UNK]x",
    "under_score hy-phen em—dash “quotes” …dots… <tag> a@b.c #1",
    "ΑΣ ας ΣΊΣΥΦΟΣ Привет МИР",
    "",
    "   ",
    "1234567890123456789 1.000.000,00 1e-12",
    "ALL CAPS camelCase MixedCASE",
)
STEPS = ("normalizer", "pre-tokenizer", "model", "post-processor")


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. Raises OSError or ValueError, naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from error


def compare_tokenizers(ours: Tokenizer, theirs: Tokenizer, texts: tuple[str, ...] = TEXTS) -> Report:
    """more: `texts`, how many were tried; and of the first difference `text`, `step`, `ours` and `theirs`, or None."""
    for text in texts:
        one, two = ours.encode(text), theirs.encode(text)
        if one.ids == two.ids and one.tokens == two.tokens and one.type_ids == two.type_ids:
            continue
        pairs = zip(STEPS, _steps(ours, text), _steps(theirs, text), strict=True)
        step, mine, other = next((each for each in pairs if each[1] != each[2]), ("ids", _ids(one), _ids(two)))
        title = f"the tokenizers differ first on {shown(text)!r}"
        lines = [f"  step    {step}", f"  ours    {shown(mine)}", f"  theirs  {shown(other)}"]
        more = {"texts": len(texts), "text": text, "step": step, "ours": mine, "theirs": other}
        return Report((title,), summary=lines, ok=False, more=more)
    more = {"texts": len(texts), "text": None, "step": None, "ours": None, "theirs": None}
    return Report((f"the tokenizers agree on all of {len(texts)} texts",), more=more)


def _steps(tokenizer: Tokenizer, text: str) -> list[str]:
    """What each of STEPS makes of a text."""
    normalised = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    split = tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in split.pre_tokenize_str(normalised)] if split else []
    alone, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    return [normalised, " | ".join(pieces), _ids(alone), f"{_ids(whole)}, types {whole.type_ids}"]


def _ids(encoding: Encoding) -> str:
    return " ".join(f"{token}:{number}" for token, number in zip(encoding.tokens, encoding.ids, strict=True))
