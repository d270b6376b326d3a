"""`minibert bench`."""

import argparse

from minibert.commands.options import add_device, add_json, add_revision, add_settings, read_settings

HELP = "Time minibert beside the peers that are installed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from minibert.bench.settings import Settings

    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a folder, a bundled name, bert-base-uncased, or a hub id")
    which.add_argument("--random", action="store_true", help="BERT-base's sizes with random weights (the default)")
    add_revision(parser, "--model")
    add_device(parser)
    add_settings(parser, Settings)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from minibert.bench.report import table
    from minibert.bench.run import run as run_bench
    from minibert.bench.settings import Settings
    from minibert.training.processes import keep_freed_memory

    keep_freed_memory()
    settings = read_settings(options, Settings)
    if settings.model is not None and settings.layers != Settings.layers:
        raise ValueError(
            f"--layers {settings.layers} is for the random model, and --model names one: give one of the two"
        )
    if settings.revision is not None and settings.model is None:
        raise ValueError(f"--revision {settings.revision} is of a hub model, and no --model was given")
    report = run_bench(settings)
    print(report.to_json() if options.json else table(report))
