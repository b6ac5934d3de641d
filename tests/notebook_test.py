"""docs/quickstart.ipynb, cell by cell, in a process and a folder of its own."""

import json
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
# What Jupyter does with cells of plain Python, but for showing what comes out.
RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
for i, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
  if cell["cell_type"] == "code":
    exec(compile("".join(cell["source"]), f"cell {i}", "exec"), namespace)
"""


def cells():
  return json.loads(NOTEBOOK.read_text())["cells"]


def test_it_is_stored_without_outputs_and_magic():
  code = [cell for cell in cells() if cell["cell_type"] == "code"]
  assert code and all(cell["outputs"] == [] for cell in code)
  for i, cell in enumerate(code):
    compile("".join(cell["source"]), f"cell {i}", "exec")


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(tmp_path):
  # A second time too: what is done is not done twice.
  for _ in range(2):
    done = subprocess.run(
      [sys.executable, "-c", RUNNER, str(NOTEBOOK)],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
  assert (tmp_path / "runs" / "study" / "report.html").exists()
