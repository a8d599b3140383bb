"""The numerics need torch and numpy only: they also run on a machine that has nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import assay.numerics

FOLDER = Path(assay.numerics.__file__).parent
# The fused kernels are imported where there are CUDA and Triton.
FILES = [path for path in FOLDER.rglob("*.py") if not path.stem.startswith("fused")]
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
)
FORBIDDEN = [
    "kedro",
    "kedro_datasets",
    "kedro_mlflow",
    "mlflow",
    "pandas",
    "pydantic",
    "sklearn",
    "safetensors",
    "tqdm",
]

PROGRAM = f"""
import sys
for name in {[*FORBIDDEN, "assay.io", "assay.pipelines", "assay.parameters"]}:
    sys.modules[name] = None  # importing it raises ImportError
import importlib
for name in {MODULES}:
    importlib.import_module("assay.numerics." + name)
import torch
from assay.numerics.dictionary import open_dictionary
from assay.numerics.pca import StreamingPCA
from assay.numerics.probe import LogisticProbe1d
tokens = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
pca = StreamingPCA().partial_fit(tokens)
batch = open_dictionary("pca-dense", pca.state_dict()).encode(tokens)
probe = LogisticProbe1d().fit(batch["values"], (tokens[:, 0] > 0).long(), 2)
print("converged", bool(probe.converged_.all()))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    source = Path(assay.numerics.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_numerics_module_imports_and_works_without_kedro_mlflow_or_pandas():
    assert {"kmeans", "kmeans.step", "pca", "probe", "probe.solver", "dictionary"} <= set(MODULES)
    ended = run(PROGRAM)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "converged True"


def test_the_block_blocks():
    ended = run("import sys; sys.modules['kedro'] = None; import assay.pipeline_registry")
    assert ended.returncode != 0
    assert "ModuleNotFoundError" in ended.stderr
    assert "kedro" in ended.stderr.splitlines()[-1]
