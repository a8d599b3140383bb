"""What a run will do, settled from the parameters and the shards before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from assay.io.datasets import find_shards
from assay.io.shards import Shards
from assay.parameters import DictionaryParameters, Parameters, SparsityParameters
from assay.pipelines.digits.canvases import cell_size
from assay.pipelines.stream import pick_device

DIGITS = Path("data/01_raw/digits")
"""Where the embedded default lies: shard paths inside it are made by the `digits` pipeline, all others are the user's."""


@dataclass(frozen=True)
class Encoding:
    """One way of writing patches as codes, and a row of a layer's table.

    ``k`` is the clusters or kept components (None: what the dictionary says), and ``codes`` the encoding whose folder holds
    them: the sweep's largest K serves all. ``as_`` is the encoding that makes them, where that goes by another name.
    """

    name: str
    method: str
    k: int | None
    codes: str
    as_: str | None = None


@dataclass(frozen=True)
class Dictionary:
    """A dictionary that is not Assay's own, on the layers that it is of."""

    name: str
    parameters: DictionaryParameters
    layers: tuple[int, ...]
    encodings: tuple[Encoding, ...]


@dataclass(frozen=True)
class Plan:
    """What the pipelines are built from."""

    layers: tuple[int, ...]
    encodings: tuple[Encoding, ...]
    """Every row of k-means and PCA that the table has for a layer."""
    dictionaries: tuple[Dictionary, ...]
    pca_codes: str
    """The encoding that the ``pca`` pipeline leaves: ``pca-dense``, or ``pca-topk-...`` where ``latent_topk`` is set."""
    sparsity: SparsityParameters | None
    """What is kept of dense k-means codes that do not fit on the disk; None: they have to fit."""
    digits: tuple[str, ...]
    """The splits that the ``digits`` pipeline makes; empty where all shards are the user's."""
    second_seed: int | None
    """k-means is fitted with this seed as well; None: once."""
    given_statistics: bool
    """mu and sigma come from the user's file."""


def topk_name(k: int) -> str:
    """The folder's name of top-K PCA codes."""
    return f"pca-topk-{k:05d}"


def make_plan(parameters: Parameters, d_model: int | None = None) -> Plan:
    """Build the plan.

    Args:
        parameters: typed parameters.
        d_model: width of the activations; None where it is not known, and then every K is kept.
    """
    ks = [k for k in parameters.pca.topk if d_model is None or k <= d_model]
    if parameters.latent_topk is not None:
        ks = sorted({*ks, parameters.latent_topk})
    pca = [Encoding(topk_name(k), "pca", k, topk_name(max(ks))) for k in ks]
    kmeans = [Encoding(name, "kmeans", parameters.kmeans.n_clusters, name) for name in parameters.kmeans.encodings]
    return Plan(
        layers=parameters.layers,
        encodings=(*kmeans, *pca),
        dictionaries=tuple(
            Dictionary(name, each, _layers_of(each, parameters), tuple(_encodings_of(name, each, kmeans, pca)))
            for name, each in parameters.dictionaries.items()
        ),
        pca_codes="pca-dense" if parameters.latent_topk is None else topk_name(parameters.latent_topk),
        sparsity=parameters.kmeans.sparsity,
        digits=digits_splits(parameters),
        second_seed=parameters.kmeans.second_seed,
        given_statistics=parameters.standardize.statistics is not None,
    )


def _layers_of(dictionary: DictionaryParameters, parameters: Parameters) -> tuple[int, ...]:
    return tuple(n for n in parameters.layers if dictionary.layers is None or n in dictionary.layers)


def _encodings_of(
    name: str, dictionary: DictionaryParameters, kmeans: list[Encoding], pca: list[Encoding]
) -> Iterator[Encoding]:
    """A random dictionary has the encodings of the method that it is the floor of; any other has one, of its own name."""
    if dictionary.random is None:
        yield Encoding(name, name, dictionary.k, name)
        return
    for row in kmeans if dictionary.random == "centres" else pca:
        own, codes = (f"{name}-{each.partition('-')[2]}" for each in (row.name, row.codes))
        yield Encoding(own, name, row.k, codes, row.codes)


def digits_splits(parameters: Parameters) -> tuple[str, ...]:
    """The splits whose shards are the embedded default's."""
    return tuple(split for split, path in parameters.shards if Path(path).parent == DIGITS)


def find_d_model(parameters: Parameters, project: Path) -> int | None:
    """Width of the activations of the fit shards; None where they cannot be read."""
    if "fit" in digits_splits(parameters):
        return parameters.digits.d_model
    try:
        return Shards(find_shards(project / parameters.shards.fit)).d_model
    except (FileNotFoundError, ValueError):
        return None


def check_shards(parameters: Parameters, project: Path) -> None:
    """Check that the shards hold what the parameters ask for.

    Raises:
        FileNotFoundError: a shard folder is missing.
        ValueError: a layer that they do not hold, a K above d_model, different widths, labels missing, or digits that
            cannot be drawn or would be written to one folder.
    """
    made_here = digits_splits(parameters)
    if made_here:
        _check_digits(parameters, made_here)
    pick_device(parameters.device)
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    n_fit = parameters.digits.n_fit * parameters.digits.n_patches
    for split, path in parameters.shards:
        if split in made_here:
            found[split] = parameters.digits.d_model, parameters.digits.layers
            continue
        shards = Shards(find_shards(project / path))
        found[split] = shards.d_model, shards.layers
        n_fit = shards.n_tokens if split == "fit" else n_fit
        if split.startswith("probe") and not shards.has_labels:
            raise ValueError(f"shards.{split}: {shards.path} has no labels.bin; probes need a label for each patch.")
    d_model, _ = found["fit"]
    for split, (width, layers) in found.items():
        absent = [layer for layer in parameters.layers if layer not in layers]
        if absent:
            raise ValueError(f"layers: shards.{split} does not hold layer {absent[0]}; it holds {list(layers)}.")
        if width != d_model:
            raise ValueError(
                f"shards.{split} has {width} dimensions, shards.fit {d_model}: they are of different models."
            )
    _check_sizes(parameters, d_model, n_fit)


def _check_sizes(parameters: Parameters, d_model: int, n_fit: int) -> None:
    """Clusters and K against the tokens and dimensions that there are."""
    if parameters.kmeans.n_clusters > n_fit:
        raise ValueError(f"kmeans.n_clusters is {parameters.kmeans.n_clusters}; shards.fit has only {n_fit} tokens.")
    if parameters.latent_topk is not None and parameters.latent_topk > d_model:
        raise ValueError(f"latent_topk is {parameters.latent_topk}; it can be at most d_model, {d_model}.")
    if min(parameters.pca.topk) > d_model:
        raise ValueError(
            f"pca.topk is {list(parameters.pca.topk)}; at least one K must not be above d_model, {d_model}."
        )


def _check_digits(parameters: Parameters, splits: tuple[str, ...]) -> None:
    digits = parameters.digits
    cell_size(digits.image_size, digits.digits_per_image, digits.patch_size)
    folders: dict[Path, str] = {}
    for split in splits:
        path = Path(getattr(parameters.shards, split))
        first = folders.setdefault(path, split)
        if first != split:
            raise ValueError(
                f"shards.{first} and shards.{split} are both {path}: give each split that is made here a folder of its own."
            )
