"""What `torch.save` wrote, without anything in it being run.

torch reads a file's tensors and plain values only (`weights_only`). Where a library saves objects,
the names of its classes, and of no others, stand for `Inert`: something that keeps what it is given
and does nothing. Before torch sees a file, its archive and its instructions are checked, so that
none takes more memory than the file has bytes.
"""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.io.saes.pickle_scan import scan
from assay.io.strict_json import shown

LONGEST_PICKLE = 2**19
"""Bytes of a file that are no tensors' numbers: those of an autoencoder are some thousands."""

END = struct.Struct("<4s4H2LH")
"""The last bytes of a zip archive: its mark, numbers of disks, entries on this one and of all,
the directory's bytes and where it begins, and the length of a comment.
"""

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)
"""Of tensors that are read; all others are of no autoencoder."""


class Inert:
    """Stands for an object of a library's class, or for a function: its attributes, and no
    behavior. `stands_for` is the name of what it stands for.
    """

    stands_for = ""
    given: tuple[Any, ...]

    def __new__(cls, *given: Any) -> Inert:
        """Keep what the object was made of."""
        made = super().__new__(cls)
        made.given = given
        return made

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Keep what the object held, under names that hide nothing of this class.

        Raises:
            ValueError: a name would.
        """
        for name in state:
            if not isinstance(name, str) or hasattr(Inert, name) or name == "given":
                raise ValueError(f"an attribute of an object is {shown(name)}")
        self.__dict__.update(state)


def load_pickle(
    source: Path | bytes, named: Path, inert: Collection[str] = (), held: Collection[str] = ()
) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        source: the file, or its bytes.
        named: the file, for messages.
        inert: full names of the classes that `Inert` stands for.
        held: full names of functions that stand for themselves by their names, and are not called:
            each is a class of `Inert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, a damaged one, or one that needs anything else to be run.
    """
    stand_ins: list[Any] = [
        (type(name.rpartition(".")[2], (Inert,), {"stands_for": name}), name)
        for name in (*inert, *held)
    ]
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            pickle, records = _archive(file)
            scan(pickle, records, inert, held)
            file.seek(0)
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise
    # What damaged and hostile files come to is open-ended: the readers of archives and of torch
    # raise whatever they ran into.
    except Exception as error:
        said = (shown(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{named} is not a whole file of tensors as torch.save writes it, or needs code to be"
            f" run, which is not done ({said}): save its state_dict"
        ) from None


def _archive(file: Any) -> tuple[bytes, dict[str, int]]:
    """The instructions of a file, and the bytes of each storage by its key.

    Raises:
        ValueError: it is no archive of torch.save, or one that would take more memory than it has
            bytes.
    """
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is no zip archive, as torch.save writes since version 1.6")
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - END.size))
    begins, *_, n_entries, directory, at, _ = END.unpack(file.read(END.size))
    # Archives of more than 4 GB say it in the 76 bytes before, which torch always writes.
    is_large = size >= 2**32 and at == 2**32 - 1
    ends = at + directory + END.size
    if begins != b"PK\x05\x06" or not (is_large or size in (ends, ends + 76)):
        raise ValueError("its archive does not end as torch.save's does: a damaged file")
    if directory > LONGEST_PICKLE and not is_large:
        raise ValueError(f"its archive's directory has {directory} bytes, wanted fewer")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(set(names)) < len(names) or len(pickles) != 1:
            raise ValueError("its archive names an entry twice, or has not one data.pkl")
        if not is_large and len(names) != n_entries:
            raise ValueError(f"its archive says {n_entries} entries, and has {len(names)}")
        if (
            any(
                entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
                for entry in entries
            )
            or sum(entry.file_size for entry in entries) > size
        ):
            raise ValueError("its archive is compressed, which torch.save never does")
        folder = pickles[0].filename.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            raise ValueError("it is a TorchScript program")
        if pickles[0].file_size > LONGEST_PICKLE:
            raise ValueError(
                f"its data.pkl has {pickles[0].file_size} bytes, wanted at most {LONGEST_PICKLE}"
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is another: a damaged file")
        data = f"{folder}data/"
        records = {
            entry.filename.removeprefix(data): entry.file_size
            for entry in entries
            if entry.filename.startswith(data)
        }
        return archive.read(pickles[0]), records


def check_tensors(found: Any, named: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, without gradients.

    Raises:
        ValueError: it is none, or a tensor is of another kind, or claims more numbers than the file
            has for it.
    """
    # Not by its own methods, which its attributes might hide.
    items: list[tuple[Any, Any]] = list(dict.items(found)) if isinstance(found, dict) else []
    if not items or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items
    ):
        raise ValueError(
            f"{named} holds a {type(found).__name__} that is no state dict, wanted tensors by name:"
            " save the model's state_dict()"
        )
    tensors: dict[str, Tensor] = dict(items)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{named}: {shown(name)} is {tensor.layout} of {tensor.dtype}, wanted a dense"
                " tensor of floating-point numbers or integers: save it as one"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{named}: {shown(name)} claims {tensor.numel()} numbers, the file has"
                f" {tensor.untyped_storage().nbytes() // tensor.element_size()}: save it again"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}
