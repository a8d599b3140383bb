"""Sparse autoencoders trained elsewhere: their weights under any of the usual names, codes, and
reconstruction.

With pre = (x - b_dec) W_enc + b_enc (b_dec is subtracted only if the autoencoder was trained so),
the code a of a token x is

- `relu`: max(pre, 0)
- `topk` (Gao et al. 2024): max(pre, 0) of the K largest, ties to the lower index, 0 elsewhere
- `jumprelu` (Rajamanoharan et al. 2024): max(pre, 0) where pre is above the feature's threshold, 0
  elsewhere
- `batchtopk` (Bussmann et al. 2024): as `jumprelu` with the threshold that training left, which may
  be the same for all features

and the reconstruction is a W_dec + b_dec. All is computed in float32, as these models are trained,
even if the process lets torch round it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from assay.codes import Batch, Format
from assay.numerics.isolation import isolated
from assay.numerics.moments import check_batch, check_mean_std, scale_of
from assay.numerics.precision import product
from assay.numerics.reconstruction_error import ErrorSums, error_sums

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
InputBias = Literal["b_dec", "none"]

_ROWS = 1 << 24  # entries of a dense code that are held at once


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T


NAMES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "W_enc": {"W_enc": _as_is, "encoder.weight": _turned},
    "b_enc": {"b_enc": _as_is, "encoder.bias": _as_is},
    "W_dec": {"W_dec": _as_is, "decoder.weight": _turned},
    "b_dec": {"b_dec": _as_is, "decoder.bias": _as_is, "bias": _as_is},
    "threshold": {"threshold": _as_is, "activation.threshold": _as_is, "log_threshold": Tensor.exp},
}
"""saev's and SAELens' names, (d, n) encoders and (n, d) decoders; and those of torch's linear
layers, which are the other way round.
"""


def check_names(shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that all tensors are under one of `NAMES`; single numbers (`k`, say) are ignored.

    Raises:
        ValueError: some belong to another formula, with gates or a skip connection: without them
            the codes would be another autoencoder's.
    """
    known = {alias for aliases in NAMES.values() for alias in aliases}
    strange = sorted(name for name, shape in shapes.items() if name not in known and len(shape) > 0)
    if strange:
        raise ValueError(
            f"found {', '.join(strange)} as well: an autoencoder of another kind; wanted one"
            " encoder and one decoder under relu, topk, batchtopk or jumprelu"
        )


