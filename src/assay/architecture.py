"""What kind of autoencoder some weights are of: the formula of its codes and its reconstruction.

With norm, c and b_out as the library that trained it has them, and s a scale per feature,

    pre = ((norm(x) - c) W_enc + b_enc) s,    code = act(pre),
    x^ = norm^-1((code / s) W_dec + b_out).

An `Architecture` says what act and norm are. Which of c, s and the biases there are, its tensors
say, under the names of `TENSORS`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["relu", "topk", "abstopk", "jumprelu", "groupmax", "matching_pursuit"]
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]

WITH_K = ("topk", "abstopk", "groupmax")
"""Activations that keep k entries, and so have a k."""

TENSORS = {
    "W_enc": "encoder (d, n); none for matching pursuit, which encodes with W_dec",
    "b_enc": "bias of the encoder (n,)",
    "W_dec": "decoder (n, d)",
    "b_out": "bias of the reconstruction (d,)",
    "center": "c, what is taken off a token before it is encoded (d,)",
    "scale": "s, the scale of each feature (n,)",
    "threshold": "of jumprelu, (n,) or one number",
    "b_gate": "bias of the gate (n,): a code is 0 unless (norm(x) - c) W_enc + b_gate is above 0",
    "r_mag": (
        "where there is a gate, the logarithm of what (norm(x) - c) W_enc is scaled by before b_enc"
        " is added (n,)"
    ),
}
"""The names of an autoencoder's tensors, their shapes with d dimensions and n features, and what
they are. All but W_dec may be missing; W_enc may not either, but for matching pursuit.
"""


@dataclass(frozen=True)
class Architecture:
    """How codes are made of pre-activations, and tokens normalized.

    Attributes:
        activation: what makes codes of the pre-activations:

            - `relu`: max(pre, 0)
            - `topk`: the k largest of a token, ties to the lower index, and 0 for the others;
              negative ones become 0 as well, unless `signed`
            - `abstopk`: the k of the largest magnitude, with their signs
            - `jumprelu`: max(pre, 0) where pre is above the feature's threshold, and 0 elsewhere;
              batch top-K is this too, once its training has left a threshold
            - `groupmax`: of each of k groups of neighboring features the largest, if positive
            - `matching_pursuit`: again and again the feature with the largest positive product with
              what is left of the token is added to the code and taken off, until less is left than
              `residual_threshold`, or for `max_iterations`, or until a step adds no new feature

        k: entries or groups, for the activations of `WITH_K` and for no other.
        signed: whether `topk` keeps negative pre-activations that are among the k largest.
        keeps_equal: whether `jumprelu` keeps a pre-activation that equals its threshold.
        norm: what is done to a token first and undone at the end: nothing; its own mean is taken
            off, and it is divided by its own standard deviation (n - 1) plus 1e-5; or it is scaled
            to the length sqrt(d).
        residual_threshold: of matching pursuit, the length of what is left; 0: no such bound.
        max_iterations: of matching pursuit; None: d.
        stop_on_duplicate_support: of matching pursuit, whether it ends with a step that adds no new
            feature.

    Raises:
        ValueError: one of them is none of these, or k is given or missing where it should not be.
    """

    activation: Activation
    k: int | None = None
    signed: bool = False
    keeps_equal: bool = False
    norm: Norm = "none"
    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True

    def __post_init__(self) -> None:
        for name, found, known in (
            ("activation", self.activation, get_args(Activation)),
            ("norm", self.norm, get_args(Norm)),
        ):
            if found not in known:
                raise ValueError(
                    f"found {name} = {found!r}, wanted one of {', '.join(known)}: change {name}"
                )
        if (self.k is None) == (self.activation in WITH_K) or (self.k is not None and self.k < 1):
            raise ValueError(
                f"found k = {self.k} for {self.activation}, wanted at least 1 for"
                f" {', '.join(WITH_K)}, and none for others"
            )
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(
                f"found max_iterations = {self.max_iterations}, wanted at least 1, or none for the"
                " number of dimensions"
            )

    def formula(self, tensors: Collection[str]) -> str:
        """The formula in one line, with those terms that there are ``tensors`` for.

        Args:
            tensors: names of `TENSORS`.
        """
        x = {"none": "x", "layer_norm": "ln(x)", "constant_norm_rescale": "rescale(x)"}[self.norm]
        inner = f"({x} - c)" if "center" in tensors else x
        b_out = " + b_out" if "b_out" in tensors else ""
        if self.activation == "matching_pursuit":
            code, decoded = f"matching_pursuit({inner}, W_dec)", f"code W_dec{b_out}"
        else:
            pre = f"{inner} W_enc"
            gate = f" where {pre} + b_gate > 0" if "b_gate" in tensors else ""
            pre += " exp(r_mag)" if "r_mag" in tensors else ""
            pre += " + b_enc" if "b_enc" in tensors else ""
            if "scale" in tensors:
                pre = f"({pre}) s"
            code = f"{self._shown}({pre}){gate}"
            decoded = f"{'(code / s)' if 'scale' in tensors else 'code'} W_dec{b_out}"
        back = decoded if self.norm == "none" else f"{x[:-3]}^-1({decoded})"
        return f"code = {code};  x^ = {back}"

    @property
    def _shown(self) -> str:
        match self.activation:
            case "topk":
                return f"top-{self.k}" if self.signed else f"relu top-{self.k}"
            case "abstopk":
                return f"top-{self.k} by magnitude"
            case "groupmax":
                return f"relu groupmax-{self.k}"
            case "jumprelu":
                return f"relu where pre {'>=' if self.keeps_equal else '>'} threshold "
            case _:
                return str(self.activation)
