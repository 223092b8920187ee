"""Seeds for each purpose of a run, derived from the run's seed."""

import zlib


def seed_of(*parts: int | str) -> int:
    """A seed for one purpose of one run, from the run's seed and the purpose's names."""
    return zlib.crc32("/".join(map(str, parts)).encode())
