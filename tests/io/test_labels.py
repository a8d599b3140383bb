"""Patch labels: the vote, the masks of several datasets, their geometry, and labels.bin."""

import json
import re
import shlex
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import shards as shards_module
from assay.io.images import Placement
from assay.io.images.files import list_files
from assay.io.images.masks import MaskLayout, fit_mask, parse_layout, read_mask
from assay.io.shards import Shards
from assay.io.shards.doubts import doubt_labels
from assay.io.shards.labels import PatchLabels, label_patches, patch_labels, publish_labels
from assay.io.shards.metadata import Metadata
from shards import edit_json

TWO: dict[str, Any] = {
    "layers": [3],
    "content_tokens_per_example": 4,
    "n_examples": 2,
    "max_tokens_per_shard": 10,
    "pixel_agg": None,
}
"""Two examples of 2 x 2 patches."""


def make_metadata(**changes: Any) -> Metadata:
    return shards_module.make_metadata(**TWO | changes)


def make_shards(
    root: Path, labels: npt.NDArray[Any] | torch.Tensor | None = None, **changes: Any
) -> Path:
    return shards_module.make_shards(root, labels=labels, **TWO | changes)


def write_masks(folder: Path, masks: dict[str, Any], dtype: type = np.uint8) -> Path:
    for name, mask in masks.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(mask, dtype=dtype)).save(folder / name)
    return folder


def blocks(*rows: list[int], size: int = 2) -> npt.NDArray[np.int64]:
    """A mask of uniform patches."""
    return np.kron(np.array(rows), np.ones((size, size), dtype=int))


def label(metadata: Metadata, folder: Path, **layout: Any) -> list[list[int]]:
    rows: list[list[int]] = label_patches(
        metadata, folder, MaskLayout(**layout), lambda n: n
    ).labels.tolist()
    return rows


