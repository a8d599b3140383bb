"""The Kedro datasets around the bytes on disk: shards, images, codes, checkpoints and named tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Never, Protocol, get_args

import fsspec
import numpy as np
import numpy.typing as npt
from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError, Version
from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.codes import StoredCodes
from assay.io.codes_layout import Codes, Dtype
from assay.io.codes_writer import write_codes
from assay.io.images import ImageLayout, Images, write_images
from assay.io.metadata import METADATA_NAME, Metadata
from assay.io.publish import discard_partials, publishing_folder
from assay.io.saev_codes import CODES_NAME, METRICS_NAME, SaevCodes, read_metrics
from assay.io.sampling import sampled_digest
from assay.io.shards import Shards, write_shards
from assay.io.tensors import fingerprint_tensors, read_tensors, write_tensors


class Recording(Protocol):
    """Activations to be written: metadata under protocol names, batches (n, n_layers, tokens, d_model), patch labels (n, patches)."""

    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def examples(self) -> Iterator[Tensor]: ...
    @property
    def labels(self) -> npt.NDArray[np.uint8]: ...


def find_shards(path: str | Path) -> Path:
    """The shard folder at ``path``: the folder itself, or the only one inside it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    path = Path(path)
    if (path / METADATA_NAME).exists():
        return path
    found = sorted(child.parent for child in path.glob(f"*/{METADATA_NAME}") if not child.parent.name.startswith("."))
    if not found:
        raise FileNotFoundError(
            f"{path}: no shard folder (none with a {METADATA_NAME}) here or one level down; correct the path"
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{path} holds {len(found)} shard folders ({names}): name one of them")
    return found[0]


class ShardsDataset(AbstractDataset[Recording, Shards]):
    """A folder of saev activation shards. Loading gives a handle that reads when it is iterated, never the array.

    Saving streams a recording into ``<filepath>/<hash>/`` and then replaces ``<filepath>`` whole, so it wants a folder of
    its own, as the embedded default has, and refuses one that holds more than an older recording; shards that saev wrote
    are only read.

    Args:
        filepath: a shard folder, or a folder that holds exactly one.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            shards_fit:
              type: assay.io.datasets.ShardsDataset
              filepath: data/01_raw/saev/shards/08e569e2

        Python::

            shards = ShardsDataset(filepath="data/01_raw/saev/shards/08e569e2").load()
            for tokens in shards.batches(layer=23, batch_size=8192):  # float32 (8192, d_model)
                ...
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Shards:
        return self._open()

    def save(self, data: Recording) -> None:
        metadata = Metadata.model_validate(data.metadata)
        held = sorted(child for child in self._filepath.glob("*") if not child.name.startswith("."))
        if len(held) > 1 or not all((child / METADATA_NAME).is_file() for child in held):
            raise ValueError(
                f"{self._filepath} holds {', '.join(child.name for child in held)}; wanted one older recording at the most,"
                " as saving replaces the folder whole: give the recording a folder of its own"
            )
        with publishing_folder(self._filepath, replace=True) as folder:
            write_shards(folder, metadata, data.examples, data.labels)

    def fingerprint(self) -> str:
        """What the shards are, hashed from names, sizes and the JSON files."""
        return self.load().fingerprint()

    def _open(self) -> Shards:
        return Shards(find_shards(self._filepath))

    def _exists(self) -> bool:
        try:
            self._open()  # load() would raise Kedro's DatasetError for whatever went wrong
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class CodesDataset(AbstractDataset[Codes, StoredCodes]):
    """The codes of one shard folder's patches in one encoding and layer: ``<filepath>/<shard hash>/<encoding>/<layer>/``.

    Codes of different models or parameters have each a folder of their own inside it, by the first 16 digits of the ``fingerprint`` of
    what they were made from. A run sets it (`place`); the metadata say it in full, and codes of another are not loaded.

    Args:
        filepath: the folder of all codes.
        shards: ``{"path": ...}``: the shard folder that the codes are of (Kedro makes a ``path`` absolute).
        encoding: e.g. ``pca-topk-00064``.
        layer: e.g. ``layer_23``.
        batch_size: rows held in memory while writing.
        rows_per_shard: rows a file at the most; what an interrupted run wrote is kept by whole files.
        dtype: of the values on disk: float32, float16 or bfloat16.
        fingerprint: of what the codes are made from, hex; None: they lie in the layer's folder itself.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "{layer}.codes_{encoding}_probe_val":
              type: assay.io.datasets.CodesDataset
              filepath: data/07_model_output/inference
              shards: {path: data/01_raw/saev/shards/687023f7}
              encoding: "{encoding}"
              layer: "{layer}"

        Python::

            codes = CodesDataset(
                filepath="data/07_model_output/inference",
                shards={"path": "data/01_raw/saev/shards/687023f7"},
                encoding="pca-topk-00064",
                layer="layer_23",
            ).load()
            for batch in codes.batches(batch_size=4096):  # values, indices (4096, 64) and error (4096,)
                ...
    """

    def __init__(
        self,
        *,
        filepath: str,
        shards: Mapping[str, str],
        encoding: str,
        layer: str,
        batch_size: int = 4096,
        rows_per_shard: int = 2**18,
        dtype: Dtype = "float32",
        fingerprint: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {dtype!r}: wanted one of {', '.join(get_args(Dtype))}")
        self._filepath = Path(filepath)
        self._shards = Path(shards["path"])
        self._encoding = encoding
        self._layer = layer
        self._batch_size = batch_size
        self._rows_per_shard = rows_per_shard
        self._dtype: Dtype = dtype
        self._fingerprint = fingerprint
        self.metadata = metadata

    @property
    def dtype(self) -> Dtype:
        """Of the values on disk."""
        return self._dtype

    def place(self, fingerprint: str) -> None:
        """Settle what the codes are made from, and with it their folder."""
        self._fingerprint = fingerprint

    @property
    def folder(self) -> Path:
        """Where the codes lie. Raises FileNotFoundError where the shards do not, ValueError where several do."""
        shards = find_shards(self._shards).resolve()  # two links may have one name
        layer = self._filepath / shards.name / self._encoding / self._layer
        return layer if self._fingerprint is None else layer / self._fingerprint[:16]

    def load(self) -> StoredCodes:
        return self._open()

    def save(self, data: Codes) -> None:
        about = {} if self._fingerprint is None else {"fingerprint": self._fingerprint}
        write_codes(
            self.folder,
            data,
            batch_size=self._batch_size,
            rows_per_shard=self._rows_per_shard,
            dtype=self._dtype,
            about=about,
        )

    def fingerprint(self) -> str:
        """What the codes are: SHA-256 of their metadata and of their index, which holds that of every file."""
        digest = hashlib.sha256()
        for name in ("metadata.json", "shards.json"):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def forget_begun(self) -> None:
        """Remove what an interrupted run began of these codes, so that saving them starts anew."""
        with suppress(FileNotFoundError):  # there are no shards yet, so nothing was begun of their codes
            discard_partials(self.folder)

    def _open(self) -> StoredCodes:
        codes = StoredCodes(self.folder)
        found = codes.provenance.get("fingerprint")
        if found != self._fingerprint:
            raise ValueError(
                f"{self.folder} holds codes of fingerprint {found}, wanted {self._fingerprint}: they were made from another"
                " model or other parameters; remove the folder, and the next run makes it again"
            )
        return codes

    def _exists(self) -> bool:
        try:
            return self._open().dtype == self._dtype  # load() would raise Kedro's DatasetError for whatever went wrong
        except (FileNotFoundError, ValueError):
            return False

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": str(self._filepath),
            "shards": str(self._shards),
            "encoding": self._encoding,
            "layer": self._layer,
            "dtype": self._dtype,
            "fingerprint": self._fingerprint,
        }


class SaevInferenceDataset(AbstractDataset[Never, Any]):
    """What saev's inference left of one of its runs: ``<run>/inference/<shard hash>/``. It is read and never written.

    Args:
        run: saev's folder of the run.
        shards: the shards that it was run on, as `ShardsDataset` names them.
        part: ``codes``, a handle on ``token_acts.npz``; or ``metrics``, the NMSE that ``metrics.json`` says.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "layer_23.codes_relu-16k_probe_val":
              type: assay.io.datasets.SaevInferenceDataset
              run: runs/z55bntm1
              shards: data/01_raw/saev/shards/687023f7
              part: codes

        Python::

            saev = SaevInferenceDataset(run="runs/z55bntm1", shards="data/01_raw/saev/shards/687023f7", part="codes")
            token_acts = saev.load()
    """

    def __init__(
        self, *, run: str, shards: str, part: Literal["codes", "metrics"], metadata: dict[str, Any] | None = None
    ) -> None:
        self._run = Path(run)
        self._shards = shards
        self._part = part
        self.metadata = metadata

    @property
    def folder(self) -> Path:
        """Where the inference on these shards lies."""
        return self._run / "inference" / find_shards(self._shards).name

    def load(self) -> SaevCodes | dict[str, float]:
        if self._part == "metrics":
            return read_metrics(self.folder)
        shards = Shards(find_shards(self._shards))
        return SaevCodes(self.folder, shards.n_tokens, shards.d_model)

    def save(self, data: Never) -> None:
        raise DatasetError(f"{self._run}: found {type(data).__name__} to save; the folder is saev's")

    def fingerprint(self) -> str:
        """Name, size and a sample of the file."""
        return f"{self.folder.name} {self._file().stat().st_size} {sampled_digest(self._file())}"

    def _file(self) -> Path:
        return self.folder / (CODES_NAME if self._part == "codes" else METRICS_NAME)

    def _exists(self) -> bool:
        try:
            return self._file().is_file()
        except (FileNotFoundError, ValueError):  # the shards are not there
            return False

    def _describe(self) -> dict[str, Any]:
        return {"run": str(self._run), "shards": self._shards, "part": self._part}


class ImagesDataset(AbstractDataset[npt.NDArray[np.uint8], Images]):
    """The images behind a shard folder, in a folder of their own. Loading gives a handle that reads one when it is asked for.

    Saving writes grey images, uint8 (n, height, width), as PNGs and replaces the folder whole.

    Args:
        filepath: the folder.
        layout: which files, and how they lie on the patches: the arguments of `assay.io.images.ImageLayout`.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            images_probe_val:
              type: assay.io.datasets.ImagesDataset
              filepath: ADEChallengeData2016/images/validation
              layout: {patch_size: 16, resize: 256, crop: true}

        Python::

            images = ImagesDataset(
                filepath="ADEChallengeData2016/images/validation", layout={"patch_size": 16, "resize": 256, "crop": True}
            ).load()
            image = images.read(7, n_patches=256)  # uint8 (256, 256, 3)
    """

    def __init__(self, *, filepath: str, layout: Mapping[str, Any], metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self._layout = ImageLayout.model_validate(layout)
        self.metadata = metadata

    def load(self) -> Images:
        return self._open()

    def save(self, data: npt.NDArray[np.uint8]) -> None:
        with publishing_folder(self._filepath, replace=True) as folder:
            write_images(folder, data)

    def fingerprint(self) -> str:
        """What the images are, hashed from their names, sizes and times."""
        return self.load().fingerprint()

    def _open(self) -> Images:
        return Images(self._filepath, self._layout)

    def _exists(self) -> bool:
        try:
            return len(self._open()) > 0  # load() would raise Kedro's DatasetError for whatever went wrong
        except (FileNotFoundError, ValueError):
            return False

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "layout": self._layout.model_dump(mode="json", exclude_none=True)}


class CheckpointsDataset(AbstractDataset[Never, Checkpoints]):
    """The folder of a fit's checkpoints. Loading gives a handle; it is the fit that saves, while it goes on.

    Args:
        filepath: a folder, which need not exist.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "{layer}.pca_checkpoints":
              type: assay.io.datasets.CheckpointsDataset
              filepath: data/06_models/.checkpoints/{layer}/pca

        Python::

            checkpoints = CheckpointsDataset(filepath="data/06_models/.checkpoints/layer_23/pca").load()
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Checkpoints:
        return Checkpoints(self._filepath)

    def save(self, data: Never) -> None:
        raise DatasetError(f"{self._filepath}: found {type(data).__name__} to save; checkpoints are saved by the fit")

    def fingerprint(self) -> str:
        """Always the same: where a fit goes on from does not change what it ends with."""
        return "checkpoints"

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class TensorsDataset(AbstractVersionedDataset[dict[str, Tensor], dict[str, Tensor]]):
    """Named tensors in one safetensors file: statistics, fitted models, probes.

    Args:
        filepath: a local safetensors file.
        version: which version, where the entry is ``versioned: true``.
        load_args: ``any_schema: true`` to read a file that somebody else wrote.
        metadata: for plugins, unused here.

    Examples:
        YAML::

            "{layer}.pca_model":
              type: assay.io.datasets.TensorsDataset
              filepath: data/06_models/{layer}/pca.safetensors
              versioned: true

        Python::

            components = TensorsDataset(filepath="data/06_models/layer_23/pca.safetensors").load()["components"]
    """

    def __init__(
        self,
        *,
        filepath: str,
        version: Version | None = None,
        load_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        local = fsspec.filesystem("file")
        super().__init__(PurePosixPath(filepath), version, exists_function=local.exists, glob_function=local.glob)
        self._load_args = load_args or {}
        self.metadata = metadata

    def load(self) -> dict[str, Tensor]:
        return read_tensors(Path(self._get_load_path()), **self._load_args)

    def save(self, data: dict[str, Tensor]) -> None:
        write_tensors(Path(self._get_save_path()), data)

    def fingerprint(self) -> str:
        """What the tensors are, hashed from their names, shapes and bytes."""
        return fingerprint_tensors(self.load())

    def _exists(self) -> bool:
        try:
            return Path(self._get_load_path()).is_file()
        except DatasetError:  # no version has been saved yet
            return False

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "version": self._version}
