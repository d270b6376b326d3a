"""Is a model right? All that can be asked of it at once, against a reference, as one table. And is a tokenizer?

The reference is another model, or a golden trace (golden.py). It computes twice: in float64, which is the truth here,
and in the dtype in question, which shows what rounding explains. The bounds follow from that (yardstick.py).
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn

from minibert.checkpoint.names import some
from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.masking import mask_tokens
from minibert.parity.report import Line, Report
from minibert.parity.yardstick import K_RMS, Error, K, Measure, largest, measures, rounding_dtype
from minibert.trace.recorder import bert_inside, exact_arithmetic, gradients, trace
from minibert.trace.table import GRADIENT, INPUTS, dtype_name, explain, hide_padding, shown, standard_inputs

MASKING_SEED = 0


@dataclass
class Reference:
    """What a model is measured against. inputs: for `trace`. measures: of the tensors of TABLE, in order of execution.
    masked: what transformers' collator makes of `masking_ids`, (input_ids, labels), if it was asked. pick: the
    entries of a tensor that the measures hold.
    """

    title: str
    inputs: dict[str, Tensor]
    measures: list[Measure]
    masked: tuple[Tensor, Tensor] | None = None
    pick: Callable[[Tensor], Tensor] = lambda x: x


@dataclass(frozen=True)
class Checked(Line):
    """One thing that was compared. value and bound: an error relative to the tensor's scale, or a number of tokens."""

    value: float
    bound: float
    detail: str

    @property
    def ok(self) -> bool:
        return self.value <= self.bound

    def cells(self) -> dict[str, str]:
        numbers = {"value": f"{self.value:.1e}", "bound": f"{self.bound:.1e}"}
        return {"": self.name, **numbers, "verdict": "ok" if self.ok else "WRONG", " ": self.detail}


def assert_parity(model: BertForMaskedLM, other: nn.Module, inputs: dict[str, Tensor] | None = None) -> None:
    """Compare `other` (transformers' BertForMaskedLM, or one of ours) with `model`, whose weights are the right ones:
    forward pass, loss, gradients and invariances. inputs: for `trace`, with labels (default: `standard_inputs`).

    `other` may be wrapped (DataParallel, compiled, PEFT, a module that holds the model), frozen or quantised. Gradients
    that it does not have are left out, and the table says so. Raises AssertionError with the table that `minibert
    parity` prints, ValueError if there is no BertForMaskedLM in `other`, or two.
    """
    dtype = next(bert_inside(other).parameters()).dtype
    report = check(other, reference_of(model, "model", dtype, inputs))
    if not report.ok:
        raise AssertionError("\n".join(report.lines()))


def reference_of(
    model: nn.Module, title: str, dtype: torch.dtype, inputs: dict[str, Tensor] | None = None
) -> Reference:
    """Raises ValueError if there are no labels: then there is no loss and no gradient to compare."""
    own = deepcopy(bert_inside(model)).to(dtype).eval().requires_grad_(True)
    config: Any = own.config
    asked = standard_inputs(config) if inputs is None else inputs
    truth = trace(deepcopy(own).to("cpu", torch.float64), **asked, grad=True)
    rounded = trace(own.to(rounding_dtype(dtype)), **asked, grad=True)
    pairs = [(name, truth.tensors[name], rounded.tensors[name]) for name in truth.names if name not in INPUTS]
    return Reference(title, asked, list(measures(pairs, dtype)))


