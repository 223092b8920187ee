"""Runs the same cases in several processes, as `accelerate launch` starts them.

As a program it is one of the processes, and takes its cases as JSON.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(cases: list[dict], processes: int = 2, **environment: str) -> list[str]:
    """Runs cases in several processes, without a GPU; returns what each process printed.

    A case has `setup`, `experiment`, `settings`, and what happens during it: `stop` = [n, p] is a
    Ctrl-C in process p after step n, `fail` = p an error in process p.

    Raises:
        RuntimeError: a process did not end with exit code 0 (with `fail`: 1).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HYBRIDRL_SMOKE": "1",
              "CUDA_VISIBLE_DEVICES": "",
              "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    started = [subprocess.Popen(
        [sys.executable, __file__, json.dumps(cases)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)]
    try:
        texts = [one.communicate(timeout=900)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    wanted = 1 if any("fail" in case for case in cases) else 0
    if any(one.returncode != wanted for one in started):
        raise RuntimeError("\n".join(texts))
    return texts


@contextmanager
def instead(owner, name: str, make) -> Iterator[None]:
    """Inside, an attribute is replaced by what `make` makes of it."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def run_case(case: dict) -> None:
    """One case in this process; the gradient of every update goes into the run's folder."""
    import torch

    from hybridrl_lib.experiments.run import run
    from hybridrl_lib.learning.learner import Learner
    from hybridrl_lib.system import processes as distributed
    from hybridrl_lib.system.errors import Stopped, UserError
    from hybridrl_lib.training.observer import Observer
    from hybridrl_lib.training.trainer import Trainer

    gradients: list[torch.Tensor] = []

    def noting(step):
        def noted(self, *arguments, **more):  # the whole gradient, before it is clipped
            gradients.append(torch.cat([p.grad.detach().flatten().clone()
                                        for p in self.parameters if p.grad is not None]))
            return step(self, *arguments, **more)
        return noted

    def disturbed(after_step):
        def happens(trainer):
            if case.get("stop") == [trainer.step, distributed.rank()]:
                os.kill(os.getpid(), signal.SIGINT)
            if case.get("fail") == distributed.rank():
                raise UserError("This process has failed.")
            after_step(trainer)
        return happens

    with instead(Learner, "step", noting), instead(Trainer, "_after_step", disturbed):
        try:
            folder = run(case["setup"], experiment=case["experiment"],
                         settings=case.get("settings", ()), observer=Observer())
        except Stopped:
            if "stop" not in case:
                raise
            return
    if distributed.is_first():
        torch.save(gradients, folder.path / "gradients.pt")


def main() -> int:
    from hybridrl_lib import cli
    from hybridrl_lib.experiments import commands

    def command(arguments):
        from hybridrl_lib.system import processes as distributed

        commands.prepare_torch("tiny")
        for case in json.loads(sys.argv[1]):
            run_case(case)
        distributed.end()

    commands.run_command = command
    cli.COMMANDS["run"] = (command, *cli.COMMANDS["run"][1:])
    return cli.main(["run", "rl"])


if __name__ == "__main__":
    sys.exit(main())
