"""Finds the final answer in a completion and puts it in canonical form."""

import re
import unicodedata
from functools import lru_cache

MAX_ANSWER_CHARACTERS = 2_000
"""Longer answers are unparsable. Those of GSM8K and MATH-500 are less than a tenth as long."""

MAX_BRACE_DEPTH = 40

_BOX_TOKENS = re.compile(r"(?P<box>\\f?box(?:ed)?\s*\{)|\\.|[{}]", re.DOTALL)

_HIDDEN = re.compile(
    r"^[ \t]*%[^\n]*"  # a line of comment; "20% of 50" is none
    r"|\\verb\*?(?P<bar>[^A-Za-z\s*])[^\n]*?(?:(?P=bar)|$)"
    r"|\\begin\{(?P<environment>verbatim|comment)\}[\s\S]*?(?:\\end\{(?P=environment)\}|\Z)"
    r"|<!--[\s\S]*?(?:-->|\Z)"
    r"|^[ \t]*```[\s\S]*?(?:^[ \t]*```|\Z)",
    re.MULTILINE,
)
"""Comments and code, where a box is not an answer. What is not closed extends to the end, which
also keeps the search linear."""


def scan_boxes(text: str) -> tuple[list[str], bool]:
    r"""The contents of all outermost `\boxed{...}` (or `\fbox{...}`), and whether one is unclosed.

    Comments and code are skipped. One pass with a stack, in linear time.
    """
    text = _HIDDEN.sub(" ", text)
    open_groups: list[int | None] = []  # where a box's content starts, None for a plain group
    closed: list[tuple[int, int]] = []
    for token in _BOX_TOKENS.finditer(text):
        if token["box"]:
            open_groups.append(token.end())
        elif token[0] == "{":
            open_groups.append(None)
        elif token[0] == "}" and open_groups:
            start = open_groups.pop()
            if start is not None:
                while closed and closed[-1][0] > start:
                    closed.pop()  # a box inside this one
                closed.append((start, token.start()))
    unclosed = any(start is not None for start in open_groups)
    return [text[start:end].strip() for start, end in closed], unclosed


def extract_boxes(text: str) -> list[str]:
    r"""The contents of all closed outermost `\boxed{...}` of `text`, in order; [] if none."""
    return scan_boxes(text)[0]


_HASHES = re.compile(r"####[ \t]*([^\n#]*)")
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?\$?(?:"
    r"\\[dt]?frac\{-?[0-9]+\}\{-?[0-9]+\}"
    r"|[0-9]+[ ]+[0-9]+/[0-9]+"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:[ ]?/[ ]?[0-9]+)?"
    r"|(?<![0-9])\.[0-9]+"
    r")(?:[ ]?\\?%)?"  # no capturing group: `findall` is to give whole matches
)


def extract_lenient(text: str) -> str | None:
    """The answer that a lenient reader takes: last box, else last `#### x`, else last number; or
    None.
    """
    boxes = extract_boxes(text)
    if boxes:
        return boxes[-1]
    marked = [line.strip(" \t*") for line in _HASHES.findall(text)]
    marked = [line for line in marked if line]
    if marked:
        return marked[-1]
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1].replace("$", "") if numbers else None


_REPLACEMENTS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[()\[\]]", ""),  # \( \) \[ \] around the formula
        (r"\\!\s*", ""),  # 11,\!111: a negative space inside a number
        (r"\\?[$€£]", ""),
        (r"\\%", "%"),
        (r"\{,\}", ","),
        (r",\s*(?:\.\.\.|…)", r",\\ldots "),  # not only a point at the end
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:text(?:bf|it|rm|normal)|math(?:rm|bf|it)|mbox)\s*\{", r"\\text{"),
        (r"\\text\{\s*i\s*\}", "i"),  # an upright imaginary unit is not a word
        (r"\\(?:displaystyle|limits)(?![A-Za-z])", ""),
        (r"\\(?:degree(?![A-Za-z])|deg(?![A-Za-z]))|°|\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\s+", " "),
        # "5, 100" is a list and "5,100" a number: that one space has to survive (as a tab)
        (r"(?<=[0-9]), (?=[0-9]{3}(?![0-9]))", ",\t"),
        (r"(?<=[^A-Za-z0-9]) | (?=[^A-Za-z0-9])", ""),
        # \frac{20,000}{\pi}: the separators of a number that fills its braces
        (r"(?<=\{)[0-9]{1,3}(?:,[0-9]{3})+(?=\})", lambda number: number[0].replace(",", "")),
        (r"(?<=[0-9]) (?=[A-Za-z])", ""),
        (r"(\\[A-Za-z]+) (?=[0-9])", r"\1"),
        (r"\t", " "),
    )
)
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "⁄": "/",
     "∞": r"\infty ", "∪": r"\cup ", "²": "^2", "³": "^3", "±": r"\pm ", "≤": r"\le ",
     "≥": r"\ge ", "∈": r"\in ", "∅": r"\emptyset ", "θ": r"\theta "}
    | {sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄"))
       for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
)  # fmt: skip


