"""Statistics and PCA in parts: contiguous ones, merged in order, the same bits whoever made them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.numerics.moments import StreamingMoments, standardize
from assay.numerics.pca import StreamingPCA
from assay.parameters import PCAParameters, StandardizeParameters
from assay.pipelines import fitting
from assay.pipelines.one_pass import OnePass
from assay.pipelines.parts import Part, cut
from assay.pipelines.pca.nodes import fit_pca
from assay.pipelines.standardize.nodes import fit_statistics
from assay.team import Team, as_current

N_TOKENS, BATCH = 768, 32  # of layer 5


@given(n=st.integers(1, 10_000), parts=st.integers(1, 50), multiple=st.integers(1, 300))
def test_parts_are_contiguous_even_and_whole(n, parts, multiple):
    found = cut(n, parts, multiple)
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    assert found[-1].stop == n
    assert all(part.start % multiple == 0 and part.start < part.stop for part in found)
    assert len(found) == min(parts, -(-n // multiple))
    pieces = [-(-(part.stop - part.start) // multiple) for part in found]
    assert max(pieces) - min(pieces) <= 1
    numbers = [part.number for part in found]
    assert numbers == sorted(set(numbers))
    assert {part.of for part in found} == {parts}


def test_what_is_one_part_is_known_as_the_whole():
    assert Part(0, 1, 0, 7).about == {}
    assert Part(1, 3, 2, 4).about == {"part": [1, 3]}


@pytest.fixture
def statistics(planted, tmp_path):
    return fit_statistics(
        Shards(planted[0]), StandardizeParameters(), Checkpoints(tmp_path / "s"), "cpu", layer=5
    )


@pytest.fixture
def fit(planted, statistics):
    """Fits a method on layer 5 and gives its tensors, as if they were saved."""

    def run(method, checkpoints, parts, saved=True, **parameters):
        given = {"batch_size": BATCH, "parts": parts, "checkpoint_steps": 3, **parameters}
        shards = Shards(planted[0])
        if method == "statistics":
            own = StandardizeParameters(**given)
            found = fit_statistics(shards, own, checkpoints, "cpu", layer=5)
        else:
            pca = PCAParameters(**given)
            found = fit_pca(shards, statistics, pca, checkpoints, "cpu", layer=5)[0]
        if saved:
            checkpoints.clear_finished()
        return found

    return run


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


METHODS = ("statistics", "pca")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_are_those_of_one_pass_to_rounding_and_no_bits_of_it(fit, tmp_path, method, parts):
    whole = fit(method, Checkpoints(tmp_path / "whole"), 1)
    found = fit(method, Checkpoints(tmp_path / "parts"), parts)
    assert not same(found, whole), "a number of parts is worth a parameter"
    for name in ("mean", "std") if method == "statistics" else ("mean", "explained_variance"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-11, atol=1e-13)
    assert not (tmp_path / "parts").exists(), "checkpoints go when what they came to is saved"


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_parts_are_merged_in_order_from_stretches_of_whole_batches(
    fit, planted, tmp_path, max_tokens, statistics, monkeypatch
):
    monkeypatch.setattr("assay.io.shards.order.WINDOW_TOKENS", 4 * BATCH)
    shards = Shards(planted[0])
    order = {"shuffle": max_tokens is not None, "max_tokens": max_tokens}
    batches = list(shards.batches(layer=5, batch_size=BATCH, **order))
    # 24 batches, or 16 of which the last is short: of 4 parts 6 each, or a window of 4.
    pieces = [batches[start : start + len(batches) // 4] for start in range(0, len(batches), 6)]
    if max_tokens is not None:
        pieces = [batches[start : start + 4] for start in range(0, 16, 4)]
    assert sum(map(len, pieces)) == len(batches)
    moments, pca = StreamingMoments(), StreamingPCA()
    for piece in pieces:
        theirs, axes = StreamingMoments(), StreamingPCA()
        for x in piece:
            theirs.partial_fit(x)
            axes.partial_fit(standardize(x, statistics["mean"], statistics["std"]))
        moments.merge(theirs)
        pca.merge(axes)
    for method, wanted in (("statistics", moments), ("pca", pca)):
        found = fit(method, Checkpoints(tmp_path / method), 4, max_tokens=max_tokens)
        assert same(wanted.state_dict(), found)


@pytest.mark.parametrize("method", METHODS)
def test_more_parts_than_batches_are_as_many_as_there_are(fit, tmp_path, method):
    found = fit(method, Checkpoints(tmp_path / "many"), 100, batch_size=256)
    assert same(found, fit(method, Checkpoints(tmp_path / "three"), 3, batch_size=256))


class OneOf(Team):
    """A rank without the others, which are ranks of other teams at other times."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


