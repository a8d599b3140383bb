"""Project settings, read by Kedro before anything else of the project."""

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import yaml
from kedro.framework.project import LOGGING
from kedro.utils import find_kedro_project

# First of all, since on a cold disk the imports that follow take a minute.
if sys.argv[1:2] == ["run"] and "--help" not in sys.argv:
    print("Loading Assay ...", flush=True)  # noqa: T201
    # Ctrl-C within them ends the process as SIGTERM does, and not with sixty lines. The run, when
    # it begins, heeds both.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

PROJECT = find_kedro_project(Path.cwd()) or Path.cwd()

# Kedro looks for it in the working folder alone, and else tells everything that it does.
if not Path("conf/logging.yml").exists() and "KEDRO_LOGGING_CONFIG" not in os.environ:
    with suppress(FileNotFoundError):
        LOGGING.configure(
            yaml.safe_load((PROJECT / "conf/logging.yml").read_text(encoding="utf-8"))
        )

# No usage statistics leave this machine. These are read when MLflow, Kedro's plugin and the Hub's
# client are imported, so they come first.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("KEDRO_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# What MLflow does not take is said in one line, by us, not with its traceback and urllib3's for
# each try.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
# Nor are two lines for each run that it closes on a server, with the URI's password in them.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
# The tries of a request that fails take 5 s: less than a run waits for MLflow, so that it can say
# what is wrong.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

# Threads that spin while they wait make torch many times slower where cores are shared, and gain
# nothing where they are not.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Absolute, so that a run from another folder does not start a second database; `mlflow ui` opens
# the same file. A URI of a database cannot hold a question mark in its path; from below the project
# the relative one has none.
if "MLFLOW_TRACKING_URI" not in os.environ:
    database = str(PROJECT / "mlflow.db")
    os.environ["MLFLOW_TRACKING_URI"] = (
        f"sqlite:///{os.path.relpath(database) if '?' in database else database}"
    )
# Where MLflow's files lie if its database is spoken to directly, not through a server.
os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", (PROJECT / "mlruns").as_uri())

# MLflow warns, whatever the filters say, when kedro-mlflow's model class is defined: it is defined
# here, unheard.
with warnings.catch_warnings(record=True):
    import kedro_mlflow.mlflow  # noqa: F401

from assay.configuration import ConfigLoader  # noqa: E402
from assay.late import LateHooks  # noqa: E402

HOOKS = (
    LateHooks(
        "assay.configuration:ConfigurationHook",
        "assay.work:WorkHook",
        "assay.tracking:TrackingHook",
    ),
)
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry", "kedro_mlflow")  # our hook calls the latter's
CONFIG_LOADER_CLASS = ConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment changes what it names and keeps the rest of the section.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
}
