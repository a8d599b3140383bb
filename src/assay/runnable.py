"""Whether a run can begin: what it reads is there, and nothing is in the way of what it makes."""

from __future__ import annotations

from kedro.io import AbstractVersionedDataset
from kedro.pipeline import Pipeline

from assay.fingerprints import is_parameter
from assay.freshness import Freshness, folder_of


def check_runnable(freshness: Freshness, pipeline: Pipeline) -> None:
    """Check that what ``pipeline`` reads and does not make is there, and that what it makes can be
    put in its place.

    Raises:
        FileNotFoundError: naming what is missing and the node that makes it.
        ValueError: a version is asked for of what has none or is to be made, or a file is in the
            way.
    """
    _check_pinned(freshness, pipeline)
    for name in sorted(pipeline.inputs()):
        if is_parameter(name) or name in freshness.pinned:
            continue
        maker = freshness.made_by.get(name)
        if maker is None and not freshness.catalog.exists(name):
            raise FileNotFoundError(
                f"`{name}` does not exist ({freshness.catalog.get(name)!r}): correct its path."
            )
        if maker is not None and not (freshness.is_kept(name) and freshness.is_current(name)):
            raise FileNotFoundError(
                f"`{name}` does not exist for these shards and parameters: run `{maker.name}`"
                " first, or leave the filters out."
            )
    for name in sorted(pipeline.all_outputs()):
        dataset = freshness.kept(name)
        if isinstance(dataset, AbstractVersionedDataset) and folder_of(dataset).is_file():
            raise ValueError(
                f"{folder_of(dataset)} is a file, wanted the folder of the versions of `{name}`:"
                " move it away."
            )


def _check_pinned(freshness: Freshness, pipeline: Pipeline) -> None:
    for name, version in freshness.pinned.items():
        if name not in freshness.made_by:  # the catalog's patterns would take a slip for a name
            raise ValueError(
                f"`{name}` is no result of this pipeline: correct its name in --load-versions."
            )
        versioned = isinstance(freshness.catalog.get(name), AbstractVersionedDataset)
        if not versioned:
            raise ValueError(f"`{name}` has no versions: leave --load-versions out.")
        if not freshness.is_current(name):
            raise FileNotFoundError(
                f"`{name}` has no version {version}: leave --load-versions out, or name one it has."
            )
        if name in pipeline.all_outputs():
            raise ValueError(
                f"`{name}` is to be made, and --load-versions asks for {version} of it: leave one"
                " out."
            )