def check(model: nn.Module, reference: Reference) -> Report:
    """The rows of the table. Intermediates come from the written-out attention, which has them; logits, loss and
    gradients from the model as it is used, fused kernels and all."""
    bert = bert_inside(model)
    device, dtype = next(bert.parameters()).device, next(bert.parameters()).dtype
    config: Any = bert.config
    whose = "minibert" if isinstance(bert, BertForMaskedLM) else "transformers"
    title = f"{whose} against {reference.title}: {dtype_name(dtype)}, {device}, torch {torch.__version__}"
    report, inputs = Report((title,)), {name: x.to(device) for name, x in reference.inputs.items()}
    if bert is not model:
        whole = _answers_like_bert(model, inputs)
        how = "as it is called" if whole else "alone: the outer module is called otherwise"
        report.notes.append(f"{type(model).__name__} holds the model, which was compared {how}")
        model = model if whole else bert
    given = {**trace(bert, **inputs, grad=False).tensors, **_as_used(model, bert, inputs)}
    there = [measure for measure in reference.measures if measure.name in given]
    if absent := [measure.name.removeprefix(GRADIENT) for measure in reference.measures if measure.name not in given]:
        report.notes.append(f"left out: the gradients of {some(absent)}, which are frozen or no float parameters here")
    found = [(measure, measure.error(reference.pick(given[measure.name].cpu()))) for measure in there]
    good = list(takewhile(lambda pair: pair[0].accepts(pair[1]), found))
    report.more["last_good"] = good[-1][0].name if good else "the inputs"
    if len(good) < len(found):
        report.first_wrong = found[len(good)][0].name
    for name in ("intermediates", "logits", "loss", "gradients"):
        if group := [pair for pair in found if _group_of(pair[0].name) == name]:
            report.rows.append(_nearest_to_its_bound(name, group))
    logits = next(measure for measure in there if measure.name == "logits")
    report.rows += _invariances(model, config, logits)
    if reference.masked is not None:
        report.rows.append(_masking(config.vocab_size, reference.masked))
    report.ok = all(row.ok for row in report.rows)
    if report.first_wrong is not None:
        report.summary.append(f"first wrong: {report.first_wrong}. The last good one is {report.more['last_good']}")
        report.summary.append(f"{report.first_wrong} is {explain(report.first_wrong)}")
    report.summary.append(
        f"a value is an error from float64; its bound is {K:.0f} times the error of the reference's own rounding "
        f"({K_RMS:.0f} times for a root mean square)"
    )
    return report


def _group_of(name: str) -> str:
    return "gradients" if name.startswith(GRADIENT) else name if name in ("logits", "loss") else "intermediates"


def _nearest_to_its_bound(name: str, group: list[tuple[Measure, Error]]) -> Checked:
    worst, error = max(group, key=lambda pair: pair[0].share(pair[1]))
    kind = worst.kind(error)
    detail = f"rounding explains {getattr(worst.explained, kind):.1e}"
    if len(group) > 1:
        detail = f"{len(group)} tensors; nearest to its bound: {worst.name}"
    detail += " (root mean square)" * (kind == "rms")
    return Checked(name, getattr(error, kind), getattr(worst.allowed, kind), detail)


def _answers_like_bert(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the outer module of a wrapped model takes what BERT takes, and gives logits and a loss."""
    try:
        signature(model.forward).bind(**inputs)
    except TypeError:
        return False
    with torch.no_grad():
        out = model(**inputs)
    return isinstance(getattr(out, "logits", None), Tensor) and isinstance(getattr(out, "loss", None), Tensor)


def _as_used(used: nn.Module, bert: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """logits, loss, and the gradients by those parameters of `bert` that require one."""
    with exact_arithmetic(inputs["input_ids"].device.type), torch.enable_grad():
        out = used(**inputs)
        found = {"loss": out.loss.detach()}
        if out.loss.requires_grad and any(parameter.requires_grad for parameter in bert.parameters()):
            found |= gradients(bert, out.loss)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return {"logits": hide_padding("logits", out.logits.detach(), mask.bool()), **found}


def _invariances(model: nn.Module, config: BertConfig, logits: Measure) -> Iterator[Checked]:
    """Whether a row's logits depend on the padding behind it, or on the rows beside it."""
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in standard_inputs(config).items() if name != "labels"}
    mask = batch["attention_mask"].bool()
    with exact_arithmetic(device.type), torch.no_grad():
        together = model(**batch).logits
        size = largest(together[mask])
        short = int(mask[1].sum())  # the row that is padded on the right
        cut = model(**{name: x[1:2, :short] for name, x in batch.items()}).logits
        alone = [model(**{name: x[row : row + 1] for name, x in batch.items()}).logits[0] for row in range(len(mask))]
    padding = largest(cut[0] - together[1, :short]) / size
    beside = max(largest((one - many)[seen]) for one, many, seen in zip(alone, together, mask, strict=True)) / size
    yield Checked("padding invariance", padding, logits.allowed.largest, "logits of a row with and without its padding")
    yield Checked("batch invariance", beside, logits.allowed.largest, "logits of a row alone and among others")


