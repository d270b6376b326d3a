"""`minibert train`."""

import argparse
import sys
from typing import TYPE_CHECKING

from minibert.commands.options import add_device, add_revision

if TYPE_CHECKING:
    from minibert.training.evaluation import Figures
    from minibert.training.settings import Settings

HELP = "Train a masked language model on text files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_what_is_learnt(parser)
    _add_how_it_is_computed(parser)


def _add_what_is_learnt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is learnt (a run that goes on must keep these)")
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
    group.add_argument("--steps", type=int, required=True, metavar="N", help="how many steps the optimizer takes")
    group.add_argument(
        "--tokens-per-step",
        type=int,
        default=8192,
        metavar="N",
        help="tokens in a step, about, over all passes and processes (default: %(default)s)",
    )
    group.add_argument(
        "--max-length", type=int, default=128, metavar="TOKENS", help="tokens in a row, at most (default: %(default)s)"
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=3e-4,
        metavar="LR",
        help="the highest one, after the warm-up (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=("linear", "cosine"),
        default="linear",
        help="how the learning rate falls to 0 (default: %(default)s)",
    )
    group.add_argument(
        "--warmup",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the steps in which the learning rate rises (default: %(default)s)",
    )
    group.add_argument("--no-dropout", action="store_true", help="train without dropout")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all random draws (default: %(default)s)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="in which matrices are multiplied (default: %(default)s)",
    )


def _add_how_it_is_computed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is computed (these may change)")
    group.add_argument(
        "--micro-tokens", type=int, metavar="N", help="tokens in one pass, at most (default: the whole step)"
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="save a checkpoint every so many steps (default: %(default)s)",
    )
    group.add_argument(
        "--evaluate-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="look at the held-out lines every so many steps (default: %(default)s)",
    )
    add_device(group)
    group.add_argument("--compile", action="store_true", help="compile the layers with torch.compile")
    group.add_argument(
        "--checkpoint-activations", action="store_true", help="compute each layer twice, and keep less in memory"
    )
    group.add_argument("--tokens", metavar="FOLDER", help="the folder for token files (default: OUT/tokens)")
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes that tokenize, and that make batches (default: by need)"
    )


def run(options: argparse.Namespace) -> int:
    from minibert.memory import keep_freed_memory
    from minibert.training import train

    keep_freed_memory()
    result = train(
        options.texts,
        init=options.init,
        out=options.out,
        settings=read_settings(options),
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


def read_settings(options: argparse.Namespace) -> "Settings":
    from minibert.training import Settings

    if options.workers is not None and options.workers < 1:
        raise ValueError(f"workers must be at least 1, not {options.workers}")
    return Settings(
        steps=options.steps,
        tokens_per_step=options.tokens_per_step,
        micro_tokens=options.micro_tokens,
        max_length=options.max_length,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup=options.warmup,
        dropout=not options.no_dropout,
        seed=options.seed,
        dtype=options.dtype,
        save_every=options.save_every,
        evaluate_every=options.evaluate_every,
        compile=options.compile,
        checkpoint_activations=options.checkpoint_activations,
        workers=options.workers or 0,
    )


def print_figures(figures: "Figures") -> None:
    """A line for each text; a dash where no token was masked."""
    print(f"{'held out':<20} {'masked tokens':>13} {'loss':>7} {'top-1':>7}")
    for name, of_text in figures.items():
        loss = "–" if of_text["loss"] is None else f"{of_text['loss']:.3f}"
        top1 = "–" if of_text["top1"] is None else f"{of_text['top1']:.1%}"
        print(f"{name:<20} {of_text['masked_tokens']:>13.0f} {loss:>7} {top1:>7}")
