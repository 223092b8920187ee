r"""The arithmetic in a solution: which of its equations hold (paper, introduction).

`rl.reward=answer_and_steps` rewards a correct answer only if
1. no equation of the solution is false, and
2. if the reference solution reaches its answer by an equation, so does the solution: by a true one
   whose value is the answer, and which is more than a number or a neutral 0 or 1. If the reference
   has true equations but none with the answer, any such equation will do.
Without rule 2 the safest solution would have no equations. It asks for one equation only, since one
line may contain what the reference writes in two. Whether its numbers come from the question is not
checked: 66 / 2 = 33 can be made up.

An equation is a `=` whose sides are sums, products, quotients, or powers of numbers; `a = b = c`
is two. Units are skipped. A decimal may be rounded or cut in its last place; 20 % is 0.2 or 20.
What cannot be judged counts as neither true nor false: unknowns, two plain numbers, a number in a
sentence (shared by 5 friends = 250 / 5 = 50), mixed units (60 minutes = 1 hour), a false equation
next to "dozen" or "million".

All reference solutions of the tiny benchmarks earn the reward, and 99.2 % of those of GSM8K
(8,792) and MATH-500. Most of the others contain an error such as 60 / 3/4 = 80; a few are misread.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .numeric import FUNCTIONS, MULTIPLIERS, measures, parse_number

MAX_TOKENS = 64  # of one side
MAX_DEPTH = 8  # brackets
MAX_DIGITS = 30  # of one numeral
MAX_BITS = 512  # of a numerator or denominator
MAX_UNIT_WORDS = 6  # between a number and an operator: "12 skeins per pair of socks + "

_CLEANING = tuple((re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in (
    (r"\\\\", "\n"),
    (r"\\[,;:! ]|\{,\}(?=\d{3})|\\(?:left|right|displaystyle)(?![A-Za-z])|&|\\[()\[\]]", ""),
    (r"\\f?box(?:ed)?\s*(?=\{)", ""),
    (r"\\(?:text[a-z]*|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[×·⋅∗]", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"[−–]", "-"),
    (r"²", "^2"), (r"³", "^3"),
    (r"\\([%$])", r"\1"),
    (r"\*\*(?!\d)|(?<!\d)\*\*", " "),  # bold type
    (r"\*\*", "^"),
    (r"^[ \t]*[-*•][ \t]+", ""),  # a list
))  # fmt: skip
_MIXED = re.compile(r"(?<!\d)(\d+)\s*\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_NOTE = re.compile(r"<<([^<>]*)>>")  # GSM8K's calculator notes
_TOKEN = re.compile(
    r"(?P<clock>\d+:\d+)"
    r"|(?P<number>\d+ \d+/\d+(?![\d/])|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<attached>[A-Za-z]*)"
    r"|(?P<word>[A-Za-z][A-Za-z'’-]*)"
    r"|(?P<equals>(?<![<>!\\:=~])=(?![>=]))"
    r"|(?P<sign>[-+*/^%(){}\[\]])"
    r"|(?P<money>[$€£¢])"
    r"|(?P<other>\\[A-Za-z]+|\n|[^\s])"
)
_OPEN, _CLOSE = "({[", ")}]"
_HALF = frozenset(("half", "third", "quarter", "twice", "double", "triple", "thrice"))
_INFIX = frozenset(("mod", "by", "times", "plus", "minus", "over")) | FUNCTIONS


@dataclass(frozen=True)
class Equation:
    """One `=` with arithmetic on both sides.

    Attributes:
        holds: whether it is true.
        values: possible values of its left side (two if it has a percent sign).
        shows: whether it is true and has an operation that changes something.
    """

    holds: bool
    values: frozenset[Fraction]
    shows: bool


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    attached: str = ""


@dataclass
class _Side:
    """One side: its value with percent as hundredths and as plain numbers, and what it contains."""

    readings: tuple[Fraction, Fraction]
    operations: int
    changes: bool
    places: int | None  # of a lone decimal
    words: str
    has_unit: bool
    text: str
    tail: bool = False  # a lone number in a sentence: "shared by 5 friends = 250 / 5 = 50"


class _Unreadable(Exception):
    pass


@lru_cache(maxsize=4_096)
def equations(text: str) -> tuple[Equation, ...]:
    """The equations of a text that can be judged, those in notes first; in linear time."""
    if "=" not in text:
        return ()
    found = [equation for note in _NOTE.findall(text) for equation in _judged(_tokens(note))]
    return (*found, *_judged(_tokens(_NOTE.sub("", text))))


def steps_hold(text: str, solution: str, answer: str) -> bool:
    """Whether a solution shows correct arithmetic, by the two rules above.

    Args:
        text: the completion.
        solution: the problem's reference solution.
        answer: its gold answer.
    """
    written = equations(text)
    if not all(equation.holds for equation in written):
        return False
    shown, model = ([e for e in found if e.shows] for found in (written, equations(solution)))
    number = parse_number(answer)
    if number and any(number.value in equation.values for equation in model):
        return any(number.value in equation.values for equation in shown)
    return bool(shown) or not model


def _tokens(text: str) -> list[_Token]:
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    for _ in range(4):  # \frac in \frac, from the inside out
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    tokens = []
    for match in _TOKEN.finditer(text):
        attached = match["attached"] or ""
        tokens.append(_Token(match.lastgroup if match["number"] is None else "number",
                             match["number"] or match[0], attached))
    return tokens


def _judged(tokens: list[_Token]) -> Iterator[Equation]:
    """Every `=` whose sides can be read and compared."""
    begins: dict[int, _Side] = {}
    ends: dict[int, _Side] = {}
    place = 0
    while place < len(tokens):
        if _may_begin(tokens, place):
            try:
                side, end = _Reader(tokens, place).side()
            except _Unreadable:
                place += 1
                continue
            before = tokens[place - 1].kind if place else ""
            side.tail = not side.operations and before != "equals" and (
                before == "word" or side.has_unit)
            begins[place], ends[end] = side, side
            place = end
        else:
            place += 1
    for place, token in enumerate(tokens):
        left, right = ends.get(place), begins.get(place + 1)
        if token.kind == "equals" and left and right and left.operations + right.operations:
            equation = _compare(left, right)
            if equation:
                yield equation


def _may_begin(tokens: list[_Token], place: int) -> bool:
    """Whether a side can begin here, not inside something that cannot be read."""
    token = tokens[place]
    before = tokens[place - 1] if place else None
    if token.kind not in ("number", "money") and token.text not in (*_OPEN, "-"):
        return False
    if before is None or before.kind == "equals" or before.text in _OPEN:
        return True
    if before.kind == "other":  # a comma, a colon, the end of a line; \pi and @ belong to it
        return before.text in ".,;:!?\n…'\"“”→"
    if token.text == "-" or before.kind in ("sign", "number", "money"):
        return False
    words = [word.text.lower() for word in tokens[max(0, place - 3):place] if word.kind == "word"]
    return (len(before.text) > 1 or before.text in "aAI") and words[-1] not in _INFIX and (
        _HALF.isdisjoint(words))


def _compare(left: _Side, right: _Side) -> Equation | None:
    """The equation of two sides; None if it cannot be judged."""
    holds = any(_equal(one, other, index, other_index, left, right)
                for index, one in enumerate(left.readings)
                for other_index, other in enumerate(right.readings))
    words = f"{left.words} {right.words}"
    if not holds and (left.tail or len(measures(words)) > 1
                      or not MULTIPLIERS.keys().isdisjoint(words.split())):
        return None
    shows = holds and (left.changes or right.changes) and left.text != right.text
    return Equation(holds, frozenset(left.readings), shows)


def _equal(one: Fraction, other: Fraction, index: int, other_index: int, left: _Side,
           right: _Side) -> bool:
    if one == other:
        return True
    for side, value, exact, hundredths in ((left, one, other, index == 0),
                                           (right, other, one, other_index == 0)):
        if side.places is not None:
            scale = 100 if hundredths and side.readings[0] != side.readings[1] else 1
            off = abs(exact - value) * scale * 10**side.places  # in units of the last place
            if off <= Fraction(1, 2) or (off < 1 and abs(value) < abs(exact)):
                return True
    return False


class _Reader:
    """Reads one side from a place on by recursive descent."""

    def __init__(self, tokens: list[_Token], place: int):
        self.tokens, self.begin, self.place, self.depth = tokens, place, place, 0
        self.operations, self.changes, self.places = 0, False, None
        self.words: list[str] = []
        self.has_unit = False

    def side(self) -> tuple[_Side, int]:
        """The side and the place after it.

        Raises:
            _Unreadable: it contains something that is not arithmetic.
        """
        readings = self.sum()
        token = self.peek()
        if token is not None and token.text in ("-", "+", "*", "/", "^"):
            raise _Unreadable  # an operator before what cannot be read
        text = "".join(t.text for t in self.tokens[self.begin:self.place]
                       if t.kind in ("number", "sign"))
        places = None if self.operations else self.places
        return _Side(readings, self.operations, self.changes, places, " ".join(self.words),
                     self.has_unit, text), self.place

    def peek(self) -> _Token | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self) -> _Token:
        if self.place >= len(self.tokens) or self.place - self.begin >= MAX_TOKENS:
            raise _Unreadable
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self):
        value = self.product()
        while (sign := self.operator("+-")) is not None:
            other = self.product()
            value = self.apply(sign, value, other)
        return value

    def product(self):
        value = self.power()
        while (sign := self.operator("*/(")) is not None:
            value = self.apply(sign, value, self.power())
        return value

    def power(self):
        value = self.atom()
        if self.operator("^") is not None:
            value = self.apply("^", value, self.power())
        return value

    def atom(self):
        self.money()
        token = self.take()
        if token.text == "-":
            return tuple(-value for value in self.power())
        if token.text in _OPEN:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _Unreadable
            value = self.sum()
            if self.take().text not in _CLOSE:
                raise _Unreadable
            self.depth -= 1
        elif token.kind == "number":
            value = self.number(token)
        else:
            raise _Unreadable
        self.money()
        if (after := self.peek()) is not None and after.text == "%":
            self.take()
            value = (value[0] / 100, value[1])
        self.units()
        return value

    def money(self) -> None:
        """Skips a currency sign or a formula's dollar."""
        while (token := self.peek()) is not None and token.kind == "money":
            self.words.append({"$": "dollar", "¢": "cent"}.get(token.text, ""))
            self.take()

    def number(self, token: _Token):
        parsed = parse_number(token.text) if len(token.text) <= MAX_DIGITS else None
        if parsed is None or len(token.attached) == 1 or token.attached.lower() in FUNCTIONS:
            raise _Unreadable  # 2x
        if token.attached:
            self.words.append(token.attached.lower())
        if "." in token.text:
            self.places = len(token.text.partition(".")[2])
        return parsed.value, parsed.value

    def units(self) -> None:
        """Skips the words between a number and what follows: "12 skeins per hat + "."""
        end, words = self.place, []
        while end < len(self.tokens) and len(words) <= MAX_UNIT_WORDS:
            token, after = self.tokens[end], self.tokens[end + 1:end + 2]
            if token.kind == "word" and token.text in ("x", "X", "of") and self.is_operand(after):
                break
            if token.kind == "word" and (len(token.text) > 1 or token.text == "a"):
                words.append(token.text.lower())
            elif not (token.text == "/" and after and after[0].kind == "word"
                      and len(after[0].text) > 1):
                break
            end += 1
        if end == self.place or not FUNCTIONS.isdisjoint(words) or not words:
            return
        token = self.tokens[end] if end < len(self.tokens) else None
        goes_on = token is not None and (
            token.kind == "equals" or token.text in ("+", "-", "*", "/", *_CLOSE)
            or token.text in ("x", "X"))
        if not goes_on and token is not None and token.kind == "number":
            return
        self.words += words  # a last number's units count, too, and are not read over
        if goes_on:
            self.place, self.has_unit = end, True

    def operator(self, wanted: str) -> str | None:
        """Takes the next operator, if it is one of those wanted and something follows it."""
        token, after = self.peek(), self.tokens[self.place + 1:self.place + 2]
        if token is None:
            return None
        if token.kind == "word":
            sign = "*" if token.text in ("x", "X", "of") and self.is_operand(after) else None
        elif token.text in _OPEN:
            if "(" in wanted:  # 5(3)
                return "*"
            return None
        else:
            sign = token.text if token.kind == "sign" else None
        if sign is None or sign not in wanted:
            return None
        self.take()
        return sign

    @staticmethod
    def is_operand(tokens: list[_Token]) -> bool:
        return bool(tokens) and (tokens[0].kind in ("number", "money") or tokens[0].text in _OPEN)

    def apply(self, sign: str, one, other):
        """The operation in both readings."""
        self.operations += 1
        neutral = {"+": (0, 0), "-": (None, 0), "*": (1, 1), "/": (None, 1), "^": (None, 1)}[sign]
        self.changes |= one[1] != neutral[0] and other[1] != neutral[1]
        return tuple(_operate(sign, left, right) for left, right in zip(one, other, strict=True))


def _operate(sign: str, left: Fraction, right: Fraction) -> Fraction:
    if sign == "/" and right == 0:
        raise _Unreadable
    if sign == "^":
        bits = max(left.numerator.bit_length(), left.denominator.bit_length())
        if right.denominator != 1 or abs(right) * bits > MAX_BITS or (left == 0 and right < 0):
            raise _Unreadable
        result = left ** int(right)
    else:
        result = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__,
                  "/": left.__truediv__}[sign](right)
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise _Unreadable
    return result
