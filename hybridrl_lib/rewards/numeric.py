"""The fast path: exact verdicts on plain numbers and words, without a worker."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .answers import canonical, has_foreign_signs, is_malformed, is_one_group, is_text, words

TOLERANCE = Fraction(1, 10**6)
"""Tolerance for answers written as decimals: 0.333333 is 1/3, and 0.33 is not."""


@dataclass(frozen=True)
class Number:
    """A number as written: its exact value, and whether it is a decimal or a percentage."""

    value: Fraction
    is_decimal: bool = False
    is_percent: bool = False


MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
                "trillion": 10**12, "dozen": 12}  # fmt: skip
FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "abs", "max", "min", "gcd",
     "lcm", "mod", "inf", "infinity", "infty", "theta", "alpha", "beta", "gamma", "lambda", "pi",
     "choose", "squared", "cubed", "factorial")
)  # fmt: skip
_ALTERNATIVES = frozenset(
    ("or", "and", "to", "between", "either", "neither", "out", "of", "half", "halves", "third",
     "thirds", "quarter", "quarters", "fourths", "fifths", "sixths", "eighths", "tenths",
     "hundredths", "remainder", "plus", "minus", "times", "not", "over", "more", "less")
)  # fmt: skip
"""Words that change the meaning of the number before them."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}\.[0-9]+|{_INTEGER}|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<plain>{_DECIMAL})(?:\\(?:times|cdot)10\^(?:\{{(?P<power>-?[0-9]{{1,3}})\}}|(?P<digit>[0-9]))"
    r"|[eE](?P<exponent>[+-]?[0-9]{1,3}))?"
    rf"|(?P<before>(?:{_INTEGER})?\.[0-9]*)\\overline\{{(?P<repeated>[0-9]+)\}}"
    rf"|(?:(?P<whole>[0-9]+) )?(?P<above>{_DECIMAL})/(?P<below>{_DECIMAL})"
    rf"|(?P<latex_whole>[0-9]+)?\\frac(?:\{{(?P<numerator>-?{_DECIMAL})\}}|(?P<top>[0-9]))"
    rf"(?:\{{(?P<denominator>-?{_DECIMAL})\}}|(?P<bottom>[0-9]))"
)
_UNIT = re.compile(
    r"(?P<number>.*[0-9}%])(?:\\text\{(?P<text>[A-Za-z. /]*)\}"
    r"|(?P<bare>[A-Za-z]{3,}(?: [A-Za-z]+)*))(?:\^\{?[23]\}?)?"
)


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _parse_unsigned(text: str) -> tuple[Fraction, bool] | None:
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    if match["plain"]:
        power = int(match["power"] or match["digit"] or match["exponent"] or 0)
        return _fraction(match["plain"]) * Fraction(10) ** power, "." in text
    if match["repeated"]:  # 0.1\overline{6}: the period again and again is period / 99...9
        before, period = "0" + match["before"], match["repeated"]
        places = len(before.partition(".")[2])
        tail = Fraction(int(period), 10**places * (10 ** len(period) - 1))
        return _fraction(before + "0") + tail, False
    above = _fraction(match["above"] or match["numerator"] or match["top"])
    below = _fraction(match["below"] or match["denominator"] or match["bottom"])
    if below == 0:
        return None
    value = above / below
    whole = match["whole"] or match["latex_whole"]
    if whole:
        if not 0 < value < 1:  # 2\frac{3}{2} could be a product: not ours to decide
            return None
        value += int(whole)
    return value, "." in text


def _split_unit(text: str) -> tuple[str, int] | None:
    """The number before a unit, and the factor of "thousand" and the like."""
    match = _UNIT.fullmatch(text)
    if not match:
        return text, 1
    unit = re.findall("[a-z]+", (match["text"] or match["bare"] or "").lower())
    multiplier = 1
    while unit and unit[0] in MULTIPLIERS:
        multiplier *= MULTIPLIERS[unit.pop(0)]
    if not FUNCTIONS.isdisjoint(unit) or not _ALTERNATIVES.isdisjoint(unit):
        return None
    return match["number"] + ("%" if "percent" in unit else ""), multiplier


