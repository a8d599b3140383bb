"""Files of equal content, found without reading most of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from assay.io.sampling import PAGE, sampled_digest, whole_digest


def find_copies(files: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pairs of a file and one of the others that hold the same bytes, in the order of the files;
    each of them is in one pair at the most.

    Sizes are compared first, then a page of those that are as large, then all that they hold.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    candidates: list[tuple[Sequence[Path], Sequence[Path]]] = [(files, others)]
    for key in (_size, _page, _content):
        candidates = [pair for both in candidates for pair in _split(*both, key)]
    pairs = [pair for both in candidates for pair in zip(*both, strict=False)]
    order = {path: number for number, path in enumerate(files)}
    return sorted(pairs, key=lambda pair: order[pair[0]])


def _split(
    files: Iterable[Path], others: Iterable[Path], key: Callable[[Path], Hashable]
) -> Iterator[tuple[list[Path], list[Path]]]:
    """The groups of files and others of one key that have some of both."""
    groups: dict[Hashable, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for part, paths in enumerate((files, others)):
        for path in paths:
            groups[key(path)][part].append(path)
    yield from (both for both in groups.values() if all(both))


def _size(path: Path) -> int:
    return path.stat().st_size


def _page(path: Path) -> str:
    return sampled_digest(path, PAGE)


def _content(path: Path) -> str:
    return whole_digest(path)
