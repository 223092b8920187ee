"""The command `hybridrl`.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 stopped by the user. torch and other large
packages are imported inside the commands that need them; the others start at once.
"""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .experiments import commands
from .system.errors import UsageError, UserError, out_of_memory, printable, unknown
from .system.processes import may_complain

INTERRUPTED = 130
EPILOG = "HYBRIDRL_DEBUG=1 shows the full traceback of an error."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        parser = make_parser(next((word for word in given if not word.startswith("-")), None))
        arguments, left_over = parser.parse_known_args(given)
        if left_over:
            raise not_understood(left_over[0], arguments.command)
        if arguments.command is None:
            parser.print_help()
            return UsageError.exit_code
        return arguments.run(arguments) or 0
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    except BrokenPipeError:  # as in `hybridrl list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("HYBRIDRL_DEBUG", "") not in ("", "0"):
            raise
        code, sentence = explain(error)
        if may_complain():
            print(f"hybridrl: {printable(sentence)}", file=sys.stderr, flush=True)
        return code


def not_understood(word: str, command: str | None) -> UsageError:
    """The error for a word on the command line that no command or option accepts."""
    if not word.startswith("-"):
        return UsageError(f"unexpected argument {word!r}; see 'hybridrl {command} --help'.")
    parser = Parser() if command else make_parser()
    if command:
        add_options(parser, command)
    return unknown("option", word.partition("=")[0],
                   [name for action in parser._actions for name in action.option_strings])


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one sentence) for what a command raised."""
    if isinstance(error, UserError):
        return error.exit_code, " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ("Stopped; the same command resumes from the last checkpoint, if one "
                             "was written.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 1, (f"The disk is full ({error.strerror}); free some space or set "
                   "HYBRIDRL_RESULTS_DIR to another folder, then rerun the command.")
    if isinstance(error, OSError) and error.filename is not None:
        return 1, (f"Could not access {error.filename} ({error.strerror}); check that it exists "
                   "and can be read and written.")
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if memory := out_of_memory(error):
        return 1, str(memory)
    return 1, (f"Unexpected error, {type(error).__name__}: {first.rstrip('.')}; "
               "rerun it with HYBRIDRL_DEBUG=1 to see the traceback.")


# The parser -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong and "COMMAND" in message:
            raise unknown("command", wrong[1], COMMANDS)
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; "
                         f"see '{self.prog} --help'.")


def make_parser(chosen: str | None = None) -> Parser:
    """The parser of all commands, with the options of the chosen one."""
    parser = Parser(prog="hybridrl", epilog=EPILOG, description=(
        "Train language models on math problems by SFT, RL, and combinations of both."))
    parser.add_argument("--version", action="version", version=f"hybridrl {__version__}")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (run, _, summary, example) in COMMANDS.items():
        one = parsers.add_parser(
            name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.",
            epilog=f"Example: {example}\n{EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            add_options(one, name)
        one.set_defaults(run=run)
    return parser


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds the options of a command. Values of `OPTIONS` may be functions, since some import
    what other commands do not need."""
    for key in COMMANDS[command][1].split():
        option = OPTIONS[key]
        parser.add_argument(key.partition("@")[0], **(option() if callable(option) else option))


# Types of values --------------------------------------------------------------------------------


def whole_number(text: str) -> int:
    """A non-negative integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a non-negative integer")
    return int(text)


def positive_number(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def seed_list(text: str) -> tuple[int, ...]:
    """`3` means the seeds 0, 1, and 2; `0,4,7` means those; `4,` means seed 4 only."""
    if "," not in text:
        return tuple(range(positive_number(text)))
    seeds = tuple(map(whole_number, words(text)))
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} contains no seed")
    return seeds


def factor_list(text: str) -> tuple[float, ...]:
    """`0.5,1,2` as numbers."""
    try:
        return tuple(map(float, words(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of factors such as "
                                         "0.5,1,2") from None


def words(text: str) -> tuple[str, ...]:
    """`a, b` as a and b."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


# Options and commands ---------------------------------------------------------------------------


def grid_option() -> dict[str, Any]:
    from .experiments.compare import GRID

    return {"type": factor_list, "default": GRID, "metavar": "FACTORS", "help": (
        "factors of the preset's learning rates that are tried on validation problems, for every "
        "arm; 1 tunes nothing; default: " + ",".join(f"{factor:g}" for factor in GRID))}


def transfer_option() -> dict[str, Any]:
    from .experiments.compare import TRANSFER

    return {"type": whole_number, "default": TRANSFER, "metavar": "N", "help": (
        "also train on each benchmark alone, with the first N seeds, and test on all; 0 for none; "
        f"default: {TRANSFER}")}


def parameter_option() -> dict[str, Any]:
    from .experiments.sweep import SWEEPS

    return {"required": True, "metavar": "NAME", "help": "one of " + ", ".join(SWEEPS)}


