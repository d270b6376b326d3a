"""The `minibert` command. Each subcommand imports what it needs, so that `minibert --help` is quick."""

import argparse
import io
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from minibert import __version__
from minibert.commands import score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from minibert.checkpoint import LoadReport

DEFAULT_MODEL = "minibert-uncased"
WORTH_PREPARING = 64  # texts: with fewer, putting the weights in order takes longer than it saves
WORTH_WATCHING = 16  # texts: with more, there is a progress bar
USER_ERRORS = (ValueError, OSError, FloatingPointError)  # OSError: no such file, no connection, disk full


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command; returns the exit status. A user's mistake is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that is not UTF-8
    options = build_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            # torch says so when it is imported where there is no NumPy. Nothing here needs it.
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
            status = options.run(options) or 0  # None, or the exit status of a command that judges
        sys.stdout.flush()
    except BrokenPipeError:  # `minibert … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"minibert {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return int(status)


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"minibert: warning: {message}", file=sys.stderr)


def build_parser() -> Parser:
    parser = Parser(prog="minibert", description="BERT's masked language model: ask it, look into it, train it.")
    parser.add_argument("--version", action="version", version=f"minibert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, help: str, *, json_output: bool = True, model: str | None = DEFAULT_MODEL
    ) -> Parser:
        sub: Parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--traceback", action="store_true", help="on an error, show where it happened")
        if json_output:
            sub.add_argument("--json", action="store_true", help="print JSON")
            sub.add_argument(
                "--model",
                default=model,
                help="a folder, a bundled name, bert-base-uncased, or a hub id (default: %(default)s)",
            )
        return sub

    sub = command("fill-mask", fill_mask, "The likeliest words for each [MASK].")
    sub.add_argument(
        "texts", nargs="+", metavar="TEXT", help='such as "The capital of France is [MASK]."; - reads lines'
    )
    sub.add_argument("--top-k", type=int, default=5, metavar="K", help="answers for each [MASK] (default: %(default)s)")
    sub.add_argument("--targets", metavar="W,W", help="only these words compete")
    sub.add_argument("--truncate", action="store_true", help="cut a text that is too long for the model")

    sub = command("mlm", mlm, "Mask a text, let the model guess, and give its loss.")
    sub.add_argument("text", metavar="TEXT")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--seed", type=int, metavar="N", help="draw the masked tokens with this seed (default: 0)")
    where.add_argument("--positions", metavar="9,18,…", help="mask these tokens, counted from [CLS] = 0")
    sub.add_argument("--probability", type=float, metavar="P", help="of choosing a token (default: 0.15)")
    sub.add_argument(
        "--recipe",
        choices=("bert", "plain", "whole-word"),
        help="bert (default): 80 %% [MASK], 10 %% random, 10 %% kept, no special tokens; plain: all [MASK], "
        "[CLS] and [SEP] too; whole-word: as bert, whole words",
    )
    sub.add_argument(
        "--score",
        choices=("masked", "all"),
        default="masked",
        help="what the loss is over: the chosen tokens, as in BERT, or all of them (default: %(default)s)",
    )
    sub.add_argument("--truncate", action="store_true", help="cut a text that is too long for the model")

    score.add_arguments(command("score", score.run, score.HELP))

    command("info", info, "A model's configuration, its parameters, and how its file was read.")

    _add_train(command)
    _add_parity_commands(command)

    sub = command("bench", bench, "Time minibert beside the peers that are installed.", json_output=False)
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--model", help="a folder, a bundled name, bert-base-uncased, or a hub id")
    which.add_argument("--random", action="store_true", help="BERT-base's sizes with random weights (the default)")
    sub.add_argument("--layers", type=int, metavar="N", help="of the random model, for a quick look (default: 12)")
    sub.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    sub.add_argument("--dtype", default="float32,bfloat16", metavar="D,D", help="one or both of (default: %(default)s)")
    sub.add_argument("--task", choices=("inference", "training", "both"), default="both", help="(default: %(default)s)")
    sub.add_argument(
        "--shapes",
        metavar="S,S",
        help="rows x tokens, as in 8x128, or mixed, normal, lognormal (default: all; in training 8x128 and mixed)",
    )
    sub.add_argument("--rounds", type=int, default=9, metavar="N", help="timings of each (default: %(default)s)")
    sub.add_argument(
        "--peers",
        default="all",
        metavar="P,P",
        help="eager, sdpa, compiled, packed (transformers), onnxruntime, onnxruntime-int8, openvino; all, or none",
    )
    sub.add_argument("--memory", action="store_true", help="peak memory too, each contender in a process of its own")
    sub.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def _add_parity_commands(command: "Callable[..., Parser]") -> None:
    sub = command("parity", parity, "This model against transformers, on this machine. Exit status 1 if they differ.")
    _where_to_run(sub)

    sub = command("trace", trace, "Write every intermediate tensor of a model, for `diff` and `diagnose`.")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--text", action="append", metavar="TEXT", help="may be given several times: rows of one batch")
    what.add_argument("--ids", metavar="FILE", help="JSON: input_ids, and attention_mask, token_type_ids, labels")
    sub.add_argument("--out", required=True, metavar="FILE", help="the safetensors file to write")
    sub.add_argument("--backend", choices=("minibert", "transformers"), default="minibert")
    sub.add_argument("--grad", action="store_true", help="also the gradient of every parameter")
    _where_to_run(sub)

    sub = command(
        "diff", diff, "The first tensor in which two traces differ. Exit status 1 if there is one.", model=None
    )
    sub.add_argument("a", metavar="A", help="a trace")
    sub.add_argument("b", metavar="B", help="another")
    sub.add_argument("--all", action="store_true", help="do not stop at the first tensor that differs")

    sub = command(
        "diagnose", diagnose, "Which known porting fault computes what is in a trace. Exit status 1 if wrong."
    )
    sub.add_argument("trace", metavar="TRACE")


