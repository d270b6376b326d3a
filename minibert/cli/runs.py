"""`minibert train` and `minibert bench`, whose options are the fields of their Settings."""

import argparse
import sys
from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_args

from minibert.cli.options import A_MODEL, add, names, require_model_of_revision

if TYPE_CHECKING:
    from minibert.training.step import Figures


def train_arguments(parser: argparse.ArgumentParser) -> None:
    from minibert.training.settings import FREE, Settings

    parser.add_argument("texts", nargs="+", metavar="PATH[:WEIGHT]", help="text files, folders or globs, also .gz")
    parser.add_argument(
        "--init", required=True, metavar="MODEL", help="where to start; from a config.json: random weights"
    )
    add(parser, "--revision", help="a branch, tag or commit of --init, if that is a hub id")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the model whose tokenizer is used (default: --init)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the run is saved")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    learnt = parser.add_argument_group("what is learnt (a run that goes on must keep these)")
    add_settings(learnt, Settings, only=set(Settings.__dataclass_fields__) - set(FREE))
    computed = parser.add_argument_group("how it is computed (these may change)")
    add_settings(computed, Settings, only=FREE)
    add(computed, "--device")
    computed.add_argument("--tokens", metavar="FOLDER", help="the folder for token files (default: OUT/tokens)")


def run_train(options: argparse.Namespace) -> int:
    from minibert.training import Settings, train
    from minibert.training.processes import keep_freed_memory

    keep_freed_memory()
    result = train(
        options.texts,
        init=options.init,
        out=options.out,
        settings=read_settings(options, Settings),
        tokenizer=options.tokenizer,
        tokens=options.tokens,
        resume=options.resume,
        device=options.device,
        revision=options.revision,
    )
    if result.first and result.ended == "was finished":
        print(f"{options.out}: this run is finished; --init {options.out} and another --out train its model further")
    if result.first and result.ended == "stopped":
        print(f"minibert train: stopped, and saved in {options.out}: --resume goes on", file=sys.stderr)
    if result.first and result.figures is not None:
        print_figures(result.figures)
    return 130 if result.ended == "stopped" else 0


def print_figures(figures: "Figures") -> None:
    """A line for each text; a dash where no token was masked."""
    print(f"{'held out':<20} {'masked tokens':>13} {'loss':>7} {'top-1':>7}")
    for name, of_text in figures.items():
        loss = "–" if of_text["loss"] is None else f"{of_text['loss']:.3f}"
        top1 = "–" if of_text["top1"] is None else f"{of_text['top1']:.1%}"
        print(f"{name:<20} {of_text['masked_tokens']:>13.0f} {loss:>7} {top1:>7}")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    from minibert.bench.settings import BenchSettings

    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help=A_MODEL)
    which.add_argument("--random", action="store_true", help="BERT-base's sizes with random weights (the default)")
    add(parser, "--revision", "--device", "--json")
    add_settings(parser, BenchSettings)


def run_bench(options: argparse.Namespace) -> None:
    from minibert.bench.report import table
    from minibert.bench.run import run
    from minibert.bench.settings import BenchSettings
    from minibert.training.processes import keep_freed_memory

    keep_freed_memory()
    require_model_of_revision(options)
    settings = read_settings(options, BenchSettings)
    if settings.model is not None and settings.layers != BenchSettings.layers:
        raise ValueError(f"--layers {settings.layers} is for the random model: give that, or --model")
    report = run(settings)
    print(report.to_json() if options.json else table(report))


# ------------------------------------------------------------------------------------------- fields that become options


def add_settings(group: argparse._ActionsContainer, settings: type, only: Collection[str] | None = None) -> None:
    """An option for each field of a dataclass that has a help text beside it, or for those of `only`. A field that is
    true unless something else is said becomes --no-….
    """
    for one in fields(settings):
        if "help" not in one.metadata or (only is not None and one.name not in only):
            continue
        name, about = f"--{one.name.replace('_', '-')}", {"dest": one.name, **one.metadata}
        if one.type is bool:
            name = name.replace("--", "--no-", 1) if one.default else name
            about |= {"action": "store_const", "const": not one.default}
        elif one.type == bool | None:
            about["action"] = argparse.BooleanOptionalAction
        else:
            about["type"] = _reader(one.type)
        about |= {"required": True} if one.default is MISSING else {"default": one.default}
        if isinstance(one.default, int | float | str) and one.type is not bool:
            about["help"] += " (default: %(default)s)"
        group.add_argument(name, **about)


def _reader(annotation: Any) -> Any:
    """What makes a value of this type from the text on the command line."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in (int, float) if kind in kinds), names if "tuple" in str(annotation) else str)


def read_settings(options: argparse.Namespace, settings: type) -> Any:
    """The dataclass, with what was given on the command line."""
    return settings(**{one.name: getattr(options, one.name) for one in fields(settings) if hasattr(options, one.name)})
