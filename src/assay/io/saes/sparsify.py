"""sparsify: `layers.N/cfg.json` and `sae.safetensors`.

The K largest of relu(pre), or the largest of each of k groups. b_dec is taken off the input, but
not where the configuration says `transcode`: then it predicts what a module makes of its input.

Source: github.com/EleutherAI/sparsify, sparse_coder.py and fused_encoder.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from assay.architecture import Architecture
from assay.io.saes.configs import Config, read_config, take_tensors
from assay.io.saes.stored import Recorded, Settings, StoredSae
from assay.io.strict_json import shown
from assay.io.tensors import read_tensors

TRAINING = ("multi_topk", "normalize_decoder")

HOOK = re.compile(r"((?:\w+\.)*(?:layers?|h|blocks|resblocks))[._](\d{1,9})((?:\.\w+)*)")
"""A folder's name, which is the module's: `layers.3`, `layers.3.mlp`, once `layers_3`."""


def read(weights: Path, config: Path, settings: Settings) -> StoredSae:
    """Read an autoencoder of sparsify's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or not understood.
    """
    said = Config(read_config(config), config)
    said.require("skip_connection", False, why="W_skip is a transcoder's, and is not read")
    said.require("signed", False, why="signed top-K of older versions is not read")
    activation = said.need("activation", str) if "activation" in said else "topk"
    if activation not in ("topk", "groupmax"):
        raise ValueError(
            f"{config}: `activation` is {shown(activation)}, wanted topk or groupmax: this version"
            " does not know it"
        )
    k, transcodes = said.take("k", int, settings.k), said.take("transcode", bool, False)
    if k is None:
        raise ValueError(f"{config} says no k: type it (k)")
    d, n = said.need("d_in", int), said.take("num_latents", int, 0)
    expansion = said.take("expansion_factor", int)
    if n == 0 and expansion is not None:
        n = d * expansion
    said.ignore(TRAINING)
    said.finish()
    names = {
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "W_dec": "W_dec",
        "b_dec": "b_out",
    }
    tensors = take_tensors(read_tensors(weights, any_schema=True), names, weights)
    tensors["W_enc"] = tensors["W_enc"].T
    if not transcodes:
        tensors["center"] = tensors["b_out"]
    hook = HOOK.fullmatch(weights.absolute().parent.name)
    recorded = Recorded(
        layer=int(hook[2]) if hook else None,
        hook=f"{hook[1]}.{hook[2]}{hook[3]}" if hook else None,
        predicts="what a module makes of its input (transcode)" if transcodes else None,
    )
    architecture = Architecture("topk" if activation == "topk" else "groupmax", k)
    stored = StoredSae("sparsify", architecture, tensors, recorded)
    stored.check(settings, d, n or None)
    return stored