def _add_train(command: "Callable[..., Parser]") -> None:
    sub = command("train", train, "Train a masked language model on text files.", json_output=False)
    sub.add_argument(
        "texts",
        nargs="+",
        metavar="PATH[:WEIGHT]",
        help="a text file, a .gz of one, a folder or a glob; one paragraph a line",
    )
    sub.add_argument(
        "--init", required=True, metavar="MODEL", help="start from this model, or from scratch with this config.json"
    )
    sub.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer to use (default: that of --init)")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where everything is saved")
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    sub.add_argument("--steps", type=int, required=True, help="of the optimizer")
    sub.add_argument(
        "--tokens-per-step",
        type=int,
        default=8192,
        metavar="N",
        help="over all passes and processes (default: %(default)s)",
    )
    sub.add_argument("--micro-tokens", type=int, metavar="N", help="tokens in one pass, at most (default: all)")
    sub.add_argument("--max-length", type=int, default=128, metavar="TOKENS", help="of a row (default: %(default)s)")
    sub.add_argument("--learning-rate", type=float, default=3e-4, metavar="LR", help="its peak (default: %(default)s)")
    sub.add_argument("--schedule", choices=("linear", "cosine"), default="linear", help="(default: %(default)s)")
    sub.add_argument(
        "--warmup", type=float, default=0.05, metavar="SHARE", help="of the steps, until that peak (default: 0.05)"
    )
    sub.add_argument("--no-dropout", action="store_true", help="train without dropout")
    sub.add_argument("--seed", type=int, default=0, metavar="N")
    sub.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="(default: %(default)s)")
    sub.add_argument(
        "--evaluate-every", type=int, default=500, metavar="STEPS", help="on held-out lines (default: %(default)s)"
    )
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of matrix products (default: %(default)s)"
    )
    sub.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one, else cpu)")
    sub.add_argument("--compile", action="store_true", help="the layers, with torch.compile")
    sub.add_argument(
        "--checkpoint-activations", action="store_true", help="compute each layer twice, and keep less in memory"
    )
    sub.add_argument("--tokens", metavar="FOLDER", help="where token files are, or are made (default: OUT/tokens)")
    sub.add_argument(
        "--workers", type=int, metavar="N", help="processes that tokenize, and that make batches (default: by need)"
    )


def _where_to_run(sub: Parser) -> None:
    sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")


# ------------------------------------------------------------------------------------------------------------ fill-mask


