"""MLflow, as one Kedro hook: a parent run a `kedro run`, which kedro-mlflow opens, and a child for
each (layer, encoding) that is probed.

Children are made and written by explicit id through a client, never by MLflow's stack of active
runs, so that threads cannot mix them up; and by a thread of their own beside the work, since a
database takes its time for each request (`writer.py`).
"""

from assay.tracking.hook import TrackingHook, close_interrupted_runs, finish_taken_up

__all__ = ["TrackingHook", "close_interrupted_runs", "finish_taken_up"]
