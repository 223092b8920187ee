"""Executes the committed notebooks in place: `python -m hybridrl_lib.experiments.execute`.

They run in order at one preset. Timings, widget state, papermill's metadata, and the cell with the
injected parameters are removed; outputs and pictures stay. A notebook is only replaced if all its
cells ran.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from ..records.files import write_whole
from ..records.folders import project_folder
from .reproduce import write_kernel

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LARGEST = 500_000  # bytes of a committed notebook
INJECTED = "injected-parameters"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what differs between runs or machines."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    notebook.cells = [cell for cell in notebook.cells
                      if INJECTED not in cell.metadata.get("tags", ())]
    number = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            number += cell.execution_count is not None
            cell.execution_count = None if cell.execution_count is None else number
            cell.outputs = [_clean_output(output, number) for output in _joined(cell.outputs)]
    return notebook


def _joined(outputs: list) -> list:
    """Merges consecutive pieces of one stream."""
    joined: list = []
    for output in outputs:
        if (joined and output.output_type == "stream" == joined[-1].output_type
                and output.name == joined[-1].name):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _clean_output(output, number: int):
    if "metadata" in output:
        output.metadata = nbformat.from_dict({})
    if output.output_type == "execute_result":
        output.execution_count = number
    return output


def execute(path: Path, preset: str) -> None:
    """Runs one notebook through papermill and replaces it with the result.

    Raises:
        papermill.PapermillExecutionError: a cell failed; the notebook is unchanged.
    """
    from papermill import execute_notebook

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / path.name
        # The kernel of this interpreter, not one of the same name in the user's folder.
        write_kernel(Path(folder) / "jupyter")
        os.environ |= {"JUPYTER_PATH": str(Path(folder) / "jupyter"),
                       "IPYTHONDIR": str(Path(folder) / "ipython"),
                       "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        os.environ.setdefault("HYBRIDRL_HEADLESS", "0")  # keeps the last picture of the live view
        execute_notebook(path, out, parameters={"preset": preset}, kernel_name="python3",
                         cwd=path.parent, progress_bar=False)
        notebook = clean(nbformat.read(out, as_version=4))
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) >= LARGEST:
        raise SystemExit(f"{path.name} would have {len(text.encode()) / 1000:.0f} kB; the limit is "
                         f"{LARGEST / 1000:.0f} kB; show fewer or smaller pictures.")
    write_whole(path, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hybridrl_lib.experiments.execute", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python -m hybridrl_lib.experiments.execute 02_grpo_step_by_step")
    parser.add_argument("names", nargs="*", help="notebooks, such as 11_rl; default: all")
    parser.add_argument("--preset", default="tiny", help="default: tiny")
    chosen = parser.parse_args(arguments)
    folder = project_folder() / "notebooks"
    paths = sorted(folder.glob("*.ipynb"))
    wanted = {Path(name).stem for name in chosen.names}
    missing = wanted - {path.stem for path in paths}
    if missing:
        print(f"There is no notebook {', '.join(sorted(missing))} in {folder.name}; choose from "
              + ", ".join(path.stem for path in paths) + ".", file=sys.stderr)
        return 2
    for path in paths:
        if wanted and path.stem not in wanted:
            continue
        began = time.monotonic()
        execute(path, chosen.preset)
        print(f"{path.name}: {time.monotonic() - began:.0f} s, "
              f"{path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