@lru_cache(maxsize=65_536)
def canonical(answer: str) -> str:
    """`answer` without what does not change its meaning: spaces, dollar signs, text wrappers.

    Answers with the same canonical text are the same. Nothing is evaluated.
    """
    text = answer.strip()
    if len(text) > MAX_ANSWER_CHARACTERS:
        return text
    while re.match(r"\\f?box(ed)?\s*\{", text):
        inner = re.fullmatch(r"\\f?box(?:ed)?\s*(\{.*\})", text, re.DOTALL)
        if not inner or not is_one_group(inner[1]):
            break
        text = inner[1][1:-1].strip()
    text = text.translate(_SYMBOLS)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;").strip()
    wrapped = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return wrapped[1].strip() if wrapped else text


def is_one_group(text: str, opening: str = "{", closing: str = "}") -> bool:
    """Whether the bracket that opens `text` is closed by its last character."""
    if not text.startswith(opening):
        return False
    depth = 0
    for place, character in enumerate(text):
        depth += (character == opening) - (character == closing)
        if depth == 0:
            return place == len(text) - 1
    return False


_WORD = re.compile(r"[^\W_]+")
_IS_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\s*\{[^{}]*\}")


def is_text(answer: str) -> bool:
    r"""Whether the whole answer is words, as `\text{Evelyn}` or `\text{(C)}`."""
    return bool(_IS_TEXT.fullmatch(answer.strip())) and bool(words(answer))


def words(answer: str) -> tuple[str, ...]:
    """The words of an answer in lower case, without brackets and punctuation."""
    return tuple(_WORD.findall(canonical(answer).replace(r"\text", " ").lower()))


_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff\ufffd"
    "\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"  # unseen, or they turn the reading order
)
_EMPTY_FRACTION = re.compile(
    r"\\frac(?:\{\s*\}|(?![{0-9A-Za-z\\])|\{[^{}]*\}(?:\{\s*\}|(?![{0-9A-Za-z\\])))"
)
_DANGLING_OPERATOR = re.compile(
    r"^(?:[*/^_]|\\(?:times|cdot|div)(?![A-Za-z]))"
    r"|(?:[\^_+*/=<>\\-]|\\(?:times|cdot|div|frac|sqrt))$"
)
_GROUP_TOKENS = re.compile(r"\\.|[{}]", re.DOTALL)




def has_foreign_signs(answer: str) -> bool:
    r"""Whether there are letters or digits outside ASCII (in formulas, not in `\text{...}`).

    Python and SymPy read the digits of every script as numbers and a Cyrillic x as a symbol. An
    answer must be ASCII and LaTeX.
    """
    return not re.sub(r"\\text\{[^{}]*\}", "", canonical(answer)).isascii()


@lru_cache(maxsize=65_536)
def is_malformed(answer: str) -> bool:
    """Whether no parser can read `answer`, so that no worker needs to try."""
    if len(answer.strip()) > MAX_ANSWER_CHARACTERS or _FORBIDDEN.search(answer):
        return True
    text = canonical(answer)
    if any(sign.isnumeric() and not sign.isascii() for sign in text):
        return True
    if not re.search(r"[^\W_]|\\[A-Za-z]", text) or re.search(r"\\f?box", text):
        return True
    if text.count(r"\begin{") != text.count(r"\end{"):
        return True
    if _EMPTY_FRACTION.search(text) or _DANGLING_OPERATOR.search(text):
        return True
    depth = 0
    for token in _GROUP_TOKENS.findall(text):
        depth += (token == "{") - (token == "}")
        if depth < 0 or depth > MAX_BRACE_DEPTH:
            return True
    return depth != 0
