"""A folder of images, recorded: each image's row is what the model gives for it alone, and a
recording that is broken off loses nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from assay.backbones import Description, Preprocessing
from assay.io.datasets import ShardsDataset
from assay.io.images import ImageLayout, Images
from assay.io.images.masks import MaskLayout
from assay.io.shards import Shards
from assay.io.shards.labels import ImageMasks
from assay.io.shards.recording import record_shards
from assay.pipelines.extract.recording import ImageRecording
from assay.pipelines.stopping import signals_stop

PATCH, N_PATCHES, D_MODEL = 2, 16, 5
LAYERS = (1, 0)
SHAPES = [(8, 8), (8, 32), (40, 10), (9, 9), (4, 16), (8, 8), (10, 12), (16, 4), (30, 31), (3, 12)]
"""Of 4 x 4, 2 x 8 and 8 x 2 patches where their aspect decides."""

DESCRIPTION = Description(
    family="vit",
    ckpt="made",
    d_model=D_MODEL,
    n_blocks=2,
    patch_size=PATCH,
    cls_token=True,
    preprocessing=Preprocessing((0, 0, 0), (1, 1, 1), (8, 8), None, "bicubic"),
    identity={"library": "made", "version": "1", "revision": "0"},
)


class MadeBackbone:
    """Patches through a fixed matrix, CLS their mean; each block a tanh of the tokens and of CLS."""

    description = DESCRIPTION

    def __init__(self, watch: Callable[[Tensor], object] = lambda _: None) -> None:
        self.watch = watch
        self.embed = torch.randn(PATCH**2 * 3, D_MODEL, generator=torch.Generator().manual_seed(0))

    def record(self, images: Tensor, layers: Sequence[int]) -> Tensor:
        self.watch(images)
        n, height, width, _ = images.shape
        tiles = (images.float() / 255).reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 3)
        patches = tiles.transpose(2, 3).reshape(n, -1, PATCH**2 * 3) @ self.embed
        first = torch.cat([patches.mean(1, keepdim=True), patches], dim=1).tanh()
        return torch.stack([first, (first + first[:, :1]).tanh()], dim=1)[:, list(layers)]


def make_images(
    root: Path, shapes: Sequence[tuple[int, int]] = SHAPES, geometry: str = "aspect", **layout: Any
) -> tuple[Images, ImageMasks]:
    """Noise, and masks of one class a patch at the most, drawn for each pixel."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, shape in enumerate(shapes):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number:03d}.png")
        mask = rng.integers(0, 4, shape, dtype=np.uint8)
        Image.fromarray(mask).save(root / f"masks/{number:03d}.png")
    layout = {"patch_size": PATCH, "geometry": geometry, "pattern": "*.png"} | layout
    images = Images(root / "images", ImageLayout.model_validate(layout))
    masks = MaskLayout.model_validate(layout | {"void": (0,)})
    return images, ImageMasks(root / "masks", masks, images)


def make_recording(
    images: Images,
    masks: ImageMasks | None,
    backbone: MadeBackbone | None = None,
    **changes: Any,
) -> ImageRecording:
    arguments: dict[str, Any] = {
        "layers": LAYERS,
        "n_patches": N_PATCHES,
        "batch_size": 2,
        "max_tokens_per_shard": 4 * 2 * (N_PATCHES + 1),
        "cls_token": True,
        "dataset": str(images.folder),
        "precision": "float32",
        "threads": 2,
    }
    return ImageRecording(images, masks, backbone or MadeBackbone(), **arguments | changes)


def alone(images: Images, backbone: MadeBackbone | None = None) -> Tensor:
    """What the model gives for each image alone, float32 (n, n_layers, 1 + patches, d_model)."""
    model = backbone or MadeBackbone()
    shown = [torch.tensor(images.read(each, N_PATCHES))[None] for each in range(len(images))]
    return torch.cat([model.record(image, LAYERS) for image in shown])


