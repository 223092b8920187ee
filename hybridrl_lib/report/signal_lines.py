"""What RL can learn from the base model's answers, in one line per benchmark."""

from collections.abc import Sequence

from .statistics import group_signal, pass_at_k


def signal_lines(rows: Sequence[dict], group_size: int) -> list[str]:
    """A line a benchmark: what RL can learn from the sampled answers to training problems."""
    right: dict[str, list[int]] = {}
    for row in rows:
        if row["part"] == "train" and "samples" in row:
            right.setdefault(row["benchmark"], []).append(sum(row["samples"]["strict"]))
            samples = len(row["samples"]["strict"])
    lines = []
    for benchmark, counts in right.items():
        group = min(group_size, samples)
        solved, signal = (f(samples, counts, group).mean() for f in (pass_at_k, group_signal))
        lines.append(f"training problems of {benchmark}: Pass@{group} {solved:.1%}, groups of "
                     f"{group} with signal {signal:.1%}")
    return lines
