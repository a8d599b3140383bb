"""What codes are, told in JSON and tensors, so that another process can make or read the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from assay.architecture import Architecture
from assay.codes import Codes
from assay.encodings import Form
from assay.io.codes import StoredCodes
from assay.io.saes import StoredSae
from assay.io.shards import Shards
from assay.pipelines.dictionary_nodes import Computation, OpenedAs, SourcedCodes, Stored

Recipe = tuple[dict[str, Any], dict[str, Tensor]]


def describe_codes(codes: Codes) -> Recipe | None:
    """How another process comes by the same codes: by a folder, or by what they are computed from.
    None where it cannot.
    """
    if isinstance(codes, StoredCodes):
        return {"folder": str(codes.path)}, {}
    if not isinstance(codes, SourcedCodes) or codes.computation is None:
        return None
    made = codes.computation
    stored, kind = made.model, made.kind
    recipe = {
        "shards": str(made.shards.path),
        "threads": made.shards.threads,
        "device": made.device,
        "layer": made.layer,
        "name": made.name,
        "form": asdict(kind) if isinstance(kind, Form) else kind,
        "sae": (
            {"library": stored.library, "architecture": asdict(stored.architecture)}
            if isinstance(stored, StoredSae)
            else None
        ),
        "provenance": dict(codes.provenance),
        "made_from": codes.made_from,
    }
    model = stored.tensors if isinstance(stored, StoredSae) else stored
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    tensors |= {f"statistics.{name}": tensor for name, tensor in made.statistics.items()}
    return recipe, tensors


def remake_codes(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codes:
    """The codes that `describe_codes` told of."""
    if "folder" in recipe:
        return StoredCodes(recipe["folder"])
    weights = _under("model.", tensors)
    model: Stored = weights
    kind: OpenedAs = recipe["form"]
    if recipe["sae"] is None:
        kind = Form(**recipe["form"])
    else:
        architecture = Architecture(**recipe["sae"]["architecture"])
        model = StoredSae(recipe["sae"]["library"], architecture, weights)
    computation = Computation(
        Shards(recipe["shards"], threads=recipe["threads"]),
        _under("statistics.", tensors),
        model,
        recipe["device"],
        layer=recipe["layer"],
        name=recipe["name"],
        kind=kind,
    )
    return computation.codes(provenance=recipe["provenance"], made_from=recipe["made_from"])


def _under(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)
    }
