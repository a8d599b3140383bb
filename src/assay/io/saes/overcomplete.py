"""overcomplete: a whole module (`model.pt`), or its state dict, which says less.

A linear encoder with relu, whose batch normalization, if there is one, is that of its running
statistics; and a dictionary that is normalized where it is used. Nothing is taken off the input or
added to the output. Its kinds:

- SAE: relu
- TopKSAE, RATopKSAE: relu, then the `top_k` largest
- BatchTopKSAE: relu where it is not below `running_threshold`
- JumpSAE, RAJumpSAE: relu where it is not below exp(`thresholds`)

The dictionary is `_weights`, normalized; or, of RA-SAE, convex combinations of the points C by the
rows of W, plus Relax, whose rows are at most `delta` long; times exp(`multiplier`). A module that
was saved in evaluation mode keeps what this came to, and the library decodes with that.

`top_k`, `running_threshold`, the normalization and `delta` are attributes of the module: a state
dict has none of them.

Source: github.com/KempnerInstitute/overcomplete, sae/, 0.3.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from assay.architecture import Architecture
from assay.io.saes.configs import take_tensors
from assay.io.saes.overcomplete_module import CLASSES, FUNCTIONS, Said, understand
from assay.io.saes.pickles import Inert, check_tensors, load_pickle
from assay.io.saes.stored import Normalization, Settings, StoredSae

LINEAR = {"encoder.final_block.0.weight": "W_enc", "encoder.final_block.0.bias": "b_enc"}
STATISTICS = {f"encoder.final_block.1.running_{name}": name for name in ("mean", "var")}
AFFINE = {f"encoder.final_block.1.{name}": name for name in ("weight", "bias")}
BATCHES = "encoder.final_block.1.num_batches_tracked"
TIEABLE = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
TIED_TO = "encoder.tied_to."
DICTIONARY = {f"dictionary.{name}": name for name in ("_weights", "multiplier")}
ARCHETYPAL = {f"dictionary.{name}": name for name in ("W", "C", "Relax", "multiplier")}
"""Names of the tensors of a state dict, and what they are called here."""

TOLERANCE = 1e-4
"""How far from 1 the sum of a row of W may be; rounding takes it some 1e-7 away."""

NORMALIZE: dict[Normalization, Callable[[Tensor], Tensor]] = {
    "identity": lambda rows: rows,
    "l1": lambda rows: rows / (_lengths(rows, 1) + 1e-8),
    "l2": lambda rows: rows / (_lengths(rows, 2) + 1e-8),
    "max_l1": lambda rows: rows / _lengths(rows, 1).amax(),
    "max_l2": lambda rows: rows / _lengths(rows, 2).amax(),
}


def read(weights: Path, settings: Settings) -> StoredSae:
    """Read an autoencoder of overcomplete's.

    Args:
        weights: its module, or state dict.
        settings: of a state dict the activation, unless its tensors say it, its k or threshold,
            and the dictionary's normalization.

    Raises:
        ValueError: the file is damaged, not understood, or does not say what is not typed.
    """
    found = load_pickle(weights, weights, CLASSES, FUNCTIONS)
    if isinstance(found, Inert):
        said, state = understand(found, weights)
        state = check_tensors(state, weights)
    else:
        state = check_tensors(found, weights)
        said = _typed(state, settings, weights)
    tensors = _tensors(state, weights)
    dictionary = _dictionary(tensors, said, weights)
    encoder, bias = _encoder(tensors, dictionary, said.eps, weights)
    stored = {"W_enc": encoder.T, "W_dec": dictionary}
    if bias is not None:
        stored["b_enc"] = bias
    if "thresholds" in tensors:
        stored["threshold"] = tensors["thresholds"].exp()
    elif said.threshold is not None:
        stored["threshold"] = said.threshold.reshape(())
    read = StoredSae(
        "overcomplete",
        said.architecture,
        {name: tensor.float() for name, tensor in stored.items()},
        notes=said.notes,
        normalization=said.normalization,
    )
    # Batch top-K has a k, of its training, and its codes have not.
    if said.threshold is not None and said.k in (None, settings.k):
        settings = replace(settings, k=None)
    read.check(settings, None, None)
    return read


def _typed(state: dict[str, Tensor], settings: Settings, weights: Path) -> Said:
    """What is typed of a state dict.

    Raises:
        ValueError: something that it needs is not.
    """
    jumps, archetypal = "thresholds" in state, "dictionary.W" in state
    activation = "jumprelu" if jumps else settings.canonical_activation
    missing = [] if archetypal or settings.normalization else ["normalization"]
    if activation is None:
        missing += ["activation (relu, topk with k, or batchtopk with threshold)"]
    elif activation == "topk" and settings.k is None:
        missing += ["k"]
    elif activation == "jumprelu" and not jumps and settings.threshold is None:
        missing += ["threshold"]
    elif activation not in ("relu", "topk", "jumprelu"):
        raise ValueError(
            f"{weights}: found activation {settings.activation} typed, wanted relu, topk or"
            " batchtopk: overcomplete has no other that is read"
        )
    if missing:
        raise ValueError(
            f"{weights} is a state dict, which does not say {' and '.join(missing)}: type it"
            " beside the path, or save the whole model by torch.save(model, path)"
        )
    batch_norm = ("eps of the batch normalization is taken to be torch's 1e-5",)
    notes = batch_norm if STATISTICS.keys() & state.keys() else ()
    threshold = None
    if activation == "jumprelu" and not jumps:
        threshold = torch.tensor(settings.threshold, dtype=torch.float64)
    k = settings.k if activation == "topk" else None
    architecture = Architecture(
        "relu" if activation == "relu" else "topk" if activation == "topk" else "jumprelu",
        k,
        keeps_equal=activation == "jumprelu",
    )
    normalization = None if archetypal else settings.normalization
    return Said(architecture, normalization, threshold, notes=notes)


def _tensors(state: dict[str, Tensor], weights: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by the names that they have here, of one dtype.

    Raises:
        ValueError: some are missing, or are of another kind of encoder.
    """
    state = dict(state)
    names = dict(ARCHETYPAL if "dictionary.W" in state else DICTIONARY)
    if "thresholds" in state:
        names["thresholds"] = "thresholds"
    # A batch normalization has both, or neither.
    optional = set() if AFFINE.keys() & state.keys() else set(AFFINE)
    tied = {name for name in state if name.startswith(TIED_TO)}
    for name in tied:
        other = state.get(f"dictionary.{name.removeprefix(TIED_TO)}")
        if other is None or not torch.equal(state.pop(name), other):
            raise ValueError(f"{weights}: {name} is not the dictionary's, to which it is tied")
    if next(iter(LINEAR)) in state:
        names |= LINEAR
        if STATISTICS.keys() & state.keys():
            names |= STATISTICS | AFFINE
            state.pop(BATCHES, None)
    elif tied or "encoder.weight" in state:
        names |= TIEABLE
        optional |= {"encoder.bias"} | ({"encoder.weight"} if tied else set())
    else:
        raise ValueError(
            f"{weights} has no linear encoder, wanted {next(iter(LINEAR))} or encoder.weight: those"
            " of MpSAE and OMPSAE, or of an encoder of convolutions, are not read"
        )
    taken = take_tensors(state, names, weights, optional)
    widest = torch.float64 if torch.float64 in {t.dtype for t in taken.values()} else torch.float32
    return {name: tensor.to(widest) for name, tensor in taken.items()}


