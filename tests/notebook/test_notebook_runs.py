"""Runs the solutions to the notebooks' questions."""

import pytest
from notebook_files import SOLUTION, read

from hybridrl_lib import notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_problems_and_rewards", "02_grpo_step_by_step"])
def test_solutions_are_right(name, monkeypatch, capsys):
    """Protects the reader from a question whose own solution is rejected."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    cells, verdicts, check = read(name).cells, [], notebook.check

    def noted(question, answer, expected, *arguments, **more):
        capsys.readouterr()
        said = []
        for given in (answer, expected):
            check(question, given, expected, *arguments, **more)
            said.append(capsys.readouterr().out.partition(question)[0])
        verdicts.append((question, said[0] == said[1]))

    monkeypatch.setattr(notebook, "check", noted)
    namespace = {"preset": "tiny", "seed": 0, "experiment": "", "settings": ""}
    questions = 0
    for index, cell in enumerate(cells):
        if cell.cell_type != "code" or index < 3:
            continue
        source = cell.source
        if source.startswith("answer = None"):
            questions += 1
            solution = SOLUTION.search(cells[index + 1].source)[1]
            # after what the cell imports and sets, just before it is checked
            source = solution + source.removeprefix("answer = None")
        exec(compile(source, f"{name}, cell {index}", "exec"), namespace)
    assert len(verdicts) == questions >= 2
    assert not [question for question, right in verdicts if not right]
