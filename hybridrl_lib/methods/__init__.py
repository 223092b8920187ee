"""Methods: one file each, named after it; this one finds them without importing torch."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ..fields import Section

if TYPE_CHECKING:
    from ..config import Settings
    from ..setups import Setup
    from .method import Method

METHODS = tuple(sorted(file.name for file in iter_modules(__path__) if file.name != "method"))


def method_class(name: str) -> "type[Method]":
    """The class of a method: the last one in its file, after those that it is built on."""
    module, base = (import_module(f".{file}", __package__) for file in (name, "method"))
    *_, last = (item for item in vars(module).values()
                if isinstance(item, type) and issubclass(item, base.Method)
                and item.__module__ == module.__name__)
    return last


def section_class(name: str) -> type[Section] | None:
    """The settings that a method has of its own; None if it has none."""
    return method_class(name).settings_section


def make_method(setup: "Setup", settings: "Settings") -> "Method":
    """The method of a setup, with its settings.

    Raises:
        UsageError: it cannot work with them.
    """
    return method_class(setup.method)(setup, settings)


__all__ = ["METHODS", "make_method", "method_class", "section_class"]
