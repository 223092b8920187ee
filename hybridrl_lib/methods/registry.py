"""Makes the method of a setup: the class named like its settings, in the file named like it."""

from importlib import import_module

from ..config.methods import METHODS
from ..config.settings import Settings
from ..setups import Setup
from .method import Method


def method_class(name: str) -> type[Method]:
    """The class of a method, such as `CHORD` in `chord.py`."""
    return getattr(import_module(f".{name}", __package__), METHODS[name].algorithm)


def make_method(setup: Setup, settings: Settings) -> Method:
    """The method of a setup."""
    return method_class(setup.method)(setup, settings)
