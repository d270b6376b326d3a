"""The commands of `minibert`, one file each: its arguments, one call, its printing.

A command's file has three things: HELP, one line; `add_arguments(parser)`; and `run(options)`, which returns the exit
status, or None for 0. It imports torch, and what needs torch, only inside `run`, so that `minibert --help` is quick.

To add a command, write its file and name it here.
"""

COMMANDS = (
    *("fill-mask", "study", "mlm", "score", "info", "train", "parity", "trace", "diff", "diagnose", "export", "bench"),
)
