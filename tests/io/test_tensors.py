"""Named tensors in one file: round trips, what is refused, atomic writing, and fingerprints."""

import errno
import os
import re
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.io.tensors import fingerprint_tensors, read_tensors, write_tensors

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def make_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return numbers % 2 == 0 if dtype is torch.bool else numbers.to(dtype)


def make_state() -> dict[str, Tensor]:
    return {
        "mean": torch.arange(3.0).double(),
        "counts": torch.arange(4).reshape(2, 2),
        "n": torch.tensor(7),
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
        "__metadata__".__ne__
    ),
    st.builds(
        make_tensor,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.integers(0, 99),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=25)
@given(tensors)
def test_round_trip(state: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "new" / "model.safetensors"
        write_tensors(path, state)
        assert_same(read_tensors(path), state)
        assert_same(load_file(path), state)  # anybody's reader can read it
        assert fingerprint_tensors(read_tensors(path)) == fingerprint_tensors(state)
        assert list(path.parent.iterdir()) == [path]


def test_views_shared_memory_and_gradients_are_written(tmp_path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    state = {
        "x": x,
        "again": x,
        "transposed": x.T,
        "part": x[1:, ::2],
        "expanded": x[:1].expand(2, 4),
    }
    write_tensors(tmp_path / "a.safetensors", {**state, "leaf": torch.ones(2, requires_grad=True)})
    assert_same(read_tensors(tmp_path / "a.safetensors"), {**state, "leaf": torch.ones(2)})


def test_what_was_read_is_free_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, make_state())
    found = read_tensors(path)
    found["mean"] += 1
    write_tensors(path, {"mean": torch.zeros(9)})
    assert torch.equal(found["mean"], torch.arange(3.0).double() + 1)
    assert_same(read_tensors(path), {"mean": torch.zeros(9)})


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"schema": "assay.tensors", "version": "1"}, "assay.tensors version 1"),
        ({"schema": "assay.tensors", "version": "3"}, "assay.tensors version 3"),
        ({"schema": "saev.tensors", "version": "1"}, "saev.tensors version 1"),
        ({"format": "pt"}, "None version None"),
        (None, "None version None"),
    ],
)
def test_another_schema_or_version_is_refused_by_name(
    tmp_path: Path, header: dict[str, str] | None, found: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(make_state(), path, metadata=header)
    wanted = rf"{re.escape(str(path))} is {found}; this reader wants assay.tensors version 2"
    with pytest.raises(ValueError, match=wanted):
        read_tensors(path)
    assert_same(read_tensors(path, any_schema=True), make_state())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            read_tensors(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, make_state())
    whole = path.read_bytes()
    for size in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:size])
        for any_schema in (False, True):
            with pytest.raises(
                ValueError, match=rf"{re.escape(str(path))} is not a whole safetensors file"
            ):
                read_tensors(path, any_schema=any_schema)


@pytest.mark.parametrize("any_schema", [False, True])
def test_no_bit_can_change_unseen(tmp_path: Path, any_schema: bool) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, make_state())
    whole = path.read_bytes()
    # Before it are our own names, which tell our files from others'.
    header = range(8 * whole.index(b'"mean"'), 8 * len(whole))
    for bit in header if any_schema else range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_tensors(path, any_schema=any_schema)


def test_a_file_of_another_seed_in_the_place_of_the_tensors_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path, seed in zip(paths, (0, 1), strict=True):
        write_tensors(path, {"centers": make_tensor(torch.float32, (4, 3), seed)})
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(first[:-48] + second[-48:])
    with pytest.raises(
        ValueError,
        match=(
            r"a.safetensors has checksum .*, wanted .*: it was changed .*; remove it, and the"
            r" next run"
        ),
    ):
        read_tensors(paths[0])


def test_a_tensor_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    one = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = ("{" + one % (0, 4) + ", " + one % (4, 8) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"a.safetensors"):
        read_tensors(path, any_schema=True)


@pytest.mark.parametrize("raw", [b"\x80\x04]\x94.", b"not a header at all", b"\xff" * 64])
def test_other_files_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a.pt is not a whole safetensors file"):
        read_tensors(tmp_path / "a.pt", any_schema=True)


@pytest.mark.parametrize("broken", ["rename", "write"])
def test_a_write_that_fails_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, make_state())
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    if broken == "rename":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr("assay.io.tensors.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_tensors(path, {"mean": torch.zeros(9)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_disk_that_is_full_is_an_error_of_the_system_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, make_state())
    before = path.read_bytes()
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:  # a limit on the size of files is as near to a full disk as a test can come
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            write_tensors(path, {"mean": torch.zeros(999)})
        except BaseException as error:
            os.write(said, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(said)
    with open(heard, "rb") as pipe:
        assert pipe.read().decode() == f"OSError: [Errno {errno.EFBIG}] File too large: '{path}'"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, wanted a file"):
        write_tensors(tmp_path, make_state())


def test_the_fingerprint_ignores_order_layout_and_gradients() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    wanted = fingerprint_tensors({"a": x, "b": torch.ones(2)})
    assert re.fullmatch("[0-9a-f]{64}", wanted)
    assert (
        fingerprint_tensors({"b": torch.ones(2).requires_grad_(), "a": x.T.contiguous().T})
        == wanted
    )


def test_the_fingerprint_tells_names_dtypes_shapes_and_bytes() -> None:
    zeros = torch.zeros(2, 2)
    flipped = zeros.clone()
    flipped.view(torch.uint8)[1, 3] ^= 1
    states: list[dict[str, Tensor]] = [
        {},
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.int()},
        {"a": zeros.view(torch.int64)},
        {"a": zeros.reshape(4)},
        {"a": zeros.reshape(1, 4)},
        {"a": -zeros},  # the sign of a zero is a byte, too
        {"a": flipped},
        {"a": zeros, "b": zeros},
        {"a": torch.zeros(0)},
        {"a": torch.zeros(0, 3)},
        {"a": torch.tensor(0.0)},
        {"a": torch.zeros(1)},
        # One name that spells two tensors' headers
        {"a": torch.zeros(0, dtype=torch.uint8), "b": torch.zeros(0, dtype=torch.uint8)},
        {"a:torch.uint8:(0,):b": torch.zeros(0, dtype=torch.uint8)},
        {"('a', 'torch.uint8', (0,))b": torch.zeros(0, dtype=torch.uint8)},
    ]
    fingerprints = [fingerprint_tensors(state) for state in states]
    assert len(set(fingerprints)) == len(states)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(DTYPES), st.data())
def test_the_fingerprint_tells_any_byte(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = make_tensor(dtype, (3, 2), data.draw(st.integers(0, 9)))
    raw = bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1
    other = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(3, 2)
    assert fingerprint_tensors({"a": tensor}) != fingerprint_tensors({"a": other})


def test_the_docs_way_of_saving_an_autoencoder_takes_weights_that_lie_as_their_transpose(
    tmp_path: Path,
) -> None:
    docs = (Path(__file__).parents[2] / "docs/dictionaries.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(safetensors\.torch\.save_file\(.+?, path\))`", docs)
    model = torch.nn.Module()
    model.W_enc = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3).T)
    path = tmp_path / "sae.safetensors"
    eval(line, {"safetensors": safetensors, "model": model, "path": path})
    assert_same(read_tensors(path, any_schema=True), {"W_enc": torch.arange(12.0).reshape(4, 3).T})
