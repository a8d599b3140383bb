"""What a folder of shards says about itself: metadata.json and shards.json, validated before they
are believed.

Both files come from elsewhere, so they are parsed by a parser with a depth limit, held to strict
types and sane bounds, and compared with the files beside them. Every fault is a FileNotFoundError
or a ValueError naming the file.
"""

import hashlib
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from assay.io.files import METADATA_NAME, contained_file, read_json_bytes
from assay.io.strict_json import parse_json

INDEX_NAME = "shards.json"

LABELS_NAME = "labels.bin"

WIDE_LABELS_NAME = "labels16.bin"
"""Labels above 255, little-endian uint16, in the place of labels.bin: saev takes whatever lies
there for uint8.
"""

MOST_FAULTS = 5

OWN_VOTE = "prefer-fg"
"""What saev calls the vote of `io/shards/labels.py`."""

REMEDY = "correct the file or record the activations again"

# The names that saev's code writes, and those of its document and of older files.
SPELLINGS = {
    "family": ("vit_family", "model_family"),
    "ckpt": ("vit_ckpt", "model_ckpt"),
    "content_tokens_per_example": ("patches_per_ex", "n_patches_per_img"),
    "d_model": ("d_vit",),
    "n_examples": ("n_imgs", "n_ex"),
    "max_tokens_per_shard": ("patches_per_shard", "max_patches_per_shard"),
    "byteorder": ("byte_order", "endianness", "endian"),
}


def _printable(text: str) -> str:
    # They are printed, and a terminal obeys control characters.
    if not text.isprintable():
        raise ValueError("control characters; wanted printable text")
    return text


Text = Annotated[str, AfterValidator(_printable)]

Block = Annotated[int, Field(ge=-(2**16), le=2**16)]

Count = Annotated[int, Field(ge=1, le=2**40)]

Width = Annotated[int, Field(ge=1, le=2**20)]

T = TypeVar("T")


class _Record(BaseModel):
    """A JSON object of strict types whose keys may be spelled in several ways."""

    model_config = ConfigDict(frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        renamed = dict(raw)
        for name in SPELLINGS.keys() & cls.model_fields.keys():
            found = {key: raw[key] for key in (name, *SPELLINGS[name]) if key in raw}
            values = list(found.values())
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{' and '.join(found)} are one field and differ: {reprlib.repr(values)};"
                    " keep one"
                )
            if values:
                renamed[name] = values[0]
        return renamed