class Cut(Exception):  # noqa: N818
    """Ends a fit from within."""


@pytest.mark.parametrize("method", METHODS)
def test_parts_begun_by_one_process_are_gone_on_with_by_several_and_back(
    fit, tmp_path, method, monkeypatch, caplog
):
    whole = fit(method, Checkpoints(tmp_path / "whole"), 4)
    checkpoints = Checkpoints(tmp_path / "cut")
    made, step = [], fitting.Fit.step

    def cutting(limit):
        def counted(self, *given):
            made.append(self._called)
            if len(made) == limit:
                raise Cut
            step(self, *given)

        return counted

    def run(limit, team):
        del made[:]
        with monkeypatch.context() as patch, as_current(team):
            patch.setattr(fitting.Fit, "step", cutting(limit))
            return fit(method, checkpoints, 4)

    with pytest.raises(Cut):  # in the second part, of six batches, after its third
        run(11, Team())
    with pytest.raises(Cut):  # the second of two ranks has parts 2 and 4
        run(5, OneOf(1, 2))
    assert made == [f"{method}, part 2 of 4"] * 3 + [f"{method}, part 4 of 4"] * 2
    found = run(1000, Team())
    assert made == [f"{method}, part 3 of 4"] * 6 + [f"{method}, part 4 of 4"] * 6
    assert same(found, whole)
    assert not (tmp_path / "cut").exists()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("method", METHODS)
def test_parts_that_are_made_but_not_saved_are_only_merged_again(
    fit, tmp_path, method, monkeypatch
):
    unsaved = fit(method, Checkpoints(tmp_path), 4, saved=False)
    monkeypatch.setattr(fitting.Fit, "step", None)  # there is none to make
    assert same(fit(method, Checkpoints(tmp_path), 4), unsaved)


def test_a_part_that_is_not_there_when_they_are_merged_is_missed(fit, planted, tmp_path):
    parameters = StandardizeParameters(batch_size=BATCH, parts=2)
    one = OnePass("statistics", Shards(planted[0]), 5, parameters, Checkpoints(tmp_path), "cpu", {})
    with as_current(OneOf(0, 2)), pytest.raises(ValueError, match="part 2 of 2, has no whole last"):
        fit("statistics", one.checkpoints, 2)


def test_another_number_of_parts_is_another_fit(fit, tmp_path, caplog):
    """Nor does a part of one go on with that of another; the warning says what differs."""
    checkpoints = Checkpoints(tmp_path)
    fit("pca", checkpoints, 2, saved=False)
    fit("pca", checkpoints, 3, saved=False)
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "its parameters.parts is 2, wanted 3" in warnings[0]


def test_a_fit_in_parts_is_looked_at_when_1_2_4_and_all_of_them_are_merged(
    planted, statistics, tmp_path
):
    checkpoints, told = Checkpoints(tmp_path), []
    checkpoints.observers.append(lambda *step: told.append(step))
    parameters = PCAParameters(batch_size=BATCH, parts=6)
    _, history = fit_pca(Shards(planted[0]), statistics, parameters, checkpoints, "cpu", layer=5)
    assert [look["step"] for look in history] == [4, 8, 16, 24]  # of 24 batches
    assert ["subspace_drift" in look for look in history] == [False, True, True, True]
    assert told == [
        (5, "pca", int(look["step"]), {k: v for k, v in look.items() if k != "step"})
        for look in history
    ]


@pytest.mark.parametrize("stop", [1, BATCH, 100, 768, 2000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_that_ends_early_is_the_beginning_of_the_whole(planted, stop, shuffle):
    shards = Shards(planted[0])
    whole = torch.cat(list(shards.batches(layer=5, batch_size=BATCH, shuffle=shuffle)))
    with shards.batches(layer=5, batch_size=BATCH, shuffle=shuffle, stop=stop) as batches:
        found = list(batches)
    assert torch.equal(torch.cat(found), whole[:stop])
    assert all(len(batch) == BATCH for batch in found[:-1])


def test_a_pass_ends_at_one_token_at_the_least(planted):
    with pytest.raises(ValueError, match="stop is 0, wanted at least 1 token"):
        Shards(planted[0]).batches(layer=5, batch_size=BATCH, stop=0)
