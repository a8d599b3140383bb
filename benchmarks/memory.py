"""Peak memory of fitting and encoding, on few tokens and on many: it must not grow with the data.

    python benchmarks/memory.py [--few 200000] [--many 2000000] [--d 256]

For each size a process of its own runs the pipelines' functions on shards in a temporary folder:
statistics, k-means, PCA, then one-hot, inverse-distance and top-K codes written to disk and read
back. Its peak is the largest resident set that the kernel saw.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from random_shards import write_random

TOKENS, LAYER = 64, 3


def make_shards(root: Path, n_tokens: int, d: int) -> Path:
    """One layer of random activations, 64 tokens an example."""
    return write_random(
        root,
        -(-n_tokens // TOKENS),
        layers=(LAYER,),
        patches=TOKENS,
        d_model=d,
        examples_per_shard=256,
        at_once=256,
    )


def work(path: Path, out: Path) -> None:
    """Fit and encode, as the pipelines do."""
    from assay.encodings import Form
    from assay.io.checkpoints import Checkpoints
    from assay.io.codes import StoredCodes, write_codes
    from assay.io.shards import Shards
    from assay.parameters import KMeansParameters, PCAParameters, StandardizeParameters
    from assay.pipelines.dictionary_nodes import encode
    from assay.pipelines.kmeans.nodes import fit_kmeans
    from assay.pipelines.pca.nodes import fit_pca
    from assay.pipelines.standardize.nodes import fit_statistics

    shards = Shards(path)
    made_of = (Checkpoints(out / "checkpoints"), "cpu")
    statistics = fit_statistics(shards, StandardizeParameters(), *made_of, layer=LAYER)
    kmeans, pca = KMeansParameters(n_clusters=64, max_iter=1, n_init=1), PCAParameters()
    centers, _ = fit_kmeans(shards, statistics, kmeans, *made_of, layer=LAYER)
    components, _ = fit_pca(shards, statistics, pca, *made_of, layer=LAYER)
    for encoding, model, parameters in (
        ("kmeans-onehot", centers, kmeans),
        ("kmeans-invdist", centers, kmeans),
        ("pca-topk-00016", components, pca),
    ):
        codes = encode(
            shards,
            statistics,
            model,
            "cpu",
            parameters,
            layer=LAYER,
            name=encoding,
            kind=Form.parse_name(encoding),
        )
        write_codes(out / encoding, codes, batch_size=4096, rows_per_shard=2**18)
        assert (
            sum(len(batch["error"]) for batch in StoredCodes(out / encoding).batches(4096))
            == shards.n_tokens
        )


def main() -> None:
    """Print the peak of each size, each in a process of its own, and their difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", type=int, default=200_000)
    parser.add_argument("--many", type=int, default=2_000_000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--dir", default=None, help="where to put the shards for the while")
    parser.add_argument("--work", nargs=2, metavar=("SHARDS", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*map(Path, arguments.work))
        sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")
        return
    peaks = []
    for n_tokens in (arguments.few, arguments.many):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as root:
            shards = make_shards(Path(root) / "shards", n_tokens, arguments.d)
            command = [sys.executable, __file__, "--work", str(shards), str(Path(root) / "codes")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) * 1024 / 1e6)
        sys.stdout.write(f"{n_tokens} tokens, d = {arguments.d}: peak {peaks[-1]:.0f} MB\n")
    sys.stdout.write(
        f"{peaks[1] - peaks[0]:.0f} MB more for {arguments.many / arguments.few:g} times the"
        " tokens\n"
    )


if __name__ == "__main__":
    main()
