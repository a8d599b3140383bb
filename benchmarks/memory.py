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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

TOKENS, LAYER = 64, 3


def make_shards(root: Path, n_tokens: int, d: int) -> Path:
    """One layer of random activations, 64 tokens an example."""
    from assay.io.shards import write_shards
    from assay.io.shards.metadata import Metadata

    n_examples = -(-n_tokens // TOKENS)
    metadata = Metadata(
        family="benchmark",
        ckpt="random",
        layers=(LAYER,),
        content_tokens_per_example=TOKENS,
        cls_token=False,
        d_model=d,
        n_examples=n_examples,
        max_tokens_per_shard=256 * TOKENS,
        data="",
        dtype="float32",
        protocol="2.1",
    )
    rng = np.random.default_rng(0)

    def examples() -> Iterator[npt.NDArray[np.float32]]:
        for start in range(0, n_examples, 256):
            yield rng.standard_normal(
                (min(256, n_examples - start), *metadata.example_shape), dtype=np.float32
            )

    return write_shards(root, metadata, examples())


def work(path: Path, out: Path) -> None:
    """Fit and encode, as the pipelines do."""
    from assay.io.checkpoints import Checkpoints
    from assay.io.codes import StoredCodes, write_codes
    from assay.io.shards import Shards
    from assay.parameters import KMeansParameters, PCAParameters, StandardizeParameters
    from assay.pipelines.encode.pipeline import ENCODE
    from assay.pipelines.kmeans.nodes import fit_kmeans
    from assay.pipelines.pca.nodes import fit_pca
    from assay.pipelines.standardize.nodes import fit_statistics

    shards = Shards(path)
    statistics = fit_statistics(shards, StandardizeParameters(), "cpu", layer=LAYER)
    parameters = {
        "kmeans": KMeansParameters(n_clusters=64, max_iter=1, n_init=1),
        "pca": PCAParameters(),
    }
    checkpoints = Checkpoints(out / "checkpoints")
    models = {
        "kmeans": fit_kmeans(
            shards, statistics, parameters["kmeans"], checkpoints, "cpu", layer=LAYER
        )[0],
        "pca": fit_pca(shards, statistics, parameters["pca"], checkpoints, "cpu", layer=LAYER)[0],
    }
    for encoding in ("kmeans-onehot", "kmeans-invdist", "pca-topk-00016"):
        method = encoding.partition("-")[0]
        codes = ENCODE[method](
            shards,
            statistics,
            models[method],
            parameters[method],
            "cpu",
            layer=LAYER,
            encoding=encoding,
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
