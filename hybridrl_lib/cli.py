"""The command `hybridrl`.

Exit codes: 0 it did what it says, 1 it could not, 2 it was called wrongly, 130 it was stopped.
torch and the like are imported inside the commands that need them; the others start at once.
"""

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .distributed import end, is_first, may_complain
from .errors import UsageError, UserError, out_of_memory, printable, unknown

INTERRUPTED = 130
EPILOG = "HYBRIDRL_DEBUG=1 shows the full traceback of an error."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        arguments, left_over = make_parser().parse_known_args(argv)
        if left_over:
            raise not_understood(left_over[0], arguments.command)
        if arguments.command is None:
            make_parser().print_help()
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
    """The error for a word on the command line that no command or option takes."""
    if not word.startswith("-"):
        return UsageError(f"{word!r} is one word too many; see 'hybridrl {command} --help'.")
    one = Parser() if command else make_parser()
    if command:
        COMMANDS[command][1](one)
    return unknown("option", word.partition("=")[0],
                   [name for action in one._actions for name in action.option_strings])


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one sentence) for what a command raised."""
    if isinstance(error, UserError):
        return error.exit_code, " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ("Stopped by you; the same command goes on from the last checkpoint, "
                             "if one was written.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 1, (f"The disk is full ({error.strerror}); free some space or set "
                   "HYBRIDRL_RESULTS_DIR to another folder, then run the same command again.")
    if isinstance(error, OSError) and error.filename is not None:
        return 1, (f"Could not use {error.filename} ({error.strerror}); check that it is there and "
                   "may be read and written.")
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if memory := out_of_memory(error):
        return 1, str(memory)
    return 1, (f"Unexpected error, {type(error).__name__}: {first.rstrip('.')}; "
               "set HYBRIDRL_DEBUG=1 and run it again to see where it comes from.")


# The parser -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong and "COMMAND" in message:
            raise unknown("command", wrong[1], COMMANDS)
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; "
                         f"see '{self.prog} --help'.")


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="hybridrl", epilog=EPILOG, description=(
        "Train language models for maths by SFT, RL and combinations of the two, and compare."))
    parser.add_argument("--version", action="version", version=f"hybridrl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (run, add, summary, example) in COMMANDS.items():
        one = commands.add_parser(
            name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.",
            epilog=f"Example: {example}\n{EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        add(one)
        one.set_defaults(run=run)
    return parser


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny",
                        help="tiny, smollm2, colab, paper or auto; tiny unless given")


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=seed_list, default=(0,), metavar="N",
                        help="how many seeds, from 0 on; or a list such as 0,3,5; 1 unless given")


def add_jobs(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--jobs", type=positive_number, metavar="J",
                        help=f"{what} at a time; unless given one a GPU, or one a core")


def add_executor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--executor", default="local", metavar="WHERE",
                        help="local, unless given: processes on this machine; ray or ray:ADDRESS: "
                             "the nodes of a Ray cluster, that in RAY_ADDRESS or this machine's")


def add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", metavar="NAME",
                        help="folder of the records under results/runs/; the preset's name unless "
                             "given")


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", dest="settings", nargs="+", action="extend", default=[],
                        metavar="KEY=VALUE",
                        help="change settings of the preset, such as rl.beta=0.04; may be repeated")


def whole_number(text: str) -> int:
    """A whole number of 0 and up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 and up")
    return int(text)


def positive_number(text: str) -> int:
    """A whole number of 1 and up."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 and up")
    return int(text)


def seed_list(text: str) -> tuple[int, ...]:
    """`3` is the seeds 0, 1 and 2; `0,4,7` are those, and `4,` is seed 4 alone."""
    if "," not in text:
        return tuple(range(positive_number(text)))
    seeds = tuple(whole_number(part.strip()) for part in text.split(",") if part.strip())
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} names no seed")
    return seeds


# run --------------------------------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("setup", metavar="SETUP", help="a name that 'hybridrl list' shows")
    parser.add_argument("--seed", type=whole_number, default=0,
                        help="order of the problems and all sampling; 0 unless given")
    add_preset(parser)
    add_place(parser)
    add_settings(parser)


def run_command(arguments: argparse.Namespace) -> None:
    from .config import load_settings
    from .setups import get_setup

    get_setup(arguments.setup)  # wrong words are refused before torch is imported
    load_settings(arguments.preset, arguments.settings)
    prepare_torch(arguments.preset)
    from .run import run

    folder = run(arguments.setup, arguments.preset, arguments.seed, arguments.experiment,
                 arguments.settings)
    if is_first():
        print(f"the record is in {folder.path}")
    end()


def prepare_torch(preset: str = "") -> None:
    """Before torch is imported: threads as `hybridrl reproduce` has them, and no progress bars.

    At `tiny` a run takes one thread, so that the same command leaves the same record on machines
    with more cores, and beside other runs.
    """
    if preset == "tiny":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


# reproduce --------------------------------------------------------------------------------------


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    add_seeds(parser)
    add_jobs(parser, "notebooks")
    add_executor(parser)
    parser.add_argument("--setups", nargs="+", action="extend", default=[], metavar="SETUP",
                        help="only these; all of them unless given")
    add_place(parser)
    add_settings(parser)


def reproduce_command(arguments: argparse.Namespace) -> None:
    from .reproduce import reproduce

    setups = [name for text in arguments.setups for name in text.split(",") if name]
    reproduce(arguments.preset, arguments.seeds, setups, arguments.jobs, arguments.experiment,
              arguments.settings, executor=arguments.executor)


# compare ----------------------------------------------------------------------------------------


def factor_list(text: str) -> tuple[float, ...]:
    """`0.5,1,2` as numbers."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of factors such as "
                                         "0.5,1,2") from None


