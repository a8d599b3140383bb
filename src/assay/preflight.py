"""What is checked on the disk before any work starts: whether the shards, and the user's own
files, hold what the parameters ask for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from kedro.pipeline import Pipeline

from assay.autoencoders import check_autoencoders
from assay.extraction import Extraction, MadeOf, check_extraction
from assay.io.class_names import read_class_names
from assay.io.datasets import find_shards
from assay.io.images import ImageLayout, Images
from assay.io.shards import Shards
from assay.io.shards.doubts import doubt_geometry, doubt_labels
from assay.io.shards.order import OrderFile
from assay.io.shards.provenance import Provenance, RecordedFiles
from assay.io.tensors import read_shapes
from assay.parameters import Parameters
from assay.pipelines.digits.canvases import cell_size
from assay.pipelines.stream import pick_device
from assay.plan import digits_splits, find_images, place

logger = logging.getLogger(__name__)


def find_d_model(parameters: Parameters, project: Path) -> int | None:
    """Width of the activations of the fit shards; None where they cannot be read."""
    if "fit" in digits_splits(parameters):
        return parameters.digits.d_model
    try:
        if "fit" in parameters.extract.splits:
            return Extraction(parameters, project).model.d_model
        return Shards(find_shards(project / parameters.shards.fit)).d_model
    except (FileNotFoundError, ValueError):
        return None


def check_pipeline(parameters: Parameters, project: Path, pipeline: Pipeline) -> None:
    """Check what a pipeline needs: the shards of all splits, or where it only records some, what
    these are recorded from. Raises as `check_shards`.
    """
    if pipeline.nodes and all(node.name.startswith("extract.") for node in pipeline.nodes):
        pick_device(parameters.device)
        check_extraction(parameters, project)
    else:
        check_shards(parameters, project)


def check_shards(parameters: Parameters, project: Path) -> None:
    """Check that the shards hold what the parameters ask for.

    Raises:
        FileNotFoundError: a shard folder is missing.
        ValueError: a layer that they do not hold, a K above d_model, different widths or models,
            labels missing or without a class in common, statistics, autoencoders or an order that
            are not of these shards, digits that cannot be drawn or would lie in one folder, or
            images that cannot be recorded.
    """
    made_of_digits = digits_splits(parameters)
    if made_of_digits:
        _check_digits(parameters, made_of_digits)
    pick_device(parameters.device)
    extraction, n_images = Extraction(parameters, project), check_extraction(parameters, project)
    found: dict[str, _Recorded] = {}
    labels: dict[str, set[int]] = {}
    n_fit = parameters.digits.n_fit * parameters.digits.n_patches
    for split, path in parameters.shards:
        if split in n_images:
            model = extraction.model
            found[split] = _Recorded(
                path,
                model.d_model,
                extraction.layers(split),
                model.family,
                model.ckpt,
                extraction.made_of(split),
            )
            n_fit = n_images[split] * extraction.n_patches if split == "fit" else n_fit
            continue
        if split in made_of_digits:
            digits = parameters.digits
            found[split] = _Recorded(
                path, digits.d_model, digits.layers, digits.model_family, digits.model_ckpt
            )
            continue
        shards = _open_shards(split, project / path)
        found[split] = _Recorded(
            path,
            shards.d_model,
            shards.layers,
            shards.metadata.family,
            shards.metadata.ckpt,
            MadeOf.parse(shards.metadata.data),
        )
        n_fit = shards.n_tokens if split == "fit" else n_fit
        if split.startswith("probe"):
            labels[split] = _classes_of(split, shards, void=parameters.probe.void != "class")
            if (doubt := doubt_labels(shards.path, shards.metadata)) is not None:
                _warn(f"shards.{split}: {doubt}.")
        if split == "probe_val":
            _check_images(parameters, project, shards)
    _check_alike(parameters, found)
    _check_sizes(parameters, found["fit"].d_model, n_fit)
    _check_labels(labels)
    _check_given(parameters, project, found["fit"].d_model, n_fit)


def check_recorded_labels(parameters: Parameters, project: Path, splits: Collection[str]) -> None:
    """Check the labels of splits that are recorded here, once they are there: only the masks knew.

    Raises:
        ValueError: all of a split's are void, or two of them have no class in common.
    """
    void = parameters.probe.void != "class"
    _check_labels(
        {
            split: _classes_of(split, _open_shards(split, project / path), void=void)
            for split, path in parameters.shards
            if split in splits
        }
    )


def _open_shards(split: str, path: Path) -> Shards:
    try:
        return Shards(find_shards(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"shards.{split}: {error}") from error
    except ValueError as error:
        raise ValueError(f"shards.{split}: {error}") from error


@functools.cache
def _warn(message: str) -> None:
    """Once per process: shards are checked by the command line and by the session."""
    logger.warning("%s", message)


@dataclass(frozen=True)
class _Recorded:
    """What a split's shards are of, and the path that names them."""

    path: str
    d_model: int
    layers: tuple[int, ...]
    family: str
    ckpt: str
    made_of: MadeOf | None = None
    """Where Assay recorded it, or is to."""

    @property
    def model(self) -> tuple[str, str]:
        """What tells models apart: a file of weights has another path on another machine, and one
        name.
        """
        return self.family, Path(self.ckpt).name if Path(self.ckpt).is_absolute() else self.ckpt


