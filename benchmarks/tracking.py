"""What MLflow on SQLite adds to a run of 6 layers x 8 rows on the embedded default: wall-clock with
it over that without.

    python benchmarks/tracking.py [--rounds 3]

Runs `kedro run --force` in a copy of the configuration, in turns with tracking and with
kedro-mlflow told to leave the pipeline alone. What is printed are the ratio of the best rounds and
that within each round.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = "[0,1,2,3,4,5]"
PARAMETERS = f"layers:{LAYERS},digits.n_blocks:6,digits.layers:{LAYERS},pca.topk:[1,2,4,8,16,64]"
UNTRACKED = "tracking: {disable_tracking: {disable_autologging: true, pipelines: [__default__]}}\n"


def make_project(root: Path) -> Path:
    """A copy of the configuration, with an environment in which nothing is tracked."""
    shutil.copytree(ROOT / "conf", root / "conf", ignore=lambda *_: ["local"])
    for environment, text in {"local": "", "untracked": UNTRACKED}.items():
        (root / "conf" / environment).mkdir()
        (root / "conf" / environment / "mlflow.yml").write_text(text or "tracking: {}\n")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(ROOT / name, root / name)
    (root / "src").mkdir()
    return root


def run(project: Path, environment: str) -> float:
    """Seconds of a whole run."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW", "KEDRO"))
    }
    command = [
        str(Path(sys.executable).parent / "kedro"),
        "run",
        "--force",
        f"--env={environment}",
        f"--params={PARAMETERS}",
    ]
    began = time.perf_counter()
    subprocess.run(command, cwd=project, env=variables, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Print what tracking adds to a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        run(project, "local")  # the database, and what is compiled on first use
        found: dict[str, list[float]] = {"local": [], "untracked": []}
        for _ in range(arguments.rounds):
            for environment, seconds in found.items():
                seconds.append(run(project, environment))
        database = (project / "mlflow.db").stat().st_size
    each = ", ".join(f"{a / b:.2f}" for a, b in zip(*found.values(), strict=True))
    best = min(found["local"]) / min(found["untracked"])
    sys.stdout.write(
        f"with MLflow on SQLite: {best:.3f} of the time without (best against best); by round"
        f" {each}\n"
    )
    sys.stdout.write(
        f"the database is {database / 2**20:.1f} MiB after {arguments.rounds + 1} runs of 6 layers"
        " x 8 rows\n"
    )


if __name__ == "__main__":
    main()
