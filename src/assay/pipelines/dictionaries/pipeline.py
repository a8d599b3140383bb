"""The `dictionaries` pipeline: codes and errors of what was not fitted here."""

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.encodings import Encoding, Form, Model
from assay.parameters import DictionaryParameters
from assay.pipelines.dictionaries.nodes import adopt_saev_metrics, draw_centers, draw_directions
from assay.pipelines.dictionary_nodes import encoding_nodes, measuring_node
from assay.pipelines.stream import bind


def create_pipeline(
    layer: int, model: Model, dictionary: DictionaryParameters, encodings: Sequence[Encoding]
) -> Pipeline:
    """Leave the codes and errors of one dictionary that is not Assay's own, in its encodings."""
    name, stage = model.name, f"dictionaries.{model.name}"
    if dictionary.saev_run is not None:
        return Pipeline(
            [
                node(
                    bind(
                        adopt_saev_metrics,
                        layer=layer,
                        name=name,
                        dictionary=dictionary.of_seed(model.seed),
                    ),
                    [
                        f"metrics_{name}",
                        f"codes_{name}_probe_val",
                        "shards_val",
                        "statistics",
                        "params:device",
                    ],
                    f"{name}_errors",
                    name=f"{stage}.adopt",
                )
            ]
        )
    if dictionary.is_autoencoder:
        stored, trained_on = f"sae_{name}", dictionary.trained_on or "raw"
        return Pipeline(
            [
                measuring_node(
                    stage,
                    stored,
                    layer=layer,
                    name=name,
                    kind=trained_on,
                    batch_size=dictionary.batch_size,
                ),
                *encoding_nodes(f"{stage}.encode", stored, layer=layer, name=name, kind=trained_on),
            ]
        )
    return Pipeline(_random(layer, model, encodings))


def _random(layer: int, model: Model, encodings: Sequence[Encoding]) -> list[Node]:
    name, stage, drawn = model.name, f"dictionaries.{model.name}", f"{model.name}_model"
    stored = {row.codes: row.codes_form for row in encodings}
    forms = [form for form in stored.values() if form is not None]
    by_center = forms[0].is_by_center
    draw = (
        node(
            bind(draw_centers, layer=layer, seed=model.seed),
            ["shards_fit", "statistics", "params:kmeans", "params:device"],
            drawn,
            name=f"{stage}.draw",
        )
        if by_center
        else node(
            bind(draw_directions, layer=layer, seed=model.seed),
            ["shards_fit"],
            drawn,
            name=f"{stage}.draw",
        )
    )
    # What is measured of a dictionary is the same for all its forms.
    measured = Form("onehot") if by_center else Form("dense")
    ks = () if by_center else tuple(row.k for row in encodings if row.k is not None)
    return [
        draw,
        measuring_node(stage, drawn, layer=layer, name=name, kind=measured, ks=ks),
        *(
            made
            for codes, form in stored.items()
            if form is not None
            for made in encoding_nodes(
                f"{stage}.encode.{codes}",
                drawn,
                layer=layer,
                name=codes,
                kind=form,
                seed=model.seed,
            )
        ),
    ]
