"""How a setting is declared, checked, and written; used by `sections.py` and `methods.py`.

A section of settings is a frozen dataclass whose fields are made by `setting`; building one casts
every value to the field's type and refuses what cannot be, naming the key and what it takes.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml

from ..system.errors import UsageError, nearest


def setting(default: Any, meaning: str, source: str = "chosen here", *, choices: tuple = (),
            at_least: float | None = None, at_most: float | None = None,
            above: float | None = None, below: float | None = None) -> Any:
    """A dataclass field with what a reader has to know about it.

    Args:
        default: its value when neither preset nor `--set` gives one.
        meaning: what it does, with its unit.
        source: where the value or the quantity comes from.
        choices: the words it takes; empty for anything of its type.
        at_least, at_most, above, below: bounds of the number, or of each number of a tuple.
    """
    return field(default=default, metadata={
        "meaning": meaning, "source": source, "choices": choices,
        "at_least": at_least, "at_most": at_most, "above": above, "below": below})


@dataclass(frozen=True)
class Section:
    """One section of the settings; subclasses add fields and, in `check`, rules across fields."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        for name, kind in field_types(type(self)).items():
            limits = self.__dataclass_fields__[name].metadata
            value = cast(f"{self.section}.{name}", kind, getattr(self, name), limits)
            object.__setattr__(self, name, value)  # frozen for users, who see the cast value
        self.check()

    def check(self) -> None:
        """Refuses values that are fine alone and impossible together."""

    def refuse(self, name: str, why: str) -> None:
        """Raises the UsageError for the value of one field."""
        raise refusal(f"{self.section}.{name}", getattr(self, name), why)


def field_types(cls: type) -> dict[str, Any]:
    """The type of each setting of a section, in the order of declaration."""
    hints = get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in fields(cls)}


def parse_text(key: str, kind: Any, text: str) -> Any:
    """The value that `text` after `key=` stands for, before it is checked.

    Text settings keep the text as it is (a path may hold `:` or `#`); all others are read as YAML.
    """
    if kind is str or str in get_args(kind) and get_origin(kind) is not tuple:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise refusal(key, text, f"give {expectation(kind, {})}") from None


def cast(key: str, kind: Any, value: Any, limits: Any) -> Any:
    """`value` as the field's type.

    Raises:
        UsageError: it is none, or it is outside the field's limits.
    """
    if type(None) in get_args(kind):
        if value is None or str(value).lower() in ("none", "null", ""):
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        return tuple(cast(key, get_args(kind)[0], item, limits) for item in as_items(value))
    if kind is bool:
        result = value if isinstance(value, bool) else None
    elif kind is str:
        result = value if isinstance(value, str) and value else None
    else:
        result = as_number(kind, value)
    if result is None or not within(result, limits):
        guess = nearest(str(value), limits["choices"])
        hint = f", did you mean {guess}" if guess else ""
        raise refusal(key, value, f"give {expectation(kind, limits)}{hint}")
    return result


def as_items(value: Any) -> list:
    """The items of a list setting: a list, one value alone, or text such as `10,20` or `()`."""
    if value is None:
        return []
    if isinstance(value, str):
        return [item.strip() for item in value.strip("()[] ").split(",") if item.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def as_number(kind: type, value: Any) -> int | float | None:
    """The finite number of type int or float that `value` stands for, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)  # also text: YAML 1.1 takes 1e-4, which has no dot, for a word
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return None
    return kind(number)


def within(value: Any, limits: Any) -> bool:
    """Whether a value keeps to the limits that its field declares."""
    at_least, at_most, above, below = (limits[name] for name in BOUNDS)
    return ((not limits["choices"] or value in limits["choices"])
            and (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
            and (above is None or value > above) and (below is None or value < below))


BOUNDS = ("at_least", "at_most", "above", "below")


def expectation(kind: Any, limits: Any) -> str:
    """What a field takes, in words, for an error."""
    if limits.get("choices"):
        return "one of " + ", ".join(limits["choices"])
    several = get_origin(kind) is tuple
    optional = " or none" if type(None) in get_args(kind) else ""
    plain = next((k for k in (bool, int, float, str) if k is kind or k in get_args(kind)), str)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[plain]
    bounds = [f"{name.replace('at_', 'of at ')} {limits[name]:g}" for name in BOUNDS
              if limits.get(name) is not None]
    return ("one or more, with commas between: " if several else "") + words + (
        " " + " and ".join(bounds) if bounds else "") + optional


def refusal(key: str, value: Any, why: str) -> UsageError:
    """The error for an impossible value of a setting."""
    return UsageError(f"{key} cannot be {show(value)!r}: {why}.")


def show(value: Any) -> str:
    """A setting's value as it is written after `--set key=`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return ",".join(show(item) for item in value) or "()"
    return str(value)
