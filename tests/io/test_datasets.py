"""The Kedro datasets, by Kedro's own interface: catalogs, versions, existence, pickling; and where
shards are found.
"""

import inspect
import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse
import torch
import yaml
from kedro.io import AbstractDataset, DataCatalog, DatasetError, Version
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.codes import Format
from assay.io import datasets as module
from assay.io.codes import StoredCodes
from assay.io.codes.saev import SaevCodes
from assay.io.datasets import (
    CheckpointsDataset,
    ClassNamesDataset,
    CodesDataset,
    ImagesDataset,
    MasksDataset,
    SaeDataset,
    SaevInferenceDataset,
    ShardsDataset,
    TensorsDataset,
    find_shards,
)
from assay.io.saes import StoredSae, hub, read_sae
from assay.io.shards import Shards, windows
from assay.io.shards.metadata import Metadata
from assay.io.tensors import fingerprint_tensors
from saes import write_saev, write_sparsify
from shards import FIELDS

STATE = {"components": torch.eye(3).double(), "n": torch.tensor(3)}


@dataclass(frozen=True, eq=False)
class MadeRecording:
    """5 examples of 2 layers, a CLS token, 3 patches and 4 dimensions."""

    seed: int = 0
    ckpt: str = "tiny"
    broken: bool = False

    @property
    def metadata(self) -> dict[str, Any]:
        own = {"ckpt": self.ckpt, "layers": [3, 23], "d_model": 4, "pixel_agg": None}
        return FIELDS | own

    @property
    def array(self) -> Tensor:
        return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(self.seed))

    @property
    def examples(self) -> Iterator[Tensor]:
        yield from self.array[:4].split(3)
        if self.broken:
            raise OSError("the model went away")
        yield self.array[4:]

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(self.seed).integers(0, 9, (5, 3), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class MadeCodes:
    """One-hot codes of 15 rows."""

    n_features: int = 4
    n_rows: int = 15
    format: Format = "onehot"
    k: int = 1
    provenance: Mapping[str, Any] = field(default_factory=dict)
    made_from: str = ""
    fallback: None = None
    rounded: None = None

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for rows in torch.arange(start, 15).split(batch_size):
            yield {"indices": rows % self.n_features, "error": rows.double()}


def tree(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_recorded(shards: Shards, recording: MadeRecording) -> None:
    for i, layer in enumerate((3, 23)):
        found = torch.cat(list(shards.batches(layer=layer, batch_size=4)))
        assert torch.equal(found, recording.array[:, i, 1:].reshape(15, 4))
    assert shards.labels().tolist() == recording.labels.reshape(-1).tolist()


def assert_coded(codes: StoredCodes, made: MadeCodes) -> None:
    (batch,) = codes.batches(15)
    (wanted,) = made.batches(15)
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def example(dataset: type[AbstractDataset[Any, Any]], language: str) -> str:
    """The YAML or Python of a docstring's examples."""
    assert dataset.__doc__
    # As it stands under every Python: since 3.13 the compiler takes the common indentation away.
    block = inspect.cleandoc(dataset.__doc__).split(f"{language}::\n", 1)[1] + "\n"
    indented = re.match(r"(?:\n| {8}.*\n)+", block)
    assert indented
    return textwrap.dedent(indented[0])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A shard folder, alone in its parent."""
    dataset = ShardsDataset(filepath=str(tmp_path / "raw"))
    dataset.save(MadeRecording())
    return dataset.load().path


# --- find_shards


def test_a_shard_folder_is_found_at_its_path_or_one_level_down(shards: Path) -> None:
    assert find_shards(shards) == find_shards(str(shards)) == shards
    assert find_shards(shards.parent) == shards


def test_hidden_and_other_folders_are_passed_over(shards: Path) -> None:
    for name in (f".{shards.name}.partial-0123456789abcdef", "notes"):
        (shards.parent / name).mkdir()
    (shards.parent / f".{shards.name}.partial-0123456789abcdef" / "metadata.json").touch()
    (shards.parent / "readme").touch()
    assert find_shards(shards.parent) == shards
    (shards / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(shards.parent))):
        find_shards(shards.parent)


def test_no_shard_folder_is_an_error(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none", tmp_path, shards / "metadata.json"):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))}: no shard folder"):
            find_shards(path)


def test_several_shard_folders_are_named(shards: Path) -> None:
    other = shards.parent / "other"
    shards.rename(other)
    for name in ("a", "b"):
        (shards.parent / name).mkdir()
        (shards.parent / name / "metadata.json").touch()
    with pytest.raises(ValueError, match=r"holds 3 shard folders \(a, b, other\): name one"):
        find_shards(shards.parent)
    assert find_shards(other) == other


# --- ShardsDataset


def test_shards_are_saved_loaded_and_exist(tmp_path: Path) -> None:
    dataset = ShardsDataset(
        filepath=str(tmp_path / "raw" / "fit"), metadata={"kedro-viz": {"layer": "raw"}}
    )
    assert not dataset.exists()
    with pytest.raises(DatasetError, match="no shard folder"):
        dataset.load()
    dataset.save(MadeRecording())
    assert dataset.exists()
    assert_recorded(dataset.load(), MadeRecording())
    folder = Metadata.model_validate(MadeRecording().metadata).hash
    assert [path.name for path in (tmp_path / "raw" / "fit").iterdir()] == [folder]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["fit"]
    assert_recorded(
        ShardsDataset(filepath=str(tmp_path / "raw" / "fit" / folder)).load(), MadeRecording()
    )
    assert dataset._describe() == {"filepath": str(tmp_path / "raw" / "fit")}
    assert str(tmp_path) in repr(dataset)


@pytest.mark.parametrize(
    "later",
    [MadeRecording(seed=1), MadeRecording(seed=1, ckpt="other")],
    ids=["same hash", "other"],
)
def test_saving_replaces_the_previous_recording(shards: Path, later: MadeRecording) -> None:
    dataset = ShardsDataset(filepath=str(shards.parent))
    before = dataset.fingerprint()
    (
        shards.parent / f".{shards.name}.partial-0123456789abcdef"
    ).mkdir()  # left by a writer that died
    dataset.save(later)
    assert_recorded(dataset.load(), later)
    assert [path.name for path in shards.parent.iterdir()] == [
        Metadata.model_validate(later.metadata).hash
    ]
    assert dataset.fingerprint() == dataset.load().fingerprint() != before


@pytest.mark.parametrize("ckpt", ["tiny", "other"])
def test_a_recording_that_fails_leaves_the_previous_one(
    tmp_path: Path, shards: Path, ckpt: str
) -> None:
    before = tree(tmp_path)
    with pytest.raises(DatasetError, match="the model went away"):
        ShardsDataset(filepath=str(shards.parent)).save(
            MadeRecording(seed=1, ckpt=ckpt, broken=True)
        )
    assert tree(tmp_path) == before
    assert list(shards.parent.iterdir()) == [shards]


def test_saving_into_a_folder_with_anything_else_is_refused(tmp_path: Path, shards: Path) -> None:
    def refuse(path: Path, found: str) -> None:
        before = tree(tmp_path)
        with pytest.raises(
            DatasetError,
            match=rf"{re.escape(str(path))} holds .*{found}.*; wanted one older recording",
        ):
            ShardsDataset(filepath=str(path)).save(MadeRecording(seed=1))
        assert tree(tmp_path) == before

    refuse(shards, "metadata.json")
    (tmp_path / "raw" / "notes.txt").touch()
    refuse(shards.parent, "notes.txt")
    (tmp_path / "raw" / "notes.txt").unlink()
    (tmp_path / "raw" / "other").mkdir()
    (tmp_path / "raw" / "other" / "metadata.json").touch()
    refuse(shards.parent, "other")
    refuse(tmp_path, "raw")


def test_loading_shards_reads_no_array(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an array was read")

    monkeypatch.setattr(windows, "read_pieces", fail)
    loaded = ShardsDataset(filepath=str(shards)).load()
    with pytest.raises(AssertionError, match="an array was read"):
        next(loaded.batches(layer=23, batch_size=2))


@pytest.mark.parametrize("damage", ["cut", "several", "missing"])
def test_shards_that_cannot_be_opened_do_not_exist(shards: Path, damage: str) -> None:
    dataset = ShardsDataset(filepath=str(shards.parent))
    if damage == "cut":
        (shards / "shards.json").write_text("[")
    elif damage == "several":
        (shards.parent / "b").mkdir()
        (shards.parent / "b" / "metadata.json").touch()
    else:
        (shards / "acts000000.bin").unlink()
    assert not dataset.exists()
    with pytest.raises(DatasetError, match=re.escape(str(shards.parent))):
        dataset.load()


# --- CodesDataset


def make_dataset(root: Path, shards: Path, **arguments: Any) -> CodesDataset:
    path = {"path": str(shards)}
    return CodesDataset(
        filepath=str(root / "inference"),
        shards=path,
        encoding="kmeans-onehot",
        layer="layer_23",
        **arguments,
    )


def test_codes_are_saved_loaded_and_exist(tmp_path: Path, shards: Path) -> None:
    dataset = make_dataset(
        tmp_path, shards.parent, metadata={"kedro-viz": {"layer": "model_output"}}
    )
    assert not dataset.exists()
    with pytest.raises(DatasetError, match=r"metadata\.json is missing; wanted a folder of codes"):
        dataset.load()
    dataset.save(MadeCodes())
    assert dataset.exists()
    assert_coded(dataset.load(), MadeCodes())
    folder = tmp_path / "inference" / shards.name / "kmeans-onehot" / "layer_23"
    assert dataset.folder == folder == dataset.load().path
    assert dataset._describe() == {
        "filepath": str(tmp_path / "inference"),
        "shards": str(shards.parent),
        "encoding": "kmeans-onehot",
        "layer": "layer_23",
        "dtype": "float32",
        "fingerprint": None,
    }
    dataset.save(MadeCodes(n_features=3))
    assert_coded(dataset.load(), MadeCodes(n_features=3))
    with pytest.raises(DatasetError, match="ended after 15 rows; 16 were promised"):
        dataset.save(MadeCodes(n_rows=16))
    assert_coded(dataset.load(), MadeCodes(n_features=3))


def test_codes_of_another_fingerprint_have_a_folder_of_their_own_and_are_not_loaded(
    tmp_path, shards
):
    first, second = (make_dataset(tmp_path, shards, fingerprint=digit * 64) for digit in "ab")
    first.save(MadeCodes())
    assert first.load().provenance["fingerprint"] == "a" * 64
    assert first.folder == tmp_path / "inference" / shards.name / "kmeans-onehot" / "layer_23" / (
        "a" * 16
    )
    assert not second.exists()
    second.save(MadeCodes())
    assert first.fingerprint() != second.fingerprint()
    shutil.rmtree(first.folder)
    shutil.move(second.folder, first.folder)  # somebody mixes them up
    assert not first.exists()
    with pytest.raises(
        DatasetError,
        match=f"codes of fingerprint {'b' * 64}, wanted {'a' * 64}: they were made from another",
    ):
        first.load()


def test_codes_are_written_a_batch_at_a_time(tmp_path: Path, shards: Path) -> None:
    asked: list[int] = []

    class Watched(MadeCodes):
        def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
            asked.append(batch_size)
            return super().batches(batch_size, start)

    make_dataset(tmp_path, shards, batch_size=6).save(Watched())
    make_dataset(tmp_path, shards).save(Watched())
    assert asked == [6, 4096]


def test_files_of_codes_have_as_many_rows_as_the_catalog_says(tmp_path: Path, shards: Path) -> None:
    dataset = make_dataset(tmp_path, shards, batch_size=2, rows_per_shard=6)
    dataset.save(MadeCodes())
    assert [shard.rows for shard in dataset.load().shards] == [6, 6, 3]


def test_codes_of_another_dtype_than_the_catalogs_are_made_again(
    tmp_path: Path, shards: Path
) -> None:
    make_dataset(tmp_path, shards).save(MadeCodes())
    half = make_dataset(tmp_path, shards, dtype="float16")
    assert not half.exists()
    half.save(MadeCodes())
    assert half.exists()
    assert half.load().dtype == "float16"
    assert not make_dataset(tmp_path, shards, dtype="bfloat16").exists()
    with pytest.raises(
        ValueError, match="dtype is 'float64': wanted one of float32, float16, bfloat16"
    ):
        make_dataset(tmp_path, shards, dtype="float64")


def test_codes_of_another_version_do_not_exist(tmp_path: Path, shards: Path) -> None:
    dataset = make_dataset(tmp_path, shards)
    dataset.save(MadeCodes())
    metadata = dataset.folder / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"version": 1}))
    assert not dataset.exists()
    with pytest.raises(
        DatasetError, match=r"assay.codes version 1; this reader wants assay.codes version 2"
    ):
        dataset.load()


def test_codes_of_shards_that_are_missing_do_not_exist(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, tmp_path / "none")
    assert not dataset.exists()
    for act in (dataset.load, lambda: dataset.save(MadeCodes())):
        with pytest.raises((DatasetError, FileNotFoundError), match="none: no shard folder"):
            act()


def test_links_of_one_name_keep_their_codes_apart(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train").symlink_to(shards)
    assert (
        make_dataset(tmp_path, tmp_path / "a" / "train").folder
        == make_dataset(tmp_path, shards).folder
    )
    assert make_dataset(tmp_path, tmp_path / "a").folder == make_dataset(tmp_path, shards).folder


# --- CheckpointsDataset


def test_checkpoints_are_always_there_and_are_no_input_that_changes(tmp_path: Path) -> None:
    dataset = CheckpointsDataset(
        filepath=str(tmp_path / "pca"), metadata={"kedro-viz": {"layer": "models"}}
    )
    assert dataset.exists()
    before = dataset.fingerprint()
    dataset.load().save({"layer": 3}, 1, STATE, {"step": 1})
    assert dataset.fingerprint() == before
    found = dataset.load().load({"layer": 3})
    assert found is not None and found.state == {"step": 1}
    assert dataset._describe() == {"filepath": str(tmp_path / "pca")}
    with pytest.raises(DatasetError, match="found dict to save; checkpoints are saved by the fit"):
        dataset.save(STATE)  # type: ignore[arg-type]


# --- TensorsDataset


def assert_state(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_are_saved_loaded_and_exist(tmp_path: Path) -> None:
    path = tmp_path / "models" / "pca.safetensors"
    dataset = TensorsDataset(filepath=str(path))
    assert not dataset.exists()
    with pytest.raises(DatasetError, match=f"{re.escape(str(path))}: no such file"):
        dataset.load()
    dataset.save(STATE)
    assert dataset.exists()
    assert path.is_file()
    assert_state(dataset.load(), STATE)
    assert dataset.fingerprint() == fingerprint_tensors(STATE)
    dataset.save({"n": torch.tensor(4)})
    assert_state(dataset.load(), {"n": torch.tensor(4)})
    assert dataset.fingerprint() != fingerprint_tensors(STATE)
    assert dataset._describe() == {"filepath": str(path), "version": None}


def test_versions_lie_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "pca.safetensors"
    first = TensorsDataset(filepath=str(path), version=Version(None, "2026-01-01T00.00.00.000Z"))
    assert not first.exists()
    first.save(STATE)
    assert (path / "2026-01-01T00.00.00.000Z" / "pca.safetensors").is_file()
    second = TensorsDataset(filepath=str(path), version=Version(None, "2026-01-02T00.00.00.000Z"))
    assert second.exists()  # an older version does
    second.save({"n": torch.tensor(4)})
    assert_state(
        TensorsDataset(filepath=str(path), version=Version(None, None)).load(),
        {"n": torch.tensor(4)},
    )
    pinned = TensorsDataset(filepath=str(path), version=Version("2026-01-01T00.00.00.000Z", None))
    assert_state(pinned.load(), STATE)
    assert "2026-01-01" in repr(pinned)
    with pytest.raises(DatasetError, match="must not exist if versioning is enabled"):
        second.save(STATE)
    absent = TensorsDataset(filepath=str(path), version=Version("2025-01-01T00.00.00.000Z", None))
    assert not absent.exists()


def test_a_file_of_somebody_else_wants_any_schema(tmp_path: Path) -> None:
    path = tmp_path / "mu_sigma.safetensors"
    save_file(STATE, path)
    with pytest.raises(DatasetError, match=r"this reader wants assay\.tensors version 2"):
        TensorsDataset(filepath=str(path)).load()
    assert_state(TensorsDataset(filepath=str(path), load_args={"any_schema": True}).load(), STATE)


# --- catalogs


def make_catalog(root: Path, shards: Path, **arguments: Any) -> DataCatalog:
    return DataCatalog.from_config(
        {
            "shards_probe_val": {
                "type": "assay.io.datasets.ShardsDataset",
                "filepath": str(shards),
            },
            "{layer}.codes_{encoding}_probe_val": {
                "type": "assay.io.datasets.CodesDataset",
                "filepath": str(root / "inference"),
                "shards": {"path": str(shards)},
                "encoding": "{encoding}",
                "layer": "{layer}",
            },
            "{layer}.{method}_model": {
                "type": "assay.io.datasets.TensorsDataset",
                "filepath": str(root / "models" / "{layer}" / "{method}.safetensors"),
                "versioned": True,
                "metadata": {"kedro-viz": {"layer": "models"}},
            },
        },
        **arguments,
    )


def test_a_catalog_makes_them_from_patterns(tmp_path: Path, shards: Path) -> None:
    catalog = make_catalog(tmp_path, shards, save_version="2026-01-01T00.00.00.000Z")
    codes, model = "layer_23.codes_pca-topk-00064_probe_val", "layer_3.pca_model"
    assert catalog.exists("shards_probe_val")
    for name, data in ((codes, MadeCodes()), (model, STATE)):
        assert not catalog.exists(name)
        catalog.save(name, data)
        assert catalog.exists(name)
    assert_coded(catalog.load(codes), MadeCodes())
    assert (
        tmp_path / "inference" / shards.name / "pca-topk-00064" / "layer_23" / "metadata.json"
    ).is_file()
    assert_state(catalog.load(model), STATE)
    version = tmp_path / "models" / "layer_3" / "pca.safetensors" / "2026-01-01T00.00.00.000Z"
    assert (version / "pca.safetensors").is_file()
    assert not catalog.exists("layer_3.codes_pca-topk-00064_probe_val")
    assert not catalog.exists("layer_23.pca_model")

    later = make_catalog(tmp_path, shards, save_version="2026-01-02T00.00.00.000Z")
    later.save(model, {"n": torch.tensor(4)})
    assert_state(make_catalog(tmp_path, shards).load(model), {"n": torch.tensor(4)})
    pinned = make_catalog(tmp_path, shards, load_versions={model: "2026-01-01T00.00.00.000Z"})
    assert_state(pinned.load(model), STATE)


def test_they_can_be_sent_to_another_process(tmp_path: Path, shards: Path) -> None:
    catalog = make_catalog(tmp_path, shards)
    codes, model = "layer_23.codes_kmeans-onehot_probe_val", "layer_23.kmeans_model"
    catalog.save(codes, MadeCodes())
    catalog.save(model, STATE)
    sent = {
        name: ForkingPickler.loads(ForkingPickler.dumps(catalog.get(name)))
        for name in ("shards_probe_val", codes, model)
    }
    assert all(dataset.exists() for dataset in sent.values())
    assert_recorded(sent["shards_probe_val"].load(), MadeRecording())
    assert_coded(sent[codes].load(), MadeCodes())
    assert_state(sent[model].load(), STATE)


# --- saev's inference


def write_inference(folder: Path) -> None:
    folder.mkdir(parents=True)
    scipy.sparse.save_npz(
        folder / "token_acts.npz", scipy.sparse.eye_array(15, 4, format="csr", dtype=np.float32)
    )
    (folder / "metrics.json").write_text('{"normalized_mse": 0.5}')


def test_brackets_and_braces_in_the_path_of_shards_codes_and_weights_are_letters(
    tmp_path: Path, shards: Path
) -> None:
    odd = tmp_path / "od[1]d{a,b}"
    copy = Path(shutil.copytree(shards, odd / "shards" / shards.name))
    assert (
        ShardsDataset(filepath=str(odd / "shards")).load().fingerprint()
        == Shards(shards).fingerprint()
    )
    write_inference(odd / "run/inference" / copy.name)
    saev = SaevInferenceDataset(run=str(odd / "run"), shards=str(odd / "shards"), part="codes")
    assert saev.exists()
    codes = saev.load()
    assert isinstance(codes, SaevCodes)
    assert codes.n_rows == 15
    weights = TensorsDataset(filepath=str(odd / "weights.safetensors"))
    weights.save(STATE)
    assert weights.exists()
    assert_state(weights.load(), STATE)


def test_what_saev_left_is_found_by_the_shards_hash_and_never_written(
    tmp_path: Path, shards: Path
) -> None:
    parts = {
        part: SaevInferenceDataset(run=str(tmp_path / "run"), shards=str(shards.parent), part=part)
        for part in ("codes", "metrics")
    }
    assert not any(dataset.exists() for dataset in parts.values())
    write_inference(tmp_path / "run/inference" / shards.name)
    assert all(dataset.exists() for dataset in parts.values())
    codes = parts["codes"].load()
    assert isinstance(codes, SaevCodes)
    assert codes.n_rows == 15
    assert parts["metrics"].load() == {"normalized_mse": 0.5}
    before = parts["metrics"].fingerprint()
    assert before == parts["metrics"].fingerprint()
    (parts["metrics"].folder / "metrics.json").write_text('{"normalized_mse": 0.25}')
    assert parts["metrics"].fingerprint() != before
    with pytest.raises(DatasetError, match="found dict to save; the folder is saev's"):
        parts["codes"].save({})  # type: ignore[arg-type]  # as a pipeline might
    assert not SaevInferenceDataset(
        run=str(tmp_path), shards=str(tmp_path / "no"), part="codes"
    ).exists()
    assert "run" in str(parts["codes"]._describe())


# --- autoencoders


def test_an_autoencoder_is_the_same_wherever_it_lies_and_however_it_is_saved(
    tmp_path: Path,
) -> None:
    path = write_sparsify(tmp_path / "layers.3")
    dataset = SaeDataset(filepath=str(path))
    assert dataset.exists()
    before = dataset.fingerprint()
    moved = SaeDataset(filepath=str(path.rename(tmp_path / "elsewhere")), settings={"k": 4})
    assert not dataset.exists()
    assert moved.fingerprint() == before
    weights = tmp_path / "elsewhere/sae.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, weights, {"by": "me"})
    assert moved.fingerprint() == before
    assert write_sparsify(tmp_path / "again") != path
    assert SaeDataset(filepath=str(tmp_path / "again")).fingerprint() == before
    changes: dict[str, dict[str, Any]] = {
        "k": {"k": 5},
        "activation": {"activation": "groupmax"},
        "center": {"transcode": True},
        "seed": {"seed": 1},
    }
    others = {
        SaeDataset(filepath=str(write_sparsify(tmp_path / name, **change))).fingerprint()
        for name, change in changes.items()
    }
    assert len(others | {before}) == 5


def test_weights_whose_formula_is_typed_are_read_by_it(tmp_path: Path) -> None:
    tensors = {
        "W_enc": torch.ones(4, 6),
        "W_dec": torch.ones(6, 4),
        "b_dec": torch.ones(4),
    }
    path = tmp_path / "a[1].safetensors"
    save_file(tensors, path)

    def read(**options: Any) -> SaeDataset:
        return SaeDataset(filepath=str(path), **options)

    given = [
        read(settings={"activation": "relu"}, input_bias="b_dec"),
        read(settings={"activation": "relu"}, input_bias="none"),
        read(settings={"activation": "topk", "k": 2}, input_bias="none"),
    ]
    assert [sorted(each.load().tensors) for each in given[:2]] == [
        ["W_dec", "W_enc", "b_out", "center"],
        ["W_dec", "W_enc", "b_out"],
    ]
    assert len({each.fingerprint() for each in given}) == 3
    assert given[2].load().architecture.k == 2


def test_an_autoencoder_is_looked_at_once_while_its_files_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sparsify(tmp_path / "layers.3")
    reads = []

    def read(*given: Any) -> StoredSae:
        reads.append(given)
        return read_sae(*given)

    monkeypatch.setattr("assay.io.datasets.sae.read_sae", read)

    def look(**settings: Any) -> SaeDataset:
        dataset = SaeDataset(filepath=str(path), settings=settings)
        dataset.fingerprint()
        return dataset

    before = look().fingerprint()
    assert len(reads) == 1
    said = look().said
    assert said is not None
    assert said["layer"] == 3
    found = look().look().stored
    assert (found.d_model, found.recorded.layer) == (80, 3)
    assert all(tensor.is_meta for tensor in found.tensors.values())
    assert len(reads) == 1
    assert not look().load().tensors["W_dec"].is_meta
    assert len(reads) == 2
    # What is typed, the configuration and the weights each tell.
    look(k=4)
    assert len(reads) == 3
    config, weights = path / "cfg.json", path / "sae.safetensors"
    config.write_text(config.read_text().replace('"k": 4', '"k": 5'))
    assert look().fingerprint() != before
    assert len(reads) == 4
    config.write_text(config.read_text().replace('"k": 5', '"k": 4'))
    now = weights.stat()
    save_file({n: -t for n, t in load_file(weights).items()}, weights)
    os.utime(weights, ns=(now.st_atime_ns, now.st_mtime_ns))
    assert weights.stat().st_size == now.st_size
    assert look().fingerprint() != before
    assert len(reads) == 5
    config.unlink()
    with pytest.raises(DatasetError, match=r"cfg\.json: no such file"):
        look()


def test_what_is_wrong_with_an_autoencoder_names_its_parameter_and_file(tmp_path: Path) -> None:
    path = write_sparsify(tmp_path / "layers.3", new=1)
    named = SaeDataset(filepath=str(path), parameter="dictionaries.mine.sae")
    for read in (named.load, named.fingerprint):
        with pytest.raises(
            DatasetError, match=f"dictionaries.mine.sae: {path}/cfg.json: found new"
        ):
            read()
    missing = SaeDataset(filepath=str(tmp_path / "no"), parameter="dictionaries.mine.sae")
    assert not missing.exists()
    with pytest.raises(DatasetError, match=f"dictionaries.mine.sae: {tmp_path}/no: no such file"):
        missing.load()
    with pytest.raises(DatasetError, match="found dict to save; the file is another library's"):
        missing.save({})  # type: ignore[arg-type]  # as a pipeline might
    assert f"{missing!r}" == f"dictionaries.mine.sae: {tmp_path}/no"


def test_an_autoencoder_that_was_read_says_what_it_is(tmp_path: Path) -> None:
    path = write_sparsify(tmp_path / "layers.3")
    dataset = SaeDataset(filepath=str(path), typed="saes/{layer}")
    assert dataset.said is None
    dataset.load()
    assert dataset.said is not None
    assert json.loads(json.dumps(dataset.said)) == dataset.said
    assert {name: dataset.said[name] for name in ("path", "commit", "library", "k", "layer")} == {
        "path": "saes/{layer}",
        "commit": None,
        "library": "sparsify",
        "k": 4,
        "layer": 3,
    }


def test_what_is_on_the_hub_says_why_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(typed: str) -> Any:
        raise FileNotFoundError(f"{typed}: found neither\nConnectError")

    monkeypatch.setattr(hub, "fetch", refuse)
    dataset = SaeDataset(filepath="hf:owner/name", parameter="dictionaries.mine.sae")
    assert dataset.exists()
    with pytest.raises(
        DatasetError, match=r"dictionaries.mine.sae: hf:owner/name: found neither\n"
    ):
        dataset.load()


# --- images


def test_images_are_written_whole_and_read_one_by_one(tmp_path: Path) -> None:
    pixels = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    dataset = ImagesDataset(
        filepath=str(tmp_path / "images"), layout={"patch_size": 4, "pattern": "*.png"}
    )
    assert not dataset.exists()
    dataset.save(pixels)
    assert dataset.exists()
    np.testing.assert_array_equal(dataset.load().read(1, 4)[..., 0], pixels[1])
    before = dataset.fingerprint()
    dataset.save(pixels[:1])  # replaces them all
    assert len(dataset.load()) == 1
    assert dataset.fingerprint() != before
    assert dataset._describe()["layout"]["patch_size"] == 4
    with pytest.raises(ValueError, match="patch_size"):
        ImagesDataset(filepath="somewhere", layout={"patch_size": 0})


# --- masks


def test_masks_are_those_of_their_images_and_another_meaning_is_another_fingerprint(
    tmp_path: Path,
) -> None:
    place = {"patch_size": 4, "geometry": "crop", "resize": 8}
    images = {"filepath": str(tmp_path / "images"), "layout": {**place, "pattern": None}}
    config: dict[str, Any] = {"filepath": str(tmp_path / "masks"), "images": images}
    dataset = MasksDataset(**config, layout=place)
    assert not dataset.exists()
    for name, ids in (("images", 200), ("masks", 7)):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), ids).save(tmp_path / name / "a.png")
    assert dataset.exists()
    assert dataset.load().label(0, 4).tolist() == [7] * 4
    before = dataset.fingerprint()
    assert MasksDataset(**config, layout=place).fingerprint() == before
    assert MasksDataset(**config, layout={**place, "offset": 1}).fingerprint() != before
    Image.new("L", (8, 8), 8).save(tmp_path / "masks" / "a.png")
    assert dataset.fingerprint() != before
    with pytest.raises(DatasetError, match="masks are only read"):
        dataset.save({})  # type: ignore[arg-type]  # as a pipeline might
    (tmp_path / "masks" / "a.png").unlink()
    assert not dataset.exists()
    assert dataset._describe()["layout"]["patch_size"] == 4


# --- names of classes


def test_names_are_the_same_however_a_file_writes_them(tmp_path: Path) -> None:
    dataset = ClassNamesDataset(filepath=str(tmp_path / "names.txt"))
    assert not dataset.exists()
    (tmp_path / "names.txt").write_text("wall\nsky")
    assert dataset.exists()
    assert dataset.load() == {1: "wall", 2: "sky"}
    before = dataset.fingerprint()
    (tmp_path / "names.txt").write_text("2: sky\r\n1: wall\r\n")
    assert dataset.fingerprint() == before
    (tmp_path / "names.txt").write_text("sky\nwall")
    assert dataset.fingerprint() != before
    with pytest.raises(DatasetError, match="found dict to save; names of classes are only read"):
        dataset.save({})  # type: ignore[arg-type]  # as a pipeline might
    (tmp_path / "names.txt").write_bytes(b"wall\n\xff")
    with pytest.raises(DatasetError, match=r"names\.txt, line 2: found byte 0xff"):
        dataset.fingerprint()
    assert dataset._describe() == {"filepath": str(tmp_path / "names.txt")}


# --- the docstrings

ALL = (
    ShardsDataset,
    ImagesDataset,
    MasksDataset,
    ClassNamesDataset,
    CodesDataset,
    CheckpointsDataset,
    TensorsDataset,
    SaeDataset,
    SaevInferenceDataset,
)


def photograph(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (300, 256), (number, 0, 0)).save(folder / f"{number}.jpg")
    masks = folder.parents[1] / "annotations" / folder.name
    masks.mkdir(parents=True)
    for number in range(8):
        Image.new("L", (300, 256), number).save(masks / f"{number}.png")
    (folder.parents[1] / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.16\twall\n")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the examples name, and is the working directory."""
    for name in ("08e569e2", "687023f7"):
        ShardsDataset(filepath=str(tmp_path / name)).save(MadeRecording(seed=5))
        target = tmp_path / "data" / "01_raw" / "saev" / "shards" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        next((tmp_path / name).iterdir()).rename(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_yaml_examples_are_true(project: Path) -> None:
    entries: dict[str, Any] = {}
    for dataset in ALL:
        entries |= yaml.safe_load(example(dataset, "YAML"))
    catalog = DataCatalog.from_config(entries)
    assert_recorded(catalog.load("shards_fit"), MadeRecording(seed=5))
    catalog.save("layer_23.codes_kmeans-onehot_probe_val", MadeCodes())
    assert_coded(
        StoredCodes(project / "data/07_model_output/inference/687023f7/kmeans-onehot/layer_23"),
        MadeCodes(),
    )
    catalog.save("layer_3.pca_model", STATE)
    assert catalog.load("layer_23.pca_checkpoints").folder == Path(
        "data/06_models/.checkpoints/layer_23/pca"
    )
    write_inference(project / "runs/z55bntm1/inference/687023f7")
    photograph(project / "ADEChallengeData2016/images/validation")
    assert len(catalog.load("images_probe_val")) == 8
    assert catalog.load("extract_masks_probe_val").label(3, 256).tolist() == [3] * 256
    assert catalog.load("class_names") == {1: "wall"}
    assert catalog.load("layer_23.codes_relu-16k_probe_val").n_features == 4
    write_saev(project / "runs/z55bntm1/checkpoint/sae.pt", d=4, n=6)
    assert catalog.load("layer_23.sae_relu-16k").n_features == 6
    (version,) = (project / "data/06_models/layer_3/pca.safetensors").iterdir()
    assert_state(TensorsDataset(filepath=str(version / "pca.safetensors")).load(), STATE)


def test_the_python_examples_are_true(project: Path) -> None:
    folder = project / "data"
    codes = CodesDataset(
        filepath=str(folder / "07_model_output/inference"),
        shards={"path": str(folder / "01_raw/saev/shards/687023f7")},
        encoding="pca-topk-00064",
        layer="layer_23",
    )
    codes.save(MadeCodes())
    TensorsDataset(filepath=str(folder / "06_models/layer_23/pca.safetensors")).save(STATE)
    write_inference(project / "runs/z55bntm1/inference/687023f7")
    write_saev(project / "runs/z55bntm1/checkpoint/sae.pt", d=4, n=6)
    photograph(project / "ADEChallengeData2016/images/validation")
    found: dict[str, Any] = {}
    for dataset in ALL:
        exec(example(dataset, "Python"), vars(module), found)
    assert found["tokens"].shape == (15, 4)
    assert found["image"].shape == (256, 256, 3)
    assert found["labels"].tolist() == [7] * 256
    assert found["names"] == {1: "wall"}
    assert found["batch"].keys() == {"indices", "error"}
    assert torch.equal(found["components"], STATE["components"])
    assert found["checkpoints"].load({"layer": 23}) is None
    assert found["token_acts"].n_rows == 15
    assert found["formula"].startswith("code = relu(x W_enc + b_enc)")
