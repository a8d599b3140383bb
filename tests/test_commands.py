"""The `assay` command: what it prints, what it writes, and how it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

import assay
from assay.commands import main
from assay.io.images import ImageLayout, Images
from assay.io.shards import Shards
from assay.io.shards.provenance import Provenance
from saes import write_sparsify
from shards import edit_json, make_shards


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two examples of 2 x 2 patches, one layer, one a shard."""
    return make_shards(
        tmp_path / "shards",
        content_tokens_per_example=4,
        n_examples=2,
        max_tokens_per_shard=10,
        pixel_agg=None,
    )


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """COCO-Stuff's ids, 255 for void."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name, rows in (("a.png", [[0, 7], [181, 255]]), ("b.png", [[7, 7], [7, 7]])):
        Image.fromarray(np.kron(rows, np.ones((4, 4))).astype(np.uint8)).save(folder / name)
    return folder


def run_alone(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(assay.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_as_a_user_types_it(tmp_path: Path) -> None:
    ended = run_alone("-m", "assay", "--help", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("Usage: assay [OPTIONS] COMMAND")
    assert "labels" in ended.stdout


def test_labels_in_a_process_without_torch_and_kedro(
    tmp_path: Path, shards: Path, masks: Path
) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'kedro', 'mlflow', 'pandas',"
        " 'sklearn']));from assay.commands import main; main()"
    )
    arguments = [
        "labels",
        str(shards),
        "--masks",
        str(masks),
        "--out",
        "labels.bin",
        "--patch-size",
        "4",
    ]
    ended = run_alone("-c", program, *arguments, "--void", "255", "--offset", "1", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "labels.bin").read_bytes() == bytes([1, 8, 182, 0, 8, 8, 8, 8])


def test_labels_by_configuration_and_options(shards: Path, masks: Path) -> None:
    config = shards.parent / "coco.yml"
    config.write_text(
        "{patch_size: 2, resize: 5, crop: true, void: [255], offset: 1, grid: [2, 2]}"
    )
    out = shards / "labels.bin"
    ended = run(
        "labels", shards, "--masks", masks, "--out", out, "--config", config, "--resize", "4x4"
    )
    assert ended.exit_code == 0, ended.output
    assert Shards(shards).labels().tolist() == [1, 8, 182, 0, 8, 8, 8, 8]
    lines = [line.split() for line in ended.output.splitlines()]
    assert ["0", "(void)", "1", "12.50%"] in lines
    assert ["8", "5", "62.50%"] in lines
    assert f"will be written to {out}" in ended.output
    assert f"Wrote uint8 (2, 4) to {out}" in ended.output

    again = run(
        "labels", shards, "--masks", masks, "--out", out, "--config", config, "--resize", "4"
    )
    assert again.exit_code == 1
    assert (
        again.output
        == f"Error: {out} exists already and is not replaced; choose another name, or --force\n"
    )
    forced = run(
        "labels",
        shards,
        "--masks",
        masks,
        "--out",
        out,
        "--config",
        config,
        "--resize",
        "4",
        "--offset",
        2,
        "--force",
    )
    assert forced.exit_code == 0, forced.output
    assert Shards(shards).labels().tolist() == [2, 9, 183, 0, 9, 9, 9, 9]


def recorded(root: Path, **changes: Any) -> Path:
    """Two examples of 4 patches of 4 pixels, on a grid of their own each."""
    geometry = {"patch_size": 4, "n_patches": 4, "geometry": "aspect"}
    files = {"n": 2, "sha256": "0"}
    said = {"model": {}, "geometry": geometry, "precision": "float32", "batch_size": 1}
    return make_shards(
        root,
        content_tokens_per_example=4,
        n_examples=2,
        max_tokens_per_shard=10,
        data=Provenance.model_validate(said | {"images": files} | changes).to_text(),
    )


def test_masks_lie_as_images_did_when_they_were_recorded_here(tmp_path: Path) -> None:
    shards, masks, out = recorded(tmp_path / "shards"), tmp_path / "masks", tmp_path / "out.bin"
    masks.mkdir()
    wide = np.kron([[1, 2, 3, 4]], np.ones((3, 3))).astype(np.uint8)
    for name, mask in (("a.png", wide), ("b.png", wide.T)):
        Image.fromarray(mask).save(masks / name)
    ended = run("labels", shards, "--masks", masks, "--out", out)
    assert ended.exit_code == 0, ended.output
    assert list(out.read_bytes()) == [1, 2, 3, 4] * 2
    for option in (("--crop",), ("--patch-size", 2), ("--geometry", "stretch")):
        refused = run("labels", shards, "--masks", masks, "--out", out, "--force", *option)
        assert refused.exit_code == 1
        assert "the shards were recorded with" in refused.output
        assert "leave it out, and it is as recorded" in refused.output


def test_masks_of_a_sample_are_those_of_its_images(tmp_path: Path) -> None:
    shards = recorded(tmp_path / "shards", examples=2, seed=1)
    masks, out = tmp_path / "masks", tmp_path / "out.bin"
    masks.mkdir()
    for number in range(9):
        Image.fromarray(np.full((8, 8), number + 1, np.uint8)).save(masks / f"{number}.png")
        (tmp_path / f"{number}.jpg").touch()
    ended = run("labels", shards, "--masks", masks, "--out", out)
    assert ended.exit_code == 0, ended.output
    images = Images(tmp_path, ImageLayout(patch_size=4, examples=2, seed=1))
    wanted = [int(path.stem) + 1 for path in images.paths for _ in range(4)]
    assert list(out.read_bytes()) == wanted


@pytest.mark.parametrize(("geometry", "doubted"), [("aspect", False), ("stretch", True)])
def test_masks_of_dinov3_lie_as_saev_places_images(
    tmp_path: Path, masks: Path, geometry: str, doubted: bool
) -> None:
    shards = make_shards(
        tmp_path / "shards",
        content_tokens_per_example=4,
        n_examples=2,
        max_tokens_per_shard=10,
        family="dinov3",
        ckpt="dinov3_vits16",
    )
    ended = run(
        *("labels", shards, "--masks", masks, "--out", tmp_path / "out.bin", "--patch-size", 4),
        *("--void", 255, "--offset", 1, "--geometry", geometry),
    )
    assert ended.exit_code == 0, ended.output
    said = "Warning: dinov3_vits16 is a DINOv3, for which saev stretches each image"
    assert (said in ended.stderr) == doubted


def test_wide_labels_say_what_they_are_called_in_a_folder_of_shards(
    shards: Path, masks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.bin"
    common = ("labels", shards, "--masks", masks, "--out", out, "--patch-size", 4, "--void", 255)
    ended = run(*common, "--offset", 200)
    assert ended.exit_code == 0, ended.output
    assert np.fromfile(out, dtype="<u2").tolist() == [200, 207, 381, 0, 207, 207, 207, 207]
    assert "labels above 255 go by the name labels16.bin" in ended.output
    ended = run(*common[:4], "--out", shards / "labels.bin", *common[6:], "--offset", 200)
    assert f"Wrote uint16 (2, 4) to {shards / 'labels16.bin'}" in ended.output
    assert Shards(shards).labels().tolist() == [200, 207, 381, 0, 207, 207, 207, 207]
    assert "labels16.bin" in run("shards", "verify", shards).output


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 1, "patch_size: Field required"),
        (("--patch-size", "3"), 1, "8 x 8 pixels; wanted 6 x 6"),
        (("--patch-size", "4", "--void", "255"), 1, "id 0 has no label"),
        (("--patch-size", "4", "--n-classes", "200"), 1, "label 255 is found"),
        (("--patch-size", "4", "--grid", "4"), 2, "wanted HxW"),
        (("--patch-size", "4", "--resize", "4x4x4"), 2, "wanted N or HxW"),
        (("--patch-size", "4", "--pattern", "*.tif"), 1, "has 0 masks (*.tif)"),
        (("--config", "missing.yml"), 1, "missing.yml is missing; wanted a YAML file of a mask"),
        (("--patch-size", "4", "--names", "no.txt"), 1, "no.txt is missing; wanted a list"),
        (("--config", "list.yml"), 1, "holds list, wanted names and values"),
        (("--config", "broken.yml"), 1, "broken.yml is no YAML"),
        (("--config", "deep.yml"), 1, "deep.yml is no YAML: it is nested more than 20 deep"),
        (("--config", "twice.yml"), 1, "twice.yml is no YAML: the key 'patch_size' is there twice"),
        (("--config", "inner.yml"), 1, "inner.yml is no YAML: the key '1' is there twice"),
        (("--config", "latin.yml"), 1, "latin.yml is no YAML: 'utf-8' codec"),
    ],
)
def test_labels_fail_in_a_line_and_leave_nothing(
    shards: Path,
    masks: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(shards.parent)
    Path("list.yml").write_text("[1]")
    Path("broken.yml").write_text("{a: [")
    Path("deep.yml").write_text("a: " + "[" * 3000 + "]" * 3000)
    Path("twice.yml").write_text("patch_size: 4\nvoid: [255]\npatch_size: 2\n")
    Path("inner.yml").write_text("{patch_size: 4, mapping: {1: 2, 0x1: 3}}")
    Path("latin.yml").write_bytes("patch_size: 4 # Größe".encode("latin-1"))
    out = shards / "labels.bin"
    ended = run("labels", shards, "--masks", masks, "--out", out, *options)
    assert ended.exit_code == code
    assert said in ended.output
    if code == 1:
        assert (
            len([line for line in ended.output.splitlines() if not line.startswith("Labels of")])
            <= 2
        )
    assert not out.exists()


def test_verify_prints_a_verdict_a_shard(shards: Path) -> None:
    ended = run("shards", "verify", shards)
    assert ended.exit_code == 0, ended.output
    lines = [line.split() for line in ended.output.splitlines()]
    assert ["acts000000.bin", "1", "ok"] in lines
    assert ["acts000001.bin", "1", "ok"] in lines
    assert ended.output.endswith(f"{shards}: ok\n")


def test_verify_fails_if_one_folder_of_several_is_bad(shards: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad [red]"
    shutil.copytree(shards, bad)
    array = np.fromfile(bad / "acts000001.bin", dtype="<f4")
    array[-1] = np.nan
    array.tofile(bad / "acts000001.bin")
    (bad / "labels.bin").write_bytes(bytes([0, 0, 1, 9] * 2))
    ended = run("shards", "verify", bad, shards, tmp_path / "missing")
    said = " ".join(ended.output.split())
    assert ended.exit_code == 1
    assert "BAD: NaN in example 1, content token 3, layer 5" in said
    assert "labels 0 to 9, 3 of them; patches of each: 0: 4, 1: 2, 9: 2" in said
    assert f"{bad}: BAD" in said
    assert f"{shards}: ok" in said
    assert f"{tmp_path / 'missing'} is missing" in said


def test_verify_takes_the_folder_around_the_shards_too(shards: Path) -> None:
    ended = run("shards", "verify", shards.parent)
    assert ended.exit_code == 0, ended.output
    assert ended.output.endswith(f"{shards}: ok\n")


def test_verify_without_a_path_reads_all_that_the_project_is_configured_to_read(
    shards: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    for part in ("conf", "pyproject.toml"):
        source = Path(__file__).parents[1] / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, project / part)
    (project / "src").mkdir()
    (project / "conf" / "mine").mkdir()
    own = {
        "fit": str(shards),
        "val": str(shards.parent),
        "probe_train": "missing",
        "probe_val": "new",
    }
    (project / "conf" / "mine" / "globals.yml").write_text(yaml.safe_dump({"shards": own}))
    images = {"model": "vit", "probe_val": {"images": "photos", "masks": "masks"}}
    (project / "conf" / "mine" / "parameters.yml").write_text(yaml.safe_dump({"extract": images}))
    verify = ("-m", "assay", "shards", "verify")
    ended = run_alone(*verify, "--env", "mine", cwd=project)
    assert ended.returncode == 1
    assert ended.stdout.count(f"{shards}: ok\n") == 2
    assert f"{project / 'missing'}: BAD" in ended.stdout
    assert "shards.probe_val: new is made by `kedro run`, and not there yet" in ended.stdout
    ended = run_alone(*verify, cwd=project)
    assert (ended.returncode, ended.stdout.count("not there yet")) == (0, 4)
    ended = run_alone(*verify, cwd=tmp_path)
    assert ended.returncode == 1
    assert f"{tmp_path} is in no Kedro project: name the shards to verify" in ended.stderr


def test_verify_as_a_user_types_it(shards: Path, tmp_path: Path) -> None:
    program = ("-m", "assay", "shards", "verify", str(shards))
    assert run_alone(*program, cwd=tmp_path).returncode == 0
    os.truncate(shards / "acts000000.bin", 3)
    ended = run_alone(*program, cwd=tmp_path)
    assert ended.returncode == 1
    assert "BAD" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_the_command_that_makes_labels_right_is_printed_in_one_piece(
    shards: Path, masks: Path
) -> None:
    out = shards / "labels.bin"
    assert (
        run(
            "labels",
            shards,
            "--masks",
            masks,
            "--out",
            out,
            "--patch-size",
            4,
            "--void",
            255,
            "--offset",
            1,
        ).exit_code
        == 0
    )
    edit_json(shards / "metadata.json", lambda raw: raw | {"pixel_agg": "majority"})
    ended = run("shards", "verify", shards)
    assert ended.exit_code == 0
    assert (
        f"assay labels {shards} --masks MASKS --patch-size PIXELS --out {out} --force"
        in ended.output
    )


def test_an_autoencoder_says_what_it_is(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "layers.7", d=6, n=10, k=3)
    found = run("sae", tmp_path, "--k", 3, "--activation", "topk")
    assert found.exit_code == 0, found.output
    assert found.output.splitlines() == [
        "library     sparsify",
        "formula     code = relu top-3((x - c) W_enc + b_enc);  x^ = code W_dec + b_out",
        "d_model     6",
        "n_features  10",
        "k           3",
        "layer       7",
        "hook        layers.7",
        f"files       {folder / 'sae.safetensors'}",
        f"            {folder / 'cfg.json'}",
    ]


def test_an_autoencoder_that_a_run_would_refuse_says_why(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.7", d=6, n=10, transcode=True)
    found = run("sae", tmp_path)
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1].startswith("notes       kedro run refuses it: it predicts")


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"new": 1}, [], "found new, which could change the codes"),
        ({}, ["--k", 5], "found k 5 typed, and the file says 4"),
        ({}, ["--threshold", 0.5], "found threshold 0.5 typed, and there is none"),
        ({}, ["--normalization", "l1"], "found normalization l1 typed, and the file says none"),
        ({"k": 11}, [], "found k = 11 for topk of 10 features"),
    ],
)
def test_an_autoencoder_that_cannot_be_read_is_told_in_two_lines(
    tmp_path: Path, config: dict[str, Any], options: list[Any], said: str
) -> None:
    write_sparsify(tmp_path / "layers.7", d=6, n=10, **config)
    found = run("sae", tmp_path, *options)
    assert found.exit_code == 1
    first, second = found.output.splitlines()
    assert first == f"Error: {tmp_path} cannot be read as it is:"
    assert said in second


def test_an_autoencoder_that_is_not_there_is_told_in_two_lines(tmp_path: Path) -> None:
    found = run("sae", tmp_path / "nowhere")
    assert found.exit_code == 1
    assert found.output.splitlines()[1].endswith(
        "nowhere: no such file or folder; correct the path"
    )


def test_python_m_assay_is_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "assay", "--help"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "labels" in ended.stdout
    assert "shards" in ended.stdout
