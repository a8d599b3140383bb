"""Codes of every origin give the same numbers, in row order, whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.numerics.codes import (
    ComputedCodes,
    SelectedCodes,
    TensorCodes,
    TopKCodes,
    add_squares,
    as_codes,
    densify,
    gather_columns,
    measure_l0,
    measure_l0_by_rank,
    sparsify,
)


def _make(code_format, n_rows, n_features, seed):
    """Codes of a format with an `error` for each row, and what they say as a plain matrix, by a
    loop.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(n_rows, n_features, dtype=torch.float32)
    if code_format == "dense":
        arrays = {
            "values": torch.randn(n_rows, n_features, generator=generator, dtype=torch.float32)
        }
        matrix = arrays["values"].clone()
    elif code_format == "sparse":
        k = max(1, n_features // 2)
        indices = torch.rand(n_rows, n_features, generator=generator, dtype=torch.float32).argsort(
            1
        )[:, :k]
        values = torch.randn(n_rows, k, generator=generator, dtype=torch.float32)
        values[torch.rand(n_rows, k, generator=generator, dtype=torch.float32) < 0.3] = 0.0
        arrays = {"values": values, "indices": indices}
        for row in range(n_rows):
            for slot in range(k):
                matrix[row, indices[row, slot]] = values[row, slot]
    else:
        arrays = {"indices": torch.randint(0, n_features, (n_rows,), generator=generator)}
        for row in range(n_rows):
            matrix[row, arrays["indices"][row]] = 1.0
    arrays["error"] = torch.arange(n_rows, dtype=torch.float32)

    def stream(batch_size, start):
        for first in range(start, n_rows, batch_size):
            yield {name: array[first : first + batch_size] for name, array in arrays.items()}

    k = {"dense": n_features, "sparse": max(1, n_features // 2), "onehot": 1}[code_format]
    return ComputedCodes(code_format, n_rows, n_features, k, stream), matrix


formats = st.sampled_from(["dense", "sparse", "onehot"])


@settings(deadline=None, max_examples=40)
@given(
    formats,
    st.integers(1, 12),
    st.integers(1, 7),
    st.integers(1, 13),
    st.integers(0, 99),
    st.data(),
)
def test_every_format_says_what_the_loop_says(
    code_format, n_rows, n_features, batch_size, seed, data
):
    codes, matrix = _make(code_format, n_rows, n_features, seed)
    start = data.draw(st.integers(0, n_features))
    stop = data.draw(st.integers(start, n_features))

    batches = [
        densify(batch, code_format, n_features, start, stop) for batch in codes.batches(batch_size)
    ]
    assert all(batch.dtype == torch.float32 for batch in batches)
    assert torch.equal(torch.cat(batches), matrix[:, start:stop])
    whole = [densify(batch, code_format, n_features) for batch in codes.batches(batch_size)]
    assert torch.equal(torch.cat(whole), matrix)

    features = torch.randint(0, n_features, (5,), generator=torch.Generator().manual_seed(seed))
    told = []
    wanted = [(features, None), (torch.arange(start, stop), codes.k), (features[:0], 1)]
    found = gather_columns(codes, wanted, batch_size, progress=told.append)
    assert torch.equal(found[0], matrix[:, features].T)
    assert torch.equal(found[1], matrix[:, start:stop].T)
    assert found[2].shape == (0, n_rows)
    assert told == [min(i, n_rows) for i in range(batch_size, n_rows + batch_size, batch_size)]
    assert measure_l0(codes, batch_size) == pytest.approx(
        float((matrix != 0).sum()) / n_rows, rel=1e-15
    )


@settings(deadline=None, max_examples=30)
@given(formats, st.integers(1, 12), st.integers(1, 13), st.integers(0, 99))
def test_selected_rows_keep_their_order_and_their_extra_keys(code_format, n_rows, batch_size, seed):
    codes, matrix = _make(code_format, n_rows, 4, seed)
    rows = (
        torch.rand(n_rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) < 0.5
    )
    selected = SelectedCodes(codes, rows)
    assert (selected.format, selected.n_rows, selected.n_features) == (
        code_format,
        int(rows.sum()),
        4,
    )
    batches = list(selected.batches(batch_size))
    assert all(0 < len(batch["error"]) <= batch_size for batch in batches)
    errors = [float(error) for batch in batches for error in batch["error"]]
    assert errors == [float(row) for row in range(n_rows) if rows[row]]
    (columns,) = gather_columns(selected, [(torch.arange(4), None)], batch_size)
    assert torch.equal(columns, matrix[rows].T)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 13), st.integers(0, 99))
def test_the_first_k_entries_of_sparse_codes_are_those_of_topk_codes(n_rows, k, batch_size, seed):
    codes, matrix = _make("sparse", n_rows, 10, seed)
    cut = TopKCodes(codes, k)
    features = torch.tensor([7, 0, 3])
    assert torch.equal(
        gather_columns(codes, [(features, k)], batch_size)[0],
        gather_columns(cut, [(features, None)], batch_size)[0],
    )
    by_rank = measure_l0_by_rank(codes, batch_size)
    assert by_rank.shape == (5,)
    assert float(by_rank[k - 1]) == pytest.approx(measure_l0(cut), rel=1e-15)
    assert float(by_rank[-1]) == pytest.approx(float((matrix != 0).sum()) / n_rows, rel=1e-15)


def test_sparse_values_that_are_not_finite_are_named():
    values = torch.ones(6, 2, dtype=torch.float32)
    values[4, 1] = torch.nan
    codes = ComputedCodes(
        "sparse",
        6,
        9,
        2,
        lambda _, start: iter([{"values": values[start:], "indices": torch.tensor([[8, 5]] * 6)}]),
    )
    with pytest.raises(
        ValueError, match="row 4, feature 5 is NaN or infinity, wanted finite values"
    ):
        gather_columns(codes, [(torch.arange(3), None)], 6)


def test_stored_indices_may_be_narrow_integers():
    batch = {
        "values": torch.tensor([[2.0, 3.0]], dtype=torch.float32),
        "indices": torch.tensor([[2, 0]], dtype=torch.int32),
    }
    assert densify(batch, "sparse", 3).tolist() == [[3.0, 0.0, 2.0]]


def test_a_tensor_is_dense_codes_of_float32():
    codes = as_codes(torch.arange(6, dtype=torch.float64).reshape(3, 2))
    assert (codes.format, codes.n_rows, codes.n_features) == ("dense", 3, 2)
    assert [batch["values"].tolist() for batch in codes.batches(2)] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert next(codes.batches(2))["values"].dtype == torch.float32
    assert as_codes(codes) is codes


@settings(deadline=None, max_examples=60)
@given(
    formats, st.integers(1, 12), st.integers(1, 13), st.integers(0, 99), st.booleans(), st.data()
)
def test_a_pass_from_any_row_on_is_the_rest_of_a_whole_one(
    code_format, n_rows, batch_size, seed, selected, data
):
    codes, matrix = _make(code_format, n_rows, 4, seed)
    if data.draw(st.booleans()) and code_format == "dense":
        codes = TensorCodes(matrix)
    if selected:
        rows = (
            torch.rand(n_rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            < 0.6
        )
        codes, matrix = SelectedCodes(codes, rows), matrix[rows]
    elif code_format == "sparse":
        codes = TopKCodes(codes, 1)
        matrix = torch.cat([densify(batch, "sparse", 4) for batch in codes.batches(20)])
    start = data.draw(st.integers(0, codes.n_rows))
    found = [densify(batch, code_format, 4) for batch in codes.batches(batch_size, start)]
    assert torch.equal(torch.cat([torch.zeros(0, 4, dtype=torch.float32), *found]), matrix[start:])


def test_topk_codes_want_sparse_codes_of_a_larger_k():
    sparse, _ = _make("sparse", 3, 6, 0)
    varying = ComputedCodes("sparse", 3, 6, None, sparse.stream)
    for codes, k in (
        (sparse, 4),
        (sparse, 0),
        (varying, 1),
        (TensorCodes(torch.ones(2, 5, dtype=torch.float32)), 1),
    ):
        with pytest.raises(
            ValueError,
            match=f"{codes.format} codes of {codes.k} entries a row, wanted .* at least {k}",
        ):
            TopKCodes(codes, k)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 6),
    st.integers(1, 6),
    st.integers(0, 99),
    st.integers(1, 6),
    st.sampled_from([0.2, 1.0, 9.0]),
)
def test_sparsified_rows_keep_what_the_loop_keeps(n, n_features, seed, top_k, margin):
    values = torch.randn(
        n, n_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    ).round(decimals=1)
    batch = {"values": values, "error": torch.arange(n, dtype=torch.float32)}
    order = [sorted(range(n_features), key=lambda j: (-abs(row[j]), j)) for row in values.tolist()]
    found = sparsify(batch, top_k=min(top_k, n_features))
    assert found["indices"].tolist() == [row[:top_k] for row in order]
    assert torch.equal(found["values"], values.gather(1, found["indices"]))
    found = sparsify(batch, margin=margin)
    assert found["error"] is batch["error"]
    plain = torch.where(values.abs() >= torch.tensor(margin, dtype=torch.float32), values, 0.0)
    assert torch.equal(densify(found, "sparse", n_features), plain)
    assert found["values"].shape[1] == (int((plain != 0).sum(1).max()) if n else 0)
    assert bool((found["values"].abs().diff(dim=1) <= 0).all())


