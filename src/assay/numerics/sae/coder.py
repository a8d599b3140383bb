"""An autoencoder's formula on tokens as it saw them: to codes and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from assay.architecture import TENSORS, Architecture
from assay.numerics.precision import product
from assay.numerics.sae.activations import activate, largest, pursue
from assay.numerics.sae.settling import exact_products, near_to, rounding_of, undecided

_LAYER_NORM_EPS = 1e-5

# A product with codes is slower than adding up rows if fewer than 1 in so many is not 0.
_SPARSE = 40


class Coder:
    """The formula of `assay.architecture` with its weights.

    Args:
        tensors: weights and biases by the names of `assay.architecture.TENSORS`.
        architecture: how codes are made.

    Attributes:
        d: dimensions of tokens.
        n: features.

    Raises:
        ValueError: tensors are missing, unknown, no floating-point numbers, not finite, or disagree
            with each other or with the architecture.
    """

    def __init__(self, tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
        unknown = sorted(tensors.keys() - TENSORS.keys())
        if unknown:
            raise ValueError(
                f"found tensors {', '.join(unknown)}, wanted none but {', '.join(TENSORS)}: rename"
                " them, or leave them out if the formula has no such term"
            )
        self._tensors = {name: _weights(name, tensor) for name, tensor in tensors.items()}
        self._architecture = architecture
        found = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.n, self.d = _check_shapes(found, architecture)

    def entries(self, x: Tensor, wide: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The entries of the codes of tokens as the autoencoder saw them, by falling magnitude:
        values and indices (b, k), or (b, longest row), where 0 pads the others. See `codes`.
        """
        codes = self.codes(x, wide)
        width = self._architecture.k or int((codes != 0).sum(1).max()) if len(codes) else 0
        indices = largest(codes.abs(), width) if width else codes.new_zeros(len(x), 0).long()
        return codes.gather(1, indices), indices

    def codes(self, x: Tensor, wide: Tensor | None = None) -> Tensor:
        """Dense codes of tokens as the autoencoder saw them (b, d), float32, as its library
        computes them; with ``wide``, the same tokens in float64, what float32's rounding would
        decide is settled.
        """
        gate, encoder = self._tensors.get("b_gate"), self._tensors.get("W_enc")
        x = self._center(x)
        if encoder is None:
            return pursue(x, self._tensors["W_dec"], self._architecture)
        products = product(x, encoder)
        gates = None if gate is None else products + gate
        pre = self._scale(products)
        if wide is not None:
            self._settle(self._center(wide), rounding_of(x, self._longest), pre, gates)
        codes = activate(pre, self._architecture, self._tensors.get("threshold"))
        return codes if gates is None else torch.where(gates > 0, codes, 0.0)

    def _center(self, x: Tensor) -> Tensor:
        """Tokens as they are multiplied with the encoder, in their own dtype."""
        x, center = self._normalize(x), self._tensors.get("center")
        return x if center is None else x - center

    def _scale(self, products: Tensor, columns: Tensor | None = None) -> Tensor:
        """Pre-activations of (norm(x) - c) W_enc, all of them (b, n) or those of the ``columns``
        (p,), in their own dtype.
        """
        r_mag, bias, scale = (
            tensor if tensor is None or columns is None else tensor[columns].to(products.dtype)
            for tensor in map(self._tensors.get, ("r_mag", "b_enc", "scale"))
        )
        pre = products if r_mag is None else products * r_mag.exp()
        pre = pre if bias is None else pre + bias
        return pre if scale is None else pre * scale

    def _settle(self, x: Tensor, rounding: Tensor, pre: Tensor, gates: Tensor | None) -> None:
        """Put into the pre-activations and gates (b, n) the exact ones of those that are within
        ``rounding`` (b, 1) of what decides about them; x (b, d) is float64.
        """
        encoder, threshold = self._tensors["W_enc"], self._tensors.get("threshold")
        if gates is not None:
            at = near_to(0.0, gates, rounding)
            gates[at] = (exact_products(x, encoder, *at) + self._tensors["b_gate"][at[1]]).float()
        at = undecided(pre, self._architecture, threshold, rounding * self._largest_scale)
        pre[at] = self._scale(exact_products(x, encoder, *at), at[1]).float()

    @cached_property
    def _longest(self) -> Tensor:
        """The length of the longest column of the encoder."""
        lengths: Tensor = torch.linalg.vector_norm(self._tensors["W_enc"], dim=0)
        return lengths.amax()

    @cached_property
    def _largest_scale(self) -> Tensor:
        ones = torch.ones_like(self._tensors["W_dec"][:, 0])
        scale, r_mag = self._tensors.get("scale", ones), self._tensors.get("r_mag")
        return (scale.abs() if r_mag is None else scale.abs() * r_mag.exp()).amax()

    @cached_property
    def _decoder(self) -> Tensor:
        return self._tensors["W_dec"].double()

    def _normalize(self, x: Tensor) -> Tensor:
        match self._architecture.norm:
            case "layer_norm":
                mean, std = _moments(x)
                return (x - mean) / (std + _LAYER_NORM_EPS)
            case "constant_norm_rescale":
                return x * _to_sqrt_d(x)
            case _:
                return x

    def decode(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """Reconstruction (b, d), float64, of tokens as the autoencoder saw them, from the entries
        of their codes.
        """
        get = self._tensors.get
        values, decoder = values.double(), self._decoder
        if (scale := get("scale")) is not None:
            # A feature of scale 0 has code 0.
            values = values / torch.where(scale == 0, 1.0, scale.double())[indices]
        if 0 < values.shape[1] * _SPARSE <= self.n:
            found = torch.nn.functional.embedding_bag(
                indices, decoder, per_sample_weights=values, mode="sum"
            )
        else:
            codes = values.new_zeros(len(values), self.n)
            found = codes.scatter_add_(1, indices, values) @ decoder
        if (bias := get("b_out")) is not None:
            found = found + bias
        match self._architecture.norm:
            case "layer_norm":
                mean, std = _moments(x.double())
                return found * std + mean
            case "constant_norm_rescale":
                return found / _to_sqrt_d(x.double())
            case _:
                return found


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> tuple[int, int]:
    """Check that the tensors fit each other and the architecture; gives n and d."""
    pursues = architecture.activation == "matching_pursuit"
    wanted = {"W_dec"} if pursues else {"W_dec", "W_enc"}
    if architecture.activation == "jumprelu":
        wanted.add("threshold")
    if "r_mag" in found or "b_gate" in found:
        wanted |= {"b_gate", "r_mag"}
    useless = found.keys() - wanted - {"center", "b_out"}
    if not pursues:
        useless -= {"b_enc", "scale"}
    if missing := wanted - found.keys():
        raise ValueError(
            f"found tensors {', '.join(sorted(found)) or 'none'}, wanted"
            f" {', '.join(sorted(missing))} as well for {architecture.activation}: save it too"
        )
    if useless:
        raise ValueError(
            f"found {', '.join(sorted(useless))}, which {architecture.activation} has no use"
            " for: leave it out, or name the activation that it belongs to"
        )
    if len(found["W_dec"]) != 2 or 0 in found["W_dec"]:
        raise ValueError(
            f"found W_dec of shape {found['W_dec']}, wanted (n_features, d), of at least one"
            " each: is it one model's?"
        )
    n, d = found["W_dec"]
    features, dimensions = ((n,),), ((d,),)
    shapes = {
        **dict.fromkeys(TENSORS, features),
        "W_enc": ((d, n),),
        "W_dec": ((n, d),),
        "b_out": dimensions,
        "center": dimensions,
        "threshold": ((n,), (1,), ()),
    }
    for name, shape in found.items():
        if shape not in shapes[name]:
            raise ValueError(
                f"found W_dec {n} x {d} and {name} {shape}, wanted"
                f" {' or '.join(map(str, shapes[name]))}: are they of one model?"
            )
    k = architecture.k
    if k is not None and (k > n or (architecture.activation == "groupmax" and n % k)):
        raise ValueError(
            f"found k = {k} for {architecture.activation} of {n} features, wanted 1 to {n}"
            + (", a divisor of it" if architecture.activation == "groupmax" else "")
        )
    return n, d


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of each token's dimensions, (b, 1)."""
    mean = x.mean(1, keepdim=True)
    if x.shape[1] == 1 or not len(x):  # of which torch warns
        return mean, torch.zeros_like(mean)
    return mean, (x - mean).std(1, keepdim=True)


def _to_sqrt_d(x: Tensor) -> Tensor:
    """What scales each token to the length sqrt(d), (b, 1): a token of length 0 stays as it is."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # In the order in which the libraries round.
    inverse: Tensor = torch.where(lengths == 0, 1.0, lengths).reciprocal()
    return inverse * math.sqrt(x.shape[1])


def _weights(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(
            f"found {name} of {tensor.dtype}, wanted floating-point numbers: save it as it was"
            " trained"
        )
    tensor = tensor.detach().float().contiguous()
    # On the meta device there are shapes and no numbers.
    is_known = tensor.numel() and not tensor.is_meta
    if is_known and not all(limit.isfinite() for limit in tensor.aminmax()):
        raise ValueError(
            f"found {name} with NaN or infinity, wanted finite numbers: save it again, from before"
            " it diverged"
        )
    return tensor