def fill_mask(options: argparse.Namespace) -> None:
    from minibert import BertForMaskedLM, FillMask, load_tokenizer
    from minibert.inference import prepare_for_inference

    texts = []
    for text in options.texts:
        texts += [line.rstrip("\n") for line in sys.stdin if line.strip()] if text == "-" else [text]
    if not texts:
        raise ValueError("there was no line on standard input")
    model = BertForMaskedLM.from_pretrained(options.model)
    if len(texts) >= WORTH_PREPARING:
        model = prepare_for_inference(model)
    fill = FillMask(model, load_tokenizer(options.model))
    targets = None if options.targets is None else [word.strip() for word in options.targets.split(",")]
    answers = fill.stream(texts, top_k=options.top_k, targets=targets, truncate=options.truncate)
    if len(texts) > WORTH_WATCHING and sys.stderr.isatty():
        from tqdm import tqdm

        answers = iter(tqdm(answers, total=len(texts), unit=" texts"))
    if options.json:
        results = [{"text": text, "answers": answer} for text, answer in zip(texts, answers, strict=True)]
        print(json.dumps(results, ensure_ascii=False, allow_nan=False, indent=2))
        return
    for text, answer in zip(texts, answers, strict=True):
        print(text)
        several = isinstance(answer[0], list)
        for number, one in enumerate(answer if several else [answer], start=1):
            if several:
                print(f"  [MASK] number {number}")
            for row in one:
                score = f"{row['score']:.2%}" if row["score"] >= 5e-5 else f"{100 * row['score']:.0e}%"
                print(f"  {score:>7}  {row['token_str']}")


# ------------------------------------------------------------------------------------------------------------------ mlm


def mlm(options: argparse.Namespace) -> None:
    import torch

    from minibert import BertForMaskedLM, PackedBatch, load_tokenizer, mask_tokens, masked_lm_loss
    from minibert.masking import Outcome
    from minibert.tokenizer import encode, require_id, special_ids

    positions = None if options.positions is None else _whole_numbers("--positions", options.positions)
    if positions is not None:
        for name, value in (("--probability", options.probability), ("--recipe", options.recipe)):
            if value is not None:
                raise ValueError(
                    f"{name} says how to draw the masked tokens, and --positions names them: give one of the two"
                )
    model, tokenizer = BertForMaskedLM.from_pretrained(options.model), load_tokenizer(options.model)
    encoding = encode(tokenizer, options.text, model.config.max_position_embeddings, truncate=options.truncate)
    ids = torch.tensor([encoding.ids])  # (1, S)
    mask_id = require_id(tokenizer, "[MASK]")
    recipe = options.recipe or "bert"
    special = torch.isin(ids, torch.tensor(special_ids(tokenizer)))
    if positions is not None:
        if outside := [place for place in positions if place >= ids.shape[1]]:
            raise ValueError(
                f"position {outside[0]} is not in the text, which is {ids.shape[1]} tokens, counted from 0"
            )
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        chosen[0, positions] = True
        special, probability = ~chosen, 1.0  # the named ones, and no other
    else:
        probability = 0.15 if options.probability is None else options.probability
        if recipe == "plain":
            special = torch.zeros_like(special)
    plain = recipe == "plain" or positions is not None
    words = torch.tensor([[-1 if word is None else word for word in encoding.word_ids]])
    masked = mask_tokens(
        ids,
        special,
        vocab_size=model.config.vocab_size,
        mask_token_id=mask_id,
        probability=probability,
        mask_fraction=1.0 if plain else 0.8,
        random_fraction=0.0 if plain else 0.1,
        word_ids=words if recipe == "whole-word" else None,
        generator=_generator(options.seed or 0),
    )
    outcome = [Outcome(code).name.lower().replace("_", " ") for code in masked.outcome[0].tolist()]
    asked = torch.ones_like(ids, dtype=torch.bool) if options.score == "all" else masked.labels != -100
    places = asked[0].nonzero().flatten()  # (M,)
    with torch.inference_mode():
        logits = model.predict(PackedBatch.from_lists(masked.input_ids.tolist()), places)  # (M, V)
    loss = masked_lm_loss(logits, ids[0, places])
    probabilities = logits.float().softmax(-1)
    rows: list[dict[str, Any]] = []
    for row, place in enumerate(places.tolist()):
        scores, tokens = probabilities[row].topk(5)
        truth = probabilities[row, encoding.ids[place]].item()
        rows.append(
            {
                "position": place,
                "token": encoding.tokens[place],
                "outcome": outcome[place],
                "seen": tokenizer.id_to_token(int(masked.input_ids[0, place])),
                "predictions": [
                    {"token_str": tokenizer.id_to_token(token), "score": score}
                    for token, score in zip(tokens.tolist(), scores.tolist(), strict=True)
                ],
                "probability_of_token": truth,
                "loss": masked_lm_loss(logits[row : row + 1], ids[0, places[row : row + 1]]).sum.item(),
            }
        )
    result: dict[str, Any] = {
        "tokens": encoding.tokens,
        "ids": encoding.ids,
        "input_ids": masked.input_ids[0].tolist(),
        "score": options.score,
        "scored": rows,
        "loss": loss.mean.item(),
        "count": int(loss.count),
    }
    if options.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2))
        return
    print(f"{len(encoding.ids)} tokens; what the model saw:")
    print(" ".join(str(tokenizer.id_to_token(token)) for token in result["input_ids"]))
    print()
    print(
        f"{'position':>8}  {'token':<15} {'outcome':<12} {'its guess':<15} {'certain':>8} {'the token':>10} {'loss':>7}"
    )
    for scored in rows:
        best = scored["predictions"][0]
        print(
            f"{scored['position']:>8}  {scored['token']:<15} {scored['outcome']:<12} {best['token_str']:<15} "
            f"{best['score']:>8.1%} {scored['probability_of_token']:>10.1%} {scored['loss']:>7.3f}"
        )
    print()
    if rows:
        right = sum(scored["predictions"][0]["token_str"] == scored["token"] for scored in rows)
        print(f"loss {result['loss']:.4f} over {result['count']} tokens ({options.score}), {right} guessed right")
    elif len(encoding.ids) == 2:
        print("the text has no word to mask")
    else:
        print("no token was chosen: try another --seed, or a higher --probability")


