"""What this package asks for: its own metadata, so that no version is written down twice."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OURS = "hybridrl_lib"


def needed(package: str = OURS) -> list[Requirement]:
    """The packages that a package needs, without its extras.

    Raises:
        PackageNotFoundError: it is not installed, at most importable.
    """
    wanted = map(Requirement, metadata.requires(package) or ())
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def needed_python() -> SpecifierSet:
    """The Pythons that the library runs on.

    Raises:
        PackageNotFoundError: as above.
    """
    return SpecifierSet(metadata.metadata(OURS)["Requires-Python"] or "")


def installed(name: str) -> str:
    """The version of a package that is installed; empty if it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def unfit(requirement: Requirement) -> bool:
    """Whether a package is installed in a version that a requirement does not allow."""
    version = installed(requirement.name)
    return bool(version) and not requirement.specifier.contains(version, prereleases=True)
