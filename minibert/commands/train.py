"""`minibert train`."""

import argparse
import sys
from typing import TYPE_CHECKING

from minibert.commands.options import add_device, add_revision, add_settings, read_settings

if TYPE_CHECKING:
    from minibert.training.step import Figures

HELP = "Train a masked language model on text files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from minibert.training.settings import FREE, Settings

    parser.add_argument(
        "texts",
        nargs="+",
        metavar="PATH[:WEIGHT]",
        help="a text file, a .gz of one, a folder or a glob; one paragraph a line",
    )
    parser.add_argument(
        "--init",
        required=True,
        metavar="MODEL",
        help="the model to start from; or a config.json, to start from random weights",
    )
    add_revision(parser, "--init")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the model whose tokenizer is used (default: --init)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the run is saved")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    learnt = parser.add_argument_group("what is learnt (a run that goes on must keep these)")
    add_settings(learnt, Settings, only=set(Settings.__dataclass_fields__) - set(FREE))
    computed = parser.add_argument_group("how it is computed (these may change)")
    add_settings(computed, Settings, only=FREE)
    add_device(computed)
    computed.add_argument("--tokens", metavar="FOLDER", help="the folder for token files (default: OUT/tokens)")


def run(options: argparse.Namespace) -> int:
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
        print(
            f"{options.out}: this run is finished; to train its model further: --init {options.out} and another --out"
        )
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
