"""Writing shards: what is refused, and what a writer that fails or dies leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.io.shards import Shards, write_shards
from shards import (
    FIELDS,
    content,
    make_examples,
    make_labeled,
    make_labels,
    make_metadata,
    make_shards,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_labeled(tmp_path)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([np.zeros((4, 2, 4, 2), np.float32)], "4 examples came, wanted n_examples = 5"),
        (
            [np.zeros((4, 2, 4, 2), np.float32)] * 2,
            "at least 8 examples came, wanted n_examples = 5",
        ),
        ([np.zeros((5, 2, 3, 2), np.float32)], r"\(5, 2, 3, 2\), wanted float32 \('n', 2, 4, 2\)"),
        ([np.zeros((2, 4, 2), np.float32)], r"a batch is float32 \(2, 4, 2\)"),
        ([np.zeros((5, 2, 4, 2))], "a batch is float64"),
        ([torch.zeros(5, 2, 4, 2, dtype=torch.bfloat16)], "a batch is torch.bfloat16"),
        (
            [np.zeros((3, 2, 4, 2), np.float32), np.full((2, 2, 4, 2), np.inf, np.float32)],
            "example 3 holds a NaN",
        ),
    ],
)
def test_writer_refuses_and_leaves_nothing(
    tmp_path: Path, examples: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, make_metadata(), examples)
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_labels_and_what_exists(folder: Path) -> None:
    metadata = make_metadata(ckpt="another")
    wrong: list[Any] = [
        make_labels(metadata)[:4],
        make_labels(metadata).astype(np.int64),
        torch.zeros(5, 3),
    ]
    for labels in wrong:
        with pytest.raises(ValueError, match=r"labels are .* wanted uint8 \(5, 3\)"):
            write_shards(folder.parent, metadata, [make_examples(metadata)], labels)
    before = Shards(folder).fingerprint()
    with pytest.raises(FileExistsError, match=folder.name):
        write_shards(folder.parent, make_metadata(), [make_examples(make_metadata(), 9)])
    assert Shards(folder).fingerprint() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_writer_takes_views_and_tensors_with_gradients(tmp_path: Path) -> None:
    metadata = make_metadata()
    examples = make_examples(metadata)
    turned = np.ascontiguousarray(examples.T).T
    tensor = torch.from_numpy(examples[3:]).requires_grad_()
    path = write_shards(
        tmp_path, metadata, [turned[:3], tensor], torch.from_numpy(make_labels(metadata))
    )
    read = torch.cat(list(Shards(path).batches(layer=5, batch_size=4)))
    np.testing.assert_array_equal(read, content(examples, metadata, 5))


def test_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    script = f"""
        import time, torch
        from assay.io.shards.metadata import Metadata
        from assay.io.shards import write_shards
        def examples():
            for number in range(5):
                yield torch.zeros(1, 2, 4, 2)
                if number == 3:
                    print("writing", flush=True)
                    time.sleep(60)
        write_shards({str(tmp_path)!r}, Metadata.model_validate({FIELDS!r}), examples())
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    left = list(tmp_path.iterdir())
    assert left
    assert all(re.fullmatch(rf"\.{make_metadata().hash}\.partial-.*", path.name) for path in left)
    for path in left:
        with pytest.raises((ValueError, FileNotFoundError)):
            Shards(path)
    path = make_shards(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert Shards(path).n_examples == 5


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 2, 4, 2)
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        write_shards(tmp_path, make_metadata(), failing())
    assert list(tmp_path.iterdir()) == []


SAEV_KEYS = (
    *(
        "family",
        "ckpt",
        "layers",
        "content_tokens_per_example",
        "cls_token",
        "d_model",
        "n_examples",
    ),
    *("max_tokens_per_shard", "data", "dataset", "pixel_agg", "dtype", "protocol"),
)
"""What saev's reader wants of a metadata.json, nothing missing and nothing more, in the order in
which it hashes it.
"""


@pytest.mark.parametrize(
    ("changes", "written", "name"),
    [
        # Hashes by orjson over a dataclass with these fields, as saev takes them.
        ({}, {}, "ba1ed70c"),
        (
            {"pixel_agg": None, "dataset": None},
            {"pixel_agg": "prefer-fg", "dataset": "."},
            "68f9f0da",
        ),
        ({"labels_dtype": "uint16", "byteorder": "little"}, {}, "ba1ed70c"),
        (
            {"dataset": "/data/Straßen/", "ckpt": '"a\\b"'},
            {"dataset": "/data/Straßen", "ckpt": '"a\\b"'},
            "905fef46",
        ),
    ],
)
def test_what_is_written_is_what_saev_reads_and_hashes(
    tmp_path: Path, changes: dict[str, Any], written: dict[str, Any], name: str
) -> None:
    folder = make_labeled(tmp_path, family="fake-clip", **changes)
    raw = json.loads((folder / "metadata.json").read_text(encoding="ascii"))
    assert raw == FIELDS | {"family": "fake-clip"} | written
    assert tuple(raw) == SAEV_KEYS
    assert all(
        set(entry) == {"name", "n_examples"}
        for entry in json.loads((folder / "shards.json").read_text())
    )
    assert folder.name == name
    assert Shards(folder).metadata.hash == name
