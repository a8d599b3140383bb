"""A project's layers as jobs of Slurm: `kedro slurm`.

Slurm queues, preempts and tracks. What is added is the order of the jobs, digits or images ->
layers -> report; the scripts that have a stopped job go on; and one run of MLflow for all of them.
"""
