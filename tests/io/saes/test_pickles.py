"""Pickles: what torch.save writes is read, and nothing that a file says is run."""

import builtins
import io
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.io.saes.pickles import LONGEST_PICKLE, Inert, check_tensors, load_pickle

NAMED = Path("ae.pt")
INERT = ("library.Model", "library.Part")
HELD = ("library.rescale",)


def entries(saved: object) -> dict[str, bytes]:
    """The archive's entries of something that torch saved."""
    file = io.BytesIO()
    torch.save(saved, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(found: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written:
        for name, content in found.items():
            written.writestr(name, content)
    return file.getvalue()


def of(instructions: bytes, **storages: bytes) -> bytes:
    """A file of hand-made instructions, between the first and the last."""
    records = {f"archive/data/{key}": content for key, content in storages.items()}
    found = {"archive/data.pkl": b"\x80\x02" + instructions + b".", "archive/version": b"3\n"}
    return archive(found | records)


def read(raw: bytes) -> Any:
    return load_pickle(raw, NAMED, INERT, HELD)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def named(name: str) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def storage(key: str, numbers: int, kind: str = "Float") -> bytes:
    size = b"J" + numbers.to_bytes(4, "little")
    return (
        b"("
        + text("storage")
        + named(f"torch.{kind}Storage")
        + text(key)
        + text("cpu")
        + size
        + b"tQ"
    )


def tensor(key: str, numbers: int, size: int, stride: int, offset: int = 0) -> bytes:
    plain = b"".join(
        b"J" + value.to_bytes(4, "little", signed=True) + b"\x85" for value in (size, stride)
    )
    first = b"J" + offset.to_bytes(4, "little", signed=True)
    hooks = named("collections.OrderedDict") + b")R"
    called = named("torch._utils._rebuild_tensor_v2")
    return called + b"(" + storage(key, numbers) + first + plain + b"\x89" + hooks + b"tR"


def test_tensors_parameters_and_plain_values(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    wanted = {
        "state": state,
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "plain": [1, -7, 2**70, 2.5, True, None, "text", (1, (2, "x")), {"a": {3: "b"}}],
        "dtype": torch.float32,
        "device": torch.device("cuda:0"),
        "set": {"a", "b"},
        "size": torch.Size([2, 3]),
    }
    torch.save(wanted, tmp_path / "ae.pt")
    found = load_pickle(tmp_path / "ae.pt", NAMED)
    assert {name: found[name] for name in ("plain", "dtype", "device", "set", "size")} == {
        name: wanted[name] for name in ("plain", "dtype", "device", "set", "size")
    }
    assert check_tensors(found["state"], NAMED).keys() == state.keys()
    assert torch.equal(found["state"]["weight"], state["weight"])
    assert torch.equal(found["parameter"], torch.arange(4.0))
    assert found["half"].dtype == torch.bfloat16


def test_objects_are_inert() -> None:
    state = b"}(" + text("k") + b"K\x05" + text("by") + named("library.rescale") + b"u"
    found = read(of(named("library.Model") + b")\x81" + state + b"b"))
    assert isinstance(found, Inert)
    assert found.stands_for == "library.Model"
    assert (vars(found)["k"], vars(found)["given"]) == (5, ())
    assert issubclass(vars(found)["by"], Inert)
    assert vars(found)["by"].stands_for == "library.rescale"
    called = read(of(named("library.Part") + text("a") + b"\x85R"))
    assert (called.stands_for, called.given) == ("library.Part", ("a",))


class Runs:
    """Would call a function with something while it is read."""

    def __init__(self, called: Callable[..., Any], *given: Any) -> None:
        self.called, self.given = called, given

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.called, self.given


def would_write(path: Path) -> list[Runs]:
    return [
        Runs(os.system, f"touch {path}"),
        Runs(subprocess.check_call, ["touch", str(path)]),
        Runs(builtins.exec, f"open({str(path)!r}, 'w')"),
        Runs(builtins.eval, f"open({str(path)!r}, 'w')"),
        Runs(builtins.open, str(path), "w"),
        Runs(os.mkdir, str(path)),
        Runs(Path.touch, path),
        Runs(shutil.copy, __file__, str(path)),
        Runs(torch.save, 1, str(path)),
        Runs(getattr, "x", "upper"),
        Runs(__import__, "shutil"),
    ]


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("nested", [False, True])
def test_what_would_write_a_file_is_refused(tmp_path: Path, number: int, nested: bool) -> None:
    path = tmp_path / "written"
    runs = would_write(path)[number]
    saved = {"bias": torch.ones(2), "config": {"deep": [runs]}} if nested else runs
    torch.save(saved, tmp_path / "ae.pt")
    assert not path.exists()
    with pytest.raises(ValueError, match=r"it needs .*, which is no part of what is read here"):
        load_pickle(tmp_path / "ae.pt", NAMED, INERT, HELD)
    assert not path.exists()


BIG = b"J\x00\x00\x00\x40"  # 2**30


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (named("builtins.bytearray") + BIG + b"\x85R", "needs builtins.bytearray"),
        (named("__builtin__.bytearray") + BIG + b"\x85R", "needs builtins.bytearray"),
        (named("torch.FloatTensor") + BIG + b"\x85R", "needs torch.FloatTensor"),
        (named("torch._utils._rebuild_qtensor") + b")R", "needs torch._utils._rebuild_qtensor"),
        (named("library.rescale") + b")R", "calls library.rescale otherwise"),
        (named("library.rescale") + b")\x81", "something that is no class of these libraries"),
        (named("torch.device") + b"]\x85R", "calls torch.device otherwise"),
        (named("torch.Size") + text("x") + b"\x85\x85R", "calls torch.Size otherwise"),
        (named("builtins.set") + b"])a\x85R", "calls builtins.set otherwise"),
        (named("collections.OrderedDict") + b"]\x85R", "calls collections.OrderedDict otherwise"),
        (named("collections.OrderedDict") + b")R}" + text("items") + b"Nsb", "sets attributes of"),
        (tensor("0", 4, 4, 1) + b"}b", "sets attributes of something"),
        (b"]q\x00h\x00)\x81", "one list in two places"),
        (b"]q\x00)R", "calls something that is no function"),
        (text("x") + b")R", "calls something that is no function"),
        (b"})Ns", "the instruction SETITEM has nothing to work on"),
        (b"NNNs", "the instruction SETITEM has nothing to work on"),
        (b"(NNu", "has nothing to work on"),
        (b"h\x07", "the instruction BINGET has nothing to work on"),
        (b"R", "the instruction REDUCE has nothing to work on"),
        (b"t", "the instruction TUPLE has nothing to work on"),
        (b"NN", "makes more than one value"),
        (b"(N", "makes more than one value"),
        (b"Vx\n", "the instruction UNICODE is none of torch.save's"),
        (b"ios\nsystem\n", "the instruction INST is none of torch.save's"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "expected 9223372036854775807 bytes"),
        (b"X\xff\xff\xff\xffabc", "expected 4294967295 bytes"),
        (storage("1", 4), "storage 1 of 4 numbers is missing"),
        (storage("0", 5), "storage 0 of 5 numbers is missing, or of another size"),
        (storage("0", 2**30), "or of another size"),
        (storage("0", 4, "ComplexFloat"), "needs torch.ComplexFloatStorage"),
        (b"K\x01Q", "a storage that is none of torch.save's"),
        (tensor("0", 4, -1, 1), "save its state_dict"),
        (tensor("0", 4, 4, -1), "save its state_dict"),
        (tensor("0", 4, 5, 1), "save its state_dict"),
        (tensor("0", 4, 1, 1, 4), "save its state_dict"),
        (tensor("0", 4, 1, 1, -1), "save its state_dict"),
    ],
)
def test_instructions_that_torch_save_does_not_write_are_refused(
    instructions: bytes, message: str
) -> None:
    raw = of(instructions, **{"0": bytes(16)})
    with pytest.raises(ValueError, match=message):
        read(raw)


def test_a_list_of_one_list_many_times_is_refused_before_it_is_shown() -> None:
    # Each level holds the last one ten times: as text 10**30 characters.
    levels = b"]q\x00" + b"".join(
        b"(" + b"h%c" % level * 10 + b"tq%c" % (level + 1) for level in range(30)
    )
    for last in (b")R", b"}h\x1eNs", b""):
        with pytest.raises(ValueError, match="one list in two places"):
            read(of(levels + last))


def test_deep_nesting_is_survived() -> None:
    assert type(read(of(b"N" + b"\x85" * 100_000))) is tuple


@pytest.mark.parametrize("name", ["__class__", "__setstate__", "__dict__", "stands_for", "given"])
def test_an_attribute_cannot_stand_before_one_of_the_stand_in(name: str) -> None:
    state = b"}" + text(name) + named("library.Part") + b"s"
    with pytest.raises(ValueError, match=f"an attribute of an object is {name}"):
        read(of(named("library.Model") + b")\x81" + state + b"b"))


@pytest.mark.parametrize("state", [b"N", b"K\x01", b"]", b"}N\x86", b"}K\x01Ns"])
def test_a_state_has_names(state: bytes) -> None:
    with pytest.raises(ValueError, match=r"sets attributes|an attribute of an object is 1"):
        read(of(named("library.Model") + b")\x81" + state + b"b"))


def test_a_stand_in_of_a_class_that_was_not_named_is_refused() -> None:
    for name in ("library.Other", "library.Model.Part", "other.library.Model", "Model"):
        with pytest.raises(ValueError, match="which is no part of what is read here"):
            read(of(named(name) + b")\x81"))


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    plain = entries({"bias": torch.zeros(100_000)})
    assert read(archive(plain))["bias"].numel() == 100_000
    folder = next(iter(plain)).partition("/")[0]
    bomb = archive(plain, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10_000
    tarred = tmp_path / "ae.tar"
    with tarfile.open(tarred, "w") as written:
        written.add(__file__, "storages")
    legacy = io.BytesIO()
    torch.save({"bias": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    huge = plain | {f"{folder}/data.pkl": plain[f"{folder}/data.pkl"] + bytes(LONGEST_PICKLE)}
    spoilt = bytearray(archive(plain))
    spoilt[spoilt.index(bytes(1000)) + 500] = 1
    for raw, message in [
        (bomb, "compressed, which torch.save never does"),
        (archive(entries(torch.rand(9)), zipfile.ZIP_DEFLATED), "compressed, which torch.save"),
        (archive(plain | {"other/data.pkl": b"\x80\x02N."}), "has not one data.pkl"),
        (archive({"archive/version": b"3"}), "has not one data.pkl"),
        (archive(plain | {f"{folder}/constants.pkl": b""}), "is a TorchScript program"),
        (archive(huge), "data.pkl has .* bytes, wanted at most"),
        (bytes(spoilt), "the checksum of .*/data/0 is another: a damaged file"),
        (archive(plain) + b"x", "does not end as torch.save's does"),
        (b"x" + archive(plain), "is no zip archive"),
        (tarred.read_bytes(), "is no zip archive"),
        (legacy.getvalue(), "is no zip archive"),
        (pickle.dumps({"bias": 1}, protocol=2), "is no zip archive"),
        (archive(plain)[:-1], "does not end as torch.save's does"),
        (b"", "is no zip archive"),
        (of(b"\x80\x04N"), "its protocol is 4, wanted torch.save's 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(raw)


def test_a_directory_of_an_archive_is_bounded_before_it_is_read() -> None:
    many = {f"archive/{number}": b"" for number in range(20_000)}
    with pytest.raises(ValueError, match=r"directory has .* bytes, wanted fewer"):
        read(archive(many))


def test_how_the_process_loads_its_own_files_changes_nothing(tmp_path: Path) -> None:
    torch.save({"bias": torch.ones(2)}, tmp_path / "ae.pt")
    # Not by monkeypatch, which takes the setting away when it undoes: nothing could be loaded then.
    with torch.utils.serialization.config.patch({"load.mmap": True}):  # type: ignore[attr-defined]
        assert load_pickle(tmp_path / "ae.pt", NAMED)["bias"].tolist() == [1, 1]


def test_a_file_that_is_missing_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "ae.pt", NAMED)
    with pytest.raises(ValueError, match="Is a directory"):
        load_pickle(tmp_path, NAMED)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "holds a dict that is no state dict"),
        ([torch.ones(2)], "holds a list that is no state dict"),
        ({"a": 1}, "holds a dict that is no state dict"),
        ({1: torch.ones(2)}, "holds a dict that is no state dict"),
        (
            {"a": torch.ones(2).to_sparse()},
            "a is torch.sparse_coo of torch.float32, wanted a dense",
        ),
        ({"a": torch.ones(2, device="meta")}, "wanted a dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.complex64, wanted a dense tensor"),
        ({"a": torch.ones(2).to(torch.float8_e5m2)}, "torch.float8_e5m2, wanted a dense tensor"),
        ({"a": torch.ones(1).expand(9)}, "a claims 9 numbers, the file has 1"),
        ({"a\x1b": torch.ones(1).expand(9)}, r"'a\\x1b' claims 9 numbers"),
    ],
)
def test_a_state_dict_holds_dense_tensors_of_numbers(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensors(found, NAMED)


def test_strides_of_0_claim_more_than_the_file_has() -> None:
    raw = of(b"}" + text("bias") + tensor("0", 4, 2**30, 0) + b"s", **{"0": bytes(16)})
    with pytest.raises(ValueError, match="bias claims 1073741824 numbers, the file has 4"):
        check_tensors(read(raw), NAMED)


def test_a_state_dicts_attributes_hide_nothing() -> None:
    found: OrderedDict[str, Any] = OrderedDict(bias=torch.nn.Parameter(torch.ones(2)))
    vars(found)["items"] = vars(found)["keys"] = "hidden"
    tensors = check_tensors(found, NAMED)
    assert torch.equal(tensors["bias"], torch.ones(2))
    assert not tensors["bias"].requires_grad
