from collections.abc import Sequence

from kedro.pipeline import Pipeline, node
from kedro.pipeline.node import Node

from assay.parameters import DictionaryParameters
from assay.pipelines.dictionaries.nodes import (
    adopt_saev_metrics,
    draw_centres,
    draw_directions,
    encode_with_sae,
    measure_sae,
)
from assay.pipelines.encode.pipeline import encode_both_splits
from assay.pipelines.kmeans.nodes import measure_kmeans
from assay.pipelines.pca.nodes import measure_pca
from assay.pipelines.stream import bind

SPLITS = ("probe_train", "probe_val")


def create_pipeline(
    layer: int,
    name: str,
    dictionary: DictionaryParameters,
    seed: int | None,
    encodings: Sequence[tuple[str, str | None, int | None]],
) -> Pipeline:
    """Leave the codes and the errors of one dictionary, by its (codes, encoding that makes them, k)."""
    if dictionary.weights is not None:
        return Pipeline(_of_weights(layer, name, dictionary))
    if dictionary.saev_run is not None:
        return Pipeline(
            [
                node(
                    bind(adopt_saev_metrics, layer=layer, name=name, dictionary=dictionary),
                    [f"metrics_{name}", f"codes_{name}_probe_val", "shards_val", "statistics", "params:device"],
                    f"{name}_errors",
                    name=f"dictionaries.{name}.adopt",
                )
            ]
        )
    return Pipeline(_random(layer, name, dictionary, seed, encodings))


def _of_weights(layer: int, name: str, dictionary: DictionaryParameters) -> list[Node]:
    return [
        node(
            bind(measure_sae, layer=layer, name=name, dictionary=dictionary),
            ["shards_val", "statistics", f"weights_{name}", "params:device"],
            f"{name}_errors",
            name=f"dictionaries.{name}.measure",
        ),
        *(
            node(
                bind(encode_with_sae, layer=layer, encoding=name, dictionary=dictionary),
                [f"shards_{split}", "statistics", f"weights_{name}", "params:device"],
                f"codes_{name}_{split}",
                name=f"dictionaries.{name}.encode.{split}",
            )
            for split in SPLITS
        ),
    ]


def _random(
    layer: int,
    name: str,
    dictionary: DictionaryParameters,
    seed: int | None,
    encodings: Sequence[tuple[str, str | None, int | None]],
) -> list[Node]:
    method = "kmeans" if dictionary.random == "centres" else "pca"
    draw = (
        node(
            bind(draw_centres, layer=layer, seed=seed),
            ["shards_fit", "statistics", "params:kmeans", "params:device"],
            f"{name}_model",
            name=f"dictionaries.{name}.draw",
        )
        if method == "kmeans"
        else node(
            bind(draw_directions, layer=layer, seed=seed),
            ["shards_fit"],
            f"{name}_model",
            name=f"dictionaries.{name}.draw",
        )
    )
    ks = tuple(k for _, _, k in encodings if k is not None)
    measure = (
        bind(measure_kmeans, layer=layer, method=name)
        if method == "kmeans"
        else bind(measure_pca, layer=layer, ks=ks, method=name)
    )
    codes_of = {codes: as_ for codes, as_, _ in encodings}
    return [
        draw,
        node(
            measure,
            ["shards_val", "statistics", f"{name}_model", f"params:{method}", "params:device"],
            f"{name}_errors",
            name=f"dictionaries.{name}.measure",
        ),
        *(
            made
            for codes, as_ in codes_of.items()
            for made in encode_both_splits(layer, name, codes, as_, seed, stage=f"dictionaries.{name}.encode")
        ),
    ]
