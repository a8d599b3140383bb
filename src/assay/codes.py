"""Codes: what an encoder says of every row, wherever it comes from and whatever it is for."""

from collections.abc import Iterator
from typing import Literal, Protocol

from torch import Tensor

Format = Literal["dense", "sparse", "onehot"]
Batch = dict[str, Tensor]


class Codes(Protocol):
    """Codes of `n_rows` rows over `n_features` features."""

    @property
    def format(self) -> Format:
        """How a batch holds the codes: all of a row, its entries and their places, or the place of
        its one 1.
        """

    @property
    def n_rows(self) -> int:
        """Rows: content tokens, in order."""

    @property
    def n_features(self) -> int:
        """Columns: clusters, components or latents."""

    @property
    def k(self) -> int | None:
        """Entries per row: n_features dense, 1 one-hot; None where sparse rows vary, and a batch is
        padded to its longest row with 0.
        """

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """A fresh pass over the rows from `start` on, in order, in batches of at most `batch_size`
        rows.
        """