def vote_slowly(masks: npt.NDArray[Any], patch_size: int) -> npt.NDArray[Any]:
    labels = []
    for mask in masks:
        for top in range(0, mask.shape[0], patch_size):
            for left in range(0, mask.shape[1], patch_size):
                pixels = mask[top : top + patch_size, left : left + patch_size].ravel().tolist()
                votes = sorted((-pixels.count(label), label) for label in set(pixels) if label != 0)
                labels.append(votes[0][1] if votes else 0)
    n_patches = (masks.shape[1] // patch_size) * (masks.shape[2] // patch_size)
    return np.array(labels, dtype=masks.dtype).reshape(len(masks), n_patches)


@st.composite
def masks_and_patch_sizes(draw: st.DrawFn) -> tuple[npt.NDArray[Any], int]:
    patch_size = draw(st.integers(1, 4))
    shape = (draw(st.integers(0, 3)), *(patch_size * draw(st.integers(1, 4)) for _ in range(2)))
    # Few classes make ties and patches of void common.
    dtype, choices = draw(
        st.sampled_from(
            [
                (np.uint8, [[0, 1, 2], [0, 3, 10], [0], [5, 255, 0]]),
                (np.uint16, [[0, 256, 65_535], [0, 1, 257]]),
            ]
        )
    )
    return (
        draw(hnp.arrays(dtype, shape, elements=st.sampled_from(draw(st.sampled_from(choices))))),
        patch_size,
    )


@given(masks_and_patch_sizes())
@settings(deadline=None, max_examples=80)
def test_patch_labels_equal_a_slow_vote(case: tuple[npt.NDArray[Any], int]) -> None:
    masks, patch_size = case
    labels = patch_labels(masks, patch_size)
    assert labels.dtype == masks.dtype
    np.testing.assert_array_equal(labels, vote_slowly(masks, patch_size))


def test_ties_go_to_the_lower_class_and_void_has_no_vote() -> None:
    masks = np.array([[[7, 3, 0, 0], [3, 7, 0, 2], [0, 0, 9, 9], [0, 0, 1, 1]]], dtype=np.uint8)
    assert patch_labels(masks, 2).tolist() == [[3, 2, 0, 1]]


@pytest.mark.parametrize("most", [1, 60, 100])
def test_votes_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    masks = np.random.default_rng(0).integers(0, 9, (3, 12, 8), dtype=np.uint8)
    wanted = patch_labels(masks, 4)
    monkeypatch.setattr("assay.io.shards.labels.MOST_COUNTED", most)
    np.testing.assert_array_equal(patch_labels(masks, 4), wanted)


def test_a_mask_of_very_many_ids_takes_little_memory() -> None:
    ids = np.arange(2**14, dtype=np.uint16).reshape(1, 128, 128)
    tracemalloc.start()
    try:
        found = patch_labels(ids, 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found[0], ids.ravel())
    assert most < 300e6  # all votes at once are 2 GB


@pytest.mark.parametrize("patch_size", [0, 3, 8])
def test_patches_that_do_not_tile_are_refused(patch_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"patch_size {patch_size}, want a positive divisor of masks' 4 x 4"
    ):
        patch_labels(np.zeros((1, 4, 4), dtype=np.uint8), patch_size)


def test_ade20k_masks_in_the_order_of_their_names(tmp_path: Path) -> None:
    split = tmp_path / "annotations" / "training"
    write_masks(
        split, {"ADE_2.png": blocks([9, 150], [0, 1]), "ADE_10.png": blocks([1, 2], [3, 4])}
    )
    write_masks(tmp_path / "annotations" / "validation", {"ADE_1.png": blocks([8, 8], [8, 8])})
    wanted = [[1, 2, 3, 4], [9, 150, 0, 1]]
    assert label(make_metadata(), split, patch_size=2) == wanted
    assert (
        label(make_metadata(), tmp_path, patch_size=2, pattern="annotations/training/*.png")
        == wanted
    )


def test_coco_stuff_by_offset_and_void_255(tmp_path: Path) -> None:
    first = blocks([0, 181], [255, 7])
    first[0, :2] = 255  # half of the patch of class 0: void has no vote
    write_masks(tmp_path, {"a.png": first, "b.png": blocks([255, 255], [0, 0])})
    layout = {"patch_size": 2, "void": (255,), "offset": 1}
    assert label(make_metadata(), tmp_path, **layout) == [[1, 182, 0, 8], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"a\.png: id 0 has no label above 0"):
        label(make_metadata(), tmp_path, patch_size=2, void=(255,))


def test_fishvista_by_a_list_and_a_mapping(tmp_path: Path) -> None:
    write_masks(
        tmp_path,
        {
            "seg/z.png": blocks([0, 1], [2, 9]),
            "seg/a.png": blocks([9, 9], [1, 0]),
            "seg/x.png": [[0]],
        },
    )
    names = tmp_path / "train.txt"
    names.write_text("seg/z.png\nseg/a.png\n\n")
    layout = {"patch_size": 2, "names": names, "void": (), "mapping": {0: 0, 1: 1, 2: 1, 9: 2}}
    assert label(make_metadata(), tmp_path, **layout) == [[0, 1, 1, 2], [2, 2, 1, 0]]
    with pytest.raises(ValueError, match=r"z\.png: id 9 has no label"):
        label(make_metadata(), tmp_path, **layout | {"mapping": {0: 0, 1: 1, 2: 1}})
    names.write_text("seg/z.png\nseg/missing.png\n")
    with pytest.raises(FileNotFoundError, match=r"missing\.png is missing"):
        label(make_metadata(), tmp_path, **layout)
    names.write_text("".join(f"{number}.png\n" for number in range(8)))
    with pytest.raises(
        FileNotFoundError,
        match=r"0\.png, .*4\.png and 3 more are missing or no file, listed by .*train\.txt",
    ):
        label(make_metadata(), tmp_path, **layout)
    names.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt is missing; wanted a list of files"):
        label(make_metadata(), tmp_path, **layout)
    for outside in ("../seg.png", "seg/../../seg.png", str(tmp_path / "seg" / "z.png")):
        names.write_text(f"seg/z.png\n{outside}\n")
        with pytest.raises(
            ValueError, match=f"train.txt lists '{re.escape(outside)}'; wanted paths inside .*masks"
        ):
            label(make_metadata(), tmp_path, **layout)


@pytest.mark.parametrize("pattern", ["../*.png", "seg/../../*.png", "/*.png"])
def test_a_pattern_does_not_lead_out_of_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(
        ValueError, match=r"pattern .*leads out of the folder; wanted a glob inside the folder"
    ):
        label(make_metadata(), tmp_path, patch_size=2, pattern=pattern)


def test_masks_of_mixed_sizes_are_resized_by_the_shorter_side_and_cropped(tmp_path: Path) -> None:
    # Columns and rows outside the center square hold class 9, which no patch may get.
    wide, tall = np.full((8, 17), 9), np.full((13, 4), 9)
    wide[:, 4:12] = blocks([1, 2], [3, 4], size=4)
    tall[4:8] = blocks([5, 6], [7, 8])
    write_masks(tmp_path, {"a.png": wide, "b.png": tall})
    assert label(make_metadata(), tmp_path, patch_size=2, resize=4, crop=True) == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
    with pytest.raises(
        ValueError, match=r"a\.png: 8 x 17 pixels, 4 x 8 resized; wanted 4 x 4, 2 x 2 patches of 2"
    ):
        label(make_metadata(), tmp_path, patch_size=2, resize=4)
    with pytest.raises(ValueError, match=r"a\.png: 8 x 17 pixels, 3 x 6 resized; wanted 4 x 4"):
        label(make_metadata(), tmp_path, patch_size=2, resize=3, crop=True)


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.one_of(st.none(), st.integers(4, 20), st.tuples(st.integers(4, 20), st.integers(6, 20))),
)
@settings(deadline=None, max_examples=80)
def test_geometry_equals_torchvision_written_out(shape: tuple[int, int], resize: Any) -> None:
    """torchvision resizes by Pillow, and CenterCrop rounds where it begins."""
    mask = np.arange(shape[0] * shape[1]).reshape(shape)
    layout = MaskLayout(patch_size=2, grid=(2, 3), resize=resize, crop=True)
    resized = list(shape)
    if isinstance(resize, tuple):
        resized = list(resize)
    elif resize is not None:
        short = int(np.argmin(shape))
        resized[short], resized[1 - short] = resize, int(resize * shape[1 - short] / shape[short])
    if resized[0] < 4 or resized[1] < 6:
        with pytest.raises(ValueError, match="wanted 4 x 6"):
            layout.place(shape, 6)
        return
    top, left = round((resized[0] - 4) / 2), round((resized[1] - 6) / 2)
    image = Image.fromarray(mask.astype(np.int32)).resize(resized[::-1], Image.Resampling.NEAREST)
    wanted = np.asarray(image)[top : top + 4, left : left + 6]
    np.testing.assert_array_equal(fit_mask(mask, layout.place(shape, 6), 2), wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        *(((40, 60), (20, 30)), ((30, 30), (50, 70)), ((33, 47), (16, 24))),
        # Centers fall on borders: as 14 pixels a patch have it at 224.
        *(((256, 256), (224, 224)), ((512, 683), (224, 224)), ((384, 798), (112, 448))),
    ],
)
def test_nearest_pixels_are_pillows(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    shape, resized = sizes
    mask = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    wanted = Image.fromarray(mask).resize(resized[::-1], Image.Resampling.NEAREST)
    placement = Placement(resized, (0, 0), resized)
    np.testing.assert_array_equal(fit_mask(mask, placement, 1), np.asarray(wanted))


def test_grid_that_is_no_square(tmp_path: Path) -> None:
    write_masks(tmp_path, {"a.png": blocks([1, 2, 3], [4, 5, 6])})
    metadata = make_metadata(content_tokens_per_example=6, n_examples=1, max_tokens_per_shard=7)
    assert label(metadata, tmp_path, patch_size=2, grid=(2, 3)) == [[1, 2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="no grid is given, and the shards have 6 patches"):
        label(metadata, tmp_path, patch_size=2)
    with pytest.raises(ValueError, match="grid is 2 x 2, and the shards have 6 patches"):
        label(metadata, tmp_path, patch_size=2, grid=(2, 2))
    with pytest.raises(ValueError, match=r"a\.png: 4 x 6 pixels; wanted 6 x 4"):
        label(metadata, tmp_path, patch_size=2, grid=(3, 2), crop=True)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (["ADE_0009", "ADE_0012"], "ADE_0010.png and ADE_0011.png are missing: restore them"),
        (["ADE_0009", "ADE_0010", "ADE_0012"], "ADE_0011.png is missing: restore them"),
        (["ADE_0009", "ADE_0013"], "correct the folder or the pattern"),
        (["9", "012"], "10.png and 11.png are missing: restore them"),
        (["a9", "b12"], "correct the folder or the pattern"),
        (["9", "12", "b"], "correct the folder or the pattern"),
    ],
)
def test_masks_that_numbers_leave_out_are_named(
    tmp_path: Path, found: list[str], named: str
) -> None:
    write_masks(tmp_path, {f"{name}.png": blocks([1, 1], [1, 1]) for name in found})
    metadata = make_metadata(n_examples=4)
    with pytest.raises(ValueError, match=f"the shards have 4 examples; .*{re.escape(named)}$"):
        label(metadata, tmp_path, patch_size=2)


