"""What a run will do, settled from the parameters alone before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.encodings import Encoding, Form, Model, layer_name
from assay.io.datasets import find_shards
from assay.io.saes.hub import is_address
from assay.io.shards.metadata import read_metadata
from assay.io.shards.provenance import Provenance
from assay.parameters import DictionaryParameters, Parameters, SparsityParameters

DIGITS = Path("data/01_raw/digits")
"""Where the embedded default lies: shard paths inside it are made by the `digits` pipeline, all
others are the user's.
"""

DEFAULT_PATCH_SIZE = 16
"""Of images, in pixels, where neither the user nor the shards say it."""


@dataclass(frozen=True)
class PlannedDictionary:
    """A dictionary that is not Assay's own, on the layers that it is of."""

    model: Model
    parameters: DictionaryParameters
    layers: tuple[int, ...]
    encodings: tuple[Encoding, ...]


@dataclass(frozen=True)
class Plan:
    """What the pipelines are built from."""

    layers: tuple[int, ...]
    encodings: tuple[Encoding, ...]
    """Every row of k-means, with each of its seeds, and of PCA that the table has for a layer."""
    dictionaries: tuple[PlannedDictionary, ...]
    pca_form: Form
    """The form of the codes that the ``pca`` pipeline leaves: ``pca-dense``, or ``pca-topk-...``
    where ``latent_topk`` is set.
    """
    sparsity: SparsityParameters | None
    """What is kept of dense k-means codes that do not fit on the disk; None: they have to fit."""
    digits: tuple[str, ...]
    """The splits that the ``digits`` pipeline makes; empty where all shards are the user's."""
    extracted: tuple[str, ...]
    """The splits that the ``extract`` pipeline records."""
    kmeans: tuple[Model, ...]
    """The models of k-means, one per seed; the first is called ``kmeans``."""
    gallery_classes: int | None
    """Classes of a dictionary that are shown on the images of probe_val; None: the images are not
    at hand.
    """
    named_classes: bool
    """Classes have names, from the user's file."""
    given_statistics: bool
    """mu and sigma come from the user's file."""

    @property
    def rows(self) -> dict[str, Encoding]:
        """Every row of the table, of whatever dictionary, by name."""
        others = (row for each in self.dictionaries for row in each.encodings)
        return {row.name: row for row in (*self.encodings, *others)}

    def rows_of(self, layer: int) -> tuple[Encoding, ...]:
        """Every row that the table has for a layer."""
        return (
            *self.encodings,
            *(row for each in self.dictionaries_of(layer) for row in each.encodings),
        )

    def dictionaries_of(self, layer: int) -> tuple[PlannedDictionary, ...]:
        """The dictionaries that are planned for a layer."""
        return tuple(each for each in self.dictionaries if layer in each.layers)


def make_plan(parameters: Parameters, d_model: int | None = None) -> Plan:
    """Build the plan.

    Args:
        parameters: typed parameters.
        d_model: width of the activations; None where it is not known, and then every K is kept; as
            where none fits.

    Raises:
        ValueError: two rows of the table would have one name, or the shards of a split would be
            made twice.
    """
    for split in set(digits_splits(parameters)) & set(parameters.extract.splits):
        raise ValueError(
            f"extract.{split}.images: shards.{split} is {getattr(parameters.shards, split)}, the"
            f" embedded default's place: give shards.{split} a place of its own, or say"
            " --env=images, which has one"
        )
    plan = _make_plan(parameters, d_model)
    names = [row.name for row in plan.encodings] + [
        row.name for each in plan.dictionaries for row in each.encodings
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"dictionaries: two rows would be called `{twice}`; give one of the dictionaries"
            " another name."
        )
    return plan


