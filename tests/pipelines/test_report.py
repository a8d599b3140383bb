"""The table: one row for each (layer, method, encoding, k), with the errors of its method and k
beside its scores.
"""

import copy
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kedro.io import DataCatalog

from assay.configuration import ConfigLoader
from assay.encodings import Encoding, Model
from assay.io.shards import Shards
from assay.parameters import KMeansParameters, PCAParameters, ProbeParameters, StandardizeParameters
from assay.pipelines.report.figures import (
    draw_clusters,
    draw_convergence,
    draw_convergence_pca,
    draw_layers,
    draw_nmse_against_l0,
    draw_prevalence,
    draw_spectrum,
)
from assay.pipelines.report.nodes import (
    COLUMNS,
    FIGURES,
    describe_data,
    draw_figures,
    make_named_views,
    make_views,
    merge_layer,
    summarize_fits,
    tabulate_agreement,
    tabulate_baselines,
    write_page,
)
from assay.pipelines.report.tables import (
    CLASSES,
    IN_PAPER,
    PAPER,
    format_cell,
    list_reconstructions,
    match_budgets,
    name_classes,
    pool_seeds,
    tabulate_classes,
    tabulate_paper,
    to_latex,
    to_markdown,
)

CONF = Path(__file__).parents[2] / "conf"
METRICS = ("probe_r", "map", "purity_at_16", "coverage_at_0.3")
ROWS = (
    ("kmeans", "kmeans-onehot", 8),
    ("kmeans", "kmeans-invdist", 8),
    ("pca", "pca-topk-00001", 1),
    ("pca", "pca-topk-00016", 16),
)


def scores(layer, method, encoding, k, mean_train_ce=0.5, **values):
    about = {"layer": layer, "method": method, "encoding": encoding, "k": k, "l0": 1.0}
    rest = {"mean_train_ce": mean_train_ce, "classes": [{"label": 1}], "converged": True}
    return about | dict.fromkeys(METRICS, 0.25) | rest | values


def errors(layer, method, ks):
    rows = [{"k": k, "nmse": 1 / (1 + k), "nmse_raw": 2 / (3 + k)} for k in ks]
    return {"layer": layer, "method": method, "n_tokens": 9, "rows": rows}


def encodings_of(parts):
    """The encodings of these scores, whose seeds are 0 for k-means, another where the name says it,
    and none for others.
    """
    models = [Model.parse(part["method"]) for part in parts]
    models = [replace(model, seed=0) if model.name == "kmeans" else model for model in models]
    return [
        replace(Encoding.parse(part["encoding"], model), k=part["k"])
        for part, model in zip(parts, models, strict=True)
    ]


ENCODINGS = encodings_of([{"method": method, "encoding": name, "k": k} for method, name, k in ROWS])


def layer_of(layer, ces):
    """A layer's rows with these train CEs, in the order of ROWS."""
    parts = [scores(layer, *row, mean_train_ce=ce) for row, ce in zip(ROWS, ces, strict=True)]
    return merge_layer(
        errors(layer, "kmeans", [8]), errors(layer, "pca", [1, 16]), *parts, encodings=ENCODINGS
    )


def test_scores_are_joined_with_the_errors_of_their_method_and_k():
    metrics = [
        errors(3, "kmeans", [1, 16]),
        errors(3, "pca", [16, 1]) | {"rows": [{"k": 1, "nmse": 0.9, "nmse_raw": 0.8}]},
    ]
    parts = [scores(3, "kmeans", "kmeans-onehot", 1), scores(3, "pca", "pca-topk-00001", 1)]
    kmeans, pca = merge_layer(*metrics, *parts, encodings=ENCODINGS)
    assert (kmeans["encoding"], kmeans["nmse"], kmeans["nmse_raw"]) == (
        "kmeans-onehot",
        1 / 2,
        2 / 4,
    )
    assert (pca["encoding"], pca["nmse"], pca["nmse_raw"]) == ("pca-topk-00001", 0.9, 0.8)
    assert kmeans | parts[0] == kmeans
    assert (kmeans["seed"], kmeans["name"], pca["seed"]) == (0, "kmeans-onehot", None)


def test_the_order_of_the_metrics_does_not_matter_to_the_join():
    metrics = [
        errors(3, "kmeans", [8]),
        errors(3, "pca", [1, 16]),
        *(scores(3, *row) for row in ROWS),
    ]
    before = copy.deepcopy(metrics)
    shuffled = random.Random(0).sample(metrics, len(metrics))
    by_encoding = {row["encoding"]: row for row in merge_layer(*metrics, encodings=ENCODINGS)}
    assert {
        row["encoding"]: row for row in merge_layer(*shuffled, encodings=ENCODINGS)
    } == by_encoding
    assert len(by_encoding) == len(ROWS)
    assert metrics == before


def test_columns_are_those_that_papers_point_at():
    assert (
        ",".join(COLUMNS)
        == "layer,method,encoding,k,seed,nmse,nmse_raw,l0,probe_r,map,purity_at_16,coverage_at_0.3,best_layer"
    )
    table = tabulate_baselines(layer_of(3, [0.5] * 4))
    assert tuple(table.columns) == COLUMNS
    assert table["best_layer"].dtype == bool
    assert table["layer"].dtype == table["k"].dtype == "int64"


