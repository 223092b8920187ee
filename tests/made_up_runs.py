"""Processes that leave a made-up record in place of `hybridrl run`, for commands that start it."""

import sys
from dataclasses import replace
from pathlib import Path

# Takes the arguments of `hybridrl run`.
RUN = f"""
import json, sys
sys.path.append({str(Path(__file__).parent)!r})
import synthetic_records
from hybridrl_lib.config import load_settings, settings_to_dict
from hybridrl_lib.records import NUMERICS_VERSION, RunFolder, experiment_folder
from hybridrl_lib.setups import get_setup
arguments = sys.argv[1:]
setup, seed = arguments[1], int(arguments[arguments.index("--seed") + 1])
experiment = arguments[arguments.index("--experiment") + 1]
chosen = arguments[arguments.index("--set") + 1:] if "--set" in arguments else []
settings = settings_to_dict(load_settings("tiny", chosen, setup=get_setup(setup)))
synthetic_records.GAIN.setdefault(setup, 2.5)
folder = experiment_folder(experiment)
synthetic_records.build_experiment(folder, [setup], [seed], {{"tiny_word": 8, "tiny_symbolic": 6}},
                                   {{"tiny_word": 4}}, epochs=2)
run = RunFolder(folder / setup / ("seed-0" if setup == "base" else f"seed-{{seed}}"))
rate = settings["rl"]["learning_rate"]
run.write("config.json", {{"setup": setup, "seed": seed, "preset": "tiny", "settings": settings,
                          "numerics_version": NUMERICS_VERSION}})
run.append("validation.jsonl", {{"step": 1, "strict": 0.9}})
run.append("validation.jsonl", {{"step": 2, "strict": 0.3 + (rate > 1.5e-4) * (setup == "rl") / 3}})
"""


def make_up_runs(monkeypatch, module) -> list[tuple[str, ...]]:
    """Makes `module.run_job` give such processes; returns the commands that they stand for."""
    commands, begin = [], module.run_job

    def noted(*arguments):
        job = begin(*arguments)
        command = job.command[job.command.index("hybridrl_lib.cli") + 1:]
        commands.append(command)
        return replace(job, command=(sys.executable, "-c", RUN, *command))

    monkeypatch.setattr(module, "run_job", noted)
    return commands