def _masking(vocab_size: int, masked: tuple[Tensor, Tensor]) -> Checked:
    ids, special, mask_id = masking_ids(vocab_size)
    generator, size = torch.Generator().manual_seed(MASKING_SEED), len(masking_words(vocab_size))
    ours = mask_tokens(ids, special, vocab_size=size, mask_token_id=mask_id, generator=generator)
    different = (ours.input_ids != masked[0]) | (ours.labels != masked[1])
    return Checked("masking", float(different.sum()), 0.0, f"of {ids.numel()} tokens, other than the collator's")


def masking_words(vocab_size: int) -> list[str]:
    """A stand-in vocabulary, so that a folder needs no tokenizer: which words they are, masking never asks."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return special + [str(number) for number in range(max(1, vocab_size - len(special)))]


def masking_ids(vocab_size: int) -> tuple[Tensor, Tensor, int]:
    """(B, S) ids with [CLS], [SEP] and padding, which of them are special, and the id of [MASK]."""
    words = masking_words(vocab_size)
    ids = torch.randint(5, len(words), (8, 64), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = words.index("[CLS]"), words.index("[SEP]")
    ids[2, 40:] = words.index("[PAD]")
    return ids, ids < 5, words.index("[MASK]")


def collator_masks(vocab_size: int) -> tuple[Tensor, Tensor]:
    """What transformers' DataCollatorForLanguageModeling makes of `masking_ids`: (input_ids, labels)."""
    import transformers

    words = masking_words(vocab_size)
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    collator = transformers.DataCollatorForLanguageModeling(tokenizer)
    collator.generator = torch.Generator().manual_seed(MASKING_SEED)  # transformers 5.17 takes seed=0 for no seed
    ids, special, _ = masking_ids(vocab_size)
    rows = zip(ids.tolist(), special.long().tolist(), strict=True)
    masked = collator([{"input_ids": row, "special_tokens_mask": where} for row, where in rows])
    return masked["input_ids"], masked["labels"]


# ---------------------------------------------------------------------------------------------- a tokenizer beside ours

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
TOKENIZER_STEPS = ("normalizer", "pre-tokenizer", "model", "post-processor")


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
        pairs = zip(TOKENIZER_STEPS, _tokenized(ours, text), _tokenized(theirs, text), strict=True)
        step, mine, other = next((each for each in pairs if each[1] != each[2]), ("ids", _ids(one), _ids(two)))
        lines = [f"  step    {step}", f"  ours    {shown(mine)}", f"  theirs  {shown(other)}"]
        more = {"texts": len(texts), "text": text, "step": step, "ours": mine, "theirs": other}
        return Report((f"the tokenizers differ first on {shown(text)!r}",), summary=lines, ok=False, more=more)
    more = {"texts": len(texts), **dict.fromkeys(("text", "step", "ours", "theirs"))}
    return Report((f"the tokenizers agree on all of {len(texts)} texts",), more=more)


def _tokenized(tokenizer: Tokenizer, text: str) -> list[str]:
    """What each of TOKENIZER_STEPS makes of a text."""
    normalised = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    split = tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in split.pre_tokenize_str(normalised)] if split else []
    alone, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    return [normalised, " | ".join(pieces), _ids(alone), f"{_ids(whole)}, types {whole.type_ids}"]


def _ids(encoding: Encoding) -> str:
    return " ".join(f"{token}:{number}" for token, number in zip(encoding.tokens, encoding.ids, strict=True))
