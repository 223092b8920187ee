"""What this package requires, from its own metadata."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OURS = "hybridrl_lib"


def needed(package: str = OURS) -> list[Requirement]:
    """The packages that a package requires, without its extras.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    wanted = map(Requirement, metadata.requires(package) or ())
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def needed_python() -> SpecifierSet:
    """The Python versions that the library supports.

    Raises:
        PackageNotFoundError: as above.
    """
    return SpecifierSet(metadata.metadata(OURS)["Requires-Python"] or "")


def installed(name: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def unfit(requirement: Requirement) -> bool:
    """Whether the installed version of a package does not satisfy a requirement."""
    version = installed(requirement.name)
    return bool(version) and not requirement.specifier.contains(version, prereleases=True)
