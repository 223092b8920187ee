"""Methods: one file each, named after it; this one finds them without importing torch."""

from importlib import import_module
from typing import TYPE_CHECKING

from ..fields import Section

if TYPE_CHECKING:
    from ..config import Settings
    from ..setups import Setup
    from .method import Method

METHODS: dict[str, str] = {  # the method's file in this folder -> its class
    "staged": "Staged",
    "combined": "Combined",
    "relift": "ReLIFT",
    "superrl": "SuperRL",
    "hpt": "HPT",
    "sasr": "SASR",
    "chord": "CHORD",
    "luffy": "LUFFY",
    "uft": "UFT",
    "mifo": "MIFO",
    "prl": "PRL",
    "switching": "Switching",
    "raft": "RAFT",
    "pear": "PEAR",
    "bridge": "Bridge",
    "prefix_rft": "PrefixRFT",
}


def method_class(name: str) -> "type[Method]":
    """The class of a method."""
    return getattr(import_module(f".{name}", __package__), METHODS[name])


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