def _check_alike(parameters: Parameters, found: dict[str, _Recorded]) -> None:
    """Every split holds the layers, and is of the model that shards.fit is of."""
    fit = found["fit"]
    for split, shards in found.items():
        absent = [layer for layer in parameters.layers if layer not in shards.layers]
        if absent:
            raise ValueError(
                f"layers: shards.{split}, {shards.path}, does not hold layer {absent[0]}; it holds"
                f" {list(shards.layers)}."
            )
        if shards.d_model != fit.d_model:
            raise ValueError(
                f"shards.{split}, {shards.path}, has {shards.d_model} dimensions, shards.fit,"
                f" {fit.path}, {fit.d_model}: they are of different models."
            )
        if shards.model != fit.model:
            raise ValueError(
                f"shards.{split}, {shards.path}, is of {shards.family} {shards.ckpt}, shards.fit,"
                f" {fit.path}, of {fit.family} {fit.ckpt}: what is fitted to one model's"
                " activations says nothing of another's; name shards of one model."
            )
    known = [(split, shards) for split, shards in found.items() if shards.made_of is not None]
    for split, shards in known[1:]:
        first, other = known[0]
        assert shards.made_of is not None and other.made_of is not None
        if (differs := shards.made_of.differs(other.made_of)) is not None:
            raise ValueError(
                f"shards.{split}, {shards.path}, and shards.{first}, {other.path}, are not alike:"
                f" {differs}: record both by one `extract` section, or name shards that are."
            )


def _check_sizes(parameters: Parameters, d_model: int, n_fit: int) -> None:
    """Clusters and K against the tokens and dimensions that there are."""
    if parameters.kmeans.n_clusters > n_fit:
        raise ValueError(
            f"kmeans.n_clusters is {parameters.kmeans.n_clusters}; shards.fit,"
            f" {parameters.shards.fit}, has only {n_fit} tokens."
        )
    if parameters.latent_topk is not None and parameters.latent_topk > d_model:
        raise ValueError(
            f"latent_topk is {parameters.latent_topk}; it can be at most d_model, {d_model} in"
            f" {parameters.shards.fit}."
        )
    if min(parameters.pca.topk) > d_model:
        raise ValueError(
            f"pca.topk is {list(parameters.pca.topk)}; at least one K must not be above d_model,"
            f" {d_model} in {parameters.shards.fit}."
        )


