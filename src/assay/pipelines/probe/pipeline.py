"""The `probe` pipeline: a probe of every (feature, class), and their scores."""

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from assay.encodings import Encoding
from assay.pipelines.probe.nodes import fit_probes
from assay.pipelines.stream import bind


def create_pipeline(layer: int, encodings: Iterable[Encoding]) -> Pipeline:
    """Probe every encoding: those that share codes in one node, from the same passes."""
    sharing: dict[str, list[Encoding]] = {}
    for row in encodings:
        sharing.setdefault(row.codes, []).append(row)
    return Pipeline(
        [
            node(
                bind(
                    fit_probes,
                    layer=layer,
                    method=rows[0].model.name,
                    rows=tuple((row.name, row.k) for row in rows),
                ),
                [
                    f"codes_{codes}_probe_train",
                    f"codes_{codes}_probe_val",
                    "shards_probe_train",
                    "shards_probe_val",
                    "params:probe",
                    f"probe-{_shared_name(rows[0])}_checkpoints",
                    "params:device",
                ],
                [
                    f"{kind}_{row.name}"
                    for row in rows
                    for kind in ("probes", "scores", "pairs", "examples")
                ],
                name=f"probe.{_shared_name(rows[0])}",
            )
            for codes, rows in sharing.items()
        ]
    )


def _shared_name(row: Encoding) -> str:
    # Where PCA's sweep shares codes no K is named: a node that is called otherwise whenever its
    # largest K changes is hard to ask for.
    return "pca-topk" if row.model.family == "pca" and row.stored_k is not None else row.codes