def stored(path: Path) -> Tensor:
    shards = Shards(path)
    raw = [np.fromfile(file, "<f4") for file in sorted(path.glob("acts*.bin"))]
    metadata = shards.metadata
    array = np.concatenate(raw).reshape(-1, *metadata.example_shape)[: metadata.n_examples]
    return torch.from_numpy(array)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("cls_token", [True, False])
def test_images_of_several_grids_come_in_their_order(tmp_path, batch_size, cls_token):
    images, masks = make_images(tmp_path)
    recording = make_recording(images, masks, batch_size=batch_size, cls_token=cls_token)
    path = record_shards(tmp_path / "a", recording)
    wanted = alone(images)
    assert len({images.read(each, N_PATCHES).shape for each in range(len(images))}) == 3
    torch.testing.assert_close(stored(path), wanted if cls_token else wanted[:, :, 1:])
    labels = np.stack([masks.label(each, N_PATCHES) for each in range(len(images))])
    assert len(np.unique(labels)) == 3
    np.testing.assert_array_equal(np.fromfile(path / "labels.bin", np.uint8), labels.ravel())
    assert Shards(path).metadata.cls_token == cls_token


def test_a_batch_is_of_one_size_and_one_shard(tmp_path):
    images, masks = make_images(tmp_path)
    shapes: list[tuple[int, ...]] = []
    backbone = MadeBackbone(lambda given: shapes.append(tuple(given.shape[:3])))
    recording = make_recording(images, masks, backbone)
    given = list(recording.batches([(0, 4), (4, 8), (8, 10)]))
    # 4 x 4, 2 x 8 and 8 x 2 patches: by the grid that comes first, and then by number.
    wanted = [[0, 3], [1], [2], [4], [5, 6], [7], [8], [9]]
    assert [batch.examples for batch in given] == wanted
    square, wide, tall = (8, 8), (4, 16), (16, 4)
    assert shapes == [
        *((2, *square), (1, *wide), (1, *tall)),
        *((1, *wide), (2, *square), (1, *tall)),
        *((1, *square), (1, *wide)),
    ]
    again = list(recording.batches([(4, 8)]))
    assert [batch.examples for batch in again] == wanted[3:6]
    for one, other in zip(again, given[3:6], strict=True):
        assert torch.equal(torch.as_tensor(one.activations), torch.as_tensor(other.activations))


def test_the_metadata_say_what_is_recorded(tmp_path):
    images, _ = make_images(tmp_path, [(8, 8)] * 3, "crop", resize=8)
    path = record_shards(tmp_path / "a", make_recording(images, None))
    said = json.loads((path / "metadata.json").read_text())
    data = json.loads(said.pop("data"))
    assert said == {
        "family": "vit",
        "ckpt": "made",
        "layers": [1, 0],
        "content_tokens_per_example": N_PATCHES,
        "cls_token": True,
        "d_model": D_MODEL,
        "n_examples": 3,
        "max_tokens_per_shard": 136,
        "dataset": str(images.folder),
        "pixel_agg": "prefer-fg",
        "dtype": "float32",
        "protocol": "2.1",
    }
    assert data["writer"] == "assay"
    assert data["model"] == DESCRIPTION.identity
    assert (data["precision"], data["batch_size"]) == ("float32", 2)
    assert data["images"]["n"] == 3
    assert (data["geometry"]["geometry"], data["geometry"]["resize"]) == ("crop", 8)
    assert not list(path.glob("labels*"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"batch_size": 3}, {"precision": "bfloat16"}, {"geometry": "stretch"}),
        *({"void": (0, 1)}, {"masks": None}, {"identity": {"library": "another"}}),
    ],
)
def test_what_changes_the_numbers_changes_the_key(tmp_path, changes):
    images, masks = make_images(tmp_path)
    key = make_recording(images, masks).key
    assert make_recording(images, masks, dataset="elsewhere", threads=1).key == key
    backbone, given = MadeBackbone(), dict(changes)
    if "geometry" in given:
        images, masks = make_images(tmp_path, **given, grid=(4, 4))
        given.clear()
    if "void" in given:
        layout = masks.layout.model_copy(update={"void": given.pop("void")})
        masks = ImageMasks(masks.folder, layout, images)
    if "identity" in given:
        identity = {"identity": given.pop("identity")}
        backbone.description = Description(**vars(DESCRIPTION) | identity)
    masks = given.pop("masks", masks)
    assert make_recording(images, masks, backbone, **given).key != key


