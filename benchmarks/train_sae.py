"""A small sparse autoencoder on the embedded default's activations, to stand in the table beside
k-means and PCA.

    make run; python benchmarks/train_sae.py --layer 3 --activation relu
    python benchmarks/train_sae.py --layer 3 --activation topk --k 16

It trains on the standardized fit shards (Adam, unit decoder rows, an L1 penalty for ReLU), writes
the weights under saev's names into `data/06_models/saes/`, and prints what to put under
`dictionaries` in conf/base/parameters.yml. A yardstick, not a recipe: train your own with saev or
SAELens.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.io.datasets import find_shards
from assay.io.shards import Shards


def train(
    tokens: Tensor, n_features: int, activation: str, k: int, l1: float, steps: int
) -> dict[str, Tensor]:
    """Weights of an autoencoder of tokens (n, d), standardized, under saev's names."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(
        torch.randn(n_features, tokens.shape[1], generator=generator)
    )
    weights = {
        "W_dec": decoder,
        "W_enc": decoder.T.clone(),
        "b_enc": torch.zeros(n_features),
        "b_dec": tokens.mean(0),
    }
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3, betas=(0.9, 0.99))
    for _ in range(steps):
        x = tokens[torch.randint(len(tokens), (1024,), generator=generator)]
        pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        codes = pre.relu()
        if activation == "topk":
            kept = pre.topk(k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
        residual = x - (codes @ weights["W_dec"] + weights["b_dec"])
        loss = residual.square().sum(1).mean() + (
            l1 * codes.sum(1).mean() if activation == "relu" else 0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    return {name: weight.detach().contiguous() for name, weight in weights.items()}


def main() -> None:
    """Train, save the weights and print how to name them in the parameters."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, default=Path("data/01_raw/digits/fit"))
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--activation", choices=["relu", "topk"], default="topk")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--l1", type=float, default=2.0)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    shards = Shards(find_shards(arguments.shards))
    tokens = torch.cat(list(shards.batches(layer=arguments.layer, batch_size=65_536)))
    std = tokens.double().std(0, unbiased=False)
    tokens = ((tokens - tokens.double().mean(0)) / torch.where(std > 0, std, 1.0)).float()
    kind, k = arguments.activation, arguments.k
    path = Path(f"data/06_models/saes/layer_{arguments.layer}/{kind}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(train(tokens, arguments.features, kind, k, arguments.l1, arguments.steps), path)
    formula = f"activation: topk, k: {k}" if kind == "topk" else "activation: relu"
    formula += ", trained_on: standardized, input_bias: b_dec"
    where = str(path).replace(f"layer_{arguments.layer}", "{layer}")
    sys.stdout.write(
        f'sae-{kind}: {{weights: "{where}", {formula}, layers: [{arguments.layer}]}}\n'
    )


if __name__ == "__main__":
    main()
