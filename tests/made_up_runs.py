"""Made-up records in place of training, for the commands that start `hybridrl run`."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from synthetic_records import build_experiment

from hybridrl_lib.config.presets import get_setup, load_settings, settings_to_dict
from hybridrl_lib.experiments.jobs import Job
from hybridrl_lib.records.folders import experiment_folder
from hybridrl_lib.records.run_folder import NUMERICS_VERSION, RunFolder, run_folder


def ended(code: int) -> SimpleNamespace:
    """A process that has already ended."""
    return SimpleNamespace(returncode=code, poll=lambda: code, wait=lambda: code,
                           interrupt=lambda: None, end=lambda: None)


@dataclass
class MadeUp:
    """What was started."""

    commands: list[tuple[str, ...]] = field(default_factory=list)
    fails: dict[str, str] = field(default_factory=dict)

    def start(self, job: Job, environment: dict[str, str], slot: int) -> SimpleNamespace:
        """Stands in for the process of a job."""
        words = job.command[job.command.index("hybridrl_lib.cli") + 1:]
        self.commands.append(words)
        job.log.write_text(self.fails.get(job.name, ""), encoding="utf-8")
        if job.name in self.fails:
            return ended(1)
        make_up(words)
        return ended(0)


def make_up_runs(monkeypatch) -> MadeUp:
    """Lets `compare` and `sweep` find made-up records where they would train."""
    made_up = MadeUp()
    monkeypatch.setattr("hybridrl_lib.experiments.plan.start_for",
                        lambda gpus, cluster: made_up.start)
    return made_up


def make_up(words: tuple[str, ...]) -> RunFolder:
    """Leaves the record of `hybridrl run ...`."""
    setup, seed = words[1], int(words[words.index("--seed") + 1])
    experiment = words[words.index("--experiment") + 1]
    chosen = words[words.index("--set") + 1:] if "--set" in words else ()
    settings = settings_to_dict(load_settings("tiny", chosen, setup=get_setup(setup)))
    folder = experiment_folder(experiment)
    build_experiment(folder, [setup], [seed], {"tiny_word": 8, "tiny_symbolic": 6},
                     {"tiny_word": 4}, epochs=2)
    run = run_folder(folder, setup, 0 if setup == "base" else seed)
    rate = settings["rl"]["learning_rate"]
    run.write("config.json", {"setup": setup, "seed": seed, "preset": "tiny",
                              "settings": settings, "numerics_version": NUMERICS_VERSION})
    run.append("validation.jsonl", {"step": 1, "strict": 0.9})
    run.append("validation.jsonl",
               {"step": 2, "strict": 0.3 + (rate > 1.5e-4) * (setup == "rl") / 3})
    return run
