"""docs/dpo.ipynb: its cells run, its outputs are there and are those of the README, and its code
stays in the files of the repository.

    pytest tests/test_notebook.py

Neither Jupyter nor a network is needed: a notebook is a JSON file. Cells with a picture are left
out where matplotlib is missing.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
import train_sft

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "docs/dpo.ipynb").read_text(encoding="utf-8"))
CELLS = NOTEBOOK["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

# Runs the cells whose sources it reads as JSON, one after the other in one namespace, as a kernel
# does. Image stands for IPython's, which shows the file; nothing may connect to anything, and what
# a cell would start as another process is printed instead.
RUNNER = """
import json, socket, subprocess, sys, types
def connect(*_):
    raise AssertionError("a cell uses the network")
def image(path):
    assert open(path, "rb").read(4) == b"\\x89PNG", path
socket.socket.connect = connect
subprocess.run = lambda words, **_: print("started:", *words)
sys.modules["IPython.display"] = types.SimpleNamespace(Image=image)
namespace = {"__name__": "__main__"}
for n, cell in enumerate(json.load(sys.stdin), 1):
    print(f"cell {n}", flush=True)
    exec(compile(cell, f"cell {n}", "exec"), namespace)
"""


def run_cells(cells, folder, **variables):
    """A fresh process that runs cells (texts) in a folder, as subprocess.run returns it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | variables
    return subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps(cells), cwd=folder,
                          env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A folder with an SFT model that has learnt a little, from which the notebook's run starts."""
    folder = tmp_path_factory.mktemp("notebook")
    train_sft.main(["--out", f"{folder}", "--steps", "90", "--reviews", "2880"])
    return folder


# ------------------------------------------------------------------------------------------------
# The cells run
# ------------------------------------------------------------------------------------------------


def test_all_cells_run_one_after_the_other_in_a_copy_of_the_repository(short_run):
    """In the folder where Jupyter starts them, docs/, with a short run for the default one."""
    cells = CODE
    if not importlib.util.find_spec("matplotlib"):
        cells = [cell for cell in CODE if "plt" not in cell]
        cells.insert(2, "args = train_dpo.parse_args(FLAGS)")       # the rest of such a cell
    flags = f"--out {short_run} --steps 4 --prefixes 60 --eval-prompts 32"
    done = run_cells(cells, ROOT / "docs", NOTEBOOK_FLAGS=flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert f"cell {len(cells)}\n" in done.stdout
    if importlib.util.find_spec("matplotlib"):
        assert "started:" not in done.stdout            # nothing is missing
        assert (short_run / "curves.png").exists() and (short_run / "reward.png").exists()


def test_without_a_copy_of_the_repository_the_first_cell_clones_one(tmp_path):
    """Git and pip are not started here; the clone is the empty folder that is there already."""
    done = run_cells(CODE[:1], tmp_path)
    assert "write the address of the repository into REPOSITORY" in done.stderr
    told = CODE[0].replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/dpo"')
    assert told != CODE[0]
    clone = "started: git clone --depth 1 https://example.org/dpo dpo"
    assert clone in run_cells([told], tmp_path).stdout      # but there is no folder to enter
    (tmp_path / "dpo").mkdir()
    again = run_cells([told, "print(os.getcwd() == sys.path[0], Path.cwd().name)"], tmp_path)
    assert "True dpo" in again.stdout and clone not in again.stdout


# ------------------------------------------------------------------------------------------------
# What is in the file
# ------------------------------------------------------------------------------------------------


def test_every_code_cell_is_preceded_by_a_question():
    for before, cell in zip(CELLS, CELLS[1:]):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown" and "?" in "".join(before["source"])


def test_cells_are_plain_python_without_functions_of_their_own():
    """The code stays in the repository's files: no cell defines a function or a class, and none
    gives another meaning to a name that is imported."""
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(cell))]
    imported = {alias.asname or alias.name.split(".")[0] for node in nodes
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert {"train_dpo", "dpo_loss", "dpo_gradient", "pack"} <= imported
    for node in nodes:
        assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)), ast.unparse(node)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in imported, node.id


def test_every_code_cell_has_been_run_in_order_and_its_output_is_in_the_file():
    """None of them failed or warned, and pictures are there as pictures, which GitHub shows; SVG it
    does not show reliably."""
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    for cell, source in zip(cells, CODE):
        outputs = cell["outputs"]
        assert outputs, source
        for output in outputs:
            assert output["output_type"] in ("stream", "execute_result"), source
            assert output.get("name", "stdout") == "stdout", output["text"]
        assert ("Image(" in source) == any("image/png" in output.get("data", {})
                                           for output in outputs), source
    assert (ROOT / "docs/dpo.ipynb").stat().st_size < 300_000


def test_the_output_is_that_of_the_run_that_the_readme_shows():
    """The two lines of its table, below the legend as it is now. If they differ, run the notebook
    again."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(?:sft|dpo) +\S+ \+-.*$", readme, re.M)
    printed = "".join("".join(output.get("text", "")) for cell in CELLS
                      for output in cell.get("outputs", []))
    assert len(rows) == 2 and all(row in printed for row in rows), rows
    assert train_dpo.LEGEND in printed


def test_links_of_the_notebook_lead_to_files():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for target in links:
        assert (ROOT / "docs" / target).exists(), target
