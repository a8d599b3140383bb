"""From two folders of images to the table, as a user types it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from assay.io.shards import Shards
from vits import write_images, write_model

SPLITS = ("fit", "val", "probe_train", "probe_val")

FORBIDDEN = ("transformers", "timm", "torchvision")


def forbid(modules, project: Path) -> None:
    """Have importing some modules fail in whatever runs in a project, as if they were not there."""
    for name in modules:
        (project / "src" / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})\n")


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


@pytest.fixture(scope="module")
def project(new_project, run_command) -> Path:
    """A project in which two folders of images have come to the table."""
    project = new_project()
    write_model(project / "vit")
    write_images(project / "train", 12, seed=1)
    write_images(project / "val", 6, seed=2)
    ended = run_command(f"kedro run --env=images --params={typed()}", project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return project


def test_from_images_to_the_table(project):
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


def test_what_is_up_to_date_and_the_embedded_default_need_no_library(project, run_command):
    forbid(FORBIDDEN, project)
    ended = run_command(f"kedro run --env=images --params={typed()}", project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Nothing to do" in ended.stdout
    tiny = "digits.train_steps:1,digits.train_images:16,digits.n_fit:4,digits.n_val:4,layers:[0]"
    places = ",".join(f"shards.{split}:data/01_raw/digits/{split}" for split in SPLITS)
    ended = run_command(f"kedro run --pipeline=digits --params={tiny},{places}", project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(list((project / "data/01_raw/digits").glob("*/*/metadata.json"))) == 4