def _classes_of(split: str, shards: Shards, *, void: bool) -> set[int]:
    """The labels that there are, less 0 where it is void."""
    if not shards.has_labels:
        raise ValueError(
            f"shards.{split}: {shards.path} has no labels.bin; probes need a label for each patch."
        )
    labels = set(torch.bincount(shards.labels()).nonzero().flatten().tolist())
    if labels == {0}:
        raise ValueError(
            f"shards.{split}: every label of {shards.path} is 0, void; label them, or name other"
            " shards."
        )
    return labels - {0} if void else labels


def _check_labels(classes: dict[str, set[int]]) -> None:
    """The probes' two splits have a class in common."""
    if len(classes) == 2 and not set.intersection(*classes.values()):
        found = "; ".join(
            f"shards.{split} has {sorted(each)[:10]}" for split, each in classes.items()
        )
        raise ValueError(
            f"no class is in both of the probes' splits, {found}: label both by one mapping."
        )


def _check_given(parameters: Parameters, project: Path, d_model: int, n_fit: int) -> None:
    """What the user's own files hold goes with shards of this width; a file that is not there is
    told of elsewhere.
    """
    if parameters.standardize.statistics is not None:
        for layer in parameters.layers:
            path = place(project, parameters.standardize.statistics, layer)
            _check_statistics(path, d_model)
    for doubt in check_autoencoders(parameters, project, d_model):
        _warn(doubt)
    if parameters.class_names is not None:
        _check_class_names(project / parameters.class_names)
    if parameters.kmeans.order is not None:
        OrderFile(parameters.kmeans.order, n_fit)


def _check_class_names(path: Path) -> None:
    try:
        read_class_names(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"class_names: {error}") from error
    except ValueError as error:
        raise ValueError(f"class_names: {error}") from error


def _check_statistics(path: Path, d_model: int) -> None:
    """A file of statistics holds a mean and a std, a number per dimension."""
    if not path.is_file():
        return
    shapes = read_shapes(path)
    for name in ("mean", "std"):
        if name not in shapes:
            raise ValueError(
                f"standardize.statistics: {path} holds {', '.join(sorted(shapes))}, want {name}:"
                " save it too."
            )
        if shapes[name] != (d_model,):
            found = " x ".join(map(str, shapes[name])) or "one number"
            raise ValueError(
                f"standardize.statistics: {path}: `{name}` is {found}, want {d_model} for these"
                " shards."
            )


def _check_images(parameters: Parameters, project: Path, shards: Shards) -> None:
    found = find_images(parameters, project)
    if found is None:
        return
    images = Images(found[0], ImageLayout.model_validate(found[1]))
    if len(images) != shards.n_examples:
        raise ValueError(
            f"images.path: {images.folder} has {len(images)} images of"
            f" {images.layout.names or images.layout.pattern or 'any kind'},"
            f" shards.probe_val {shards.n_examples} examples: name the folder that they were"
            " recorded from, or set images.pattern or images.names."
        )
    if (doubt := doubt_geometry(shards.metadata, images.layout)) is not None:
        _warn(f"images: {doubt}.")
    said = Provenance.parse(shards.metadata.data)
    if said is not None and RecordedFiles.of(images.folder, images.paths) != said.images:
        raise ValueError(
            f"images.path: the images in {images.folder} have other names or sizes than those that"
            " shards.probe_val was recorded from: name their folder, or correct images.pattern or"
            " images.names."
        )
    images.check(shards.metadata.content_tokens_per_example)


def _check_digits(parameters: Parameters, splits: tuple[str, ...]) -> None:
    digits = parameters.digits
    cell_size(digits.image_size, digits.digits_per_image, digits.patch_size)
    folders: dict[Path, str] = {}
    for split in splits:
        path = Path(getattr(parameters.shards, split))
        first = folders.setdefault(path, split)
        if first != split:
            raise ValueError(
                f"shards.{first} and shards.{split} are both {path}: give each split that is made"
                " here a folder of its own."
            )
