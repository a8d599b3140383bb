from kedro.pipeline import Pipeline, node

from assay.pipelines.probe.nodes import fit_probes
from assay.pipelines.stream import bind


def create_pipeline(layer: int, *, encodings: tuple[tuple[str, str, int, str], ...]) -> Pipeline:
    """Probe every (method, encoding, k, encoding whose codes hold it)."""
    return Pipeline(
        [
            node(
                bind(
                    fit_probes,
                    layer=layer,
                    method=method,
                    encoding=encoding,
                    k=k,
                    kept=None if codes == encoding else k,
                ),
                [
                    f"codes_{codes}_probe_train",
                    f"codes_{codes}_probe_val",
                    "shards_probe_train",
                    "shards_probe_val",
                    "params:probe",
                    "params:device",
                ],
                [f"probes_{encoding}", f"scores_{encoding}"],
                name=f"probe.{encoding}",
            )
            for method, encoding, k, codes in encodings
        ]
    )