def test_padding_may_name_a_feature_again():
    batch = {
        "values": torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float32),
        "indices": torch.tensor([[0, 0, 0]]),
    }
    assert densify(batch, "sparse", 2).tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("index", [-1, 3])
@pytest.mark.parametrize("code_format", ["sparse", "onehot"])
def test_an_index_that_is_no_feature_is_refused(index, code_format):
    indices = torch.tensor([0, index])
    batch = (
        {"indices": indices}
        if code_format == "onehot"
        else {"indices": indices[None], "values": torch.ones(1, 2, dtype=torch.float32)}
    )
    with pytest.raises(ValueError, match=f"codes name features .*{index}.*wanted 0 to 2"):
        densify(batch, code_format, 3)


def test_batches_with_other_rows_than_promised_are_refused():
    for promised in (2, 4):
        codes = ComputedCodes(
            "dense", promised, 2, 2, TensorCodes(torch.ones(3, 2, dtype=torch.float32)).batches
        )
        for use in (measure_l0, lambda codes: gather_columns(codes, [(torch.arange(2), None)], 8)):
            with pytest.raises(ValueError, match=f"codes hold 3 rows.*wanted {promised}"):
                use(codes)


def test_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"shape \(3,\), wanted \(rows, features\)"):
        TensorCodes(torch.ones(3, dtype=torch.float32))
    for rows in (torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.float32)):
        with pytest.raises(ValueError, match=r"wanted torch.bool of shape \(3,\)"):
            SelectedCodes(TensorCodes(torch.ones(3, 2, dtype=torch.float32)), rows)
    with pytest.raises(ValueError, match="0 rows"):
        measure_l0(TensorCodes(torch.ones(0, 2, dtype=torch.float32)))