class Metadata(_Record):
    """What was recorded in a folder of shards (saev's `metadata.json`).

    Args:
        family: the model family, such as "dinov3".
        ckpt: the model checkpoint.
        layers: block numbers, in the order of the layer axis.
        content_tokens_per_example: patches in an example, the CLS token not counted.
        cls_token: whether token 0 is the CLS token.
        d_model: the width of one activation, in float32 numbers.
        n_examples: examples (images) over all shards.
        max_tokens_per_shard: the budget of a shard in tokens, counted over all layers.
        data: an opaque description of the dataset. It may be a pickle in base64, and is never
            decoded.
        dataset: where the dataset lay. Older files have none.
        pixel_agg: how pixel labels became patch labels, in segmentation data: "prefer-fg" leaves
            void out of the vote, as Assay does; by "majority" void votes as well.
        labels_dtype: of the patch labels in labels.bin, as older versions of Assay declared it,
            "uint16" (little-endian) where there are more than 255 classes; None is "uint8". It is
            no longer written, since saev refuses names that it does not know.
        dtype: only "float32".
        byteorder: only "little". saev writes none; a file that names another order must not be read
            as if it did not.
        protocol: the version of saev's protocol.

    Raises:
        ValueError: a field is missing, mistyped or out of bounds, or two spellings of it differ
            (pydantic's subclass).
    """

    family: Text
    ckpt: Text
    layers: Annotated[
        tuple[Block, ...], FailFast(), Field(strict=False, min_length=1, max_length=4096)
    ]
    content_tokens_per_example: Width
    cls_token: bool
    d_model: Width
    n_examples: Count
    max_tokens_per_shard: Count
    data: str
    dataset: Text | None = None
    pixel_agg: Text | None = None
    labels_dtype: Literal["uint8", "uint16"] | None = None
    dtype: Literal["float32"]
    byteorder: Literal["little", "<"] | None = None
    protocol: Literal["1.0.0", "1.1", "2.1"]

    @field_validator("data", mode="before")
    @classmethod
    def _data_as_text(cls, value: Any) -> Any:
        # Protocol 1.0.0 wrote an object where later versions write a string.
        return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value

    @field_validator("layers")
    @classmethod
    def _distinct(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("block numbers must be distinct")
        return layers

    @model_validator(mode="after")
    def _one_example_fits(self) -> "Metadata":
        if self.examples_per_shard < 1:
            raise ValueError(
                f"max_tokens_per_shard {self.max_tokens_per_shard} holds no example of"
                f" {len(self.layers)} layers x {self.tokens_per_example} tokens; wanted at least"
                f" {len(self.layers) * self.tokens_per_example}"
            )
        return self

    @property
    def tokens_per_example(self) -> int:
        """Tokens stored for one example in one layer, the CLS token included."""
        return self.content_tokens_per_example + self.cls_token

    @property
    def examples_per_shard(self) -> int:
        """Examples in a full shard."""
        return self.max_tokens_per_shard // (self.tokens_per_example * len(self.layers))

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(n_layers, tokens, d_model) of one example on disk."""
        return len(self.layers), self.tokens_per_example, self.d_model

    @property
    def example_bytes(self) -> int:
        """Bytes of one example on disk, over all layers."""
        return len(self.layers) * self.tokens_per_example * self.d_model * 4

    @property
    def hash(self) -> str:
        """First 8 hex digits of the SHA-256 of what is written, as saev takes it: fields in their
        order, no spaces, UTF-8.
        """
        canonical = json.dumps(self._as_saev_writes(), separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def to_json(self) -> str:
        """The text of a metadata.json that saev's reader takes: all names that it wants, and none
        that it does not know.

        It knows the families bird-mae, clip, dinov2, dinov3, fake-clip, pe-core, pe-spatial and
        siglip.
        """
        return json.dumps(self._as_saev_writes(), indent=2)

    def _as_saev_writes(self) -> dict[str, Any]:
        found = self.model_dump(exclude={"labels_dtype", "byteorder"})
        # A path to saev, to which the empty one is ".".
        found["dataset"] = str(PurePosixPath(self.dataset or "."))
        found["pixel_agg"] = self.pixel_agg or OWN_VOTE
        return found


class ShardEntry(_Record):
    """One item of `shards.json`: a file's name, which may hold no path, and the examples in it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
    n_examples: Annotated[int, Field(ge=0, le=2**40)]


_INDEX: TypeAdapter[list[ShardEntry]] = TypeAdapter(
    Annotated[list[ShardEntry], FailFast(), Field(max_length=1_000_000)]
)


def read_metadata(folder: Path) -> Metadata:
    """The validated metadata.json of `folder`; raises FileNotFoundError, or ValueError naming the
    file.
    """
    return _validated(folder, METADATA_NAME, Metadata.model_validate)


def read_index(folder: Path, metadata: Metadata) -> list[ShardEntry]:
    """The validated shards.json of `folder`.

    Names are distinct, and numbered ones in the order of their numbers; every shard is full but the
    last one with examples in it; only empty ones come after that; and the examples sum to what the
    metadata says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is anything else; the message names the file.
    """
    path = folder / INDEX_NAME
    most = metadata.n_examples // metadata.examples_per_shard + 1

    def validate(raw: Any) -> list[ShardEntry]:
        # First of all: a million entries take a while to look at, each with a file.
        if isinstance(raw, list) and len(raw) > most:
            raise ValueError(
                f"it lists {len(raw)} shards, wanted at most {most} for {metadata.n_examples}"
                f" examples of which a shard holds {metadata.examples_per_shard}"
            )
        return _INDEX.validate_python(raw)

    entries = _validated(folder, INDEX_NAME, validate)
    names = Counter((METADATA_NAME, INDEX_NAME, LABELS_NAME, WIDE_LABELS_NAME))
    names.update(entry.name for entry in entries)
    (name, times), *_ = names.most_common(1)
    if times > 1:
        raise ValueError(
            f"{path} lists {name!r}, which is taken; wanted another file for each shard: {REMEDY}"
        )
    total = sum(entry.n_examples for entry in entries)
    if total != metadata.n_examples:
        raise ValueError(
            f"{path} lists {total} examples, {METADATA_NAME} says {metadata.n_examples}; {REMEDY}"
        )
    numbers = [
        int(found[1]) for entry in entries if (found := re.fullmatch(r"acts(\d+)\.bin", entry.name))
    ]
    if numbers != sorted(numbers):
        late = next(
            number for number, before in zip(numbers[1:], numbers, strict=False) if number < before
        )
        raise ValueError(
            f"{path} lists acts{late:06d}.bin after one of a higher number; wanted them in order,"
            f" or examples and labels do not belong together: {REMEDY}"
        )
    left = total
    for entry in entries:
        wanted = min(left, metadata.examples_per_shard)
        if entry.n_examples != wanted:
            raise ValueError(
                f"{path}: {entry.name} has n_examples {entry.n_examples}, wanted {wanted}; {REMEDY}"
            )
        left -= wanted
    return entries


class LabelsFile(NamedTuple):
    """The patch labels of a folder of shards: a file's name, the dtype of a label, and the bytes of
    all that there must be.
    """

    name: str
    dtype: Literal["uint8", "uint16"]
    n_bytes: int


def find_labels(folder: Path, metadata: Metadata) -> LabelsFile | None:
    """The file of the labels, the wide ones before the others; None where there is neither. Its
    size is not checked.
    """
    n_labels = metadata.n_examples * metadata.content_tokens_per_example
    if os.path.lexists(folder / WIDE_LABELS_NAME):
        return LabelsFile(WIDE_LABELS_NAME, "uint16", 2 * n_labels)
    if not os.path.lexists(folder / LABELS_NAME):
        return None
    dtype = metadata.labels_dtype or "uint8"
    return LabelsFile(LABELS_NAME, dtype, n_labels * (2 if dtype == "uint16" else 1))


def sized_labels(folder: Path, metadata: Metadata, labels: LabelsFile) -> Path:
    """The real path of the labels; raises FileNotFoundError, or ValueError if there are not as many
    as content tokens.
    """
    path, info = contained_file(folder, labels.name)
    if info.st_size != labels.n_bytes:
        raise ValueError(
            f"{path} has {info.st_size} bytes, wanted {labels.n_bytes} ({metadata.n_examples}"
            f" examples x {metadata.content_tokens_per_example} content tokens, {labels.dtype});"
            " restore the file"
        )
    return path


def sized_shard(folder: Path, metadata: Metadata, entry: ShardEntry) -> Path:
    """The real path of a shard whose size is that of a full one, or of exactly its examples.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another size.
    """
    path, info = contained_file(folder, entry.name)
    full, cut = (
        metadata.examples_per_shard * metadata.example_bytes,
        entry.n_examples * metadata.example_bytes,
    )
    if info.st_size not in (full, cut):
        raise ValueError(
            f"{path} has {info.st_size} bytes, wanted {full} ({metadata.examples_per_shard}"
            f" examples) or {cut} ({entry.n_examples} examples); the file is damaged, copy or"
            " record it again"
        )
    return path


def _validated(folder: Path, name: str, validate: Callable[[Any], T]) -> T:
    raw = read_json_bytes(folder, name)
    try:
        parsed = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{folder / name} is not valid JSON: {error}; {REMEDY}") from error
    try:
        return validate(parsed)
    except ValidationError as error:
        raise ValueError(f"{folder / name}: {explain(error)}; {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{folder / name}: {error}; {REMEDY}") from error


def explain(error: ValidationError) -> str:
    """What is wrong, where, and what was found there, in a line."""
    faults = [
        f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}, found"
        f" {reprlib.repr(fault['input'])}"
        for fault in error.errors(include_url=False)
    ]
    more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
    return "; ".join(faults[:MOST_FAULTS] + more)
