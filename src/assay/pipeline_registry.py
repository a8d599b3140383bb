"""The pipelines by name. Each holds what it needs from the stages before it, so that any of them
runs on its own.

What is up to date is not made again, so `--pipeline=pca` after a whole run makes only what a
changed parameter asks for.
"""

from __future__ import annotations

from collections.abc import Callable

from kedro.pipeline import Pipeline

from assay.configuration import current_configuration
from assay.encodings import layer_name
from assay.extraction import Extraction
from assay.pipelines import (
    dictionaries,
    digits,
    encode,
    extract,
    kmeans,
    pca,
    probe,
    report,
    standardize,
)
from assay.plan import Plan, make_plan
from assay.preflight import find_d_model

SHARED = {"shards_fit", "shards_val", "shards_probe_train", "shards_probe_val"}


def register_pipelines() -> dict[str, Pipeline]:
    """Build every pipeline for the layers and encodings that the configuration asks for."""
    project, parameters = current_configuration()
    stages = _stages(
        make_plan(parameters, find_d_model(parameters, project)), Extraction(parameters, project)
    )
    whole = sum(stages.values(), Pipeline([]))
    names = {name: [node.name for node in stage.nodes] for name, stage in stages.items()}
    return {name: whole.to_nodes(*nodes) for name, nodes in names.items() if nodes} | {
        "__default__": whole
    }


def _stages(plan: Plan, extraction: Extraction) -> dict[str, Pipeline]:
    ks = tuple(row.k for row in plan.encodings if row.model.family == "pca" and row.k is not None)
    elsewhere = [row for row in plan.encodings if row.codes != plan.pca_form.name]

    def create_dictionaries(layer: int) -> Pipeline:
        made = (
            dictionaries.create_pipeline(layer, each.model, each.parameters, each.encodings)
            for each in plan.dictionaries_of(layer)
        )
        return sum(made, Pipeline([]))

    def layers(create: Callable[[int], Pipeline]) -> Pipeline:
        return sum((_in_namespace(create(layer), layer) for layer in plan.layers), Pipeline([]))

    return {
        "digits": digits.create_pipeline(plan.digits) if plan.digits else Pipeline([]),
        "extract": extract.create_pipeline(
            {split: extraction.layers(split) for split in plan.extracted},
            extraction.parameters.extract.recording,
        ),
        "standardize": layers(
            lambda n: standardize.create_pipeline(n, given_statistics=plan.given_statistics)
        ),
        "kmeans": layers(lambda n: kmeans.create_pipeline(n, plan.kmeans)),
        "pca": layers(lambda n: pca.create_pipeline(n, ks=ks, form=plan.pca_form)),
        "encode": layers(lambda n: encode.create_pipeline(n, elsewhere, sparsity=plan.sparsity)),
        "dictionaries": layers(create_dictionaries),
        "probe": layers(lambda n: probe.create_pipeline(n, plan.rows_of(n))),
        "report": (
            layers(
                lambda n: report.create_layer_pipeline(n, plan.rows_of(n), again=plan.kmeans[1:])
            )
            + report.create_pipeline(
                [layer_name(layer) for layer in plan.layers],
                several_seeds=len(plan.kmeans) > 1,
                gallery_classes=plan.gallery_classes,
                named_classes=plan.named_classes,
            )
        ),
    }


def _in_namespace(pipeline: Pipeline, layer: int) -> Pipeline:
    """The pipeline of one layer: `layer_23` before its nodes and datasets, but for what layers
    share or leave to the report.
    """
    namespace = layer_name(layer)
    inputs = pipeline.inputs()
    return Pipeline(
        pipeline,
        namespace=namespace,
        inputs=SHARED & inputs,
        outputs={
            kind: f"{kind}_{namespace}"
            for kind in ("rows", "curves", "examples")
            if kind in pipeline.outputs()
        }
        or None,
        parameters={name for name in inputs if name.startswith("params:")},
    )