def test_a_sum_of_squares_that_is_gone_on_with_gives_the_same_bits():
    values = (
        torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        .abs()
        .sort(descending=True)
        .values
    )
    error = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = add_squares(error, values[:, 20:])
    assert torch.equal(add_squares(add_squares(error, values[:, 90:]), values[:, 20:90]), whole)
    torch.testing.assert_close(
        whole, error + values[:, 20:].double().square().sum(1), rtol=1e-14, atol=0
    )
    assert torch.equal(add_squares(error, values[:, 200:]), error)


def test_squares_are_added_from_the_last_column_on_to_the_bit():
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    error = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    untouched = error.clone()
    wanted = error.tolist()
    for j in reversed(range(30)):
        wanted = [
            total + value * value
            for total, value in zip(wanted, values[:, j].tolist(), strict=True)
        ]
    assert add_squares(error, values).tolist() == wanted
    assert torch.equal(error, untouched)


@pytest.mark.parametrize("code_format", ["dense", "sparse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_by_its_row_among_all(code_format, bad):
    """Also where rows are left out: it is the patch that has to be looked for."""
    codes, _ = _make(code_format, 20, 5, seed=1)
    arrays = next(codes.batches(20))
    arrays["values"][13, 1] = bad
    feature = 1 if code_format == "dense" else int(arrays["indices"][13, 1])
    rows = torch.zeros(20, dtype=torch.bool)
    rows[10:] = True
    for some in (codes, SelectedCodes(codes, rows)):
        with pytest.raises(ValueError, match=rf"^row 13, feature {feature} is NaN or infinity"):
            gather_columns(some, [(torch.arange(5), None)], 6)
    rows[13] = False  # and where it is one of those
    with pytest.raises(ValueError, match=rf"^row 13, feature {feature} is NaN or infinity"):
        list(SelectedCodes(codes, rows).batches(6))


def test_a_pass_over_selected_rows_that_goes_on_is_of_the_batches_of_the_whole_pass():
    """Codes that are computed depend on the rows that they are computed with, by rounding."""
    together = []

    def stream(batch_size, start):
        before = start // batch_size * batch_size  # as shards are read
        for first in range(before, 20, batch_size):
            rows = range(max(first, start), min(first + batch_size, 20))
            together.append(rows)
            yield {"values": torch.tensor([[float(row)] for row in rows])}

    rows = torch.ones(20, dtype=torch.bool)
    rows[[0, 1, 2, 7, 8, 9, 19]] = False
    codes = SelectedCodes(ComputedCodes("dense", 20, 1, 1, stream), rows)
    whole = list(codes.batches(4))
    assert together == [range(3, 4), *(range(n, n + 4) for n in (4, 8, 12, 16))]
    done = 0
    for number, batch in enumerate(whole):
        together.clear()
        rest = list(codes.batches(4, done))
        assert together == [range(3, 4), *(range(n, n + 4) for n in (4, 8, 12, 16))][number:]
        for mine, other in zip(rest, whole[number:], strict=True):
            assert torch.equal(mine["values"], other["values"])
        done += len(batch["values"])
    (first, *_) = codes.batches(4, 3)  # within a batch
    assert first["values"].flatten().tolist() == [6.0]