def test_rows_are_sorted_by_layer_method_k_and_encoding():
    table = tabulate_baselines(layer_of(23, [0.5] * 4)[::-1], layer_of(5, [0.5] * 4))
    one_layer = ["kmeans-invdist", "kmeans-onehot", "pca-topk-00001", "pca-topk-00016"]
    assert table["layer"].tolist() == [5] * 4 + [23] * 4
    assert table["encoding"].tolist() == one_layer * 2
    assert table.index.tolist() == list(range(8))
    parts = [
        scores(3, "pca", "pca-topk-100000", 100_000),
        scores(3, "pca", "pca-topk-99999", 99_999),
    ]
    rows = merge_layer(errors(3, "pca", [99_999, 100_000]), *parts, encodings=encodings_of(parts))
    table = tabulate_baselines(rows)
    assert table["k"].tolist() == [99_999, 100_000]


def test_values_stay_with_their_row():
    rows = layer_of(3, [0.5] * 4)
    for number, row in enumerate(rows):
        row["map"] = number / 10
    table = tabulate_baselines(rows).set_index("encoding")
    for row in rows:
        for name in ("nmse", "nmse_raw", "l0", *METRICS):
            assert table.loc[row["encoding"], name] == row[name]


def test_the_best_layer_is_picked_on_train_ce_for_each_encoding_apart():
    table = tabulate_baselines(layer_of(3, [0.1, 0.5, 0.3, 0.2]), layer_of(5, [0.2, 0.4, 0.3, 0.1]))
    best = table[table["best_layer"]].set_index("encoding")["layer"].to_dict()
    assert best == {
        "kmeans-onehot": 3,
        "kmeans-invdist": 5,
        "pca-topk-00001": 3,
        "pca-topk-00016": 5,
    }


def test_other_scores_do_not_pick_the_best_layer():
    better = layer_of(3, [0.1] * 4)
    worse = [row | dict.fromkeys(METRICS, 1.0) for row in layer_of(5, [0.2] * 4)]
    table = tabulate_baselines(worse, better)
    assert (table["best_layer"] == (table["layer"] == 3)).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_tie_goes_to_the_lower_layer(turned):
    layers = [layer_of(5, [0.3] * 4), layer_of(12, [0.3] * 4), layer_of(3, [0.4] * 4)]
    table = tabulate_baselines(*(layers[::-1] if turned else layers))
    assert (table["best_layer"] == (table["layer"] == 5)).all()