def test_a_digest_is_of_the_places_sizes_and_times_of_images_and_masks(tmp_path):
    images, masks = make_images(tmp_path)
    recording = make_recording(images, masks)

    def digests() -> list[str]:
        return [recording.digest(first, first + 2) for first in range(0, 10, 2)]

    found = [digests()]
    assert len(set(found[0])) == 5
    for folder, changed in (("images", 2), ("masks", 4)):
        with (tmp_path / folder / f"00{2 * changed}.png").open("ab") as file:
            file.write(b" ")
        found.append(digests())
        assert [one != other for one, other in zip(*found[-2:], strict=True)] == [
            number == changed for number in range(5)
        ]
    assert make_recording(images, None).digest(0, 2) != found[0][0]

    # Another content of the same size, and another folder of the same files.
    path = images.paths[0]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert digests()[0] != found[-1][0]
    shutil.copytree(tmp_path / "images", tmp_path / "others")  # with their times
    others = Images(tmp_path / "others", images.layout)
    assert [path.stat().st_mtime_ns for path in others.paths] == [
        path.stat().st_mtime_ns for path in images.paths
    ]
    assert make_recording(others, masks).digest(0, 2) != digests()[0]


def test_a_shard_without_room_for_an_image_is_an_error(tmp_path):
    images, masks = make_images(tmp_path)
    message = "max_tokens_per_shard 33 holds no example of 2 layers x 17 tokens; wanted at least 34"
    with pytest.raises(ValueError, match=message):
        _ = make_recording(images, masks, max_tokens_per_shard=33).metadata


@pytest.mark.parametrize("spoiled", ["images/006.png", "masks/006.png"])
def test_a_damaged_file_is_named_and_costs_no_shard(tmp_path, spoiled):
    images, masks = make_images(tmp_path)
    wanted = tree(record_shards(tmp_path / "wanted", make_recording(images, masks)).parent)
    good = (tmp_path / spoiled).read_bytes()
    # As long as it was: a shard whose files are longer is made again.
    (tmp_path / spoiled).write_bytes(bytes(len(good)))
    with pytest.raises(ValueError, match=spoiled):
        record_shards(tmp_path / "a", make_recording(images, masks))
    (tmp_path / spoiled).write_bytes(good)
    shown: list[int] = []
    backbone = MadeBackbone(lambda given: shown.append(len(given)))
    record_shards(tmp_path / "a", make_recording(images, masks, backbone))
    assert sum(shown) == 6
    assert tree(tmp_path / "a") == wanted


@pytest.mark.parametrize("changed", ["images/006.png", "masks/006.png", "void", None])
def test_the_same_recording_is_not_made_again_and_another_content_is(tmp_path, changed):
    images, masks = make_images(tmp_path)
    record_shards(tmp_path / "a", make_recording(images, masks))
    before = images.fingerprint(), masks.fingerprint()
    if changed == "void":
        layout = masks.layout.model_copy(update={"void": (0, 1)})
        masks = ImageMasks(masks.folder, layout, images)
    elif changed is not None:
        content = bytearray((tmp_path / changed).read_bytes())
        content[-1] ^= 1  # of a checksum that nobody looks at
        (tmp_path / changed).write_bytes(content)
    # What a run goes by, before it asks for a recording at all.
    assert ((images.fingerprint(), masks.fingerprint()) != before) == (changed is not None)
    shown: list[int] = []
    backbone = MadeBackbone(lambda given: shown.append(len(given)))
    record_shards(tmp_path / "a", make_recording(images, masks, backbone))
    assert sum(shown) == (0 if changed is None else len(images))


