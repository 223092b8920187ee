"""Package faces whose names are imported when first used."""

from collections.abc import Callable
from importlib import import_module


def lazy(package: str, homes: dict[str, str]) -> tuple[Callable[[str], object], list[str]]:
    """`__getattr__` and `__all__` of a package.

    Args:
        package: its `__name__`.
        homes: {public name: the module below the package that defines it}.
    """
    def __getattr__(name: str) -> object:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, sorted(homes)
