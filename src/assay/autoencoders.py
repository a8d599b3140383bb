"""The autoencoders that the parameters name: where they lie, and if they go with the shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from kedro.io import DatasetError

from assay.encodings import Model, layer_name
from assay.io.datasets import SaeDataset
from assay.io.saes import Settings
from assay.io.saes.residual_stream import check_place
from assay.parameters import Parameters
from assay.plan import layers_of, place
from assay.sae import open_sae


@dataclass(frozen=True)
class GivenAutoencoder:
    """An autoencoder of one layer and one seed."""

    layer: int
    model: Model
    parameter: str
    """That names it, as `dictionaries.mine.sae`."""
    dataset: SaeDataset

    @property
    def entry(self) -> str:
        """The catalog's name for it."""
        return f"{layer_name(self.layer)}.sae_{self.model.name}"


def given_autoencoders(parameters: Parameters, project: Path) -> Iterator[GivenAutoencoder]:
    """Every autoencoder that is named, on every layer that it is of."""
    for name, dictionary in parameters.dictionaries.items():
        typed = dictionary.sae or dictionary.weights
        if typed is None:
            continue
        parameter = f"dictionaries.{name}.{'weights' if dictionary.sae is None else 'sae'}"
        settings = {
            setting.name: value
            for setting in fields(Settings)
            if (value := getattr(dictionary, setting.name)) is not None
        }
        for model in dictionary.models(name):
            for layer in layers_of(dictionary, parameters):
                dataset = SaeDataset(
                    filepath=str(place(project, typed, layer, model.seed)),
                    settings=settings,
                    input_bias=dictionary.input_bias,
                    parameter=parameter,
                    typed=typed,
                )
                yield GivenAutoencoder(layer, model, parameter, dataset)


def check_autoencoders(parameters: Parameters, project: Path, d_model: int) -> list[str]:
    """Check that the autoencoders that are there are understood, and are of these activations; one
    that is missing is told of elsewhere, if it is needed.

    Returns:
        What cannot be checked, a sentence each.

    Raises:
        ValueError: one is damaged, not understood, of another width, or was trained on something
            else than the residual stream after its layer's block.
        OSError: one cannot be read.
    """
    doubts: list[str] = []
    for given in given_autoencoders(parameters, project):
        if given.dataset.exists():
            doubts += _check(given, d_model)
    return doubts


def _check(given: GivenAutoencoder, d_model: int) -> Iterator[str]:
    try:
        look = given.dataset.look()
        # Of one that is not finite the tensors are named.
        stored = look.stored if look.is_finite else given.dataset.load()
    except DatasetError as error:
        raise (error.__cause__ or error) from None
    if stored.d_model != d_model:
        # A library knows which of its sizes is which.
        by_hand = stored.library == "hand-made"
        turned = ": it is the other way round" if by_hand and stored.n_features == d_model else ""
        raise ValueError(
            f"{given.parameter}: {given.dataset.filepath} is of {stored.d_model} dimensions, want"
            f" {d_model} for these shards{turned}."
        )
    try:
        open_sae(stored)
        compared = check_place(stored.recorded, given.layer)
    except ValueError as error:
        raise ValueError(f"{given.parameter}: {given.dataset.filepath}: {error}.") from error
    if not compared:
        yield (
            f"{given.parameter}: {given.dataset.filepath} records"
            f" {stored.recorded.hook or f'layer {stored.recorded.layer}'}, and the shards count"
            f" layer {given.layer} from the end: whether they are the same cannot be told."
        )
