"""docs/tutorial.ipynb is committed without outputs, and it runs from top to bottom."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def test_the_tutorial_has_no_outputs_and_no_traces_of_a_machine():
    notebook = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))
    assert "pip install -e ." in "".join(notebook["cells"][0]["source"])


@pytest.mark.heavy  # it trains for 80 steps: 15 s on an idle core
def test_the_tutorial_runs_alone_and_prints_the_shapes(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # transformers without ipywidgets
    notebook = nbformat.read(TUTORIAL, as_version=4)
    options = {
        "resources": {"metadata": {"path": str(tmp_path)}},
        "extra_arguments": ["--log-level=ERROR"],
    }
    nbclient.NotebookClient(notebook, timeout=300, **options).execute()
    assert list(tmp_path.iterdir()) == []  # its files are in a temporary folder

    printed, pictures = {}, set()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed[cell.id] = printed.get(cell.id, "") + output.get("text", "")
            pictures |= {cell.id} if "image/png" in output.get("data", {}) else set()
            assert output.get("name") != "stderr", output.text
    assert pictures == {"draw-tokens", "draw-windows", "draw-split", "draw-tables", "draw-loss"}
    assert printed["encode"].startswith("58 characters, 17 tokens\n[464, 3290, ")
    counts = [int(line.split()[0]) for line in printed["strides"].splitlines()]
    assert counts == [13, 4, 2]  # windows with stride 1, 4 and 8
    assert printed["first-batch"].startswith("torch.Size([8, 4])\n")
    assert "sum           torch.Size([8, 4, 256])\nx is the sum: True" in printed["stem"]
    shown = next(cell for cell in notebook.cells if cell.id == "show-batch").outputs[0].data
    assert shown["text/plain"].startswith("step 0: 8 windows")
    assert shown["text/html"].count("<div class='row'>") == 8
    first, last = map(float, re.findall(r"loss ([\d.]+)", printed["fit"]))
    assert first > 10.5
    assert last < 7