def test_a_recording_that_was_begun_on_another_kind_of_device_is_begun_anew(tmp_path):
    images, masks = make_images(tmp_path)
    on = {device: make_recording(images, masks, device=device) for device in ("cpu", "cuda")}
    assert on["cpu"].key != on["cuda"].key
    # But one that is there is the same.
    assert on["cpu"].metadata == on["cuda"].metadata


def test_an_image_that_comes_to_no_finite_activations_is_named(tmp_path):
    images, masks = make_images(tmp_path)

    class Spoiled(MadeBackbone):
        def record(self, images: Tensor, layers: Sequence[int]) -> Tensor:
            found = super().record(images, layers)
            found[images[:, 0, 0, 0] == shown[0, 0, 0], 1, 3, 2] = torch.inf
            return found

    shown = images.read(6, N_PATCHES)
    assert [images.read(each, N_PATCHES)[0, 0, 0] == shown[0, 0, 0] for each in (4, 5, 7)].count(
        True
    ) == 0
    with pytest.raises(ValueError, match=r"images/006.png: the model's activations hold a NaN"):
        record_shards(tmp_path / "a", make_recording(images, masks, Spoiled(), batch_size=4))


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_a_model_that_is_not_as_it_says_is_an_error(tmp_path, axis, cls_token):
    class Wrong(MadeBackbone):
        def record(self, images: Tensor, layers: Sequence[int]) -> Tensor:
            found = super().record(images, layers)
            return torch.cat([found, found.narrow(axis, 0, 1)], axis)

    images, masks = make_images(tmp_path)
    message = r"made gave \(.*\) for images \(2, 8, 8, 3\), wanted \(2, 2, 17, 5\): images, layers"
    with pytest.raises(ValueError, match=message):
        record_shards(tmp_path / "a", make_recording(images, masks, Wrong(), cls_token=cls_token))


def test_a_changed_list_shows_the_model_only_what_changed(tmp_path):
    images, masks = make_images(tmp_path)

    def fail(_: Tensor) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("broken off")

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="broken off"):
        record_shards(tmp_path / "a", make_recording(images, masks, MadeBackbone(fail)))
    (tmp_path / "images/009.png").unlink()
    (tmp_path / "images/001.png").rename(tmp_path / "images/0010.png")
    (tmp_path / "masks/001.png").rename(tmp_path / "masks/0010.png")
    images = Images(images.folder, images.layout)
    masks = ImageMasks(masks.folder, masks.layout, images)
    shown: list[int] = []
    backbone = MadeBackbone(lambda given: shown.append(len(given)))
    path = record_shards(tmp_path / "a", make_recording(images, masks, backbone))
    assert sum(shown) == 5  # of 4, 4 and 1
    torch.testing.assert_close(stored(path), alone(images))


def test_only_so_many_images_are_read_ahead(tmp_path, monkeypatch):
    images, masks = make_images(tmp_path, [(8, 8)] * 60)
    n_read: list[int] = []
    read = Images.read
    monkeypatch.setattr(Images, "read", lambda *given: (n_read.append(1), read(*given))[1])
    recording = make_recording(images, masks)
    batches = recording.batches([(first, first + 4) for first in range(0, 60, 4)])
    next(batches)
    # A batch is given out, and twice as many as threads, or as two batches, are being read.
    assert len(n_read) <= 2 + 4 + 2
    batches.close()
    assert not [each for each in threading.enumerate() if "assay-decode" in each.name]
    assert len(n_read) <= 2 + 4 + 2


