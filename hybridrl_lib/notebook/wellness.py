"""Whether a run was well while it trained: its warnings, with what to do about them."""

from IPython.display import Markdown, display

from ..records.health import DETECTORS, replay
from ..records.run_folder import RunFolder
from ..report.text import literal, markdown_table


def show_health(record: RunFolder) -> None:
    """Lists a run's warnings (`hybridrl_lib/health.py`) by step, or says that there were none."""
    metrics = record.lines("metrics.jsonl")
    if not metrics:
        print("Nothing was trained, so nothing could go wrong in training.")
        return
    alarms = replay(metrics, record.lines("probe.jsonl")).alarms
    if not alarms:
        print(f"No warnings: none of {len(DETECTORS)} detectors spoke up in {len(metrics)} steps.")
        return
    rows = [[alarm.name, *map(literal, (alarm.steps, alarm.sentence, alarm.advice))]
            for alarm in alarms]
    text = markdown_table(["warning", "steps", "seen when it began", "what to do"], rows)
    display(Markdown(text + "\nThe first one is nearest to the cause; others may follow from it."))
