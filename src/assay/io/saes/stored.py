"""What a file of an autoencoder says, whichever library saved it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from assay.architecture import Architecture
from assay.io.tensors import fingerprint_tensors

Library = Literal[
    "saev",
    "SAELens",
    "dictionary_learning",
    "overcomplete",
    "sparsify",
    "ViT-Prisma",
    "hand-made",
]

Normalization = Literal["l2", "max_l2", "l1", "max_l1", "identity"]


@dataclass(frozen=True)
class Settings:
    """What is typed of an autoencoder beside its path. What a file says as well has to be the same.

    Attributes:
        activation: `batchtopk` is `jumprelu` with the threshold that training left.
        k: entries per token, of an activation that keeps so many.
        threshold: one number, for all features.
        normalization: of overcomplete's dictionary, where it is used.

    Raises:
        ValueError: one is of another type, or not known.
    """

    activation: str | None = None
    k: int | None = None
    threshold: float | None = None
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        for name, found, kinds, wanted in (
            ("activation", self.activation, str, "a name such as topk"),
            ("k", self.k, int, "an integer of at least 1"),
            ("threshold", self.threshold, int | float, "a number"),
        ):
            if found is not None and (isinstance(found, bool) or not isinstance(found, kinds)):
                raise ValueError(f"found {name} = {found!r}, wanted {wanted}: change {name}")
        if self.k is not None and self.k < 1:
            raise ValueError(
                f"found k = {self.k}, wanted an integer of at least 1: change k, or leave it out"
            )
        if self.normalization is not None and self.normalization not in get_args(Normalization):
            raise ValueError(
                f"found normalization = {self.normalization!r}, wanted one of"
                f" {', '.join(get_args(Normalization))}: change normalization"
            )

    @property
    def canonical_activation(self) -> str | None:
        """The activation by its name in `assay.architecture`."""
        return "jumprelu" if self.activation == "batchtopk" else self.activation


@dataclass(frozen=True)
class Recorded:
    """Where in the model an autoencoder was trained, as far as its file says.

    Attributes:
        layer: the number of the block, as recorded.
        hook: the hook point or module, as recorded.
        predicts: what it reconstructs, where that is not its input: a transcoder's.
    """

    layer: int | None = None
    hook: str | None = None
    predicts: str | None = None


@dataclass(frozen=True)
class StoredSae:
    """An autoencoder as it was read.

    Attributes:
        library: that saved it.
        architecture: how codes are made.
        tensors: by the names of `assay.architecture.TENSORS`, on the CPU.
        recorded: where it was trained.
        files: that it was read from, the weights first.
        notes: what is worth knowing of the file and changes no formula.
        normalization: of overcomplete's dictionary, which is done already.

    Raises:
        ValueError: there is no decoder, or it is not as large as the encoder.
    """

    library: Library
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    recorded: Recorded = Recorded()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        encoder, decoder = self.tensors.get("W_enc"), self.tensors["W_dec"]
        if decoder.ndim != 2 or (encoder is not None and encoder.shape != decoder.T.shape):
            raise ValueError(
                f"found an encoder {_by(encoder)} and a decoder {_by(decoder)}, wanted d_model x"
                " features and features x d_model: are they of one model?"
            )

    @property
    def formula(self) -> str:
        """In one line."""
        return self.architecture.formula(self.tensors.keys())

    @property
    def d_model(self) -> int:
        """Dimensions of its tokens."""
        return self.tensors["W_dec"].shape[1]

    @property
    def n_features(self) -> int:
        """Features of its codes."""
        return self.tensors["W_dec"].shape[0]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what makes codes and reconstruction: the same wherever the file lies,
        and whatever format it is saved in.
        """
        tensors = {name: tensor.float() for name, tensor in self.tensors.items()}
        said = json.dumps([asdict(self.architecture), fingerprint_tensors(tensors)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def check(self, settings: Settings, d_model: int | None, n_features: int | None) -> None:
        """Check that what is typed, and what a configuration says of the sizes, is so.

        Args:
            settings: as they are typed.
            d_model: dimensions, as a configuration says; None: it does not.
            n_features: features, likewise.

        Raises:
            ValueError: something is otherwise, or typed though it makes no difference.
        """
        for name, said, found in (
            ("dimensions", d_model, self.d_model),
            ("features", n_features, self.n_features),
        ):
            if said not in (None, found):
                raise ValueError(
                    f"found {said} {name} in the configuration and {found} in the weights: they are"
                    " not of one model"
                )
        for name, meant, is_so in (
            ("activation", settings.canonical_activation, self.architecture.activation),
            ("k", settings.k, self.architecture.k),
            ("normalization", settings.normalization, self.normalization),
        ):
            if meant not in (None, is_so):
                raise ValueError(
                    f"found {name} {getattr(settings, name)} typed, and the file says"
                    f" {'none' if is_so is None else is_so}: leave {name} out, or name the file"
                    " that it is of"
                )
        if settings.threshold is not None:
            self._check_threshold(settings.threshold)

    def _check_threshold(self, typed: float) -> None:
        found = self.tensors.get("threshold")
        if found is None or not torch.allclose(
            found.double(), torch.full_like(found, typed, dtype=torch.float64), rtol=1e-6
        ):
            said = (
                "there is none"
                if found is None
                else f"the file says {float(found.min()):.6g} to {float(found.max()):.6g}"
            )
            raise ValueError(
                f"found threshold {typed} typed, and {said}: leave threshold out, or name the file"
                " that it is of"
            )

    def describe(self) -> dict[str, Any]:
        """What is known of it, as JSON."""
        return {
            "library": self.library,
            "formula": self.formula,
            "d_model": self.d_model,
            "n_features": self.n_features,
            "k": self.architecture.k,
            "layer": self.recorded.layer,
            "hook": self.recorded.hook,
            "files": [str(file) for file in self.files],
            "notes": list(self.notes),
        }


def _by(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "of one number"
