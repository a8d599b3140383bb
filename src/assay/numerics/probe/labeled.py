"""Codes with their labels, and how many of their features are worked on together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from assay.codes import Codes
from assay.numerics.codes import TopKCodes, gather_columns
from assay.numerics.memory import free_bytes
from assay.numerics.probe.sketch import FeatureSketch
from assay.numerics.ranking import check_labels, count_classes

_SOLVED = 256  # features whose sketches are solved as one, at the most
_MOST = 2**30  # bytes of what is worked on as one, whatever the memory

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much: rows or features."""


def check_slabs(rows: int, features: int | None) -> None:
    """Check the sizes of slabs.

    Raises:
        ValueError: they hold no rows or no features.
    """
    for name, value in (("slab_rows", rows), ("slab_features", features)):
        if value is not None and value < 1:
            raise ValueError(f"found {name} = {value}, wanted at least 1: change {name}")


def group_size(most: int, feature_bytes: int) -> int:
    """How many features are worked on as one: a power of 2, `most` at the most, which is one.

    The bits of a feature's results may depend on those that it is grouped with, by how their points
    are padded to one length. So groups begin at multiples of their size, and that does not depend
    on the memory that happens to be free.
    """
    return int(min(most, 1 << max(0, (_MOST // feature_bytes).bit_length() - 1)))


def solved_together(n_classes: int, *, by_class: bool) -> int:
    """Features whose sketches are solved as one: whoever shares a fit shares whole groups."""
    return group_size(_SOLVED, FeatureSketch.bytes_per_feature(n_classes, by_class=by_class))


@dataclass(frozen=True)
class LabeledCodes:
    """Codes with a label for each row, to be worked on in slabs, on the labels' device.

    Attributes:
        codes: of any format.
        labels: int64 (rows,) in 0..n_classes-1, or -1: a negative of every class.
        n_classes: classes.
        slab_rows: rows read at once.
        slab_features: features worked on together, in whole groups; None: as many as a quarter of
            the free memory holds.
        progress: called with the numbers of rows and features that are done.

    Raises:
        ValueError: labels are not int64 (rows,) in -1..n_classes-1, or slabs hold nothing.
    """

    codes: Codes
    labels: Tensor
    n_classes: int
    slab_rows: int = 4096
    slab_features: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_slabs(self.slab_rows, self.slab_features)
        check_labels(self.labels, self.codes.n_rows, self.n_classes)

    def check_ks(self, ks: Sequence[int | None]) -> None:
        """Check that the codes have first k entries for each of `ks`; None is all of them.

        Raises:
            ValueError: they have not, or there is no k.
        """
        if not ks:
            raise ValueError("found no K, wanted at least 1: give None for all entries of a row")
        for k in ks:
            if k is not None:
                TopKCodes(self.codes, k)  # raises where it cannot be

    @cached_property
    def class_counts(self) -> Tensor:
        """Rows of each class, int64 (n_classes,)."""
        return count_classes(self.labels, self.n_classes)

    def room(self, feature_bytes: int, group: int = 1) -> int:
        """Features to work on together, `feature_bytes` of memory each: whole groups, at least one
        of them.
        """
        fits = free_bytes(self.labels.device) // 4 // feature_bytes
        return max(group, min(self.slab_features or fits, fits) // group * group)

    def telling(self, what: str, total: int) -> Callable[[int], None]:
        """A function that tells `progress`, if there is one, how much is done."""

        def tell(done: int) -> None:
            if self.progress is not None:
                self.progress(what, done, total)

        return tell

    def gather(self, wanted: Sequence[tuple[Tensor, int | None]]) -> list[Tensor]:
        """Columns as float32 (f, rows), from one pass: for each pair of features (f,) and k, these
        features of the first k entries of each row.
        """
        tell = self.telling("gathered", self.codes.n_rows)
        return gather_columns(self.codes, wanted, self.slab_rows, self.labels.device, tell)
