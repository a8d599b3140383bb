"""Autoencoders by their address on the Hub, from a cache as its client leaves it."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from assay import load_sae
from assay.io.saes import hub
from assay.io.saes.hub import Address, fetch, find, is_address, parse_address
from saes import write_sparsify

COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def write_cached(cache: Path, commit: str, folder: str, k: int) -> Path:
    """Add one of sparsify's autoencoders to a commit in the cache: links to blobs."""
    repository = cache / "models--owner--name"
    place = repository / "snapshots" / commit / folder
    write_sparsify(place, d=4, n=6, k=k)
    blobs = repository / "blobs"
    blobs.mkdir(exist_ok=True)
    for name in ("sae.safetensors", "cfg.json"):
        blob = blobs / f"{commit[:4]}-{folder.replace('/', '-')}-{name}"
        (place / name).rename(blob)
        (place / name).symlink_to(os.path.relpath(blob, place))
    return place


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of a repository, the newer of which is that of its main branch."""
    cache = tmp_path / "hub"
    write_cached(cache, COMMIT, "layers.3", k=2)
    write_cached(cache, COMMIT, "deep/layers.5", k=3)
    write_cached(cache, OLDER, "layers.3", k=1)
    refs = cache / "models--owner--name/refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (refs / "v1").write_text(OLDER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch.cache_clear()
    yield cache
    fetch.cache_clear()


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("hf:o/n", Address("o/n", None, "")),
        ("hf:o/n/", Address("o/n", None, "")),
        ("hf:o-1/n.2@main", Address("o-1/n.2", "main", "")),
        ("hf:o/n@v1.0/a/b.pt", Address("o/n", "v1.0", "a/b.pt")),
        ("hf:o/n/layers.3/", Address("o/n", None, "layers.3")),
    ],
)
def test_an_address_has_three_parts(typed, wanted):
    assert is_address(typed)
    assert parse_address(typed) == wanted


@pytest.mark.parametrize(
    "typed",
    [
        "hf:",
        "hf:n",
        "hf:/o/n",
        "hf:o//n",
        "hf:o/n@",
        "hf:o/n@../x",
        "hf:o/n/../../x",
        "hf:../n",
        "hf:o/n/.git",
        "hf:o/n a",
        "hf:o/n\n",
        "hf:o/n@a@b",
        "hf:https://huggingface.co/o/n",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_asked_for(typed):
    with pytest.raises(ValueError, match="wanted hf:owner/name, hf:owner/name@revision or either"):
        fetch(typed)


@pytest.mark.parametrize(
    ("typed", "commit", "inside", "k"),
    [
        ("hf:owner/name/layers.3", COMMIT, "layers.3", 2),
        ("hf:owner/name@main/layers.3", COMMIT, "layers.3", 2),
        ("hf:owner/name@v1/layers.3", OLDER, "layers.3", 1),
        (f"hf:owner/name@{OLDER}/layers.3", OLDER, "layers.3", 1),
        ("hf:owner/name/deep/layers.5", COMMIT, "deep/layers.5", 3),
        ("hf:owner/name/layers.3/sae.safetensors", COMMIT, "layers.3/sae.safetensors", 2),
    ],
)
def test_what_is_in_the_cache_needs_no_network(cache, typed, commit, inside, k):
    path, found = find(typed)
    assert (path, found) == (cache / "models--owner--name/snapshots" / commit / inside, commit)
    assert load_sae(typed).k == k


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "typed",
    ["hf:owner/other/layers.3", "hf:owner/name@v2/layers.3", f"hf:owner/name@{'a' * 40}/layers.3"],
)
def test_what_is_neither_cached_nor_reachable_is_told_in_two_lines(typed):
    with pytest.raises(FileNotFoundError) as caught:
        load_sae(typed)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{typed}: found neither in the cache of the Hub nor on the Hub; ")
    assert second.startswith("LocalEntryNotFoundError: ")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("typed", "inside"),
    [
        ("hf:owner/name", "its own folder"),
        ("hf:owner/name/deep", "deep"),
        ("hf:owner/name/layers.4", "layers.4"),
    ],
)
def test_a_folder_without_an_autoencoder_is_not_searched_for_what_happens_to_be_cached(
    typed, inside
):
    with pytest.raises(FileNotFoundError, match=f": found none of .* in {inside}, nor a"):
        load_sae(typed)


def test_only_the_files_of_one_autoencoder_are_fetched_and_once(cache, monkeypatch):
    asked = []
    snapshot = cache / "models--owner--name/snapshots" / COMMIT

    def download(repository, *, revision, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append((repository, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        assert fetch("hf:owner/name@v3/layers.3") == (snapshot / "layers.3", COMMIT)
    ((repository, revision, patterns),) = asked
    assert (repository, revision) == ("owner/name", "v3")
    assert {"layers.3/sae.safetensors", "layers.3/cfg.json", "layers.3/ae.pt"} <= set(patterns)
    assert not any("*" in pattern for pattern in patterns)
    assert all(pattern.startswith("layers.3") or "/" not in pattern for pattern in patterns)
    with pytest.raises(FileNotFoundError):
        fetch("hf:owner/name")
    assert asked[1][1] is None
    assert {"sae.pt", "cfg.json"} <= set(asked[1][2])


@pytest.mark.usefixtures("cache")
def test_a_hub_that_cannot_be_reached_leaves_the_cache(monkeypatch):
    real = huggingface_hub.snapshot_download

    def download(*given, **options):
        if not options.get("local_files_only"):
            raise RuntimeError("proxy\nsays no")
        return real(*given, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("hf:owner/name/layers.3")[1] == COMMIT
    with pytest.raises(
        FileNotFoundError, match=r"fetch it where there is a network\nRuntimeError: proxy$"
    ):
        fetch("hf:owner/other")


PROGRAM = """
import sys
from assay.io.saes import hub
import assay.settings, assay.preflight, assay.commands, assay.sae
print("huggingface_hub" in sys.modules)
path, commit = hub.find("hf:owner/name/layers.3")
print(commit)
from huggingface_hub import constants
print(constants.HF_HUB_DISABLE_TELEMETRY)
"""


def test_the_hubs_client_is_imported_where_it_is_used_and_sends_no_statistics(cache):
    kept = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={name: value for name, value in kept.items() if name != "DO_NOT_TRACK"}
        | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["False", COMMIT, "True"]


def test_a_path_on_a_disk_is_left_alone():
    assert find("runs/hf:x") == (Path("runs/hf:x"), None)
    assert not is_address(Path("models") / "hf:owner")
    assert hub.is_address(Path("hf:owner/name"))
