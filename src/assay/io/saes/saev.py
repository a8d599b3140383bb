"""saev: `sae.pt`, a line of JSON and then a state dict.

Since the header's schema 2 nothing is taken off the input; with schema 1 or none b_dec is. The
activation is one of three:

- Relu
- TopK: the top_k largest, signed
- BatchTopK: what is above max(threshold, 0), by the threshold that training left

Source: github.com/OSU-NLP-Group/saev, nn/modeling.py.
"""

from __future__ import annotations

from pathlib import Path

from assay.architecture import Architecture
from assay.io.saes.configs import Config, checked_object, take_tensors
from assay.io.saes.pickles import check_tensors, load_pickle
from assay.io.saes.stored import Settings, StoredSae
from assay.io.strict_json import parse_json, shown

LONGEST_HEADER = 2**20
SCHEMAS = (None, 1, 2, 3, 4, 5)

TRAINING = (
    "ghost_grads",
    "l1_coeff",
    "n_reinit_samples",
    "normalize_w_dec",
    "reinit_blend",
    "reinit_enc_dec_tranpose",
    "reinit_enc_dec_transpose",
    "remove_parallel_grads",
    "seed",
    "sparsity_coeff",
    "use_ghost_grads",
)
"""What says how an autoencoder was initialized and trained."""


def begins(weights: Path) -> bool:
    """Whether a file begins as saev's do, whatever it is called."""
    with weights.open("rb") as file:
        return file.read(1) == b"{"


def read(weights: Path, settings: Settings) -> StoredSae:
    """Read an autoencoder of saev's.

    Raises:
        ValueError: the file is damaged, or not understood.
    """
    header, rest = _split(weights)
    schema = header.take("schema", int)
    if schema not in SCHEMAS:
        raise ValueError(
            f"{weights} has saev's schema {schema}, wanted one of"
            f" {', '.join(map(str, SCHEMAS[1:]))} or none: this version does not know it"
        )
    header.ignore(("commit", "lib"))
    config = header if schema is None else Config(header.need("cfg", dict), weights)
    activation, params = _activation(header, config, schema)
    d = config.need("d_vit" if "d_vit" in config else "d_model", int)
    n, expansion = config.take("d_sae", int), config.take("exp_factor", int)
    if n is None and expansion is not None:
        n = d * expansion
    config.ignore(TRAINING)
    header.finish()
    config.finish()
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_out"}
    if activation == "BatchTopK":
        names["activation.threshold"] = "threshold"
    tensors = take_tensors(check_tensors(load_pickle(rest, weights), weights), names, weights)
    if schema in (None, 1):
        tensors["center"] = tensors["b_out"]
    architecture = _architecture(activation, params, settings.k, tensors["b_enc"].numel())
    stored = StoredSae("saev", architecture, tensors)
    stored.check(settings, d, n)
    return stored


def _split(weights: Path) -> tuple[Config, bytes]:
    """The header, and the bytes that follow its line."""
    with weights.open("rb") as file:
        line = file.readline(LONGEST_HEADER)
        if not line.endswith(b"\n"):
            raise ValueError(
                f"{weights} begins with no line of JSON of at most {LONGEST_HEADER} bytes, wanted"
                " saev's header: is it whole, and saev's?"
            )
        try:
            header = parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"{weights} begins with a line that is no valid JSON ({shown(error)}): save it"
                " again"
            ) from None
        return Config(checked_object(header, weights), weights), file.read()


def _activation(header: Config, config: Config, schema: int | None) -> tuple[str, Config]:
    """The name of the activation's class, and its parameters."""
    if schema is None:
        return "Relu", Config({}, header.named)
    cls = header.take("cls", str)
    if schema == 1 and cls in ("Relu", "TopK", "BatchTopK"):
        # There the header's class is the activation's, and k is one of the model's parameters.
        k = {} if cls == "Relu" else {"top_k": config.take("top_k", int)}
        return cls, Config(k, header.named)
    if cls not in (None, "SparseAutoencoderConfig"):
        raise ValueError(
            f"{header.named}: `cls` is {shown(cls)}, wanted Relu, TopK, BatchTopK or"
            " SparseAutoencoderConfig: this version does not know it"
        )
    activation = Config(config.need("activation", dict), header.named)
    name = activation.need("cls", str)
    params = Config(activation.take("params", dict, {}), header.named)
    activation.finish()
    params.ignore(("aux", "key", "kind", "momentum", "sparsity"))
    return name, params


def _architecture(activation: str, params: Config, typed: int | None, n: int) -> Architecture:
    """How codes are made, of n features.

    Args:
        activation: its class.
        params: its parameters.
        typed: k, for where there is none.
        n: features.
    """
    k = params.take("top_k", int, typed)
    params.finish()
    match activation:
        case "Relu":
            return Architecture("relu")
        case "TopK" if k is None:
            raise ValueError(f"{params.named} says no top_k: type it (k)")
        case "TopK":
            # As the library has it, where there are fewer features.
            return Architecture("topk", min(k, n), signed=True)
        case "BatchTopK":
            return Architecture("jumprelu")
        case _:
            raise ValueError(
                f"{params.named}: the activation is {shown(activation)}, wanted Relu, TopK or"
                " BatchTopK, which do not depend on what else is in a batch"
            )