@pytest.mark.parametrize("dropped", [False, True])
def test_a_signal_stops_at_once_and_what_is_whole_is_kept(tmp_path, dropped):
    images, masks = make_images(tmp_path, [(8, 8)] * 40)
    shown: list[int] = []

    def stop(given: Tensor) -> None:
        shown.append(len(given))
        if len(shown) == 9:
            # The library that it comes in may drop it.
            with suppress(KeyboardInterrupt) if dropped else nullcontext():
                os.kill(os.getpid(), signal.SIGTERM)

    with signals_stop(), pytest.raises(KeyboardInterrupt):
        ShardsDataset(filepath=str(tmp_path / "a")).save(
            make_recording(images, masks, MadeBackbone(stop))
        )
    assert len(shown) == 9
    assert not [each for each in threading.enumerate() if each.name.startswith("assay-")]
    assert not (tmp_path / "a").exists()
    shown.clear()
    backbone = MadeBackbone(lambda given: shown.append(len(given)))
    path = record_shards(tmp_path / "a", make_recording(images, masks, backbone))
    assert 40 - 4 * 4 <= sum(shown) <= 40 - 4 * 3  # the last batches may not have been written
    torch.testing.assert_close(stored(path), alone(images))


ON_A_GPU = """
import sys
from pathlib import Path
import pretended_cuda
sys.path[:0] = [{tests!r}]
import torch
from assay.io.shards.recording import record_shards
from assay.pipelines.extract import recording
from test_extract_recording import MadeBackbone, make_images, make_recording

copy, arrived, ahead = recording._copy, recording._arrived, [0]

def copying(*given):
    ahead.append(ahead[-1] + 1)
    return copy(*given)

def arriving(*given):
    ahead.append(ahead[-1] - 1)
    return arrived(*given)

recording._copy, recording._arrived = copying, arriving

class OnGPU(MadeBackbone):
    def record(self, images, layers):
        return super().record(images.to("cuda", non_blocking=True), layers)

counts = pretended_cuda.install()
images, masks = make_images(Path({root!r}))
backbone = OnGPU()
backbone.embed = backbone.embed.cuda()
counts.reset()
record_shards(Path({root!r}) / "a", make_recording(images, masks, backbone))
print(counts.waits, max(ahead))
"""


def test_a_gpu_gives_the_same_bytes_and_is_waited_for_by_events_alone(tmp_path):
    images, masks = make_images(tmp_path)
    wanted = tree(record_shards(tmp_path / "wanted", make_recording(images, masks)).parent)
    helpers = Path(__file__).parents[1] / "helpers"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, str(helpers)]))
    program = ON_A_GPU.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert tree(tmp_path / "a") == wanted
    waits = re.findall(r"'recording.py:\d+ (\w+)': (\d+)", ended.stdout)
    assert waits == [("event", "8")]  # as there are batches
    assert ended.stdout.split()[-1] == "2"  # and no more are on their way


PROGRAM = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
sys.path[:0] = [{tests!r}]
from assay.io.datasets import find_shards
from assay.io.shards.recording import record_shards
from test_extract_recording import MadeBackbone, SHAPES, make_images, make_recording, tree

torch.set_num_threads(1)
root, random = Path({root!r}), random.Random(0)
images, masks = make_images(root / "of", 5 * SHAPES)

def record(folder):
    backbone = MadeBackbone(lambda given: time.sleep(0.001))
    record_shards(folder, make_recording(images, masks, backbone))

def run(folder, seconds=None):
    child = os.fork()
    if child == 0:
        record(folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

began = time.perf_counter()
assert run(root / "wanted") == 0
whole = time.perf_counter() - began
wanted, killed, begun = tree(root / "wanted"), 0, 0
while killed < 20:
    killed += run(root / "a", random.uniform(0.1, 0.7) * whole) == signal.SIGKILL
    begun += any(root.glob(".a.partial-*/notes/*.json"))
    try:
        find_shards(root / "a")
    except FileNotFoundError:
        assert not (root / "a").exists()
    else:
        assert tree(root / "a") == wanted
        shutil.rmtree(root / "a")  # it would not be made again
assert run(root / "a") == 0
assert tree(root / "a") == wanted
print(begun, *sorted(os.listdir(root)))
"""


def test_twenty_kills_change_no_byte_and_show_nothing_half_made(tmp_path):
    program = PROGRAM.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    begun, *left = ended.stdout.split()
    assert left == ["a", "of", "wanted"]
    assert int(begun) >= 10, "too few of the kills came within a recording"
