"""What the benchmarks make that users may take up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from assay.io.shards import Shards
from assay.numerics.sae import SparseAutoencoder
from assay.parameters import DictionaryParameters

SCRIPT = Path(__file__).parents[1] / "benchmarks/train_sae.py"


@pytest.mark.parametrize(("activation", "k"), [("relu", None), ("topk", 4)])
def test_the_small_autoencoder_is_what_its_script_says(planted, tmp_path, activation, k):
    command = [
        sys.executable,
        str(SCRIPT),
        "--shards",
        str(planted[0]),
        "--layer",
        "5",
        "--activation",
        activation,
    ]
    command += ["--features", "96", "--steps", "150", "--k", "4", "--l1", "0.05"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    ((name, options),) = yaml.safe_load(ended.stdout).items()
    dictionary = DictionaryParameters.model_validate(options)
    assert (name, dictionary.activation, dictionary.k, dictionary.layers) == (
        f"sae-{activation}",
        activation,
        k,
        (5,),
    )
    weights = load_file(tmp_path / dictionary.weights.replace("{layer}", "layer_5"))
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(96))
    x = torch.cat(list(Shards(planted[1]).batches(layer=5, batch_size=1000))).double()
    x = ((x - x.mean(0)) / x.std(0)).float()
    sae = SparseAutoencoder(weights, activation=activation, k=k)
    assert float(sae.residual(x).square().sum() / x.square().sum()) < 0.9
