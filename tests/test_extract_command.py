"""`assay extract`: a folder of images in, a folder of shards out, and nothing twice."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from assay.commands import main
from assay.io.datasets import find_shards
from assay.io.images import ImageLayout, Images
from assay.io.shards import Shards
from assay.io.shards.provenance import Provenance
from vits import write_images, write_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_model(root / "vit")
    write_images(root / "data", 6, seed=3, size=(48, 64))
    return root


@pytest.fixture
def here(sources, tmp_path, monkeypatch) -> Path:
    """The working directory, with a model, images and masks."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["extract", "data/images", *map(str, arguments)])


SAMPLE = ImageLayout(patch_size=8, pattern=None, examples=3, seed=1)

LEAST = ("--model", "vit", "--layers", "2,0", "--out", "out")


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_folder_is_recorded_once(here):
    ended = run(*LEAST, "--masks", "data/masks")
    assert ended.exit_code == 0, ended.output
    shards = Shards(find_shards("out"))
    assert (shards.layers, shards.n_examples, shards.has_labels) == ((0, 2), 6, True)
    assert shards.metadata.dataset == str(here / "data/images")
    assert f"Recorded out/{shards.path.name}" in ended.output
    assert f"shards.fit:{here / 'out'},layers:[0,2]" in ended.output
    assert "6 images of 16 patches, layers 0, 2 of dinov2 vit" in ended.output
    before = stamps(here / "out")
    ended = run(*LEAST, "--masks", "data/masks")
    assert ended.exit_code == 0
    assert f"Nothing to do: out/{shards.path.name}" in ended.output
    assert stamps(here / "out") == before
    assert os.listdir(here / "out") == [shards.path.name]
    (shards.path / "labels.bin").unlink()
    assert "Recorded" in run(*LEAST, "--masks", "data/masks").output
    assert Shards(find_shards("out")).has_labels
    ended = run(*LEAST, "--masks", "data/masks", "--force")
    assert "Recorded" in ended.output
    assert stamps(here / "out") != before


def test_labels_of_a_sample_are_made_of_its_own_masks_alone(here):
    ended = run(*LEAST, "--masks", "data/masks", "--examples", 3, "--seed", 1)
    assert ended.exit_code == 0, ended.output
    shards = find_shards("out")
    wanted = (shards / "labels.bin").read_bytes()

    def label(*options: str) -> Result:
        typed = ["labels", str(shards), "--masks", "data/masks", "--out", "labels.bin", "--force"]
        return CliRunner().invoke(main, [*typed, "--pattern", "*/*.png", *options])

    assert label().exit_code == 0, label().output
    assert Path("labels.bin").read_bytes() == wanted
    first = min((here / "data/masks").glob("*/*.png"))
    for number in range(9):  # they are drawn from too
        shutil.copy(first, first.with_name(f"0{number}x.png"))
    refused = label()
    assert refused.exit_code == 1
    assert "gives other masks than those that these shards were recorded with" in refused.output
    assert Path("labels.bin").read_bytes() == wanted
    drawn = Images(here / "data/images", SAMPLE).paths
    names = (str(path.relative_to(here / "data/images")) for path in drawn)
    Path("names.txt").write_text("\n".join(names))
    assert label("--names", "names.txt").exit_code == 0
    assert Path("labels.bin").read_bytes() == wanted


def test_what_has_changed_is_recorded_again_and_other_settings_want_another_place(here):
    assert run(*LEAST, "--masks", "data/masks").exit_code == 0
    assert 3 in Shards(find_shards("out")).labels()
    assert run(*LEAST, "--masks", "data/masks", "--void", "0", "--void", "3").exit_code == 0
    assert 3 not in Shards(find_shards("out")).labels()
    # A mask of another content.
    mask = here / "data/masks/a/000.png"
    os.utime(shutil.copy(here / "data/masks/b/001.png", mask), (1, 1))
    assert "Recorded" in run(*LEAST, "--masks", "data/masks", "--void", "0", "--void", "3").output
    ended = run("--model", "vit", "--layers", "1", "--out", "out")
    assert ended.exit_code == 1
    assert "out holds another recording" in ended.output
    assert "name another folder, or --force" in ended.output
    assert run("--model", "vit", "--layers", "1", "--out", "out", "--force").exit_code == 0
    assert Shards(find_shards("out")).layers == (1,)


