from kedro.pipeline import Pipeline, node

from assay.pipelines.report.nodes import merge_layer, tabulate_baselines


def create_layer_pipeline(metrics: list[str]) -> Pipeline:
    """Join the metrics of one layer into its rows."""
    return Pipeline([node(merge_layer, metrics, "rows", name="report.merge")])


def create_pipeline(rows: list[str]) -> Pipeline:
    """Gather every layer's rows into the table."""
    return Pipeline([node(tabulate_baselines, rows, "baselines", name="report.tabulate")])
