"""The solutions to the notebooks' questions, run."""

import pytest
from notebook_files import SOLUTION, read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_problems_and_rewards", "02_grpo_step_by_step"])
def test_solutions_are_right(name, monkeypatch, capsys):
    """Protects the reader from a question whose own solution is called wrong."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    cells = read(name).cells
    namespace = {"preset": "tiny", "seed": 0, "experiment": "", "settings": ""}
    questions = 0
    for index, cell in enumerate(cells):
        if cell.cell_type != "code" or index < 3:
            continue
        source = cell.source
        if source.startswith("answer = None"):
            questions += 1
            solution = SOLUTION.search(cells[index + 1].source)[1]
            # behind what the cell imports and sets, just before it is checked
            source = solution + source.removeprefix("answer = None")
        exec(compile(source, f"{name}, cell {index}", "exec"), namespace)
    said = capsys.readouterr().out
    assert questions >= 2 and said.count("right: ") == questions, said
    assert "not yet" not in said and "your turn" not in said
