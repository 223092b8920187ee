"""What a method's notebook shows: the library's own code, and the columns that the method wrote."""

import json

import pytest

from hybridrl_lib import notebook
from hybridrl_lib.methods.relift import ReLIFT
from hybridrl_lib.notebook import curves, methods
from hybridrl_lib.records.run_folder import RunFolder


@pytest.fixture()
def drawn(monkeypatch):
    """The panels of every figure that is shown, as (title, number of points, dashed lines)."""
    panels = []
    monkeypatch.setattr(methods, "show", lambda figure, alt: panels.extend(
        (axes.get_title(loc="left"), len(axes.lines[0].get_xdata()),
         *(line.get_ydata()[0] for line in axes.lines[1:] if line.get_linestyle() == "--"))
        for axes in figure.axes if axes.lines))
    return panels


def record(folder, setup, rows, **settings):
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i + 1, "stage": "rl", "epoch": i / 4, **row}) + "\n"
        for i, row in enumerate(rows)), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"setup": setup, "settings": settings}),
                                        encoding="utf-8")
    return RunFolder(folder)


def test_the_methods_own_columns_are_drawn(tmp_path, drawn, capsys):
    """A method's own columns, the requested first, thresholds dashed; without any, a message."""
    rows = [{"relift/buffer": i, "relift/taught": 2 * i, "lambda/rl": 1.0, "other/x": 3,
             **({"relift/once": 1} if i == 2 else {})} for i in range(5)]
    notebook.plot_diagnostics(record(tmp_path, "relift_code", rows), "lambda/rl", "not/there")
    assert drawn == [("lambda/rl", 5), ("relift/buffer", 5), ("relift/taught", 5)]
    drawn.clear()
    rows = [{"switching/entropy": 0.5, "switching/loss_fall": 0.1, "switching/switches": 0}] * 2
    notebook.plot_diagnostics(record(tmp_path, "switching", rows, switching={
        "entropy": 0.05, "loss_fall": None}))
    assert drawn == [("switching/entropy", 2, 0.05), ("switching/loss_fall", 2),
                     ("switching/switches", 2)]
    drawn.clear()
    rows = [{"uft/hinted": 0.9, "kl/anchor": 0.1, "entropy_control/coefficient": 0.2}] * 2
    notebook.plot_diagnostics(record(tmp_path, "uft", rows, uft={"hinted": 0.6}))
    assert drawn == [("entropy_control/coefficient", 2), ("kl/anchor", 2), ("uft/hinted", 2)]
    drawn.clear()
    for setup in ("sft", "a setup that is gone"):
        notebook.plot_diagnostics(record(tmp_path, setup, [{"reward": 0.5}] * 3))
        assert drawn == [] and capsys.readouterr().out.strip()


def test_the_code_that_is_shown_is_the_librarys(monkeypatch):
    """Nothing is copied into a notebook, where it would become outdated."""
    shown = []
    monkeypatch.setattr(methods, "display", shown.append)
    notebook.show_source(ReLIFT.compose, curves.show)
    assert len(shown) == 2
    assert shown[0].data.startswith("```python\ndef compose(self, step")
    assert "\n    updates = super()" in shown[0].data
    assert shown[1].data.endswith("\n```")
