"""The jobs of a project, in their order, and their scripts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from assay.plan import Plan
from assay.slurm.options import SlurmOptions

ENDING = """\
trap : TERM # for the run, which saves itself; this script outlives it
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --unbuffered COMMAND # no signal without srun
code=$?
# 143: asked to stop, it has saved itself. A job that is RUNNING was not cancelled, nor queued again
# by Slurm; `incomplete` has Slurm look once more, since that may come to be in between.
if [ $code = 143 ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue incomplete "$job" && exec sleep 600
fi
exit $code
"""
"""How a job's script ends."""


@dataclass(frozen=True)
class Job:
    """A job, which waits for the one before it."""

    step: str
    """Its part of the work, and the end of its name in Slurm."""
    about: str
    """What it does, for people."""
    arguments: str = ""
    """What of the pipelines it runs: the end of its `kedro run`, as a shell reads it."""
    layers: tuple[int, ...] = ()
    """One for each element, where it is an array."""
    computes: bool = False
    """Whether it has a use for a GPU."""
    after: str | None = None
    """The step that has to be done before it begins."""


def plan_jobs(plan: Plan) -> list[Job]:
    """What has to be done before the layers, the layers side by side, and the report."""
    jobs = []
    if plan.digits:
        jobs.append(
            Job("digits", "The embedded default's shards, once for all.", " --pipelines=digits")
        )
    if plan.extracted:
        about = "What is recorded from images, once for all layers."
        jobs.append(Job("extract", about, " --pipelines=extract", computes=True))
    jobs.append(
        Job(
            "layers",
            "The layers, side by side.",
            ' --namespaces="layer_${layers[SLURM_ARRAY_TASK_ID]}"',
            plan.layers,
            computes=True,
        )
    )
    jobs.append(Job("report", "The table and the report of all layers."))
    afters = [None, *(job.step for job in jobs)]
    return [replace(job, after=after) for job, after in zip(jobs, afters, strict=False)]


def split(job: Job, size: int) -> list[Job]:
    """A job as several whose arrays have ``size`` elements at the most."""
    if len(job.layers) <= size:
        return [job]
    starts = range(0, len(job.layers), size)
    return [replace(job, layers=job.layers[start : start + size]) for start in starts]


def render(job: Job, name: str, options: SlurmOptions, arguments: Sequence[str]) -> str:
    """A job's script.

    Args:
        job: the job.
        name: of the submission: the beginning of the job's name in Slurm.
        options: of all jobs.
        arguments: of `kedro run`, before the job's own.
    """
    ranks = options.ranks if job.layers else 1
    program = "kedro"
    if ranks > 1:  # by torchrun, which would kill what has not saved itself in 30 s
        patience = f"--shutdown-timeout={options.signal_seconds}"
        program = f"python -m assay.ranks --nproc-per-node={ranks} {patience}"
    after = "" if job.after is None else f" --dependency=afterok:ID-OF-{job.after.upper()}"
    threads = "$SLURM_CPUS_PER_TASK" if ranks == 1 else f"$((SLURM_CPUS_PER_TASK / {ranks}))"
    lines = [
        "#!/bin/bash",
        f"# {job.about} By hand: sbatch{after} scripts/slurm_{job.step}.sh",
        *(f"#SBATCH --{line}" for line in _directives(job, name, options)),
        *options.setup,
        f"export OMP_NUM_THREADS={threads}",
    ]
    if job.layers:
        lines.append(f"layers=({' '.join(map(str, job.layers))})")
        lines.append("job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID may name all")
    else:
        lines.append("job=$SLURM_JOB_ID")
    run = f"{shlex.join([*program.split(), 'run', *arguments])}{job.arguments}"
    lines += ENDING.replace("COMMAND", run).splitlines()
    return "\n".join(lines) + "\n"


def _directives(job: Job, name: str, options: SlurmOptions) -> Iterator[str]:
    yield f"job-name={name}-{job.step}"
    if job.layers:
        most = "" if options.parallel is None else f"%{options.parallel}"
        yield f"array=0-{len(job.layers) - 1}{most}"
    yield "requeue"
    yield "open-mode=append"
    yield "kill-on-invalid-dep=yes"
    yield f"signal=TERM@{options.signal_seconds}"
    asked = options.model_dump(include={"partition", "account", "time", "cpus_per_task", "mem"})
    if job.computes:
        asked["gpus"] = options.gpus
    for option, value in asked.items():
        if value is not None:
            yield f"{option.replace('_', '-')}={value}"
    for option, value in options.extra.items():
        yield option if value is None else f"{option}={value}"