def test_masks_that_a_list_leaves_out_are_to_be_listed(tmp_path: Path) -> None:
    write_masks(tmp_path, {f"m{n}.png": blocks([1, 1], [1, 1]) for n in range(4)})
    names = tmp_path / "names.txt"
    names.write_text("m0.png\nm1.png\nm3.png\n")
    with pytest.raises(ValueError, match=r"m2\.png is missing: add them to the list$"):
        label(make_metadata(n_examples=4), tmp_path, patch_size=2, names=names)


@pytest.mark.parametrize("n_masks", [0, 1, 3])
def test_another_number_of_masks_than_examples_is_refused(tmp_path: Path, n_masks: int) -> None:
    write_masks(tmp_path, {f"{number}.png": blocks([1, 1], [1, 1]) for number in range(n_masks)})
    with pytest.raises(
        ValueError, match=rf"has {n_masks} masks \(\*\.png\), and the shards have 2 examples"
    ):
        label(make_metadata(), tmp_path, patch_size=2)


def test_files_that_are_no_masks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "b.png"
    for channels, kind in ((3, "RGB"), (4, "RGB with alpha"), (2, "gray with alpha")):
        Image.fromarray(np.zeros((4, 4, channels), dtype=np.uint8)).save(path)
        with pytest.raises(
            ValueError, match=rf"b\.png is a PNG of {kind}; wanted one of a single channel"
        ):
            read_mask(path)
    write_masks(tmp_path, {"b.png": np.random.default_rng(0).integers(0, 99, (40, 40))})
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"b\.png is damaged"):
        read_mask(path)
    path.write_bytes(b"BM and so on, for more than a header's length")
    with pytest.raises(ValueError, match=r"b\.png is no PNG"):
        read_mask(path)
    with pytest.raises(FileNotFoundError, match="wanted that of the masks"):
        list_files(tmp_path / "missing", MaskLayout(patch_size=1))
    with pytest.raises(ValueError, match="wanted a glob inside the folder"):
        list_files(tmp_path, MaskLayout(patch_size=1, pattern="/*.png"))