def add_compare(parser: argparse.ArgumentParser) -> None:
    from .compare import GRID, TRANSFER

    add_preset(parser)
    add_seeds(parser)
    parser.add_argument("--methods", nargs="+", action="extend", default=[], metavar="NAME",
                        help="setups, or methods, each with its control; unless given the paper's "
                             "setups and all methods")
    parser.add_argument("--grid", type=factor_list, default=GRID, metavar="FACTORS",
                        help="the preset's learning rates times these are tried on validation "
                             "problems, for every arm; "
                             + ",".join(f"{factor:g}" for factor in GRID)
                             + " unless given, and 1 tunes nothing")
    parser.add_argument("--transfer", type=whole_number, default=TRANSFER, metavar="N",
                        help="also train on each benchmark alone, with the first N seeds, and test "
                             f"on all; {TRANSFER} unless given, 0 for none")
    add_jobs(parser, "runs")
    add_executor(parser)
    add_place(parser)
    add_settings(parser)


def compare_command(arguments: argparse.Namespace) -> None:
    from .compare import compare

    names = [name for text in arguments.methods for name in text.split(",") if name]
    compare(arguments.preset, arguments.seeds, names, arguments.grid, arguments.transfer,
            arguments.jobs, arguments.experiment, arguments.settings,
            executor=arguments.executor)


# sweep ------------------------------------------------------------------------------------------


def add_sweep(parser: argparse.ArgumentParser) -> None:
    from .sweep import SWEEPS

    parser.add_argument("--parameter", required=True, metavar="NAME",
                        help="one of " + ", ".join(SWEEPS))
    parser.add_argument("--values", type=lambda text: tuple(
                            part.strip() for part in text.split(",") if part.strip()),
                        default=(), metavar="LIST",
                        help="such as 0,0.02,0.1; the parameter's own list unless given")
    parser.add_argument("--setup", metavar="SETUP",
                        help="swept instead of the parameter's own, such as sft_then_rl")
    add_preset(parser)
    add_seeds(parser)
    add_jobs(parser, "runs")
    add_executor(parser)
    add_place(parser)
    add_settings(parser)


def sweep_command(arguments: argparse.Namespace) -> None:
    from .sweep import sweep

    sweep(arguments.parameter, arguments.values, arguments.preset, arguments.seeds,
          arguments.setup, arguments.jobs, arguments.experiment, arguments.settings,
          executor=arguments.executor)


# report -----------------------------------------------------------------------------------------


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT",
                        help="a name under results/runs/ or results/published/, or a folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="where to write; the experiment's folder unless given, and "
                             "results/runs/NAME for a published one given by its name")


def report_command(arguments: argparse.Namespace) -> None:
    from .catalogue import published_folder
    from .records import results_folder

    folder, out, published = find_experiment(
        arguments.experiment, results_folder(), published_folder())
    from .report import make_report

    make_report(folder, out_folder=arguments.out or out, published=published)


def find_experiment(name: str, runs: Path, published: Path
                    ) -> tuple[Path, Path | None, Path | None]:
    """(folder of the records, where to write, published table to show beside) for a name or path.

    Published records are read-only: a report of them goes to the folder of new runs, unless the
    folder itself was named.

    Raises:
        UserError: there is no finished run by that name.
    """
    if os.sep in name or name in (".", ".."):
        return Path(name), None, None
    mine, theirs = runs / name, published / name
    if has_records(mine):
        return mine, None, theirs if (theirs / "table2.csv").is_file() else None
    if has_records(theirs):
        return theirs, mine, None
    known = sorted({path.name for root in (runs, published) if root.is_dir()
                    for path in root.iterdir() if has_records(path)})
    if known:
        raise unknown("experiment with a finished run", name, known)
    raise UserError(f"There is no finished run of experiment {name!r}; train a setup first, for "
                    "example with 'hybridrl run sft'.")


def has_records(folder: Path) -> bool:
    return any(folder.glob("*/seed-*/manifest.json"))


