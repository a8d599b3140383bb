"""What the benchmarks make that users may take up, and that those of `make bench` can be run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from assay import load_sae
from assay.io.datasets import find_shards
from assay.io.shards import Shards
from assay.parameters import DictionaryParameters

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("activation", "k"), [("relu", None), ("topk", 4)])
def test_the_small_autoencoder_is_what_its_script_says(planted, tmp_path, activation, k):
    command = [
        sys.executable,
        str(BENCHMARKS / "train_sae.py"),
        "--shards",
        str(planted[0]),
        "--layer",
        "5",
        "--activation",
        activation,
    ]
    command += ["--features", "96", "--steps", "150", "--k", "4", "--l1", "0.05"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    ((name, options),) = yaml.safe_load(ended.stdout).items()
    dictionary = DictionaryParameters.model_validate(options)
    assert (name, dictionary.layers) == (f"sae-{activation}", (5,))
    assert dictionary.sae is not None
    sae = load_sae(tmp_path / dictionary.sae.replace("{layer}", "layer_5"))
    assert sae.k == k
    x = torch.cat(list(Shards(planted[1]).batches(layer=5, batch_size=1000)))
    left = (x - sae.reconstruct(x)).double().square().sum()
    assert float(left / (x.double() - x.double().mean(0)).square().sum()) < 0.9


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("memory.py", "--few 640 --many 1280 --d 16", "MB more for 2 times the tokens"),
        ("read.py", "--gb 0.01 --rounds 1", "each pass read one layer's 2097152 bytes, no more"),
    ],
)
def test_a_benchmark_on_small_shards_ends(tmp_path, script, options, said):
    command = [sys.executable, str(BENCHMARKS / script), *options.split(), "--dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert said in ended.stdout
    assert not list(tmp_path.iterdir())


def test_runs_are_the_same_where_no_bit_of_their_results_differs(tmp_path, monkeypatch, capsys):
    def write(run: str, center: float) -> Path:
        folder = tmp_path / run / "data/06_models/kmeans.safetensors" / f"2026-11-28T0{run}.00"
        folder.mkdir(parents=True)
        save_file({"centers": torch.tensor([0.1, center])}, folder / "kmeans.safetensors")
        table = tmp_path / run / "data/08_reporting/baselines.csv"
        table.parent.mkdir()
        table.write_text("nmse\n0.1\n")
        pairs = pd.DataFrame({"name": ["a", "b"], "ce": [0.5, center]})
        pairs.to_parquet(tmp_path / run / "data/pairs.parquet")
        return tmp_path / run / "data"

    def compare(first: Path, second: Path) -> tuple[bool, str]:
        script = BENCHMARKS / "same_results.py"
        monkeypatch.setattr(sys, "argv", [str(script), str(first), str(second)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return bool(ended.value.code), capsys.readouterr().out

    first = write("1", 0.2)
    same = (False, "3 results with 4 values compared\nall the same, to the bit\n")
    assert compare(first, write("2", 0.2)) == same
    differs, said = compare(first, write("3", float(np.nextafter(np.float32(0.2), np.float32(1)))))
    assert differs
    assert "/06_models/kmeans.safetensors/kmeans.safetensors: centers differs" in said
    assert "/pairs.parquet: ce differs" in said
    assert "name" not in said
    assert compare(tmp_path / "none", tmp_path / "none")[0]


def test_what_is_measured_of_recording_images_is_a_recording(tmp_path):
    pytest.importorskip("transformers")
    extract = runpy.run_path(str(BENCHMARKS / "extract.py"))
    images = extract["open_images"](extract["make_images"](tmp_path / "images", 2))
    assert extract["measure_decoding"](images) > 1
    model = extract["make_model"](tmp_path / "model", num_hidden_layers=12, hidden_size=24)
    clock, cores, bare = extract["measure_loop"](images, model, tmp_path, 2, None)
    assert (len(clock), len(cores)) == (2, 2)
    assert bare > 0
    for number in range(2):  # each round makes one
        shards = Shards(find_shards(tmp_path / f"recorded-{number}"))
        assert (shards.n_examples, shards.metadata.layers) == (2, (5, 11))