def test_a_list_of_names_is_utf_8_with_a_byte_order_mark_or_without(tmp_path: Path) -> None:
    write_masks(tmp_path, {"grün.png": blocks([1, 1], [1, 1])})
    names = tmp_path / "names.txt"
    layout = MaskLayout(patch_size=2, names=names)
    for encoding in ("utf-8", "utf-8-sig"):
        names.write_text("grün.png\n", encoding=encoding)
        assert list_files(tmp_path, layout) == [tmp_path / "grün.png"]
    names.write_text("grün.png\n", encoding="latin-1")
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(names))} is no UTF-8 text .*; wanted a list of files"
    ):
        list_files(tmp_path, layout)
    names.write_text("a\x1b[2J.png\n")
    with pytest.raises(
        ValueError, match=r"lists 'a\\x1b\[2J.png'; wanted names of printable characters"
    ):
        list_files(tmp_path, layout)


def interlace(mask: npt.NDArray[np.uint8]) -> bytes:
    """The rows of the passes of an interlaced PNG, by its specification."""
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    parts = [mask[y::dy, x::dx] for x, y, dx, dy in passes]
    return b"".join(bytes([0]) + row.tobytes() for part in parts if part.size for row in part)


@pytest.mark.parametrize("shape", [(9, 13), (1, 1), (8, 8), (3, 5)])
@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_mask_whose_image_data_end_early_is_refused(
    tmp_path: Path, shape: tuple[int, int], interlaced: int
) -> None:
    mask = np.random.default_rng(0).integers(1, 200, shape, dtype=np.uint8)
    rows = interlace(mask) if interlaced else b"".join(bytes([0]) + row.tobytes() for row in mask)
    path = tmp_path / "a.png"
    for length in (len(rows), len(rows) - 1, len(rows) // 2):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", shape[1], shape[0], 8, 0, 0, 0, interlaced))
        packed = zlib.compress(rows[:length])
        data = chunk(b"IDAT", packed[:7]) + chunk(b"IDAT", packed[7:])
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
        if length == len(rows):
            np.testing.assert_array_equal(read_mask(path), mask)
        else:
            with pytest.raises(ValueError, match=r"a\.png is damaged"):
                read_mask(path)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(depth: int, color: int, ids: list[int]) -> bytes:
    """One row of pixels of any bit depth."""
    bits = "".join(f"{id_:0{depth}b}" for id_ in ids)
    bits += "0" * (-len(bits) % 8)
    row = bytes([0]) + int(bits, 2).to_bytes(len(bits) // 8, "big")
    palette = chunk(b"PLTE", bytes(3 * 2 ** min(depth, 8))) if color == 3 else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(ids), 1, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + palette
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("depth", "color"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3), (8, 3)]
)
def test_every_depth_of_png_gives_the_ids_that_are_written(
    tmp_path: Path, depth: int, color: int
) -> None:
    ids = [0, 1, 2**depth - 1, 2**depth // 2, 2 % 2**depth]
    (tmp_path / "a.png").write_bytes(raw_png(depth, color, ids))
    assert read_mask(tmp_path / "a.png").astype(int).tolist() == [ids]


@pytest.mark.parametrize("large", [255, 256, 65_535])
def test_labels_round_trip_through_the_shards(tmp_path: Path, large: int) -> None:
    shards = make_shards(tmp_path)
    masks = write_masks(
        tmp_path / "masks",
        {"a.png": blocks([1, 2], [3, large]), "b.png": blocks([0, 256 % large, 1][:2], [1, 1])},
        np.uint16,
    )
    labels = label_patches(make_metadata(), masks, MaskLayout(patch_size=2), lambda n: n)
    assert labels.dtype == ("uint8" if large == 255 else "uint16")
    before = json.loads((shards / "metadata.json").read_text())
    name = "labels.bin" if large == 255 else "labels16.bin"
    assert publish_labels(labels, shards / "labels.bin", shards) == shards / name
    assert (shards / name).read_bytes() == labels.labels.astype(
        "<u1" if large == 255 else "<u2"
    ).tobytes()
    assert Shards(shards).labels().tolist() == [1, 2, 3, large, 0, 256 % large, 1, 1]
    assert json.loads((shards / "metadata.json").read_text()) == before
    small = PatchLabels(np.ones((2, 4), dtype=np.uint8))
    with pytest.raises(FileExistsError, match=f"{name} exists already"):
        publish_labels(small, shards / "labels.bin", shards)
    assert publish_labels(small, shards / "labels.bin", shards, force=True) == shards / "labels.bin"
    assert Shards(shards).labels().tolist() == [1] * 8
    assert sorted(path.name for path in shards.glob("labels*")) == ["labels.bin"]
    assert [path.name for path in shards.iterdir() if path.name.startswith(".")] == []


def test_labels_by_our_vote_are_said_to_be_so(tmp_path: Path) -> None:
    shards = make_shards(
        tmp_path / "o'neill", labels=np.zeros((2, 4), np.uint8), pixel_agg="majority"
    )
    said = doubt_labels(shards, Shards(shards).metadata)
    assert said is not None
    assert 'made with pixel_agg "majority", by which void votes and wins ties' in said
    (command,) = re.findall(
        "assay labels (.*) --masks MASKS --patch-size PIXELS --out (.*) --force,", said
    )
    assert [shlex.split(word) for word in command] == [[str(shards)], [str(shards / "labels.bin")]]
    before = json.loads((shards / "metadata.json").read_text())
    publish_labels(
        PatchLabels(np.ones((2, 4), dtype=np.uint8)), shards / "labels.bin", shards, force=True
    )
    assert json.loads((shards / "metadata.json").read_text()) == before | {"pixel_agg": "prefer-fg"}
    assert doubt_labels(shards, Shards(shards).metadata) is None
    unlabeled = make_shards(tmp_path, pixel_agg="majority", ckpt="other")
    assert doubt_labels(unlabeled, Shards(unlabeled).metadata) is None


@pytest.mark.parametrize(
    ("family", "geometry"),
    [("dinov3", "--geometry aspect, as saev"), ("clip", "--geometry, --grid and --resize as the")],
)
def test_labels_are_to_be_made_anew_as_saev_places_images(
    tmp_path: Path, family: str, geometry: str
) -> None:
    labels = np.zeros((2, 4), np.uint8)
    shards = make_shards(tmp_path, labels=labels, pixel_agg="majority", family=family)
    said = doubt_labels(shards, Shards(shards).metadata)
    assert said is not None and f"--force, with {geometry}" in said


def test_n_classes_sets_the_dtype_and_the_largest_label(tmp_path: Path) -> None:
    write_masks(tmp_path, {name: blocks([1, 2], [3, 4]) for name in ("a.png", "b.png")})

    def dtype(n_classes: int) -> str:
        layout = MaskLayout(patch_size=2, n_classes=n_classes)
        return label_patches(make_metadata(), tmp_path, layout, lambda n: n).dtype

    assert (dtype(5), dtype(256), dtype(257)) == ("uint8", "uint8", "uint16")
    with pytest.raises(
        ValueError, match=r"a\.png: label 4 is found, wanted less than n_classes = 4"
    ):
        dtype(4)


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy])
def test_wide_labels_have_a_file_of_their_own_and_that_of_older_versions_is_read(
    tmp_path: Path, as_given: Callable[..., Any]
) -> None:
    labels = np.array([[0, 1, 256, 65_535], [300, 2, 3, 4]], dtype=np.uint16)
    shards = make_shards(tmp_path, labels=as_given(labels))
    assert Shards(shards).labels().tolist() == labels.ravel().tolist()
    (shards / "labels.bin").write_bytes(bytes(3))  # of no account beside them
    assert Shards(shards).labels().tolist() == labels.ravel().tolist()
    (shards / "labels16.bin").rename(shards / "labels.bin")
    edit_json(shards / "metadata.json", lambda raw: raw | {"labels_dtype": "uint16"})
    assert Shards(shards).labels().tolist() == labels.ravel().tolist()
    edit_json(shards / "metadata.json", lambda raw: raw | {"labels_dtype": "uint8"})
    with pytest.raises(ValueError, match=re.escape("labels.bin has 16 bytes, wanted 8")):
        Shards(shards)
    edit_json(shards / "metadata.json", lambda raw: raw | {"labels_dtype": "int64"})
    with pytest.raises(ValueError, match="labels_dtype"):
        Shards(shards)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    labels = PatchLabels(np.full((2, 4), 300, dtype=np.uint16))
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    out = tmp_path / "elsewhere" / "wide.bin"
    assert publish_labels(labels, out, shards) == out
    assert out.read_bytes() == labels.labels.astype("<u2").tobytes()
    with pytest.raises(FileExistsError, match="exists already and is not replaced"):
        publish_labels(labels, out, shards)
    assert publish_labels(labels, out, shards, force=True) == out
    (tmp_path / "link").symlink_to(shards)
    outs = ("metadata.json", "other.bin", "sub/labels.bin", "a/b/labels.bin")
    for path in (
        *(shards / name for name in outs),
        tmp_path / "link" / "acts000000.bin",
        tmp_path / "link/sub/x.bin",
    ):
        with pytest.raises(ValueError, match="lies in a folder of shards, which are immutable"):
            publish_labels(labels, path, shards, force=True)
    other = make_shards(tmp_path / "shards", ckpt="other")
    with pytest.raises(ValueError, match="lies in a folder of shards"):
        publish_labels(labels, other / "labels.bin", shards)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "patch_size: Field required. There are patch_size, grid, "),
        ({"patch_size": 0}, "patch_size: Input should be greater than 0"),
        ({"patch_size": 2, "patchsize": 2}, "patchsize: Extra inputs are not permitted"),
        ({"patch_size": 2, "void": [-1]}, "void: Input should be greater than or equal to 0"),
        (
            {"patch_size": 2, "mapping": {1: 70_000}},
            "mapping: Input should be less than or equal to 65535",
        ),
        ({"patch_size": 2, "mapping": {1: 1}, "offset": 1}, "found a mapping and offset 1"),
        ({"patch_size": 2, "mapping": {0: 1}}, "id 0 is both void and mapped to a label"),
        ({"patch_size": 2, 3: 4}, "wrong mask layout"),
    ],
)
def test_wrong_layouts_are_one_line(raw: dict[Any, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        parse_layout(raw)
    assert "\n" not in str(caught.value)