# rerun ------------------------------------------------------------------------------------------


def add_rerun(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST",
                        help="manifest.json or config.json of a run, or its folder")
    parser.add_argument("--experiment", metavar="NAME",
                        help="where the second run goes; the first one's name with -rerun unless "
                             "given")
    parser.add_argument("--set", dest="settings", nargs="+", action="extend", default=[],
                        metavar="KEY=VALUE",
                        help="where it must differ from the record, such as model.path=FILE.gguf")


def rerun_command(arguments: argparse.Namespace) -> int:
    prepare_torch()
    from .rerun import rerun

    return rerun(arguments.manifest, arguments.experiment, arguments.settings)


# merge ------------------------------------------------------------------------------------------


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN",
                        help="the folder of a finished run with model.adapter=lora, or of an "
                             "adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the whole model")


def merge_command(arguments: argparse.Namespace) -> None:
    prepare_torch()
    from .adapters import merge

    merge(arguments.run_folder, arguments.out)
    print(f"the whole model is in {arguments.out}; use it with --set model.path={arguments.out}")


# publish ----------------------------------------------------------------------------------------


def add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a name under results/runs/")
    parser.add_argument("--to", type=Path, metavar="FOLDER",
                        help="results/published unless given; a folder of the experiment's name is "
                             "made there, or replaced")


def publish_command(arguments: argparse.Namespace) -> None:
    from .publish import publish
    from .records import from_here, project_folder

    folder = publish(arguments.experiment,
                     arguments.to or project_folder() / "results" / "published")
    print(f"published in {from_here(folder)}")


# list, doctor, pretrain-tiny --------------------------------------------------------------------


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def list_command(arguments: argparse.Namespace) -> None:
    from .catalogue import catalogue, render

    listing = catalogue()
    print(json.dumps(listing, indent=2) if arguments.json else render(listing))


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="judge this one alone; exit 1 if it will not work here")
    add_json(parser)


def doctor_command(arguments: argparse.Namespace) -> int:
    from .doctor import render, report

    rows = report(arguments.preset)
    names = ("topic", "value", "advice")
    print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2)
          if arguments.json else render(rows=rows))
    verdicts = [value for topic, value, _ in rows if topic.startswith("preset ")]
    return int(arguments.preset is not None and "no" in verdicts)


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="a new folder; unless given, the package's own, if it is missing")
    parser.add_argument("--seed", type=whole_number, default=0, help="0 unless given")


def pretrain_command(arguments: argparse.Namespace) -> None:
    folder = arguments.out or Path(__file__).parent / "assets" / "tiny"
    if (folder / "config.json").exists():
        raise UsageError(f"The folder {folder} already holds a model; choose another --out.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bytes on machines with more cores
    from .pretraining import pretrain

    pretrain(folder, seed=arguments.seed, report=lambda line: print(line, flush=True))
    print(f"the model is in {folder}; use it with --set model.path={folder}")


COMMANDS: dict[str, tuple[Callable, Callable, str, str]] = {
    "run": (run_command, add_run, "train and evaluate one setup, and record it",
            "hybridrl run sft_then_rl --preset tiny --seed 1 --set rl.beta=0.04"),
    "reproduce": (reproduce_command, add_reproduce,
                  "run the notebooks of all setups and seeds through papermill, then the report",
                  "hybridrl reproduce --preset tiny --seeds 3 --jobs 2"),
    "compare": (compare_command, add_compare,
                "tune, train and test methods alike, and compare them with SFT -> RL",
                "hybridrl compare --preset tiny --seeds 3 --methods relift,combined"),
    "sweep": (sweep_command, add_sweep, "train one setup with several values of a setting",
              "hybridrl sweep --parameter beta --values 0,0.02,0.1 --seeds 3"),
    "report": (report_command, add_report, "make Table 2 and the figures from records",
               "hybridrl report tiny"),
    "rerun": (rerun_command, add_rerun, "run a recorded run again and compare the answers",
              "hybridrl rerun results/published/tiny/rl/seed-0/manifest.json"),
    "merge": (merge_command, add_merge, "add the adapter of a LoRA run into its model's weights",
              "hybridrl merge results/runs/lora/sft/seed-0 my-model"),
    "publish": (publish_command, add_publish,
                "copy the records of an experiment to where they stay, packed",
                "hybridrl publish tiny --to results/published"),
    "list": (list_command, add_json, "show setups, methods and presets with what each costs",
             "hybridrl list --json"),
    "doctor": (doctor_command, add_doctor, "show what this machine has and what will work on it",
               "hybridrl doctor --preset smollm2"),
    "pretrain-tiny": (pretrain_command, add_pretrain, "make the tiny base model",
                      "hybridrl pretrain-tiny --out my-tiny --seed 0"),
}

if __name__ == "__main__":
    sys.exit(main())
