"""Project settings, read by Kedro before anything else of the project."""

import os
import warnings
from pathlib import Path

from kedro.utils import find_kedro_project

PROJECT = find_kedro_project(Path.cwd()) or Path.cwd()

# No usage statistics leave this machine. MLflow and Kedro's plugin read these when they are imported.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("KEDRO_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

# Absolute, so that a run from another folder does not start a second database; `mlflow ui` opens the same file.
os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{PROJECT / 'mlflow.db'}")

# kedro-mlflow's own model class makes MLflow say this at every start.
warnings.filterwarnings("ignore", message=".*Add type hints to the `predict` method", category=UserWarning)

from assay.configuration import ConfigurationHook  # noqa: E402
from assay.freshness import FreshnessHook  # noqa: E402
from assay.tracking import TrackingHook  # noqa: E402

HOOKS = (ConfigurationHook(), FreshnessHook(), TrackingHook())
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)
CONFIG_LOADER_ARGS = {"base_env": "base", "default_run_env": "local"}