@lru_cache(maxsize=65_536)
def parse_number(answer: str) -> Number | None:
    r"""`answer` as a number, or None if it is not certainly one.

    Integers with separators, decimals, `a/b`, `\frac`, mixed numbers, and `x = 5`, with a currency
    sign, a unit, degrees, or percent; "3 million" is 3,000,000.
    """
    text = re.sub(r"^[A-Za-z]=", "", canonical(answer))
    if not re.search(r"[0-9]", text):
        return None
    split = _split_unit(text)
    if split is None:
        return None
    text, multiplier = split
    is_percent = text.endswith("%")
    text = re.sub(r"\^\\circ(?:\\text\{[CF]\}|[CF])?$", "", text.rstrip("%"))
    sign = 1
    for _ in range(3):  # -(3), {-3}, (-3)
        if text.startswith(("-", "+")) and sign == 1:
            sign = -1 if text[0] == "-" else 1
            text = text[1:]
        if is_one_group(text) or is_one_group(text, "(", ")"):
            text = text[1:-1]
    try:
        parsed = _parse_unsigned(text)
    except ValueError:  # Python's own limit on the digits of an integer
        return None
    if parsed is None:
        return None
    return Number(sign * multiplier * parsed[0], parsed[1], is_percent)


_MEASURES = {
    name: number
    for number, names in enumerate((
        "degree degrees circ", "radian radians rad", "cent cents", "dollar dollars usd",
        "inch inches", "foot feet ft", "yard yards", "mile miles", "mm millimeter millimeters",
        "cm centimeter centimeters", "meter meters", "km kilometer kilometers", "gram grams",
        "kg kilogram kilograms", "pound pounds lb", "ounce ounces oz", "second seconds",
        "minute minutes", "hour hours", "day days", "week weeks", "month months", "year years",
    ))
    for name in names.split()
}  # fmt: skip
"""Units that are compared; others are ignored."""


def measures(answer: str) -> set[int]:
    text = answer.lower().replace(r"\$", " dollar ").replace("°", " degree ")
    return {_MEASURES[word] for word in re.findall("[a-z]+", text) if word in _MEASURES}


def _other_measure(gold: str, answer: str) -> bool:
    """Whether both have a unit, and different ones: 5.4 dollars and 5.4 cents."""
    one, other = measures(gold), measures(answer)
    return bool(one) and bool(other) and one.isdisjoint(other)


def _same(gold: Number, answer: Number) -> bool:
    readings = [(gold.value, answer.value)]
    if gold.is_percent != answer.is_percent:  # "20 %" may answer 20 as well as 0.2
        readings.append(
            (gold.value / 100, answer.value) if gold.is_percent
            else (gold.value, answer.value / 100)
        )  # fmt: skip
    if any(left == right for left, right in readings):
        return True
    if not (gold.is_decimal or answer.is_decimal):
        return False
    return any(abs(left - right) <= TOLERANCE * min(1, abs(left)) for left, right in readings)


_ONLY_WORDS = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z ,.'\"!?()]*")
_TERM = r"(?:[1-9][0-9]*)?[abknpqruvwxyz](?:\^\{?[1-9][0-9]*\}?)?"
_WITH_VARIABLE = re.compile(rf"[-+]?(?:{_TERM}(?:[-+/][1-9][0-9]*)?|[0-9]+[-+]{_TERM})")
_THOUSANDS = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_LIST_MARK = re.compile(r"[,;]|(?<![A-Za-z])(?:or|and|to|between)(?![A-Za-z])")
_OTHER_COMMAND = re.compile(r"\\(?!text\{|frac|sqrt|pi(?![A-Za-z])|pm|[{}])")
_SUM = re.compile(r"(?:[0-9 .,+*/(){}^-]|\\times|\\cdot|\\div|\\frac)+")
_NO_NUMERAL = re.compile(
    r"-?[0-9.]+(?: [0-9.]+)+"  # math-verify reads "3 5" as 3 + 5
    r"|-?[0-9]*\.[0-9]*\.[0-9.]*"
    r"|-?[0-9.]+/[0-9.]+(?:/[0-9.]+)+"
    r"|-?[0-9.]+/0+|-?\\frac\{-?[0-9.]+\}\{0+\}"
)
_MORE_THAN_ONE = re.compile(
    r"\\text\{[^{}]*(?<!\^)[0-9]|[0-9]\}?_\{?[0-9]|\\[cl]?dots(?![A-Za-z])"
)
"""A number in words next to or below the answer, or an open list: math-verify ignores these, so
they could hold a second answer."""
_EQUALS = re.compile(r"(?<![<>!\\:])=")