def test_the_same_images_from_another_directory_and_by_another_path_are_the_same(here, monkeypatch):
    (here / "link").symlink_to(here / "data")
    (here / "elsewhere").mkdir()
    arguments = ["--masks", "data/masks", *LEAST]
    assert CliRunner().invoke(main, ["extract", "link/images", *arguments]).exit_code == 0
    assert Shards(find_shards("out")).metadata.dataset == str(here / "data/images")
    for folder, images in ((here, "vit/../data/images/"), (here / "elsewhere", "../link/images")):
        monkeypatch.chdir(folder)
        up = os.path.relpath(here)
        paths = ["--masks", f"{up}/link/masks", "--out", f"{up}/out", "--model", f"{up}/vit"]
        ended = CliRunner().invoke(main, ["extract", images, *paths, "--layers", "0,2"])
        assert ended.exit_code == 0, ended.output
        assert "Nothing to do" in ended.output


def test_shards_of_others_are_never_replaced(here, planted):
    shutil.copytree(planted[0], here / "out" / planted[0].name)
    before = stamps(here / "out")
    for force in ((), ("--force",)):
        ended = run(*LEAST, *force)
        assert ended.exit_code == 1
        assert "holds shards that this cannot replace (planted planted-tiny)" in ended.output
    assert stamps(here / "out") == before


def test_every_option_and_a_file_of_them(here):
    (here / "names.txt").write_text("a/000.png\na/002.png\nb/001.png\n")
    (here / "how.yml").write_text(
        yaml.safe_dump(
            {
                "model": "vit",
                "layers": [1],
                "geometry": "crop",
                "mapping": {0: 0, 1: 7, 2: 7, 3: 9},
                "batch_size": 2,
            }
        )
    )
    shutil.move(here / "data/masks", here / "data/ids")
    for name in ("a", "b"):
        shutil.move(here / "data/ids" / name, here / "data/ids" / f"{name}{name}")
    ended = run(
        *("--config", "how.yml", "--out", "out", "--geometry", "stretch", "--grid", "2x8"),
        *("--resample", "bilinear", "--precision", "bfloat16", "--no-cls-token"),
        *("--batch-size", 3, "--names", "names.txt", "--examples", 2, "--seed", 5),
        *("--masks", "data/ids", "--replace", "a/=aa/", "--replace", "b/=bb/"),
        *("--n-classes", 10, "--max-tokens-per-shard", 20, "--device", "cpu"),
    )
    assert ended.exit_code == 0, ended.output
    shards = Shards(find_shards("out"))
    assert (shards.n_examples, shards.layers, shards.metadata.cls_token) == (2, (1,), False)
    assert shards.metadata.max_tokens_per_shard == 20
    assert set(shards.labels().tolist()) <= {0, 7, 9}
    said = Provenance.parse(shards.metadata.data)
    assert said is not None
    geometry = said.geometry
    assert (geometry.geometry, geometry.grid, geometry.resample) == ("stretch", (2, 8), "bilinear")
    assert (said.precision, said.batch_size, said.examples, said.seed) == ("bfloat16", 3, 2, 5)
    ended = run(
        *("--model", "vit", "--layers", 0, "--out", "aspect", "--geometry", "aspect"),
        *("--grid", "4x4", "--pattern", "a/*"),
    )
    assert ended.exit_code == 0, ended.output
    assert Shards(find_shards("aspect")).n_examples == 3
    ended = run(*("--model", "vit", "--layers", 0, "--out", "crop", "--resize", "40"))
    said = Provenance.parse(Shards(find_shards("crop")).metadata.data)
    assert said is not None and said.geometry.resize == 40


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--out", "o"), 1, ["--model and --layers missing"]),
        (("--model", "vit", "--layers", "x", "--out", "o"), 2, ["wanted block numbers from 0"]),
        (("--model", "vit", "--layers", "3", "--out", "o"), 1, ["layer 3", "0 to 2"]),
        (("--model", "gone", "--layers", "0", "--out", "o"), 1, ["gone"]),
        ((*LEAST, "--replace", "x"), 2, ["wanted the text in an image's path"]),
        ((*LEAST, "--geometry", "stretch", "--resize", "9"), 1, ["resize 9 and geometry stretch"]),
        ((*LEAST, "--pattern", "*.gif"), 1, ["holds no image"]),
        ((*LEAST, "--examples", "7"), 1, ["7"]),
        ((*LEAST, "--masks", "gone"), 1, ["gone is no folder"]),
        ((*LEAST, "--masks", "data"), 1, ["data/a/000.png", "under the image's path"]),
        ((*LEAST, "--n-classes", "1"), 1, ["wrong options: n_classes"]),
        ((*LEAST, "--n-classes", "2", "--masks", "data/masks"), 1, ["n_classes = 2", "png"]),
        (("--config", "gone.yml", *LEAST), 1, ["gone.yml is missing"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_a_line_and_leaves_nothing(here, options, code, words):
    ended = run(*options)
    assert ended.exit_code == code, ended.output
    for word in words:
        assert word in ended.output
    assert not [name for name in os.listdir(here) if name not in {"vit", "data"}]