def _generator(seed: int) -> "torch.Generator":
    import torch

    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must fit in 64 bits, and {seed} does not")
    return torch.Generator().manual_seed(seed)


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ValueError(f"{name} takes whole numbers from 0, with commas between, not {text!r}")
    return numbers


# ----------------------------------------------------------------------------------------------------------------- info


def info(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from minibert import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(options.model)
    report = model.load_report
    assert report is not None
    parts = {"embeddings": model.embeddings, "encoder layers": model.layers, "masked-language-model head": model.head}
    budget = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    budget["total"] = sum(p.numel() for p in model.parameters())
    if options.json:
        print(
            json.dumps({"config": asdict(model.config), "parameters": budget, "load_report": _report(report)}, indent=2)
        )
        return
    print("configuration")
    for key, value in asdict(model.config).items():
        print(f"  {key:<30} {value}")
    print("parameters (the decoder is the word embedding matrix, and is counted once)")
    for name, number in budget.items():
        print(f"  {name:<30} {number:>12,}")
    print("load report")
    for line in _report_lines(report):
        print(f"  {line}")


def _report(report: "LoadReport") -> dict[str, Any]:
    return {
        "name": report.name,
        "files": [str(path) for path in report.files],
        "sha256": report.sha256,
        "file_dtypes": report.file_dtypes,
        "dtype": report.dtype,
        "loaded": list(report.loaded),
        "renamed": report.renamed,
        "tied": report.tied,
        "ignored": report.ignored,
        "initialised": list(report.initialised),
        "non_finite": list(report.non_finite),
        "ignored_config_keys": list(report.ignored_config_keys),
        "defaulted_config_keys": list(report.defaulted_config_keys),
    }


def _report_lines(report: "LoadReport") -> "Iterator[str]":
    for path in report.files:
        yield f"{path}"
        yield f"SHA-256 {report.sha256[path.name]}"
    stored = ", ".join(f"{count} × {name}" for name, count in report.file_dtypes.items())
    yield f"{len(report.loaded)} tensors loaded (in the file: {stored}), held as {report.dtype}"
    for title, names in (("renamed", report.renamed), ("tied copy", report.tied), ("ignored", report.ignored)):
        for name, what in names.items():
            yield f"{title}: {name} ({what})"
    for title, listed in (
        ("initialised, not loaded", report.initialised),
        ("NaN or infinite values in", report.non_finite),
        ("config keys that change nothing", report.ignored_config_keys),
        ("config keys left to their default", report.defaulted_config_keys),
    ):
        if listed:
            yield f"{title}: {', '.join(listed)}"


# ---------------------------------------------------------------------------------------------------------------- train


def train(options: argparse.Namespace) -> int:
    import signal
    from contextlib import ExitStack
    from pathlib import Path
    from threading import Event

    from minibert import BertForMaskedLM
    from minibert.memory import keep_freed_memory
    from minibert.training import saving
    from minibert.training.loop import Settings, describe, require_fit
    from minibert.training.loop import train as run
    from minibert.training.ranks import join
    from minibert.training.start import start_config, start_model, start_tokenizer
    from minibert.training.tokens import token_files

    keep_freed_memory()
    if not options.out.strip():
        raise ValueError("--out needs the name of a folder")
    settings = Settings(
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
    out = Path(options.out)
    stop = Event()

    def ask_to_stop(number: int, _: Any) -> None:  # the run saves and ends after this step; a second signal ends it now
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    with join(options.device) as ranks, ExitStack() as around:
        if ranks.first:
            if options.resume and not saving.is_begun(out):
                print(f"minibert train: there is no run in {out} to go on with: one begins", file=sys.stderr)
            around.enter_context(saving.folder_of_run(out, resume=options.resume))
        ranks.wait()
        tokenizer = start_tokenizer(options.init, options.tokenizer)
        finished = saving.is_finished(out)
        checkpoint = out if finished else next(reversed(saving.checkpoints(out)), None)
        if checkpoint is None:
            model = start_model(options.init, seed=options.seed, device=ranks.device)
        else:
            model = BertForMaskedLM.from_pretrained(checkpoint, device=ranks.device)
        require_fit(model, tokenizer, settings)
        config = start_config(options.init, model)
        if finished:
            saving.require_same(out, describe(options.init, config, tokenizer, [], settings))
            if ranks.first:
                print(f"{out}: this run is finished; to train its model further: --init {out} and another --out")
            return 0
        tokens = Path(options.tokens) if options.tokens else out / "tokens"
        files = token_files(options.texts, tokenizer, tokens, workers=options.workers)
        if ranks.first:
            saving.open_run(out, describe(options.init, config, tokenizer, files, settings))
            if not any(len(file.held_out) for file in files):
                lost = f"there will be no figures and no {out / 'best'}"
                print(f"minibert train: the texts are so short that no line is held out: {lost}", file=sys.stderr)
        ranks.wait()
        before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            figures = run(model, tokenizer, files, out, settings, ranks=ranks, checkpoint=checkpoint, stop=stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if figures is None:
        if ranks.first:
            print(f"minibert train: stopped, and saved in {out}: --resume goes on", file=sys.stderr)
        return 130
    if ranks.first:
        print(f"{'held out':<20} {'masked tokens':>13} {'loss':>7} {'top-1':>7}")
        for name, of_text in figures.items():
            print(f"{name:<20} {of_text['masked_tokens']:>13.0f} {of_text['loss']:>7.3f} {of_text['top1']:>7.1%}")
    return 0


# --------------------------------------------------------------------------------------------------------------- parity


def parity(options: argparse.Namespace) -> int:
    from minibert.parity import commands

    return commands.parity(options)


def trace(options: argparse.Namespace) -> int:
    from minibert.parity import commands

    return commands.write_trace(options)


def diff(options: argparse.Namespace) -> int:
    from minibert.parity import commands

    return commands.compare(options)


def diagnose(options: argparse.Namespace) -> int:
    from minibert.parity import commands

    return commands.name_fault(options)


# ---------------------------------------------------------------------------------------------------------------- bench


def bench(options: argparse.Namespace) -> None:
    from minibert.bench import run as bench_run
    from minibert.bench.contenders import PEERS
    from minibert.memory import keep_freed_memory

    keep_freed_memory()
    if options.layers is not None and options.model is not None:
        raise ValueError(
            f"--layers {options.layers} is for the random model, and --model names one: give one of the two"
        )
    peers = PEERS if options.peers == "all" else () if options.peers == "none" else _names(options.peers)
    report = bench_run.run(
        bench_run.Settings(
            model=options.model,
            layers=12 if options.layers is None else options.layers,
            device=options.device,
            precisions=_names(options.dtype),
            tasks=bench_run.TASKS if options.task == "both" else (options.task,),
            shapes=None if options.shapes is None else _names(options.shapes),
            rounds=options.rounds,
            peers=peers,
            memory=options.memory,
        )
    )
    print(report.to_json() if options.json else bench_run.table(report))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