class SparseAutoencoder:
    """An autoencoder of n features on tokens of d dimensions.

    Args:
        tensors: weights and biases, under any of `NAMES`; `b_enc` may be missing, and `threshold`
            unless the activation needs it.
        activation: `relu`, `topk`, `batchtopk` or `jumprelu`.
        k: entries a token, for `topk` and for nothing else.
        input_bias: `b_dec`, which is taken off the tokens before they are encoded, or `none`.
        mean: (d,), where the autoencoder was trained on raw activations: tokens are taken back to
            them, x = x~ std + mean, and the reconstruction is standardized again.
        std: (d,), to go with `mean`.

    Raises:
        ValueError: tensors are missing, unknown, no floating-point numbers, not finite, or disagree
            with each other; or an argument is out of range.
    """

    format: Format = "sparse"
    zero_is_far = False
    encode_rounded = None

    @isolated()
    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        activation: Activation,
        k: int | None = None,
        input_bias: InputBias = "b_dec",
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        _check_choice("activation", activation, get_args(Activation))
        _check_choice("input_bias", input_bias, get_args(InputBias))
        has_threshold = activation in ("jumprelu", "batchtopk")
        found = {
            name: _find(tensors, name) for name in NAMES if name != "threshold" or has_threshold
        }
        missing = [name for name, tensor in found.items() if tensor is None and name != "b_enc"]
        if missing:
            wanted = "; ".join(f"{name} ({' or '.join(NAMES[name])})" for name in missing)
            raise ValueError(
                f"found tensors {', '.join(sorted(tensors))}, wanted {wanted} for {activation}:"
                " save it too"
            )
        check_names({name: tensor.shape for name, tensor in tensors.items()})
        encoder, decoder, bias = found["W_enc"], found["W_dec"], found["b_dec"]
        assert encoder is not None
        assert decoder is not None
        assert bias is not None
        if encoder.ndim != 2:
            raise ValueError(
                f"found W_enc of shape {tuple(encoder.shape)}, wanted (d, n_features): is it one"
                " model's?"
            )
        d, n = encoder.shape
        self.W_enc, self.W_dec, self.b_dec = encoder, decoder, bias
        self.b_enc = encoder.new_zeros(n) if found["b_enc"] is None else found["b_enc"]
        self.threshold = found.get("threshold")
        if self.threshold is not None and tuple(self.threshold.shape) not in ((), (1,), (n,)):
            raise ValueError(
                f"found W_enc {d} x {n} and threshold {tuple(self.threshold.shape)}, wanted ({n},)"
                " or one number: are they of one model?"
            )
        for name, shape in {"W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"found W_enc {d} x {n} and {name} {tuple(getattr(self, name).shape)}, wanted"
                    f" {shape}: are they of one model?"
                )
        if (k is None) == (activation == "topk") or not 1 <= (1 if k is None else k) <= n:
            raise ValueError(
                f"found k = {k} for {activation} of {n} features, wanted 1 to {n} for topk, and"
                " none for others"
            )
        self.activation = activation
        self.k = k
        self.ks = (k or n,)
        self.n_features = n
        self.input_bias = input_bias
        if (mean is None) != (std is None):
            raise ValueError(
                "found a mean or a std alone, wanted both, or none for an autoencoder of"
                " standardized tokens"
            )
        if mean is not None and std is not None:
            check_mean_std(mean, std)
            if tuple(mean.shape) != (d,):
                raise ValueError(
                    f"found W_enc {d} x {n} and mean {tuple(mean.shape)}, wanted ({d},): are they"
                    " of one layer?"
                )
        self.mean, self.std = mean, None if std is None else scale_of(std)

    @isolated()
    def encode(self, x: Tensor) -> Batch:
        """Sparse codes of standardized tokens (b, d): `values` float32 and `indices` (b, longest
        row), by falling value, and `error` float64 (b,), the squared error of the reconstruction in
        the standardized space.

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
        """The residual of the reconstruction of standardized tokens, x~ - x^, float32 (b, d)."""
        return torch.cat([part - self._decode(self._activations(part)) for part in self._parts(x)])

    @isolated()
    def errors(self, x: Tensor, std: Tensor) -> dict[int, ErrorSums]:
        """Errors of a batch of standardized tokens, under the entries per token, or under the
        number of features if the entries vary.
        """
        return {self.ks[0]: error_sums(x, self.residual(x), std)}

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rows whose dense codes are held at once, float32."""
        check_batch(x, len(self.W_enc))
        return torch.split(x.float(), max(1, _ROWS // self.n_features))

    def _encode(self, x: Tensor) -> Batch:
        codes = self._activations(x)
        width = self.k or int((codes != 0).sum(1).max()) if len(codes) else 0
        values, indices = codes.sort(dim=1, descending=True, stable=True)
        values, indices = values[:, :width].contiguous(), indices[:, :width].contiguous()
        error = (x - self._decode(codes)).double().square().sum(1)
        # What pads a row names feature 0, not one that may be named already.
        return {"values": values, "indices": torch.where(values != 0, indices, 0), "error": error}

    def _activations(self, x: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            x = (x.double() * self.std + self.mean).float()
        if self.input_bias == "b_dec":
            x = x - self.b_dec
        pre = product(x, self.W_enc) + self.b_enc
        if self.activation == "topk":
            values, indices = pre.sort(dim=1, descending=True, stable=True)
            return torch.zeros_like(pre).scatter_(
                1, indices[:, : self.k], values[:, : self.k].clamp(min=0)
            )
        if self.activation == "relu":
            return pre.clamp(min=0)
        assert self.threshold is not None
        # A threshold may be negative: dictionary_learning saves -1 until training has set it.
        return torch.where(pre > self.threshold, pre.clamp(min=0), 0.0)

    def _decode(self, codes: Tensor) -> Tensor:
        x = product(codes, self.W_dec) + self.b_dec
        if self.mean is not None and self.std is not None:
            x = ((x.double() - self.mean) / self.std).float()
        return x


def _check_choice(name: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise ValueError(
            f"found {name} = {found!r}, wanted one of {', '.join(known)}: change {name}"
        )


def _find(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of a name, under any of its aliases, float32; if there are several, they must be
    equal.
    """
    found = {
        alias: _weights(tensors, alias, change)
        for alias, change in NAMES[name].items()
        if alias in tensors
    }
    if not found:
        return None
    (first, tensor), *others = found.items()
    for alias, other in others:
        # Not bit for bit: the logarithm of a threshold is rounded.
        if other.shape != tensor.shape or not torch.allclose(other, tensor, rtol=1e-6, atol=0):
            raise ValueError(
                f"found {first} and another {alias}, wanted one {name}: save the one that it was"
                " trained with"
            )
    return tensor


def _weights(
    tensors: Mapping[str, Tensor], alias: str, change: Callable[[Tensor], Tensor]
) -> Tensor:
    if not tensors[alias].is_floating_point():
        raise ValueError(
            f"found {alias} of {tensors[alias].dtype}, wanted floating-point numbers: save it as it"
            " was trained"
        )
    tensor = change(tensors[alias].detach().float()).contiguous()
    if tensor.numel() and not all(limit.isfinite() for limit in tensor.aminmax()):
        raise ValueError(
            f"found {alias} with NaN or infinity, wanted finite numbers: save it again, from before"
            " it diverged"
        )
    return tensor
