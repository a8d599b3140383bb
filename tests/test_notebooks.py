"""The notebooks, run for real after a run of everything; and what they, the files, the page and
MLflow say is one and the same.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.cells.append(nbformat.v4.new_code_cell(sys.argv[2]))
NotebookClient(notebook, timeout=120, resources={"metadata": {"path": sys.argv[3]}}).execute()
print("".join(output["text"] for output in notebook.cells[-1].outputs))
"""


@pytest.fixture(scope="module")
def project(whole_run):
    project, ended = whole_run
    assert ended.returncode == 0, ended.stderr
    (project / "notebooks").mkdir(exist_ok=True)
    return project


def run_notebook(path: Path, project: Path, last: str) -> str:
    """Run a notebook in the project's folder of notebooks, then one more cell, and give what that
    prints.
    """
    command = [sys.executable, "-c", RUN, str(path), last, str(project / "notebooks")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_there_are_three_without_outputs():
    assert [path.stem for path in NOTEBOOKS] == [
        "a_class_closely",
        "ade20k_table",
        "layers_compared",
    ]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert all(cell.get("outputs", []) == [] for cell in cells)


def test_a_class_is_looked_at_closely(project):
    path = next(path for path in NOTEBOOKS if path.stem == "a_class_closely")
    printed = run_notebook(
        path, project, "print(len(pairs), len(shared) > 0, len(mine), examples['patch'].shape[1])"
    )
    assert printed == "8 True 6 6"


def test_layers_are_compared(project):
    path = next(path for path in NOTEBOOKS if path.stem == "layers_compared")
    printed = run_notebook(
        path, project, "print(list(by_layer.columns), len(gains), len(figure.data))"
    )
    assert printed == "[3, 5] 6 6"


def test_the_table_the_page_mlflow_and_the_notebook_say_the_same(project):
    """Every number of the paper's table, to the last digit that each of the four keeps."""
    (path,) = (path for path in NOTEBOOKS if path.stem == "ade20k_table")
    notebook = pd.DataFrame(
        json.loads(run_notebook(path, project, "print(table.to_json(orient='records'))"))
    )
    paper = pd.read_csv(project / "data/08_reporting/paper.csv")
    measures = ["nmse", "l0", "probe_r", "map", "purity_at_16", "coverage_at_0.3"]

    page = (project / "data/08_reporting/report.html").read_text()
    table = page[page.index('<h2 id="paper">') :]
    table = table[table.index("<tbody>") : table.index("</tbody>")]
    cells = [re.findall(r'data-sort="([^"]*)"', row) for row in table.split("<tr>")[1:]]
    on_page = pd.DataFrame(
        [[html.unescape(cell) for cell in row] for row in cells],
        columns=["method", "encoding", "k", "layer", *measures],
    )

    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    runs = mlflow.search_runs(experiment_names=["assay"])

    assert len(paper) == len(notebook) == len(on_page) == 6
    for row in paper.to_dict("records"):
        mine = notebook[notebook["encoding"] == row["encoding"]].to_dict("records")
        shown = on_page[on_page["encoding"] == row["encoding"]].to_dict("records")
        logged = runs[
            (runs["params.encoding"] == row["encoding"])
            & (runs["params.layer"] == str(row["layer"]))
        ]
        assert len(mine) == len(shown) == len(logged) == 1
        for measure in measures:
            # to_json keeps ten digits.
            assert mine[0][measure] == pytest.approx(row[measure], abs=1e-9)
            assert float(shown[0][measure]) == pytest.approx(row[measure], rel=1e-12)
            assert logged[f"metrics.{measure}"].item() == pytest.approx(row[measure], rel=1e-12)
