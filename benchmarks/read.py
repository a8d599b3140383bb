"""How fast one layer of a six-layer folder of shards is read, against plain preads of the same
bytes into one buffer.

    python benchmarks/read.py [--gb 8] [--dir DIR] [--rounds 5] [--threads 2]
    python benchmarks/read.py --gb 4 --delay 1

Makes the shards in a temporary folder, reads them once to warm the page cache, then runs rounds of:
plain preads in the order on disk, a sequential pass, a shuffled pass. Every pass is as a caller has
it, checked for NaN, each batch a fresh buffer. What is printed are ratios of the rounds' best
rates, and the best ratio within a round: other work on the machine slows single rounds. The bytes
that each pass asks of the kernel are counted, and must be the layer's, once.

With `--delay` so many milliseconds are added to each read, as on a file system that is far away,
and what is printed is how much faster more threads are than two.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
from random_shards import write_random

from assay.io.shards import Shards, windows
from assay.io.shards.preadv import Pieces, read_pieces

LAYERS, TOKENS, D_MODEL, LAYER = (18, 19, 20, 21, 22, 23), 256, 1024, 21
BATCH_SIZE = 8192


def make_shards(root: Path, gigabytes: float) -> Shards:
    """Six layers of random activations, ViT-L's width, a CLS token each, in shards of 64."""
    example_bytes = len(LAYERS) * (TOKENS + 1) * D_MODEL * 4
    n_examples = int(-(-gigabytes * 1e9 // example_bytes))
    path = write_random(
        root,
        n_examples,
        layers=LAYERS,
        patches=TOKENS,
        d_model=D_MODEL,
        examples_per_shard=64,
        cls_token=True,
        at_once=1,
    )
    return Shards(path)


def read_plainly(shards: Shards) -> None:
    """Each example's content tokens of the layer by one pread, into one buffer of a batch's size,
    round and round.
    """
    source = shards.layer_bytes(LAYER)
    block = TOKENS * D_MODEL * 4
    buffer = np.zeros(BATCH_SIZE * D_MODEL * 4, dtype=np.uint8).data
    descriptors = {path: os.open(path, os.O_RDONLY) for path in source.files}
    for example in range(shards.n_examples):
        path, offset = source.place(example * TOKENS)
        at = example * block % len(buffer)
        assert os.preadv(descriptors[path], [buffer[at : at + block]], offset) == block
    for descriptor in descriptors.values():
        os.close(descriptor)


def read_batches(shards: Shards, threads: int, shuffle: bool) -> None:
    """One pass of the reader."""
    batches = shards.batches(layer=LAYER, batch_size=BATCH_SIZE, shuffle=shuffle, threads=threads)
    assert sum(map(len, batches)) == shards.n_tokens


def bytes_read(read: Callable[[], None]) -> int:
    """What a pass asks of the kernel."""
    counts: list[int] = []

    def counting(descriptor: int, pieces: Pieces, offset: int) -> int:
        n = read_pieces(descriptor, pieces, offset)
        counts.append(n)
        return n

    with patch.object(windows, "read_pieces", counting):
        read()
    return sum(counts)


def read_from_afar(shards: Shards, delay: float, rounds: int) -> None:
    """Print the rates of 2, 16 and 64 threads where each read takes `delay` seconds more."""

    def slow(descriptor: int, pieces: Pieces, offset: int) -> int:
        time.sleep(delay)
        return read_pieces(descriptor, pieces, offset)

    layer_bytes = shards.n_tokens * D_MODEL * 4
    for shuffle in (False, True):
        rates: dict[int, list[float]] = {2: [], 16: [], 64: []}
        with patch.object(windows, "read_pieces", slow):
            for _ in range(rounds):
                for threads, found in rates.items():
                    began = time.perf_counter()
                    read_batches(shards, threads, shuffle)
                    found.append(layer_bytes / (time.perf_counter() - began))
        sys.stdout.write(
            f"{'shuffled' if shuffle else 'sequential'}, {1000 * delay:g} ms more a read: "
            + ", ".join(
                f"{threads} threads {max(found) / 1e9:.2f} GB/s ({max(found) / max(rates[2]):.1f})"
                for threads, found in rates.items()
            )
            + "\n"
        )


def main() -> None:
    """Print what a pass reads, and its rate against that of plain preads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, default=8.0, help="size of the shards, all layers, in 10^9 bytes"
    )
    parser.add_argument(
        "--dir",
        default=None,
        help="where to put them for the while; the temporary folder by default",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="that read ahead")
    parser.add_argument(
        "--delay", type=float, default=None, help="milliseconds that are added to each read"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as root:
        shards = make_shards(Path(root), arguments.gb)
        if arguments.delay is not None:
            read_from_afar(shards, arguments.delay / 1000, arguments.rounds)
            return
        passes: dict[str, Callable[[], None]] = {
            "plain preads": lambda: read_plainly(shards),
            "sequential": lambda: read_batches(shards, arguments.threads, shuffle=False),
            "shuffled": lambda: read_batches(shards, arguments.threads, shuffle=True),
        }
        layer_bytes = shards.n_tokens * D_MODEL * 4
        read_plainly(shards)
        for name in ("sequential", "shuffled"):
            n = bytes_read(passes[name])
            assert n == layer_bytes, f"{name} read {n} bytes, the layer has {layer_bytes}"
        rates: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(arguments.rounds):
            for name, read in passes.items():
                began = time.perf_counter()
                read()
                rates[name].append(layer_bytes / (time.perf_counter() - began))
    say = sys.stdout.write
    say(
        f"{arguments.gb:g} GB in {len(LAYERS)} layers; each pass read one layer's {layer_bytes}"
        " bytes, no more\n"
    )
    plain = rates["plain preads"]
    for name in ("sequential", "shuffled"):
        rounds = [rate / base for rate, base in zip(rates[name], plain, strict=True)]
        say(
            f"{name}: {max(rates[name]) / max(plain):.2f} of plain preads (best against best); "
            f"by round {', '.join(f'{ratio:.2f}' for ratio in rounds)}\n"
        )


if __name__ == "__main__":
    main()
