"""What the numerics show: their names, and examples that run."""

import doctest
import importlib
import pkgutil

import pytest

import assay.numerics

# The fused kernels are imported where there are CUDA and Triton.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(assay.numerics.__path__, "assay.numerics.")
    if ".fused" not in module.name
]


def test_every_name_is_there_and_says_what_it_is():
    assert assay.numerics.__all__ == sorted(assay.numerics.__all__)
    for name in assay.numerics.__all__:
        assert getattr(assay.numerics, name).__doc__, name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_show(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def test_the_estimators_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("MiniBatchKMeans", "StreamingPCA", "LogisticProbe1d"):
        assert finder.find(getattr(assay.numerics, name))[0].examples, name


def test_estimators_show_their_parameters():
    assert (
        repr(assay.numerics.StreamingPCA(3, whiten=True))
        == "StreamingPCA(n_components=3, whiten=True)"
    )
    assert "ridge=" in repr(assay.numerics.LogisticProbe1d())
    assert "n_clusters=3" in repr(assay.numerics.MiniBatchKMeans(3))
