"""A small sparse autoencoder on the embedded default's activations, to stand in the table beside
k-means and PCA.

    make run; python benchmarks/train_sae.py --layer 3 --activation relu
    python benchmarks/train_sae.py --layer 3 --activation topk --k 16

It trains on the fit shards (Adam, an L1 penalty for ReLU), standardized, and moves the
standardization into the weights, so that the autoencoder takes tokens as they are. The file is in
saev's format: `data/06_models/saes/layer_3/relu/sae.pt`. What to put under `dictionaries` in
conf/base/parameters.yml is printed. A yardstick, not a recipe: train your own with saev or SAELens.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from assay.io.datasets import find_shards
from assay.io.shards import Shards


def train(
    tokens: Tensor, n_features: int, activation: str, k: int, l1: float, steps: int
) -> dict[str, Tensor]:
    """Weights of an autoencoder of tokens (n, d), standardized, under saev's names.

    Nothing is taken off the input, and top-K keeps negative codes, as in saev.
    """
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(
        torch.randn(n_features, tokens.shape[1], generator=generator)
    )
    weights = {
        "W_dec": decoder,
        "W_enc": decoder.T.clone(),
        "b_enc": -tokens.mean(0) @ decoder.T,
        "b_dec": tokens.mean(0),
    }
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3, betas=(0.9, 0.99))
    for _ in range(steps):
        x = tokens[torch.randint(len(tokens), (1024,), generator=generator)]
        pre = x @ weights["W_enc"] + weights["b_enc"]
        codes = pre.relu()
        if activation == "topk":
            kept = pre.topk(k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
        residual = x - (codes @ weights["W_dec"] + weights["b_dec"])
        loss = residual.square().sum(1).mean() + (
            l1 * codes.sum(1).mean() if activation == "relu" else 0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    return {name: weight.detach() for name, weight in weights.items()}


def fold(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The same autoencoder of tokens that are not standardized: mean and std (d,), float64."""
    encoder = weights["W_enc"].double() / std[:, None]
    folded = {
        "W_enc": encoder,
        "b_enc": weights["b_enc"].double() - mean @ encoder,
        "W_dec": weights["W_dec"].double() * std,
        "b_dec": weights["b_dec"].double() * std + mean,
    }
    return {name: weight.float().contiguous() for name, weight in folded.items()}


def save_as_saev(path: Path, weights: dict[str, Tensor], activation: str, k: int) -> None:
    """Write `sae.pt` as saev does: a line of JSON, then a state dict."""
    d, n = weights["W_enc"].shape
    kind = {"cls": "TopK", "params": {"top_k": k}} if activation == "topk" else {"cls": "Relu"}
    config = {"d_model": d, "d_sae": n, "activation": {"params": {}, **kind}}
    header = {"schema": 5, "cfg": config, "commit": "unknown", "lib": "benchmarks/train_sae.py"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(weights, file)


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
    mean, std = tokens.double().mean(0), tokens.double().std(0, unbiased=False)
    std = torch.where(std > 0, std, 1.0)
    kind, k = arguments.activation, arguments.k
    standardized = ((tokens - mean) / std).float()
    weights = train(standardized, arguments.features, kind, k, arguments.l1, arguments.steps)
    path = Path(f"data/06_models/saes/layer_{arguments.layer}/{kind}/sae.pt")
    save_as_saev(path, fold(weights, mean, std), kind, k)
    where = str(path).replace(f"layer_{arguments.layer}", "{layer}")
    sys.stdout.write(f'sae-{kind}: {{sae: "{where}", layers: [{arguments.layer}]}}\n')


if __name__ == "__main__":
    main()