def _make_plan(parameters: Parameters, d_model: int | None) -> Plan:
    # Where every K is too large all are kept, so that preflight can refuse them by name.
    ks = [k for k in parameters.pca.topk if d_model is None or k <= d_model] or list(
        parameters.pca.topk
    )
    if parameters.latent_topk is not None:
        ks = sorted({*ks, parameters.latent_topk})
    sweep = [Encoding(Model("pca"), Form("topk", k), k, stored_k=max(ks)) for k in ks]
    # The error of a smaller K follows from the values that a larger one stores, unless those are
    # whitened: then no K reads the codes of another.
    whiten = parameters.pca.whiten or None
    whitened = [Encoding(Model("pca"), Form("topk", k, whiten), k) for k in ks]
    pca = whitened if whiten else sweep
    fitted = parameters.kmeans
    models = (
        Model("kmeans", fitted.seed),
        *(Model("kmeans", seed, is_of_several=True) for seed in fitted.more_seeds),
    )
    forms = [Form.parse_name(name) for name in fitted.encodings]
    kmeans = [Encoding(model, form, fitted.n_clusters) for model in models for form in forms]
    return Plan(
        layers=parameters.layers,
        encodings=(*kmeans, *pca),
        dictionaries=tuple(
            PlannedDictionary(
                model,
                each,
                layers_of(each, parameters),
                tuple(_encodings_of(model, each, kmeans[: len(forms)], sweep)),
            )
            for name, each in parameters.dictionaries.items()
            for model in each.models(name)
        ),
        pca_form=(
            Form("dense", whiten=whiten)
            if parameters.latent_topk is None
            else Form("topk", parameters.latent_topk, whiten)
        ),
        sparsity=parameters.kmeans.sparsity,
        digits=digits_splits(parameters),
        extracted=parameters.extract.splits,
        gallery_classes=(parameters.images.classes if has_images(parameters) else None),
        kmeans=models,
        named_classes=parameters.class_names is not None,
        given_statistics=parameters.standardize.statistics is not None,
    )


def layers_of(dictionary: DictionaryParameters, parameters: Parameters) -> tuple[int, ...]:
    """The layers that a dictionary is of: its own, or all of the run's."""
    return tuple(
        n for n in parameters.layers if dictionary.layers is None or n in dictionary.layers
    )


def _encodings_of(
    model: Model, dictionary: DictionaryParameters, kmeans: list[Encoding], sweep: list[Encoding]
) -> Iterator[Encoding]:
    """A random dictionary has the encodings of the method that it is the floor of, never whitened:
    along random directions no standard deviation is known. Any other has one, of its own name.
    """
    if dictionary.random is None:
        yield Encoding(model, None, None)  # its k only its codes say
    else:
        yield from (
            replace(row, model=model)
            for row in (kmeans if dictionary.random == "centres" else sweep)
        )


def digits_splits(parameters: Parameters) -> tuple[str, ...]:
    """The splits whose shards are the embedded default's."""
    return tuple(split for split, path in parameters.shards if Path(path).parent == DIGITS)


def made_here(parameters: Parameters) -> tuple[str, ...]:
    """The splits whose shards a run makes."""
    return (*digits_splits(parameters), *parameters.extract.splits)


def has_images(parameters: Parameters) -> bool:
    """Whether the images of probe_val are at hand: those that its shards are made of, or the
    user's.
    """
    return "probe_val" in made_here(parameters) or parameters.images.path is not None


def find_images(parameters: Parameters, project: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the images of probe_val and how they lie on the patches: the embedded
    default's, or the user's, or none. What the user does not say is as it was recorded here.

    Raises:
        ValueError: the user says what contradicts that.
    """
    given = parameters.images
    if "probe_val" in digits_splits(parameters):
        layout = {"patch_size": parameters.digits.patch_size, "pattern": "*.png"}
        return project / f"{parameters.shards.probe_val}-images", layout
    if given.path is None:
        return None
    typed = given.model_dump(exclude={"path", "classes"}) | {
        "crop": given.crop is not None,
        "names": project / given.names if given.names else None,
    }
    recorded = _provenance(project / parameters.shards.probe_val)
    if recorded is not None and "probe_val" not in parameters.extract.splits:
        try:
            typed = {"pattern": None} | recorded.layout(typed, resample=True)
        except ValueError as error:
            raise ValueError(f"images: {error}.") from None
    return project / given.path, typed | {"patch_size": typed["patch_size"] or DEFAULT_PATCH_SIZE}


def _provenance(shards: Path) -> Provenance | None:
    """How shards were recorded, where it was here and they can be read."""
    try:
        return Provenance.parse(read_metadata(find_shards(shards)).data)
    except (FileNotFoundError, ValueError):
        return None


def place(project: Path, path: str, layer: int, seed: int | None = None) -> Path:
    """Where the file of a layer and a seed is that a parameter names; an address on the Hub stays
    one.
    """
    filled = path.replace("{layer}", layer_name(layer)).replace("{seed}", str(seed))
    return Path(filled) if is_address(filled) else project / filled