LIST = {"nargs": "+", "action": "extend", "default": []}
FOLDER = {"type": Path, "metavar": "FOLDER"}
OPTIONS: dict[str, dict[str, Any] | Callable[[], dict[str, Any]]] = {
    # Of several commands. What follows an @ names a variant.
    "setup": {"metavar": "SETUP", "help": "a name from 'hybridrl list'"},
    "experiment": {"metavar": "EXPERIMENT", "help": "a name under results/runs/"},
    "--preset": {"default": "tiny", "help": "tiny, smollm2, colab, paper, or auto; default: tiny"},
    "--seed": {"type": whole_number, "default": 0, "help": "of all random numbers; default: 0"},
    "--seeds": {"type": seed_list, "default": (0,), "metavar": "N", "help": (
        "number of seeds, starting at 0, or a list such as 0,3,5; default: 1")},
    "--jobs": {"type": positive_number, "metavar": "J", "help": (
        "runs at a time; default: one per GPU, else one per core")},
    "--executor": {"default": "local", "metavar": "WHERE", "help": (
        "local (default): processes on this machine; ray or ray:ADDRESS: the nodes of a Ray "
        "cluster, by default that in RAY_ADDRESS or this machine's")},
    "--experiment": {"metavar": "NAME", "help": (
        "folder of the records in results/runs/; default: the preset's name")},
    "--set": LIST | {"dest": "settings", "metavar": "KEY=VALUE", "help": (
        "change settings, such as rl.beta=0.04; can be repeated")},
    "--json": {"action": "store_true", "help": "JSON output"},
    # Of one command.
    "--setups": LIST | {"metavar": "SETUP", "help": (
        "only these; default: the base model and the paper's six setups")},
    "--methods": LIST | {"metavar": "NAME", "help": (
        "setups, or methods, each with its control; default: the paper's setups and all methods")},
    "--grid": grid_option,
    "--transfer": transfer_option,
    "--parameter": parameter_option,
    "--values": {"type": words, "default": (), "metavar": "LIST", "help": (
        "such as 0,0.02,0.1; default: the parameter's own list")},
    "--setup": {"metavar": "SETUP", "help": "such as sft_then_rl; default: the parameter's own"},
    "experiment@report": {"nargs": "?", "metavar": "EXPERIMENT", "help": (
        "a name under results/runs/ or results/published/, or a folder")},
    "--docs": {"action": "store_true", "help": (
        "instead, rewrite the tables of README.md and docs/ of this checkout from the published "
        "pages")},
    "--out@report": FOLDER | {"help": (
        "where to write; default: the experiment's folder, or results/runs/NAME for a published "
        "one given by name")},
    "manifest": {"type": Path, "metavar": "MANIFEST", "help": (
        "manifest.json or config.json of a run, or its folder")},
    "--experiment@rerun": {"metavar": "NAME", "help": (
        "where the second run goes; default: the first one's name with -rerun")},
    "run_folder": {"type": Path, "metavar": "RUN", "help": (
        "the folder of a finished run with model.adapter=lora, or of an adapter")},
    "out": {"type": Path, "metavar": "OUT", "help": "a new folder for the whole model"},
    "--to": FOLDER | {"help": (
        "default: results/published; the folder of the experiment's name there is created or "
        "replaced")},
    "--preset@doctor": {"help": "check only this one; exit code 1 if it does not fit"},
    "--out@pretrain": FOLDER | {"help": (
        "a new folder; default: the package's own, if it is missing")},
}
COMMANDS: dict[str, tuple[Callable, str, str, str]] = {  # function, options, summary, example
    "run": (commands.run_command, "setup --seed --preset --experiment --set",
            "train and evaluate one setup",
            "hybridrl run sft_then_rl --preset tiny --seed 1 --set rl.beta=0.04"),
    "reproduce": (commands.reproduce_command,
                  "--preset --seeds --jobs --executor --setups --experiment --set",
                  "run the notebooks of setups and seeds through papermill, then the report",
                  "hybridrl reproduce --preset tiny --seeds 3 --jobs 2"),
    "compare": (commands.compare_command, "--preset --seeds --methods --grid --transfer --jobs "
                "--executor --experiment --set",
                "tune, train, and test methods in the same way, and compare them with SFT -> RL",
                "hybridrl compare --preset tiny --seeds 3 --methods relift,combined"),
    "sweep": (commands.sweep_command, "--parameter --values --setup --preset --seeds --jobs "
              "--executor --experiment --set",
              "train one setup with several values of a setting",
              "hybridrl sweep --parameter beta --values 0,0.02,0.1 --seeds 3"),
    "report": (commands.report_command, "experiment@report --docs --out@report",
               "write Table 2 and the figures from records", "hybridrl report tiny"),
    "rerun": (commands.rerun_command, "manifest --experiment@rerun --set",
              "run a recorded run again and compare the answers",
              "hybridrl rerun results/runs/tiny/sft/seed-0"),
    "merge": (commands.merge_command, "run_folder out",
              "merge the adapter of a LoRA run into its base model",
              "hybridrl merge results/runs/lora/sft/seed-0 my-model"),
    "publish": (commands.publish_command, "experiment --to",
                "copy the records of an experiment to results/published, compressed",
                "hybridrl publish tiny --to results/published"),
    "list": (commands.list_command, "--json", "show setups, methods, and presets with their costs",
             "hybridrl list --json"),
    "doctor": (commands.doctor_command, "--preset@doctor --json",
               "show what this machine has and which presets fit",
               "hybridrl doctor --preset smollm2"),
    "pretrain-tiny": (commands.pretrain_command, "--out@pretrain --seed",
                      "train the tiny base model",
                      "hybridrl pretrain-tiny --out my-tiny --seed 0"),
}


if __name__ == "__main__":
    sys.exit(main())
