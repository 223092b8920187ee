"""The warnings of a run, with advice."""

from IPython.display import Markdown, display

from ..records.health import DETECTORS, replay
from ..records.run_folder import RunFolder
from ..report.text import literal, markdown_table


def show_health(record: RunFolder) -> None:
    """Lists a run's warnings (`records/health.py`) by step."""
    metrics = record.lines("metrics.jsonl")
    if not metrics:
        print("Nothing was trained.")
        return
    alarms = replay(metrics, record.lines("probe.jsonl")).alarms
    if not alarms:
        print(f"No warnings: none of {len(DETECTORS)} detectors spoke up in {len(metrics)} steps.")
        return
    rows = [[alarm.name, *map(literal, (alarm.steps, alarm.sentence, alarm.advice))]
            for alarm in alarms]
    text = markdown_table(["warning", "steps", "seen when it began", "what to do"], rows)
    display(Markdown(text + "\nThe first one is closest to the cause; others may follow from it."))
