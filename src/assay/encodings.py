"""Values that identify a row of the table, and every name built from them and parsed into them.

A method of one seed is a `Model`, the way in which tokens are written as codes a `Form`, and both
together an `Encoding`. Files, datasets, MLflow's runs and the table go by their names, which are
made and read here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, Self

Family = Literal["kmeans", "pca"]

KINDS: dict[Family, tuple[str, ...]] = {
    "kmeans": (
        *("onehot", "invdist"),
        *(
            f"distance-{transform}"
            for transform in ("sqeuclidean", "neg_euclidean", "cosine", "unit")
        ),
    ),
    "pca": ("dense", "topk"),
}
"""The kinds of codes that each family of dictionaries has. No kind belongs to two families."""


def layer_name(layer: int) -> str:
    """``layer_23``: a layer's namespace, its folder, and what stands for ``{layer}`` in paths."""
    return f"layer_{layer}"


def child_name(layer: int, encoding: str) -> str:
    """``layer_23/pca-topk-00064``: MLflow's run of an encoding of a layer, a child of that of the
    whole.
    """
    return f"{layer_name(layer)}/{encoding}"


@dataclass(frozen=True)
class Model:
    """A dictionary of one seed: ``kmeans``, or ``kmeans-seed-3`` where it is one of several.

    Attributes:
        method: `kmeans`, `pca`, or the name of a dictionary that is not Assay's own; those of
            several seeds share it.
        seed: None where there is none, or it is not known.
        is_of_several: whether the name says the seed.
    """

    method: str
    seed: int | None = None
    is_of_several: bool = False

    @property
    def name(self) -> str:
        """The name of what was fitted: of files and datasets."""
        return f"{self.method}-seed-{self.seed}" if self.is_of_several else self.method

    @property
    def family(self) -> Family | None:
        """`kmeans` or `pca`; None for a dictionary that is not Assay's own."""
        return next((family for family in KINDS if family == self.method), None)

    @classmethod
    def parse(cls, name: str) -> Self:
        """The model of a name; of a seed that the name does not say nothing is known."""
        found = re.fullmatch(r"(.+)-seed-(\d+)", name)
        return cls(name) if found is None else cls(found[1], int(found[2]), True)


@dataclass(frozen=True)
class Form:
    """How codes are made: ``kmeans-onehot``, ``pca-topk-00064``.

    Attributes:
        kind: one of `KINDS`.
        k: entries that are kept of each row, for `topk` and for nothing else.
        whiten: of PCA's, whether a coefficient is divided by the standard deviation along its
            component; None: as what was fitted says. No name says it: a table has one or the other.
    """

    kind: str
    k: int | None = None
    whiten: bool | None = None

    @property
    def family(self) -> Family:
        """Whose centers or components they are made with. ValueError for a kind of neither."""
        for family, kinds in KINDS.items():
            if self.kind in kinds:
                return family
        known = ", ".join(kind for kinds in KINDS.values() for kind in kinds)
        raise ValueError(f"the form is of the kind {self.kind!r}; wanted one of {known}")

    @property
    def suffix(self) -> str:
        """What follows the model in an encoding's name. K has five digits, so that names sort as
        numbers do.
        """
        return self.kind if self.k is None else f"{self.kind}-{self.k:05d}"

    @property
    def name(self) -> str:
        """The name of the method's own encoding of this form."""
        return f"{self.family}-{self.suffix}"

    @property
    def zero_is_far(self) -> bool:
        """Whether a code of 0 means that the center is far, so that small codes can be left out."""
        return self.kind in ("invdist", "distance-cosine", "distance-unit")

    @property
    def is_by_center(self) -> bool:
        """Whether a token is reconstructed as its nearest center, whatever its codes are."""
        return self.family == "kmeans"

    @classmethod
    def parse(cls, suffix: str) -> Self | None:
        """The form of what follows a model's name; None where it is none."""
        topk = re.fullmatch(r"topk-([0-9]{5,})", suffix)
        if topk is not None:
            return cls("topk", int(topk[1]))
        return (
            cls(suffix)
            if suffix != "topk" and any(suffix in kinds for kinds in KINDS.values())
            else None
        )

    @classmethod
    def parse_name(cls, name: str) -> Self:
        """The form of `name`. ValueError where it is none."""
        for family in KINDS:
            found = cls.parse(name.removeprefix(f"{family}-"))
            if found is not None and found.name == name:
                return found
        known = ", ".join(
            sorted(
                f"{family}-{kind}"
                for family, kinds in KINDS.items()
                for kind in kinds
                if kind != "topk"
            )
        )
        raise ValueError(
            f"the encoding is {name!r}; wanted one of {known} or pca-topk-KKKKK, K in five digits"
            " or more"
        )


@dataclass(frozen=True)
class Encoding:
    """One way of writing patches as codes, and a row of a layer's table.

    Attributes:
        model: whose codes they are.
        form: how they are made; None for a dictionary that has one way of its own.
        k: clusters or kept components; None: what the dictionary says.
        stored_k: K of the top-K codes that are stored, of which these are the first `k` entries:
            the sweep's largest K serves all. None: these are stored themselves.
    """

    model: Model
    form: Form | None
    k: int | None
    stored_k: int | None = None

    @property
    def name(self) -> str:
        """The encoding's alone: of files, datasets and MLflow's runs."""
        return self._named(self.model.name, self.form)

    @property
    def shown(self) -> str:
        """What those of several seeds share: their name in the table."""
        return self._named(self.model.method, self.form)

    @property
    def codes(self) -> str:
        """The name of the stored encoding whose codes contain this one's."""
        return self._named(self.model.name, self.codes_form)

    @property
    def codes_form(self) -> Form | None:
        """The form of the stored codes that contain this one's."""
        return (
            self.form
            if self.form is None or self.stored_k is None
            else replace(self.form, k=self.stored_k)
        )

    @staticmethod
    def _named(model: str, form: Form | None) -> str:
        return model if form is None else f"{model}-{form.suffix}"

    @classmethod
    def parse(cls, name: str, model: Model) -> Self:
        """Parse an encoding's name, given its model. For a name as the table shows it, without a
        seed, pass `Model(method)`.

        ValueError where it is neither the model's own name nor that and a form.
        """
        form = None if name == model.name else Form.parse(name.removeprefix(f"{model.name}-"))
        found = cls(model, form, None if form is None else form.k)
        if found.name != name:
            raise ValueError(
                f"the encoding is {name!r}, wanted {model.name}, or that and a form, as"
                f" {model.name}-onehot"
            )
        return found
