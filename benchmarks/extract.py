"""Recording images: how fast they are decoded, what the loop adds to the model's own time, and
whether memory grows with the folder.

    python benchmarks/extract.py [--images 32] [--rounds 3] [--few 200] [--many 2000] [--threads N]

Images are noisy JPEG files of 683 x 512 pixels, resized to 256 and cropped to 224. The model is a
randomly initialized ViT-S/16 that `transformers` reads; memory is measured with one of a single
narrow block, each size in a process of its own.
"""

import argparse
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

SHAPE, SIDE, CROP, PATCH = (512, 683), 256, 224, 16
N_PATCHES = (CROP // PATCH) ** 2
BATCH = 8
DISTINCT = 100
"""Images that are drawn; the others are copies of them."""


def make_images(folder: Path, n: int) -> Path:
    """Smooth colors with noise, as photographs compress: about 100 kB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(min(n, DISTINCT)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(SHAPE[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)
    for number in range(DISTINCT, n):
        shutil.copy(folder / f"{number % DISTINCT:05d}.jpg", folder / f"{number:05d}.jpg")
    return folder


def make_model(folder: Path, **config: Any) -> Path:
    """A ViT of random weights, saved as `transformers` saves it."""
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=CROP, patch_size=PATCH, **config)).save_pretrained(folder)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    size = {"size": {"height": CROP, "width": CROP}}
    (folder / "preprocessor_config.json").write_text(json.dumps(half | size), encoding="utf-8")
    return folder


def open_images(folder: Path) -> Any:
    """As a recording sees them."""
    from assay.io.images import ImageLayout, Images

    layout = {"patch_size": PATCH, "geometry": "crop", "resize": SIDE, "grid": (14, 14)}
    return Images(folder, ImageLayout.model_validate(layout))


def open_model(folder: Path) -> Any:
    """The backbone, on the CPU."""
    from assay.backbones import open_backbone

    return open_backbone(str(folder), None, device=torch.device("cpu"), precision="float32")


def record(
    images: Any, backbone: Any, out: Path, layers: tuple[int, ...], threads: int | None
) -> None:
    """Record the images, as the pipeline does."""
    from assay.io.shards.recording import record_shards
    from assay.pipelines.extract.recording import ImageRecording

    recording = ImageRecording(
        images,
        None,
        backbone,
        layers=layers,
        n_patches=N_PATCHES,
        batch_size=BATCH,
        max_tokens_per_shard=400_000,
        cls_token=True,
        dataset=str(images.folder),
        precision="float32",
        threads=threads,
    )
    record_shards(out, recording)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """How long a piece of work takes by the clock, and of all cores' time."""
    clock, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cores


def measure_decoding(images: Any) -> float:
    """Images read a second of one core's time."""
    images.read(0, N_PATCHES)
    began = time.thread_time()
    for example in range(len(images)):
        images.read(example, N_PATCHES)
    return len(images) / (time.thread_time() - began)


def measure_loop(
    images: Any, model: Path, root: Path, rounds: int, threads: int | None
) -> tuple[list[float], list[float], float]:
    """What a recording takes of the time of bare forwards on the same batches, by the clock and of
    all cores, round by round; and images a second of the fastest forwards.
    """
    backbone, layers = open_model(model), (5, 11)
    read = [torch.tensor(images.read(each, N_PATCHES)) for each in range(len(images))]
    batches = torch.split(torch.stack(read), BATCH)

    def forward() -> None:
        for batch in batches:
            backbone.record(batch, layers)

    places = (root / f"recorded-{number}" for number in itertools.count())

    def loop() -> None:
        # A place of its own: what is recorded there already would not be made again.
        record(images, backbone, next(places), layers, threads)

    for work in (forward, loop):  # the first of each imports, and starts threads
        work()
    times = [(seconds(forward), seconds(loop)) for _ in range(rounds)]
    clock, cores = ([loop[i] / bare[i] for bare, loop in times] for i in (0, 1))
    return clock, cores, len(images) / min(bare[0] for bare, _ in times)


def measure_peak(n: int, root: Path) -> float:
    """Peak resident set of a process that records so many images, in MB."""
    make_images(root / f"images-{n}", n)
    command = [sys.executable, __file__, "--work", str(root / f"images-{n}"), str(root / "narrow")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e6


def main() -> None:
    """Print the three of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64, help="that the loop records")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, default=200)
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=None, help="that decode")
    parser.add_argument("--dir", default=None, help="where to put all of it for the while")
    parser.add_argument("--work", nargs=2, metavar=("IMAGES", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    say = sys.stdout.write
    if arguments.work:
        folder, model = map(Path, arguments.work)
        out = folder.with_name(f"{folder.name}-recorded")
        record(open_images(folder), open_model(model), out, (0,), arguments.threads)
        say(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
        root = Path(place)
        images = open_images(make_images(root / "images", arguments.images))
        rate = measure_decoding(images)
        say(f"decoded, resized and cropped: {rate:.0f} images a second of one core's time\n")
        small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        model = make_model(root / "small", num_hidden_layers=12, **small)
        clock, cores, bare = measure_loop(images, model, root, arguments.rounds, arguments.threads)
        for name, ratios in (("by the clock", clock), ("of all cores' time", cores)):
            rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            say(f"the loop takes {median(ratios):.3f} of the bare forward {name}: {rounds}\n")
        say(f"the bare forward: {bare:.1f} images a second\n")
        narrow = {"hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 96}
        make_model(root / "narrow", num_hidden_layers=1, **narrow)
        peaks = [measure_peak(n, root) for n in (arguments.few, arguments.many)]
        say(
            f"peak memory: {peaks[0]:.0f} MB for {arguments.few} images, {peaks[1]:.0f} MB for"
            f" {arguments.many}, {peaks[1] - peaks[0]:.0f} MB more\n"
        )


if __name__ == "__main__":
    main()
