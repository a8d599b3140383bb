from collections.abc import Sequence

from kedro.pipeline import Pipeline, node

from assay.pipelines.probe.nodes import fit_probes
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, encodings: Sequence[tuple[str, str, int | None, str]]) -> Pipeline:
    """Probe every (method, encoding, k, encoding whose codes hold it): those that share codes in one node, from the same passes."""
    sharing: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for method, encoding, k, codes in encodings:
        sharing.setdefault((method, codes), []).append((encoding, k))
    return Pipeline(
        [
            node(
                bind(fit_probes, layer=layer, method=method, rows=tuple(rows)),
                [
                    f"codes_{codes}_probe_train",
                    f"codes_{codes}_probe_val",
                    "shards_probe_train",
                    "shards_probe_val",
                    "params:probe",
                    "params:device",
                ],
                [f"{kind}_{encoding}" for encoding, _ in rows for kind in ("probes", "scores", "pairs", "examples")],
                name=f"probe.{'pca-topk' if method == 'pca' else codes}",
            )
            for (method, codes), rows in sharing.items()
        ]
    )
