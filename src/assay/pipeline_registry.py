"""The pipelines by name. Each holds what it needs from the stages before it, so that any of them runs on its own.

What is up to date is not made again, so `--pipeline=pca` after a whole run makes only what a changed parameter asks for.
"""

from __future__ import annotations

from collections.abc import Callable

from kedro.pipeline import Pipeline

from assay.configuration import current_configuration
from assay.pipelines import dictionaries, digits, encode, kmeans, pca, probe, report, standardize
from assay.plan import Dictionary, Plan, find_d_model, make_plan

SHARED = {"shards_fit", "shards_val", "shards_probe_train", "shards_probe_val"}


def register_pipelines() -> dict[str, Pipeline]:
    """Build every pipeline for the layers and encodings that the configuration asks for."""
    project, parameters = current_configuration()
    stages = _stages(make_plan(parameters, find_d_model(parameters, project)))
    whole = sum(stages.values(), Pipeline([]))
    names = {name: [node.name for node in stage.nodes] for name, stage in stages.items()}
    return {name: whole.to_nodes(*nodes) for name, nodes in names.items() if nodes} | {"__default__": whole}


def _stages(plan: Plan) -> dict[str, Pipeline]:
    rows = plan.encodings
    ks = tuple(row.k for row in rows if row.method == "pca" and row.k is not None)
    # Each once: the rows of PCA share the codes of their largest K.
    elsewhere = tuple(
        dict.fromkeys((row.method, row.codes, row.as_, row.seed) for row in rows if row.codes != plan.pca_codes)
    )
    metrics = [f"{method}_errors" for method in (*plan.kmeans_seeds, "pca")] + [f"scores_{row.name}" for row in rows]

    def of_layer(layer: int) -> list[Dictionary]:
        return [each for each in plan.dictionaries if layer in each.layers]

    def create_dictionary(layer: int, each: Dictionary) -> Pipeline:
        encodings = tuple((row.codes, row.as_, row.k) for row in each.encodings)
        return dictionaries.create_pipeline(layer, each.name, each.parameters, each.seed, encodings)

    def others(layer: int) -> list[str]:
        found = of_layer(layer)
        return [
            *(f"{each.name}_errors" for each in found),
            *(f"scores_{row.name}" for each in found for row in each.encodings),
        ]

    def create_report(layer: int) -> Pipeline:
        everything = (*rows, *(row for each in of_layer(layer) for row in each.encodings))
        agreements = [f"{fit}_agreement" for fit in [*plan.kmeans_seeds][1:]]
        seeds = {row.name: row.seed for row in everything}
        return report.create_layer_pipeline(layer, metrics + others(layer), seeds=seeds, agreements=agreements)

    def layers(create: Callable[[int], Pipeline]) -> Pipeline:
        return sum((_in_namespace(create(layer), layer) for layer in plan.layers), Pipeline([]))

    return {
        "digits": digits.create_pipeline(plan.digits) if plan.digits else Pipeline([]),
        "standardize": layers(lambda n: standardize.create_pipeline(n, given_statistics=plan.given_statistics)),
        "kmeans": layers(lambda n: kmeans.create_pipeline(n, seeds=plan.kmeans_seeds)),
        "pca": layers(lambda n: pca.create_pipeline(n, ks=ks, codes=plan.pca_codes)),
        "encode": layers(lambda n: encode.create_pipeline(n, encodings=elsewhere, sparsity=plan.sparsity)),
        "dictionaries": layers(lambda n: sum((create_dictionary(n, each) for each in of_layer(n)), Pipeline([]))),
        "probe": layers(
            lambda n: probe.create_pipeline(
                n,
                encodings=tuple(
                    (row.method, row.name, row.k, row.codes)
                    for row in (*rows, *(row for each in of_layer(n) for row in each.encodings))
                ),
            )
        ),
        "report": layers(create_report)
        + report.create_pipeline(
            [f"layer_{layer}" for layer in plan.layers],
            several_seeds=len(plan.kmeans_seeds) > 1,
            gallery_classes=plan.gallery_classes,
        ),
    }


def _in_namespace(pipeline: Pipeline, layer: int) -> Pipeline:
    """The pipeline of one layer: `layer_23` before its nodes and datasets, but for what layers share or leave to the report."""
    namespace = f"layer_{layer}"
    inputs = pipeline.inputs()
    return Pipeline(
        pipeline,
        namespace=namespace,
        inputs=SHARED & inputs,
        outputs={kind: f"{kind}_{namespace}" for kind in ("rows", "curves", "examples") if kind in pipeline.outputs()}
        or None,
        parameters={name for name in inputs if name.startswith("params:")},
    )
