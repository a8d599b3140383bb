"""An autoencoder as a dictionary: codes, their reconstruction, and its error.

Codes are computed in float32, as these models are trained, even if the process lets torch round it;
the reconstruction of the codes that are kept, and so their error, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from assay.architecture import Architecture
from assay.codes import Batch, Format
from assay.numerics.isolation import isolated
from assay.numerics.moments import check_batch, check_mean_std, scale_of
from assay.numerics.reconstruction_error import ErrorSums, error_sums
from assay.numerics.sae.coder import Coder

_ROWS = 1 << 24  # entries of a dense code that are held at once


class SparseAutoencoder:
    """An autoencoder of n features on tokens of d dimensions.

    `encode`, `residual` and `errors` take standardized tokens, as those of every dictionary do;
    `encode_dense` and `reconstruct` take tokens as the autoencoder saw them. Both are the same
    unless `mean` and `std` are given, but for what float32 cannot decide: the former settle it in
    float64, so that they are the same on any machine, and the latter are as the library computes.

    Args:
        tensors: weights and biases by the names of `assay.architecture.TENSORS`.
        architecture: how codes are made.
        mean: (d,), where the autoencoder was trained on raw activations: tokens are taken back to
            them, x = x~ std + mean, and the reconstruction is standardized again.
        std: (d,), to go with `mean`.

    Attributes:
        n_features: n.
        k: entries per token; None where tokens have more or fewer.
        formula: of the codes and the reconstruction, in one line.

    Raises:
        ValueError: tensors are missing, unknown, no floating-point numbers, not finite, or disagree
            with each other or with the architecture.

    Examples:
        >>> import torch
        >>> from assay.numerics import Architecture, SparseAutoencoder
        >>> tensors = {"W_enc": torch.eye(2), "W_dec": torch.eye(2)}
        >>> sae = SparseAutoencoder(tensors, Architecture("topk", k=1))
        >>> sae.encode_dense(torch.tensor([[3.0, 4.0]]))
        tensor([[0., 4.]])
    """

    format: Format = "sparse"
    zero_is_far = False
    encode_rounded = None

    @isolated()
    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        architecture: Architecture,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        self._coder = Coder(tensors, architecture)
        self.architecture = architecture
        self.formula = architecture.formula(tensors.keys())
        self.k = architecture.k
        self.n_features = self._coder.n
        self.ks = (self.k or self.n_features,)
        if (mean is None) != (std is None):
            raise ValueError(
                "found a mean or a std alone, wanted both, or none for an autoencoder of"
                " standardized tokens"
            )
        if mean is not None and std is not None:
            check_mean_std(mean, std)
            d = self._coder.d
            if tuple(mean.shape) != (d,):
                raise ValueError(
                    f"found weights of {d} dimensions and mean {tuple(mean.shape)}, wanted ({d},):"
                    " are they of one layer?"
                )
        self.mean, self.std = mean, None if std is None else scale_of(std)

    @isolated()
    def encode_dense(self, x: Tensor) -> Tensor:
        """Codes of tokens as the autoencoder saw them (b, d): float32 (b, n), 0 where a feature is
        not active.

        Raises:
            ValueError: x holds NaN or infinity, or is of another width.
        """
        parts = [self._coder.codes(part) for part in self._parts(x)]
        return torch.cat(parts) if parts else x.new_zeros(0, self.n_features)

    @isolated()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruction of tokens as the autoencoder saw them (b, d), in the same space: float32
        (b, d).

        Raises:
            ValueError: x holds NaN or infinity, or is of another width.
        """
        return torch.cat(
            [
                self._coder.decode(part, *self._coder.entries(part)).float()
                for part in self._parts(x)
            ]
        )

    @isolated()
    def encode(self, x: Tensor) -> Batch:
        """Sparse codes of standardized tokens (b, d): `values` float32 and `indices` (b, longest
        row), by falling magnitude, and `error` float64 (b,), the squared error of the
        reconstruction in the standardized space.

        Raises:
            ValueError: x holds NaN or infinity, or is of another width.
        """
        parts = [self._encode(part) for part in self._parts(x)]
        width = max((part["values"].shape[1] for part in parts), default=0)
        for part in parts:
            for name in ("values", "indices"):
                part[name] = torch.nn.functional.pad(part[name], (0, width - part[name].shape[1]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @isolated()
    def residual(self, x: Tensor) -> Tensor:
        """The residual of the reconstruction of standardized tokens, x~ - x^, float64 (b, d)."""
        parts = ((part, self._seen(part)) for part in self._parts(x))
        return torch.cat(
            [
                self._left(part, seen, *self._coder.entries(seen.float(), seen))
                for part, seen in parts
            ]
        )

    @isolated()
    def errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of a batch of standardized tokens, under the entries per token, or under the
        number of features if the entries vary.
        """
        return {self.ks[0]: error_sums(x, self.residual(x), std)}

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rows whose dense codes are held at once, float32."""
        check_batch(x, self._coder.d)
        return torch.split(x.float(), max(1, _ROWS // self.n_features))

    def _encode(self, x: Tensor) -> Batch:
        seen = self._seen(x)
        values, indices = self._coder.entries(seen.float(), seen)
        error = self._left(x, seen, values, indices).square().sum(1)
        # What pads a row names feature 0, not one that may be named already.
        return {"values": values, "indices": torch.where(values != 0, indices, 0), "error": error}

    def _seen(self, x: Tensor) -> Tensor:
        """Standardized tokens as the autoencoder saw them, float64."""
        x = x.double()
        return x if self.mean is None or self.std is None else x * self.std + self.mean

    def _left(self, x: Tensor, seen: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """x~ - x^, float64, of standardized tokens, the same as the autoencoder saw them, and the
        entries of their codes.
        """
        found = self._coder.decode(seen, values, indices)
        if self.mean is not None and self.std is not None:
            found = (found - self.mean) / self.std
        return x.double() - found
