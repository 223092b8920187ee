"""Errors that a user can cause and fix: one sentence each, without a traceback."""

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What is wrong and what to do about it, in one sentence.

    The command line prints the sentence and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(UserError):
    """A command, setting, or value that does not exist."""

    exit_code = 2


class Stopped(UserError):
    """The user stopped the run, and nothing is lost; exit code 128 + SIGINT, as in shells."""

    exit_code = 130


# What torch and its backends say, in lower case; not all of these errors have their own type.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def out_of_memory(error: BaseException) -> UserError | None:
    """The message for an error that says that memory ran out; None for others."""
    said = str(error).lower()
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and not (
            isinstance(error, RuntimeError) and any(sign in said for sign in OUT_OF_MEMORY)):
        return None
    return UserError("Out of memory; lower training.micro_batch_tokens, "
                     "training.logit_chunk_tokens or evaluation.batch_size and run it again: a run "
                     "resumes from its last checkpoint.")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Converts errors about memory to a `UserError`."""
    try:
        yield
    except Exception as error:
        if ours := out_of_memory(error):
            raise ours from error
        raise


def show_in_one_sentence() -> None:
    """Makes a notebook show a `UserError` as its message, without a traceback.

    A notebook keeps the last error, and with it the model and the optimizer of its frames. After a
    Ctrl-C and after our own errors these are released, so that the cell can run again.
    """
    from IPython import get_ipython  # needed in notebooks only

    shell = get_ipython()
    if shell is None:
        return

    def show(shell, kind, error, trace, tb_offset=None):
        one = error
        while one is not None:  # first, since showing a frame would keep it
            traceback.clear_frames(one.__traceback__)
            one = one.__cause__ or one.__context__
        if isinstance(error, UserError):
            shell._showtraceback(kind, error, [f"{kind.__name__}: {error}"])
        else:
            shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((UserError, KeyboardInterrupt), show)


def reason(error: BaseException, length: int = 200) -> str:
    """The first line of another library's error, without colors, as part of a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = re.sub(r"\x1b\[[0-9;]*m", "", line) or type(error).__name__
    return printable(line)[:length].rstrip(". ")


# What controls a terminal, changes the order of letters, or cannot be written as UTF-8.
_UNPRINTABLE = {
    **{number: chr(0x2400 + number) for number in range(0x20) if chr(number) not in "\t\n"},
    **dict.fromkeys((0x7F, *range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F),
                     *range(0x2066, 0x206A), *range(0xD800, 0xE000)), "\ufffd")}


def printable(text: object) -> str:
    """Text from a model or a file with every control character made visible."""
    return str(text).translate(_UNPRINTABLE)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate with the most similar spelling, or None."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, word: str, candidates: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `candidates`; it names the nearest one."""
    word, candidates = str(word), list(candidates)  # what a record holds may be no text
    guess = nearest(word, candidates)
    hint = f"did you mean {guess!r}" if guess else "choose one of " + ", ".join(candidates)
    return UsageError(f"There is no {kind} {word!r}; {hint}?" if guess else
                      f"There is no {kind} {word!r}; {hint}.")
