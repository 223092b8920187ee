"""Package faces whose names are imported when first used."""

from collections.abc import Callable
from importlib import import_module


def lazy(package: str, homes: dict[str, str]) -> tuple[Callable[[str], object], list[str]]:
    """`__getattr__` and `__all__` of a package.

    Args:
        package: its `__name__`.
        homes: {module below the package: the public names that it defines, separated by spaces}.
    """
    modules = {name: module for module, names in homes.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, sorted(modules)
