"""A verifier shared by the processes of one run."""

from collections import Counter
from collections.abc import Sequence

from ..system.processes import merged, my_part, together
from .verifier import Verdict, Verifier


class SharedVerifier:
    """A verifier whose work is divided among the processes of a run.

    A verdict may depend on a time limit, so each is computed once and used by all processes.
    """

    def __init__(self, own: Verifier):
        self.own, self.counts = own, Counter()

    def verify(self, golds: Sequence[str], texts: Sequence[str],
               finished: Sequence[bool]) -> list[Verdict]:
        """Like `Verifier.verify`; `counts` counts the verdicts of all processes."""
        places = my_part(len(texts))

        def judge() -> tuple[dict, Counter]:
            before = Counter(self.own.counts)
            verdicts = self.own.verify(*([values[i] for i in places]
                                         for values in (golds, texts, finished)))
            return dict(zip(places, verdicts, strict=True)), self.own.counts - before

        parts = together(judge)
        for _, counts in parts:
            self.counts.update(counts)
        found = merged([verdicts for verdicts, _ in parts])
        return [found[i] for i in range(len(texts))]