@settings(deadline=None, max_examples=25)
@given(
    ces=st.lists(
        st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
def test_each_encoding_has_one_best_layer_and_none_lower_is_as_good(ces):
    table = tabulate_baselines(*(layer_of(layer, each) for layer, each in enumerate(ces)))
    for column, (_, encoding, _) in enumerate(ROWS):
        (row,) = table[(table["encoding"] == encoding) & table["best_layer"]].to_dict("records")
        series = [each[column] for each in ces]
        assert row["layer"] == series.index(min(series))


def rows_of(layer, ces, n_classes=3):
    """A layer's rows with classes, of which one is absent from validation."""
    rows = layer_of(layer, ces)
    for number, row in enumerate(rows):
        row["classes"] = [
            dict.fromkeys(set(CLASSES[5:]) - {"absent_in"}, 0.1 * (number + 1))
            | {
                "label": c + 1,
                "n_train": 50,
                "n_val": 10 * (c + 1),
                "feature": number,
                "feature_by_val": number,
            }
            for c in range(n_classes)
        ]
        row |= {"absent_in_train": [8], "absent_in_val": [7, 8]}
    return rows


def both_layers():
    return [rows_of(3, [0.5, 0.4, 0.3, 0.2]), rows_of(5, [0.4, 0.5, 0.2, 0.3])]


def test_the_papers_table_has_each_method_at_its_best_layer():
    baselines = tabulate_baselines(*both_layers())
    paper = tabulate_paper(baselines)
    assert tuple(paper.columns) == PAPER
    found = {row.encoding: row.layer for row in paper.itertuples()}
    assert found == {
        "kmeans-onehot": 5,
        "kmeans-invdist": 3,
        "pca-topk-00001": 5,
        "pca-topk-00016": 3,
    }
    assert paper["method"].tolist() == ["kmeans", "kmeans", "pca", "pca"]
    other = baselines.assign(method=baselines["method"].replace("kmeans", "a-sae"))
    # The baselines come first.
    assert tabulate_paper(other)["method"].tolist() == [
        "pca",
        "pca",
        "a-sae",
        "a-sae",
    ]


def test_the_columns_of_the_other_tables_are_those_that_the_docs_name():
    assert (
        ",".join(PAPER)
        == "method,encoding,k,layer,seeds,nmse,l0,probe_r,map,purity_at_16,coverage_at_0.3,"
        "nmse_sd,l0_sd,probe_r_sd,map_sd,purity_at_16_sd,coverage_at_0.3_sd,nmse_raw,nmse_raw_sd"
    )
    assert (
        ",".join(tabulate_classes(*both_layers()).columns)
        == "layer,encoding,seed,label,n_train,n_val,feature,train_ce,margin,val_ce,base_ce,average_precision,precision,recall,f1,"
        "purity_at_16,purity_at_64,purity_at_256,feature_by_val,val_ce_by_val,average_precision_by_val,absent_in,"
        "mean_feature_ce,median_feature_ce"
    )
    assert (
        ",".join(match_budgets(tabulate_baselines(*both_layers())).columns)
        == "layer,encoding,l0,nmse,probe_r,map,pca_encoding,pca_l0,pca_nmse,pca_probe_r,pca_map,nmse_raw,pca_nmse_raw,l0_ratio"
    )
    text = (Path(__file__).parents[2] / "docs/outputs.md").read_text(encoding="utf-8")
    for column in (
        *CLASSES[3:],
        "l0_ratio",
        "inertia_first",
        "adjusted_rand_index",
        "seeds",
        "class_name",
    ):
        if not column.startswith("purity"):
            assert f"`{column}`" in text, column


def test_every_class_has_a_row_and_the_absent_are_named():
    classes = tabulate_classes(*both_layers())
    assert len(classes) == 2 * 4 * 5
    mine = classes[(classes["layer"] == 5) & (classes["encoding"] == "pca-topk-00016")].set_index(
        "label"
    )
    assert mine["absent_in"].to_dict() == {1: "", 2: "", 3: "", 7: "val", 8: "train and val"}
    assert mine.loc[2, "n_val"] == 20
    assert mine.loc[2, "average_precision"] == pytest.approx(0.4)
    assert mine["average_precision"].isna()[7]  # missing, not 0
    for name in ("n_train", "n_val", "feature", "feature_by_val"):
        # Whole numbers in the file, also beside classes that have none.
        assert classes[name].dtype == "Int64"


def test_classes_have_names_where_a_file_gives_them_and_numbers_where_not():
    baselines = tabulate_baselines(*both_layers())
    plain = make_views(baselines, *both_layers())
    named = make_named_views(baselines, {1: "wall", 8: "floor, flooring"}, *both_layers())
    assert named[1:3] == plain[1:3]
    for ours, theirs in ((named[0], plain[0]), (named[3], plain[3])):
        pd.testing.assert_frame_equal(ours, theirs)
    classes = named[4]
    assert "class_name" not in plain[4]
    assert [*classes.columns] == [*CLASSES, "class_name"]  # the columns that were there stay
    pd.testing.assert_frame_equal(classes.drop(columns="class_name"), plain[4])
    # The absent as well.
    assert set(zip(classes["label"], classes["class_name"], strict=True)) == {
        (1, "wall"),
        (2, "2"),
        (3, "3"),
        (7, "7"),
        (8, "floor, flooring"),
    }
    void = classes.assign(label=0)
    assert set(name_classes(void, {1: "wall"})["class_name"]) == {"void"}
    assert set(name_classes(void, {0: "background"})["class_name"]) == {"background"}


def test_names_come_back_from_the_file_as_they_were(tmp_path):
    """What pandas takes for missing, or for numbers, may be the name of a class."""
    names = {1: "None", 2: "NA", 3: "007", 7: "1e5", 8: ' "nan", '.strip()}
    loader = ConfigLoader(str(CONF), base_env="base", default_run_env="base")
    entry = loader["catalog"]["classes"] | {"filepath": str(tmp_path / "classes.csv")}
    dataset = DataCatalog.from_config({"classes": entry})
    baselines = tabulate_baselines(*both_layers())
    for classes in (
        make_views(baselines, *both_layers())[4],
        make_named_views(baselines, names, *both_layers())[4],
    ):
        dataset.save("classes", classes)
        found = dataset.load("classes")
        for name in classes.columns.difference(["absent_in"]):
            if name == "class_name":
                assert found[name].tolist() == classes[name].tolist()
            else:
                assert (
                    found[name]
                    .astype(float, errors="ignore")
                    .equals(classes[name].astype(float, errors="ignore"))
                )


def test_a_row_is_matched_with_the_pca_row_of_its_layer_whose_l0_is_nearest_by_ratio():
    baselines = tabulate_baselines(*both_layers())
    baselines["l0"] = [
        {"kmeans-invdist": 5.0, "kmeans-onehot": 3.9}.get(encoding, k)
        for encoding, k in zip(baselines["encoding"], baselines["k"], strict=True)
    ]
    matched = match_budgets(baselines)
    assert len(matched) == 4
    pairs = {(row.layer, row.encoding): row.pca_encoding for row in matched.itertuples()}
    assert pairs == {
        (layer, encoding): f"pca-topk-{k:05d}"
        for layer in (3, 5)
        for encoding, k in (("kmeans-invdist", 16), ("kmeans-onehot", 1))
    }
    ratios = {row.encoding: row.l0_ratio for row in matched.itertuples()}
    # Near is not equal.
    assert ratios == pytest.approx({"kmeans-invdist": 5 / 16, "kmeans-onehot": 3.9})
    # The distances reconstruct nothing: at their L0 there is no error to hold against PCA's.
    errors_of = matched.set_index("encoding")[["nmse", "nmse_raw", "pca_nmse", "pca_nmse_raw"]]
    assert errors_of.loc["kmeans-onehot"].notna().to_numpy().all()
    assert errors_of.loc["kmeans-invdist", ["nmse", "nmse_raw"]].isna().to_numpy().all()
    assert errors_of.loc["kmeans-invdist", ["pca_nmse", "pca_nmse_raw"]].notna().to_numpy().all()
    assert match_budgets(baselines[baselines["method"] == "pca"]).empty
    assert match_budgets(baselines[baselines["method"] == "kmeans"]).empty


@pytest.mark.parametrize(
    ("value", "column", "shown"),
    [
        (0.12345, "nmse", "0.123"),
        (1.0, "map", "1.000"),
        (0.0, "map", "0.000"),
        (-0.5, "probe_r", "-0.500"),
        (0.0002, "nmse", "2e-04"),
        (31.98765, "l0", "31.99"),
        (64.0, "pca_l0", "64"),
        (16383.6, "l0", "16384"),
        (1234.56, "pca_l0", "1235"),
        (12.0, "n_val", "12"),
        (16, "k", "16"),
        (True, "best_layer", "*"),
        (False, "best_layer", ""),
        (None, "nmse", "–"),
        (float("nan"), "nmse", "–"),
        ("kmeans", "method", "kmeans"),
    ],
)
def test_a_cell_is_shown_with_as_many_digits_as_its_column_wants(value, column, shown):
    assert format_cell(value, column) == shown


def test_markdown_and_latex_say_what_the_paper_table_says():
    paper = tabulate_paper(tabulate_baselines(*both_layers()))
    markdown, latex = to_markdown(paper), to_latex(paper)
    lines = markdown.splitlines()
    assert len(lines) == 2 + len(paper)
    assert lines[0].startswith("| Method | Encoding | k | Layer | NMSE | L0 |")
    assert {line.count("|") for line in lines} == {4 + len(IN_PAPER) + 1}
    for row, line in zip(paper.itertuples(index=False), lines[2:], strict=True):
        wanted = [
            format_cell(value, name)
            for name, value in zip(PAPER, row, strict=True)
            if name not in ("seeds", "nmse_raw") and not name.endswith("_sd")
        ]
        assert line == f"| {' | '.join(wanted)} |"
        assert f"{' & '.join(wanted)} \\\\" in latex
    assert latex.startswith("\\begin{tabular}{llrrrrrrrr}\n\\toprule")
    assert "a\\_b" in to_latex(paper.assign(encoding="a_b"))


def test_a_row_without_nmse_shows_the_raw_one_in_the_paper_table():
    """As a run of saev, which measured nothing in the standardized space."""
    layers = both_layers()
    for row in (row for layer in layers for row in layer if row["method"] == "pca"):
        row["nmse"] = None
    paper = tabulate_paper(tabulate_baselines(*layers))
    assert paper["nmse_raw"].notna().all()
    header, _, *lines = to_markdown(paper).splitlines()
    assert header.startswith("| Method | Encoding | k | Layer | NMSE | NMSE raw | L0 |")
    assert all(
        f"| – | {format_cell(raw, 'nmse_raw')} |" in line
        for raw, line in zip(paper["nmse_raw"][2:], lines[2:], strict=True)
    )
    assert "& NMSE & NMSE raw &" in to_latex(paper)


def three_seeds(layer=7):
    """A layer of k-means with three seeds and of a dictionary with one."""
    parts = [scores(layer, "sae", "sae", 9, mean_train_ce=0.3)]
    metrics = [errors(layer, "sae", [9])]
    for number, name in enumerate(("kmeans", "kmeans-seed-4", "kmeans-seed-9")):
        metrics.append(errors(layer, name, [8]))
        parts.append(
            scores(layer, name, f"{name}-onehot", 8, mean_train_ce=0.1 + number, map=0.2 * number)
        )
    rows = merge_layer(*metrics, *parts, encodings=encodings_of(parts))
    return [row | {"absent_in_train": [], "absent_in_val": []} for row in rows]


def test_the_rows_of_several_seeds_share_a_name_and_are_pooled_for_the_paper():
    baselines = tabulate_baselines(three_seeds())
    assert baselines["encoding"].tolist() == ["kmeans-onehot"] * 3 + ["sae"]
    assert baselines["method"].tolist() == ["kmeans"] * 3 + ["sae"]
    assert baselines["seed"].tolist()[:3] == [0, 4, 9]
    assert baselines["best_layer"].all()
    pooled = pool_seeds(baselines).set_index("encoding")
    assert pooled["seeds"].to_dict() == {"kmeans-onehot": 3, "sae": 1}
    assert pooled.loc["kmeans-onehot", "map"] == pytest.approx(0.2)
    assert pooled.loc["kmeans-onehot", "map_sd"] == pytest.approx(0.2)  # of 0, 0.2 and 0.4
    assert pooled["map_sd"].isna()["sae"]  # one seed has no spread
    paper = tabulate_paper(baselines)
    assert tuple(paper.columns) == PAPER
    markdown, latex = to_markdown(paper), to_latex(paper)
    assert "| Layer | Seeds | NMSE |" in markdown
    assert "| 0.200 ± 0.200 |" in markdown
    assert "& 0.250 &" in latex  # the dictionary's
    assert r"0.200 $\pm$ 0.200" in latex
    classes = tabulate_classes(three_seeds())
    assert classes["seed"].tolist()[:3] == [0, 4, 9]
    matched = match_budgets(tabulate_baselines(three_seeds(3), layer_of(5, [0.4] * 4)))
    # There is no PCA in layer 3.
    assert matched["encoding"].tolist() == [
        "kmeans-invdist",
        "kmeans-onehot",
    ]


def test_the_best_layer_is_that_of_the_mean_over_the_seeds():
    """Layer 3 has the best seed, layer 5 the best mean."""

    def of(layer, ces):
        parts = [
            scores(layer, name, f"{name}-onehot", 8, mean_train_ce=ce)
            for name, ce in zip(("kmeans", "kmeans-seed-1"), ces, strict=True)
        ]
        measured = [errors(layer, name, [8]) for name in ("kmeans", "kmeans-seed-1")]
        return merge_layer(*measured, *parts, encodings=encodings_of(parts))

    table = tabulate_baselines(of(3, [0.1, 0.9]), of(5, [0.4, 0.4]))
    assert (table["best_layer"] == (table["layer"] == 5)).all()


def test_the_agreement_of_seeds_is_a_table():
    rows = [
        {"layer": n, "seed": s, "inertia_first": 1.0, "inertia": 2.0}
        for n, s in ((5, 2), (5, 1), (3, 1))
    ]
    table = tabulate_agreement({"agreements": rows[:2]}, {"agreements": rows[2:]})
    assert table[["layer", "seed"]].to_numpy().tolist() == [[3, 1], [5, 1], [5, 2]]
    fits = {"explained_variance": torch.ones(1)}, {"counts": torch.ones(1)}
    assert summarize_fits(fits[0], [], fits[1], [], *rows[:2], layer=5)["agreements"] == rows[:2]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_the_latex_compiles(tmp_path):
    latex = to_latex(tabulate_paper(tabulate_baselines(*both_layers(), three_seeds())))
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
        + latex
        + "\\end{document}"
    )
    ended = subprocess.run(
        ["pdflatex", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def curves(layer, n=50):
    fits = {"explained_variance": torch.arange(float(n), 0, -1)}, {"counts": torch.arange(n)}
    settled = [{"step": 1.0, "reconstruction_error": 0.5}]
    settled += [
        {"step": 2.0**i, "reconstruction_error": 0.6, "subspace_drift": 0.5**i} for i in range(1, 4)
    ]
    steps = [{"ewa_inertia": 1 / (1 + i), "inertia": 9.0} for i in range(n)]
    return summarize_fits(fits[0], settled, fits[1], steps, layer=layer)


def drawn(layers=None, size=50):
    layers = layers or both_layers()
    baselines = tabulate_baselines(*layers)
    classes = tabulate_classes(*layers)
    return dict(
        zip(
            FIGURES, draw_figures(baselines, classes, curves(5, size), curves(3, size)), strict=True
        )
    )


def test_the_fits_are_summed_up_for_the_pictures():
    assert curves(3, 3) == {
        "layer": 3,
        "spectrum": [3.0, 2.0, 1.0],
        "settled": curves(5, 9)["settled"],
        "cluster_counts": [2, 1, 0],
        "inertia": [1.0, 1 / 2, 1 / 3],
        "agreements": [],
    }


def test_every_picture_has_lines_names_and_titled_axes():
    for name, figure in drawn().items():
        assert figure.layout.title.text, name
        assert figure.data, name
        for trace in figure.data:
            assert len(trace.x) == len(trace.y) > 0, name
            assert trace.name, name
        titled = [axis for axis in figure.select_xaxes() if axis.title.text]
        assert titled, name
        assert all(axis.title.text for axis in figure.select_yaxes()), name
        colors = {
            (
                trace.line.color or trace.marker.color,
                trace.line.dash,
                trace.marker.symbol,
                trace.name,
            )
            for trace in figure.data
        }
        # Told apart by more than color.
        assert len(colors) == len({trace.name for trace in figure.data}), name


def test_the_pictures_show_the_tables_numbers():
    layers = both_layers()
    baselines = tabulate_baselines(*layers)
    figures = drawn(layers)
    shown = {
        (text, y)
        for trace in figures["nmse_against_l0"].data
        for text, y in zip(trace.text, trace.y, strict=True)
    }
    texts = [
        "kmeans, nearest center" if "kmeans" in name else name for name in baselines["encoding"]
    ]
    assert shown == set(zip(texts, baselines["nmse"], strict=True))
    (line,) = [
        trace
        for trace in figures["layers"].data
        if trace.name == "pca-topk-00001" and trace.showlegend
    ]
    assert list(line.x) == ["3", "5"]
    assert list(line.y) == baselines.loc[baselines["encoding"] == "pca-topk-00001", "nmse"].tolist()
    assert len(figures["layers"].data) == 4 * 5
    (points,) = [
        trace for trace in figures["prevalence"].data if trace.name == "kmeans-onehot, layer 5"
    ]
    assert list(points.x) == [10, 20, 30]  # no point for an absent class
    shares = [trace for trace in figures["spectrum"].data if trace.yaxis == "y2"]
    assert all(trace.y[-1] == pytest.approx(1) for trace in shares)
    assert [trace.name for trace in figures["clusters"].data] == ["layer 3", "layer 5"]
    # An empty cluster still has a place on the axis.
    assert min(figures["clusters"].data[0].y) == 0.5
    drift, left = figures["convergence_pca"].data[:2]
    # The first look has no drift.
    assert (list(drift.x), list(drift.y)) == (
        [2, 4, 8],
        [0.5, 0.25, 0.125],
    )
    assert (list(left.x), list(left.y)) == ([1, 2, 4, 8], [0.5, 0.6, 0.6, 0.6])


def test_a_fit_of_one_step_is_said_to_be_one_and_not_drawn():
    """A tenth of a screen of words in place of two empty axes; MLflow and kedro-viz show the same
    figure.
    """
    one = {"layer": 3, "settled": [{"step": 1.0, "reconstruction_error": 0.5}], "inertia": [1.0]}
    for figure, words in (
        (draw_convergence_pca([one, one]), "PCA was fitted in one step."),
        (draw_convergence([one, one]), "k-means was fitted in one step."),
    ):
        assert not figure.data
        assert figure.layout.title.text.startswith("Convergence of")
        assert [note.text for note in figure.layout.annotations] == [words]
        assert figure.layout.height < 200


def test_a_pca_of_one_step_beside_one_of_several_has_a_legend_though_it_has_no_drift():
    settled = [{"step": float(i), "reconstruction_error": 0.5} for i in range(1, 4)]
    several = {
        "layer": 5,
        "settled": [settled[0], *(look | {"subspace_drift": 0.1} for look in settled[1:])],
    }
    shown = [
        trace
        for trace in draw_convergence_pca([{"layer": 3, "settled": settled[:1]}, several]).data
        if trace.showlegend
    ]
    assert [list(trace.y) for trace in shown] == [[0.5], [0.5] * 3]


def test_a_line_of_a_single_point_is_marked():
    """One cluster, one dimension, one step: a line through one point shows nothing."""
    one = {"layer": 3, "spectrum": [1.0], "cluster_counts": [9], "inertia": [1.0], "settled": []}
    several = one | {"layer": 5, "inertia": [1.0, 0.5]}
    for draw in (draw_spectrum, draw_clusters, draw_convergence):
        for trace in draw([one, several]).data:
            assert "markers" in trace.mode
    assert drawn(size=50)["convergence"].data[0].mode == "lines"


def test_the_metrics_of_one_layer_are_drawn_over_the_encodings():
    """Over the layers they would be dots above one another."""
    baselines = tabulate_baselines(layer_of(3, [0.5] * 4))
    baselines.loc[0, "nmse"] = None
    figure = draw_layers(pool_seeds(baselines))
    assert figure.layout.title.text == "Metrics of layer 3"
    assert [trace.name for trace in figure.data] == [
        "NMSE",
        "Probe R",
        "mAP",
        "Purity@16",
        "Coverage@0.3",
    ]
    # A row without NMSE has no such mark.
    assert list(figure.data[0].y) == baselines["encoding"].tolist()[1:]
    for trace, measure in zip(figure.data, ("nmse", *METRICS), strict=True):
        assert trace.mode == "markers"
        assert (
            dict(zip(trace.y, trace.x, strict=True)).items()
            <= dict(zip(baselines["encoding"], baselines[measure], strict=True)).items()
        )
    three = tabulate_baselines(three_seeds())
    assert draw_layers(pool_seeds(three)).data[2].error_x.array[0] == pytest.approx(0.2)


def test_centers_reconstruct_with_one_entry_whatever_codes_are_probed():
    """Distances to 8 centers are 8 entries a patch, and their NMSE is the nearest center's. So it
    is of random centers.
    """
    names = ["kmeans-invdist", "kmeans-distance-neg_euclidean", "kmeans-onehot"]
    parts = [
        scores(3, "kmeans", name, 8) | {"l0": 1.0 if "onehot" in name else 8.0} for name in names
    ]
    parts += [
        scores(3, "floor", f"floor-{name}", 8) | {"l0": 8.0} for name in ("invdist", "topk-00008")
    ]
    parts += [scores(3, "sae-invdist", "sae-invdist", 8) | {"l0": 3.5}]
    metrics = [errors(3, name, [8]) for name in ("kmeans", "floor", "sae-invdist")]
    rows = merge_layer(*metrics, *parts, encodings=encodings_of(parts))
    pooled = pool_seeds(tabulate_baselines(rows))
    found = {row.encoding: row.l0 for row in list_reconstructions(pooled).itertuples()}
    assert found == {
        "kmeans, nearest center": 1,
        "floor, nearest center": 1,
        "floor-topk-00008": 8,
        "sae-invdist": 3.5,
    }
    figure = draw_nmse_against_l0(pooled)
    assert {(trace.name, *trace.x) for trace in figure.data} == {
        ("kmeans, layer 3", 1),
        ("floor, layer 3", 1, 8),
        ("sae-invdist, layer 3", 3.5),
    }


def test_long_curves_are_thinned_and_keep_their_ends():
    for figure in (drawn(size=10_000)[name] for name in ("spectrum", "clusters", "convergence")):
        for trace in figure.data:
            assert len(trace.x) <= 2000
            assert (trace.x[0], trace.x[-1]) == (1, 10_000)


def test_an_nmse_that_is_rounding_does_not_stretch_the_axis():
    """With as many components as dimensions it is 1e-30 or so."""
    layers = [
        [row | {"nmse": 1e-30} if row["k"] == 16 else row for row in layer]
        for layer in both_layers()
    ]
    figure = drawn(layers)["nmse_against_l0"]
    assert min(value for trace in figure.data for value in trace.y) == 1e-6
    shown = {(trace.marker.symbol, trace.line.color) for trace in figure.data}
    # Two methods, two layers: each has a look of its own.
    assert len(shown) == len(figure.data) == 4


def test_a_row_without_nmse_is_in_every_picture_but_the_one_of_nmse():
    layers = [
        [row | {"nmse": None} if row["method"] == "kmeans" else row for row in layer]
        for layer in both_layers()
    ]
    figures = drawn(layers)
    assert {trace.name.split(",")[0] for trace in figures["nmse_against_l0"].data} == {"pca"}
    assert "kmeans-onehot" in {trace.name for trace in figures["layers"].data}


def test_the_prevalence_picture_has_a_point_a_class_whatever_the_seeds():
    rows = three_seeds()
    for number, row in enumerate(rows):
        row["classes"] = [
            dict.fromkeys(set(CLASSES[5:]) - {"absent_in"}, 0.1)
            | {"label": label, "n_train": 9, "feature": 0, "feature_by_val": 0}
            | {"n_val": 10 * label, "average_precision": 0.1 * (number % 3)}
            for label in (1, 2)
        ]
    figure = draw_prevalence(pool_seeds(tabulate_baselines(rows)), tabulate_classes(rows))
    points = next(trace for trace in figure.data if trace.name.startswith("kmeans"))
    assert (list(points.x), list(points.text)) == ([10, 20], [1, 2])
    assert list(points.y) == pytest.approx([0.1, 0.1])  # of 0, 0.1 and 0.2


HOSTILE = "<b>wall</b><script>alert(1)</script> & co"
"""The name of a class, from a file that nobody trusts."""


def test_the_prevalence_picture_and_the_page_say_names_and_obey_none():
    baselines = tabulate_baselines(*both_layers())
    names = {1: HOSTILE, 2: "sky"}
    *_, classes = make_named_views(baselines, names, *both_layers())
    plain = tabulate_classes(*both_layers())
    figures = {
        given: dict(zip(FIGURES, draw_figures(baselines, table, curves(5), curves(3)), strict=True))
        for given, table in (("named", classes), ("plain", plain))
    }
    for trace in figures["named"]["prevalence"].data:
        # Plotly takes tags in a text for its own, and decodes these.
        assert [*trace.text] == [
            "&lt;b&gt;wall&lt;/b&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; co",
            "sky",
            "3",
        ]
    assert [*figures["plain"]["prevalence"].data[0].text] == [1, 2, 3]
    item = {"layer": 3, "encoding": "pca-topk-00016", "seed": None, "feature": 2, "images": []}
    item |= {"average_precision": 0.5}
    pages = {
        given: write_page(
            baselines=baselines,
            paper=tabulate_paper(baselines),
            matched=match_budgets(baselines),
            classes=table,
            about={},
            gallery=gallery,
            **{f"figure_{name}": figure for name, figure in figures[given].items()},
        )
        for given, table, gallery in (
            (
                "named",
                classes,
                [item | {"label": n, "class_name": names.get(n, str(n))} for n in (1, 2, 3)],
            ),
            ("plain", plain, [item | {"label": 1}]),
        )
    }
    page = pages["named"]
    assert "<b>wall" not in page and "<script>alert" not in page
    escaped = "&lt;b&gt;wall&lt;/b&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; co"
    assert f"class 1 ({escaped}) · feature 2" in page
    assert "class 2 (sky) · feature 2" in page
    assert "class 3 · feature 2" in page  # not its number twice
    table = page[page.index('<h2 id="classes">') : page.index('<h2 id="gallery">')]
    heads = re.findall(r'<button type="button">([^<]*)</button>', table)
    assert heads[:6] == ["Layer", "Encoding", "Seed", "Class", "Name", "Patches, train"]
    assert f'class="text">{escaped}</td>' in table
    assert "class_name" not in pages["plain"]
    assert '<button type="button">Name</button>' not in pages["plain"]
    assert "class 1 · feature 2" in pages["plain"]


def about(planted, rows=None, **given):
    fit, val = map(Shards, planted)
    sections = {
        "standardize": StandardizeParameters(),
        "kmeans": KMeansParameters(),
        "pca": PCAParameters(),
        "probe": ProbeParameters(),
    }
    return describe_data(
        rows or [{"n_train": 600, "n_val": 300}], fit, val, fit, val, **sections | given
    )


def test_what_was_read_counts_the_patches_that_were_used(planted):
    fit, val = (f"shards {path.name}" for path in planted)
    assert about(planted) == {
        "model": "planted planted-tiny",
        "statistics, k-means, PCA from": f"{fit}, 768 patches",
        "reconstruction on": f"{val}, 384 patches",
        "probes fitted on": f"{fit}, 600 of 768 patches; void patches left out",
        "probes judged on": f"{val}, 300 of 384 patches; void patches left out",
    }
    whole = about(planted, [{"n_train": 768, "n_val": 384}], probe=ProbeParameters(void="negative"))
    assert whole["probes judged on"] == f"{val}, 384 patches; void patches count as negatives"
    assert about(planted, probe=ProbeParameters(void="class"))["probes judged on"].endswith(
        "; void is a class"
    )


def test_what_was_read_says_which_library_recorded_it_and_how(planted, tmp_path):
    said = {
        "writer": "assay",
        "model": {"library": "transformers", "version": "5.24.0", "weights": "0" * 64},
        "geometry": {"patch_size": 14, "n_patches": 16, "geometry": "crop", "grid": [4, 4]},
        "precision": "bfloat16",
        "batch_size": 32,
        "images": {"n": 48, "sha256": "0" * 64},
    }
    fit = shutil.copytree(planted[0], tmp_path / planted[0].name)
    metadata = json.loads((fit / "metadata.json").read_text())
    for model, told in ((said["model"], "transformers 5.24.0"), ({"v": "1"}, "code of one's own")):
        recorded = metadata | {"data": json.dumps(said | {"model": model})}
        (fit / "metadata.json").write_text(json.dumps(recorded))
        assert about((fit, planted[1]))["recorded by"] == (
            f"{told}; geometry crop on 4 x 4 patches of 14 pixels; bfloat16"
        )


def test_what_was_read_counts_samples_and_names_what_was_given(planted):
    fit = f"shards {planted[0].name}"
    sampled = about(
        planted, kmeans=KMeansParameters(max_tokens=500), pca=PCAParameters(max_tokens=10_000)
    )
    assert sampled["k-means from"] == f"{fit}, 500 of 768 patches"
    # A sample of more than there are is all.
    assert sampled["statistics, PCA from"] == f"{fit}, 768 patches"
    whitened = about(planted, pca=PCAParameters(whiten=True))
    assert whitened["PCA codes"] == "each coefficient over its standard deviation"
    given_ = about(
        planted,
        standardize=StandardizeParameters(statistics="mu_sigma.safetensors"),
        kmeans=KMeansParameters(order="order.npy"),
    )
    assert given_["statistics from"] == "mu_sigma.safetensors"
    assert given_["k-means from"] == f"{fit}, the patches of order.npy in its order"


def test_the_page_has_words_where_there_is_nothing_to_draw_and_names_seeds():
    rows = three_seeds()
    for row in rows:
        row["classes"] = []
    baselines, classes = (
        tabulate_baselines(rows, rows_of(3, [9.0] * 4)),
        tabulate_classes(rows, rows_of(3, [9.0] * 4)),
    )
    one_step = {
        "layer": 7,
        "settled": [{"step": 1.0, "reconstruction_error": 0.5}],
        "inertia": [1.0, 0.5],
    }
    drawn_here = dict(
        zip(FIGURES, draw_figures(baselines, classes, curves(3) | one_step), strict=True)
    )
    item = {
        "layer": 7,
        "encoding": "kmeans-onehot",
        "label": 1,
        "feature": 2,
        "average_precision": 0.5,
        "images": [],
    }
    page = write_page(
        baselines=baselines,
        paper=tabulate_paper(baselines),
        matched=match_budgets(baselines),
        classes=classes,
        about={"probes judged on": "2,375 of 12,800 patches"},
        gallery=[item | {"seed": 4}, item | {"seed": None, "encoding": "sae"}],
        **{f"figure_{name}": figure for name, figure in drawn_here.items()},
    )
    assert "<b>Convergence of PCA.</b> PCA was fitted in one step." in page
    assert 'id="convergence_pca"' not in page
    assert "PCA&#39;s leading subspace moved" not in page  # a legend of nothing
    assert 'id="convergence"' in page
    assert "<h3>kmeans-onehot, layer 7, seed 4</h3>" in page
    assert "<h3>sae, layer 7</h3>" in page
    assert "<dd>2,375 of 12,800 patches</dd>" in page
    assert "<span>0.200</span> <span>± 0.200</span>" in page
    heads = re.findall(
        r'<button type="button">([^<]*)</button>', page[page.index('<h2 id="matched">') :]
    )
    assert heads[:8] == [
        "Layer",
        "Encoding",
        "PCA Encoding",
        "L0",
        "PCA L0",
        "L0 / PCA L0",
        "NMSE",
        "PCA NMSE",
    ]