def _dictionary(tensors: dict[str, Tensor], said: Said, weights: Path) -> Tensor:
    """What the library decodes with, (n, d)."""
    multiplier = tensors["multiplier"]
    found = [tensors[name] for name in ("_weights", "W", "C", "Relax") if name in tensors]
    if multiplier.numel() != 1 or any(each.ndim != 2 or not each.numel() for each in found):
        raise ValueError(f"{weights}: the dictionary's tensors are no matrices: save it again")
    if said.normalization is None:
        dictionary = _archetypes(tensors, said, weights)
    else:
        dictionary = NORMALIZE[said.normalization](tensors["_weights"])
    if said.dictionary is not None:
        if said.dictionary.shape != dictionary.shape:
            raise ValueError(
                f"{weights}: _fused_dictionary is {tuple(said.dictionary.shape)}, wanted"
                f" {tuple(dictionary.shape)}, as its weights are: save it again"
            )
        return said.dictionary.to(dictionary.dtype)
    return dictionary * multiplier.exp()


def _archetypes(tensors: dict[str, Tensor], said: Said, weights: Path) -> Tensor:
    """Convex combinations of points, each moved by less than delta."""
    combinations, points, relax = (tensors[name] for name in ("W", "C", "Relax"))
    (n, p), d = combinations.shape, points.shape[1]
    if len(points) != p or relax.shape != (n, d):
        raise ValueError(
            f"{weights}: found W {n} x {p}, C {tuple(points.shape)} and Relax"
            f" {tuple(relax.shape)}, wanted points and features to agree: of one model?"
        )
    positive = combinations.relu()
    sums = positive.sum(1, keepdim=True)
    if said.delta is None and said.dictionary is None:
        near = ((sums - 1).abs() < TOLERANCE) | (sums == 0)
        if not bool(near.all()) or not torch.equal(positive, combinations):
            raise ValueError(
                f"{weights}: the rows of W do not sum to 1 yet, so Relax may be longer than delta,"
                " which a state dict does not say: call model.eval() before it is saved, or save"
                " the whole model"
            )
    elif said.delta is not None:
        relax = relax * (said.delta / relax.norm(dim=1, keepdim=True)).clamp(max=1)
    return positive / (sums + 1e-8) @ points + relax


def _encoder(
    tensors: dict[str, Tensor], dictionary: Tensor, eps: float, weights: Path
) -> tuple[Tensor, Tensor | None]:
    """The encoder (n, d) and its bias, with the batch normalization in both."""
    encoder, bias = tensors.get("W_enc", dictionary), tensors.get("b_enc")
    if "mean" not in tensors:
        return encoder, bias
    n = len(encoder)
    statistics = {name: tensors[name].double() for name in ("mean", "var")}
    gain, shift = (tensors.get(name) for name in ("weight", "bias"))
    for tensor in (*statistics.values(), bias, gain, shift):
        if tensor is not None and tensor.shape != (n,):
            raise ValueError(
                f"{weights}: the batch normalization is of {tuple(tensor.shape)} features, wanted"
                f" {n}: save it again"
            )
    assert bias is not None
    scale = (statistics["var"] + eps).rsqrt() * (1.0 if gain is None else gain.double())
    moved = (bias.double() - statistics["mean"]) * scale
    return encoder.double() * scale[:, None], moved + (0.0 if shift is None else shift.double())


def _lengths(rows: Tensor, order: int) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, ord=order, dim=1, keepdim=True)
    return lengths