def _is_another_thing(text: str) -> bool:
    """Whether `text` (canonical, not a number) is certainly not the number asked for."""
    if _ONLY_WORDS.fullmatch(text) or _WITH_VARIABLE.fullmatch(text):
        return True
    if _NO_NUMERAL.fullmatch(text) or _MORE_THAN_ONE.search(text):
        return True
    if text.count("(") != text.count(")") and not re.search(r"[][]", text):
        return True
    if not _OTHER_COMMAND.search(text):
        if _LIST_MARK.search(_THOUSANDS.sub("0", text)):
            return True
        if re.search(r"[0-9}]\\text\{", text) and not _ALTERNATIVES.isdisjoint(
            re.findall("[a-z]+", text.lower())):
            return True
    # An unevaluated calculation: rewarding "24-7" for 17 teaches a model to stop too early.
    if _SUM.fullmatch(text):
        operators = re.findall(r"(?<=[0-9)}])(?:[-+*]|\\times|\\cdot|\\div)", text)
        if "+" in operators or "-" in operators or (operators and "^" not in text):
            return True
    return False


def numbers_equal(gold: str, answer: str) -> bool | None:
    """Whether `answer` is the number `gold`; None if that takes a computer algebra system.

    Exact, in fractions; a decimal may be off by `TOLERANCE` (of the gold, if that is below 1). Also
    None if the gold is not a plain number.
    """
    gold_number = parse_number(gold)
    if gold_number is None:
        return None
    if is_malformed(answer):
        return False
    if _other_measure(gold, answer):
        return False
    number = parse_number(answer)
    if number is None:
        text = canonical(answer)
        if _is_another_thing(text):
            return False
        last = _EQUALS.split(text)[-1]  # 3+4=7: the last side is the answer
        if last == text or re.search(r"\{[^{}]*=", text):  # none, or the one of a \sum_{k=1}
            return None
        number = parse_number(last)
        if number is None:
            return False if is_malformed(last) or _is_another_thing(canonical(last)) else None
    return _same(gold_number, number)


_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_\{?([0-9]+)\}?")
_BASE_NAMES = {
    name: str(base)
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), start=2
    )
}
_BASE_NAME = re.compile(r"_\{?(?:\\text\{)?([a-z]+)\}*$")
_PLAIN_DIGITS = re.compile(r"[0-9A-Za-z,]+")


def _numerals_equal(gold: str, answer: str) -> bool | None:
    """A numeral with its base, as `52_8`: the same digits, and no other base named."""
    gold_numeral = _BASED.fullmatch(canonical(gold))
    if not gold_numeral or not re.search("[0-9]", gold_numeral[1]):
        return None
    text = _BASE_NAME.sub(
        lambda name: "_" + _BASE_NAMES.get(name[1], name[1]),
        re.sub("^[A-Za-z]=", "", canonical(answer)))
    numeral = _BASED.fullmatch(text)
    if numeral:
        digits, base = numeral.groups()
    elif _PLAIN_DIGITS.fullmatch(text):
        digits, base = text.replace(",", ""), gold_numeral[2]
    else:
        return False  # math-verify does not look at bases
    same_digits = digits.lower().lstrip("0") == gold_numeral[1].lower().lstrip("0")
    return same_digits and base == gold_numeral[2]


def _without_article(found: tuple[str, ...]) -> tuple[str, ...]:
    """"an ellipse" as "ellipse"; the letter of a choice ("A", "A, B") is not an article."""
    if len(found) > 1 and found[0] in ("a", "an", "the") and len(found[1]) > 1:
        return found[1:]
    return found


@lru_cache(maxsize=65_536)
def decide(gold: str, answer: str) -> str | None:
    """The outcome "right", "wrong", or "unparsable"; None if a worker must be asked."""
    if is_malformed(answer):
        return "unparsable"
    if canonical(gold) == canonical(answer):
        return "right"
    equal = numbers_equal(gold, answer)
    if equal is None and is_text(gold):
        equal = _without_article(words(gold)) == _without_article(words(answer))
    if equal is None:
        equal = _numerals_equal(gold, answer)
    # math-verify takes the set {3, 5} for the point or interval (3, 5)
    if equal is None and canonical(gold).startswith(("(", "[")) and canonical(answer)[:2] == r"\{":
        equal = False
    if equal is None and not _MORE_THAN_ONE.search(canonical(gold)):
        equal = False if _MORE_THAN_ONE.search(canonical(answer)) else None
    if equal is None and has_foreign_signs(answer) and not has_foreign_signs(gold):
        return "unparsable"
    return None if equal is None else "right" if equal else "wrong"


def is_plain(gold: str) -> bool:
    """Whether the gold is a number, words or a numeral with a base: sound without a parser."""
    return not is_malformed(gold) and (
        parse_number(gold) is not None or is_text(gold) or bool(_BASED.fullmatch(canonical(gold))))
