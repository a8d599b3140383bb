"""Damaged and random files of every library: a ValueError or a FileNotFoundError, and no other."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from assay.io.saes import Settings, read_sae
from assay.sae import open_sae
from overcomplete_stubs import autoencoder, dictionary, linear, save
from slow_autoencoder import D, N, weights

Made = tuple[Path, Settings]


def _saev(folder: Path) -> Made:
    state = io.BytesIO()
    torch.save(weights(), state)
    cfg = {
        "d_model": D,
        "d_sae": N,
        "activation": {"cls": "TopK", "params": {"top_k": 3}},
    }
    header = {"schema": 5, "cfg": cfg, "commit": "x", "lib": "1"}
    (folder / "sae.pt").write_bytes(json.dumps(header).encode() + b"\n" + state.getvalue())
    return folder, Settings()


def _saelens(folder: Path) -> Made:
    said = {"architecture": "standard", "d_in": D, "d_sae": N, "metadata": {}}
    said |= {"apply_b_dec_to_input": True, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(said))
    save_file(weights(), folder / "sae_weights.safetensors")
    return folder, Settings()


def _sparsify(folder: Path) -> Made:
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": 3}))
    found = weights()
    tensors = {"encoder.weight": found["W_enc"].T.contiguous(), "encoder.bias": found["b_enc"]}
    save_file(
        tensors | {name: found[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors"
    )
    return folder, Settings()


def _prisma(folder: Path) -> Made:
    said = {"architecture": "standard", "d_in": D, "d_sae": N, "activation_fn_str": "relu"}
    said |= {"normalize_activations": "none", "hook_point_layer": 3, "layer_subtype": "hook_resid"}
    (folder / "config.json").write_text(json.dumps(said))
    torch.save(weights(), folder / "weights.pt")
    return folder, Settings()


def _dictionary_learning(folder: Path) -> Made:
    found = weights()
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": N, "k": 3}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    state = {"encoder.weight": found["W_enc"].T.contiguous(), "encoder.bias": found["b_enc"]}
    state |= {"decoder.weight": found["W_dec"].T.contiguous(), "b_dec": found["b_dec"]}
    torch.save(state | {"k": torch.tensor(3), "threshold": torch.tensor(1.0)}, folder / "ae.pt")
    return folder, Settings()


def _module() -> Any:
    found = weights()
    encoder = linear(found["W_enc"].T.contiguous(), found["b_enc"], torch.nn.BatchNorm1d(N))
    return autoencoder("topk_sae.TopKSAE", encoder, dictionary(found["W_dec"]), top_k=3)


def _overcomplete(folder: Path) -> Made:
    save(_module(), folder / "model.pt")
    return folder, Settings()


def _overcomplete_state(folder: Path) -> Made:
    torch.save(_module().state_dict(), folder / "model.pt")
    return folder, Settings(activation="topk", k=3, normalization="max_l2")


FORMATS: dict[str, Callable[[Path], Made]] = {
    "saev": _saev,
    "SAELens": _saelens,
    "sparsify": _sparsify,
    "ViT-Prisma": _prisma,
    "dictionary_learning": _dictionary_learning,
    "overcomplete": _overcomplete,
    "overcomplete's state": _overcomplete_state,
}


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """Some bits are others; most often at the beginning or the end, where the structure is."""
    found = bytearray(raw)
    for _ in range(draw.choice([1, 2, 20])):
        near = draw.choice([len(found), min(len(found), 400), -min(len(found), 900)])
        at = draw.randrange(near) if near > 0 else len(found) + draw.randrange(near, 0)
        found[at] ^= 1 << draw.randrange(8)
    return bytes(found)


def truncated(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def repeated(raw: bytes, draw: random.Random) -> bytes:
    begin, length, to = (draw.randrange(len(raw)) for _ in range(3))
    return raw[:to] + raw[begin : begin + draw.choice([1, 8, length])] + raw[to:]


def cut(raw: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(raw))
    return raw[:begin] + raw[begin + draw.choice([1, 8, 200]) :]


def random_bytes(raw: bytes, draw: random.Random) -> bytes:
    return draw.choice([b"", b"PK\x03\x04", b"{", raw[:60]]) + draw.randbytes(draw.randrange(3000))


def nulled(raw: bytes, draw: random.Random) -> bytes:
    """One of the values of a JSON text is another."""
    text = raw.decode(errors="replace")
    values = [at for at, character in enumerate(text) if character == ":"]
    at = draw.choice(values) if values else 0
    end = min((found for c in ",}" if (found := text.find(c, at)) > 0), default=at)
    others = ["null", "-1", "0", "1e999", '"x"', "[]", "{}", "true", "3.5", "[[[]]]", "9" * 30]
    return (text[: at + 1] + draw.choice(others) + text[end:]).encode(errors="replace")


ANY = (flipped, truncated, repeated, cut, random_bytes)


def within(raw: bytes, draw: random.Random) -> bytes:
    """An entry of an archive is damaged, and the archive is whole."""
    start = raw.index(b"PK\x03\x04")
    with zipfile.ZipFile(io.BytesIO(raw[start:])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice([name for name in entries if name.endswith(("data.pkl", "/0", "byteorder"))])
    entries[name] = draw.choice(ANY)(entries[name], draw)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return raw[:start] + file.getvalue()


def damage(folder: Path, draw: random.Random) -> None:
    """Damage one of the files of a folder."""
    file = draw.choice(sorted(folder.iterdir()))
    raw = file.read_bytes()
    changes = [*ANY, within, within, within] if file.suffix == ".pt" else [*ANY, nulled, nulled]
    file.write_bytes(draw.choice(changes)(raw, draw))


def is_refused(made: Made) -> bool:
    """Whether what lies there is refused; any other error is raised."""
    folder, settings = made
    try:
        open_sae(read_sae(folder, settings))
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    else:
        return False
    assert said.isprintable()
    return True


@pytest.mark.parametrize("library", FORMATS)
def test_damaged_files_are_refused_or_read(tmp_path: Path, library: str) -> None:
    draw = random.Random(library)
    made = FORMATS[library](tmp_path)
    assert not is_refused(made)
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused = 0
    for _ in range(100):
        damage(tmp_path, draw)
        refused += is_refused(made)
        for file, raw in whole.items():
            file.write_bytes(raw)
        assert sorted(tmp_path.iterdir()) == sorted(whole)
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("sae_weights.safetensors", (10**9).to_bytes(8, "little") + b"{}"),
        ("sae_weights.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
        ("sae.safetensors", (10**9).to_bytes(8, "little") + b"{}"),
        ("sae.pt", b'{"schema": 5' + b" " * 2**21),
        ("sae.pt", b"[" * 2**19 + b"\n"),
        ("ae.pt", b"PK\x03\x04" + b"\xff" * 1000),
        ("model.pt", b""),
        ("weights.pt", b"\x80\x02."),
    ],
)
def test_headers_that_claim_more_than_the_file_has(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    for config in ("cfg.json", "config.json"):
        (tmp_path / config).write_text("{}")
    assert is_refused((tmp_path, Settings()))


def test_a_configuration_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    made = _saelens(tmp_path)
    with (tmp_path / "cfg.json").open("r+b") as file:
        file.truncate(10**9)
    with pytest.raises(ValueError, match="has 1000000000 bytes, wanted at most 4194304"):
        read_sae(*made)
