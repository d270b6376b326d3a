"""`minibert bench`."""

import argparse

from minibert.commands.options import add_device, add_json, add_revision, names

HELP = "Time minibert beside the peers that are installed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a folder, a bundled name, bert-base-uncased, or a hub id")
    which.add_argument("--random", action="store_true", help="BERT-base's sizes with random weights (the default)")
    add_revision(parser, "--model")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of the random model; fewer for a quick look (default: 12)"
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        metavar="D,D",
        help="one or several of float32, bfloat16, int8, which is for inference only (default: all that the task has)",
    )
    parser.add_argument(
        "--task", choices=("inference", "training", "both"), default="both", help="what to time (default: %(default)s)"
    )
    parser.add_argument(
        "--shapes",
        metavar="S,S",
        help="rows x tokens, as in 8x128, or mixed, normal, lognormal (default: all; in training 8x128 and mixed)",
    )
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="how often each is timed (default: %(default)s)"
    )
    parser.add_argument(
        "--peers",
        default="all",
        metavar="P,P",
        help="eager, sdpa, compiled, packed (transformers), onnxruntime, onnxruntime-int8, openvino, "
        "openvino-bfloat16, openvino-int8, ctranslate2, ctranslate2-int8; all, or none. Those from packed on have one "
        "precision each, whatever --dtype says",
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, each contender in a process of its own")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from minibert.bench.contenders import PEERS
    from minibert.bench.report import table
    from minibert.bench.run import run as run_bench
    from minibert.bench.settings import TASKS, Settings
    from minibert.memory import keep_freed_memory

    keep_freed_memory()
    if options.layers is not None and options.model is not None:
        raise ValueError(
            f"--layers {options.layers} is for the random model, and --model names one: give one of the two"
        )
    if options.revision is not None and options.model is None:
        raise ValueError(f"--revision {options.revision} is of a hub model, and no --model was given")
    peers = PEERS if options.peers == "all" else () if options.peers == "none" else names(options.peers)
    every = ("float32", "bfloat16") if options.task == "training" else ("float32", "bfloat16", "int8")
    precisions = every if options.dtype is None else names(options.dtype)
    report = run_bench(
        Settings(
            model=options.model,
            revision=options.revision,
            layers=12 if options.layers is None else options.layers,
            device=options.device,
            precisions=precisions,
            tasks=TASKS if options.task == "both" else (options.task,),
            shapes=None if options.shapes is None else names(options.shapes),
            rounds=options.rounds,
            peers=peers,
            memory=options.memory,
        )
    )
    print(report.to_json() if options.json else table(report))
