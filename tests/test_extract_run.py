"""From two folders of images to the table, as a user types it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from assay.io.shards import Shards
from vits import write_images, write_model

SPLITS = ("fit", "val", "probe_train", "probe_val")

FORBIDDEN = ("transformers", "timm", "torchvision")


def run_without(modules, command: str, project: Path) -> subprocess.CompletedProcess[str]:
    """Run `kedro <command>` in a process in which importing some modules fails."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({list(modules)!r}));"
        f" sys.argv = ['kedro', *{command.split()!r}];"
        " from kedro.framework.cli.cli import main; main()"
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW", "KEDRO", "PYTEST_CURRENT"))
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=project,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def project(new_project) -> Path:
    project = new_project()
    write_model(project / "vit")
    write_images(project / "train", 12, seed=1)
    write_images(project / "val", 6, seed=2)
    return project


def typed(**changes: object) -> str:
    params = {
        "extract.model": "vit",
        "layers": "[2]",
        "images.path": "null",
        "kmeans.n_clusters": 4,
        "kmeans.max_iter": 2,
        "pca.topk": "[1,4]",
        "probe.certified_pairs": 2,
    }
    for split in SPLITS:
        folder = "train" if split in {"fit", "probe_train"} else "val"
        params[f"extract.{split}.images"] = f"{folder}/images"
        if split.startswith("probe"):
            params[f"extract.{split}.masks"] = f"{folder}/masks"
    return ",".join(f"{name}={value}" for name, value in (params | changes).items())


def test_from_images_to_the_table_and_nothing_twice(project, run_command):
    ended = run_command(f"kedro run --env=images --params='{typed()}'", project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = pd.read_csv(project / "data/08_reporting/baselines.csv")
    assert set(table["layer"]) == {2}
    assert (table["map"] > 0).all()
    assert (project / "data/08_reporting/gallery.json").is_file()
    for split in SPLITS:
        (folder,) = (project / "data/01_raw/images" / split).glob("[!.]*")
        assert Shards(folder).layers == (2,)
    assert not list((project / "data/01_raw/images").glob(".*"))
    (manifest,) = (project / "data/08_reporting/manifests").glob("*.json")
    said = json.loads(manifest.read_text())["shards"]["fit"]
    assert said["recorded_by"]["library"] == "transformers"
    again = run_without(FORBIDDEN, f"run --env=images --params={typed()}", project)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing to do" in again.stdout


def test_the_embedded_default_needs_none_of_it(new_project):
    project = new_project()
    shutil.rmtree(project / "conf")
    shutil.copytree(Path(__file__).parents[1] / "conf", project / "conf")
    tiny = "digits.train_steps:1,digits.train_images:16,digits.n_fit:4,digits.n_val:4"
    ended = run_without(FORBIDDEN, f"run --pipeline=digits --params={tiny}", project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(list((project / "data/01_raw/digits").glob("*/*/metadata.json"))) == 4
