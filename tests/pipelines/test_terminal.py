"""The table as the terminal shows it: whole, in 80 columns."""

import io

import pandas as pd
import pytest
from rich.console import Console

from assay.pipelines.report.tables import format_cell
from assay.pipelines.report.terminal import render_table


def rows(*shown):
    """A table's rows of (layer, method, encoding, k, seed, map)."""
    columns = ["layer", "method", "encoding", "k", "seed", "map"]
    rest = {
        "nmse": 0.25,
        "nmse_raw": 0.5,
        "l0": 16.477,
        "probe_r": 2e-4,
        "purity_at_16": 1.0,
        "coverage_at_0.3": 0.5,
    }
    table = pd.DataFrame(shown, columns=columns).assign(**rest, best_layer=True)
    return table[
        [
            *columns[:5],
            "nmse",
            "nmse_raw",
            "l0",
            "probe_r",
            "map",
            "purity_at_16",
            "coverage_at_0.3",
            "best_layer",
        ]
    ]


def printed(table):
    file = io.StringIO()
    console = Console(width=80, file=file)
    console.print(render_table(table))
    return file.getvalue().splitlines()


def test_the_table_fits_in_80_columns_whatever_is_in_it():
    """The longest names that there are, several seeds or one: no cell is cut."""
    long = "random-directions-topk-01024"
    one = rows(
        (23, "kmeans", "kmeans-invdist", 16_384, 0, 0.123),
        (23, "random-directions", long, 1024, 0, 0.5),
    )
    several = rows(*((23, "random-directions", long, 1024, seed, 0.1 * seed) for seed in (1, 2, 6)))
    for table in (one, several):
        lines = printed(table)
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
        assert any(long in line and "2e-04" in line and "16.5" in line for line in lines)
    assert sum(long in line for line in printed(several)) == 1
    assert any("0.300" in line for line in printed(several))  # the mean of 0.1, 0.2 and 0.6
    assert "means over seeds" in "".join(printed(several))
    plain = printed(
        rows(
            (3, "kmeans", "kmeans-onehot", 128, 0, 0.5), (3, "pca", "pca-topk-00004", 4, None, 0.5)
        )
    )
    assert any("kmeans kmeans-onehot  128 0.250 0.500" in line for line in plain)
    assert "…" not in "".join(plain)


@pytest.mark.parametrize("n_clusters", [4096, 16_384, 163_840])
def test_no_heading_and_no_cell_is_cut_however_many_clusters_there_are(n_clusters):
    table = rows(
        (23, "kmeans", "kmeans-invdist", n_clusters, 0, 0.5),
        (23, "pca", "pca-topk-01024", 1024, None, 0.5),
    )
    table.loc[0, ["l0", "probe_r"]] = float(n_clusters), -0.1234
    lines = printed(table)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    heads, first = next(
        (lines[i - 2 : i], lines[i + 1]) for i, line in enumerate(lines) if "──" in line
    )
    assert "".join(heads).split()[-1] == "*"
    assert first.split()[-1] == "*"
    assert "-0.123" in first
    assert str(n_clusters) in first
    assert "lowest mean train CE" in "".join(lines)  # what the star says


def test_a_row_without_nmse_shows_the_raw_one():
    """As a run of saev, beside names as long as they come."""
    long = "random-directions-topk-01024"
    table = rows(
        (23, "theirs", "theirs", 16_384, None, 0.5), (23, "random-directions", long, 1024, 0, 0.5)
    )
    table.loc[0, ["nmse", "nmse_raw", "l0"]] = None, 0.2458, 1234.5
    lines = printed(table)
    assert max(map(len, lines)) <= 80
    (theirs,) = [line for line in lines if "theirs" in line]
    assert theirs.split()[1:5] == ["theirs", "-", "0.246", "1234"]
    assert any(long in line for line in lines)


def test_a_name_that_is_too_long_takes_several_lines():
    name = "sae-" + "x" * 70
    lines = printed(rows((23, name, name, 16_384, 0, 0.5)))
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert sum(line.count("x") for line in lines) == 70
    assert any("2e-04" in line and "16.5" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "column", "shown"),
    [
        (31.98765, "l0", "32"),
        (16383.6, "l0", "16384"),
        (1.0, "map", "1"),
        (0.0, "map", "0"),
        (0.12345, "map", "0.123"),
        (0.0002, "nmse", "2e-04"),
        (float("nan"), "nmse", "-"),
        (16, "k", "16"),
        (True, "best_layer", "*"),
    ],
)
def test_a_cell_takes_as_little_room_as_its_value_allows(value, column, shown):
    assert format_cell(value, column, narrow=True) == shown
