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

TRAINING = ("expansion_factor", "multi_topk", "normalize_decoder")


def read(weights: Path, config: Path, settings: Settings) -> StoredSae:
    """Read an autoencoder of sparsify's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or not understood.
    """
    said = Config(read_config(config), config)
    said.require("skip_connection", False, why="W_skip is a transcoder's, and is not read")
    said.require("signed", False, why="signed top-K of older versions is not read")
    activation = said.take("activation", str, "topk")
    if activation not in ("topk", "groupmax"):
        raise ValueError(
            f"{config}: `activation` is {shown(activation)}, wanted topk or groupmax: this version"
            " does not know it"
        )
    k, transcodes = said.take("k", int, 32), said.take("transcode", bool, False)
    d, n = said.take("d_in", int), said.take("num_latents", int, 0)
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
    folder = weights.absolute().parent.name
    layer = re.fullmatch(r"layers[._](\d+)", folder)
    recorded = Recorded(
        layer=int(layer[1]) if layer else None,
        hook=folder if layer else None,
        predicts="what a module makes of its input (transcode)" if transcodes else None,
    )
    architecture = Architecture("topk" if activation == "topk" else "groupmax", k)
    stored = StoredSae("sparsify", architecture, tensors, recorded)
    stored.check(settings, d, n or None)
    return stored
