"""What `slurm.yml` says of the jobs, typed."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from kedro.config import MissingConfigException
from kedro.framework.project import settings
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from assay.configuration import ConfigLoader

OWN = (
    "array",
    "chdir",
    "dependency",
    "job-name",
    "kill-on-invalid-dep",
    "ntasks",
    "open-mode",
    "output",
    "requeue",
    "signal",
)
"""Options of sbatch that the scripts have a use of their own for."""


def _check_word(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[^\s'\"\\#$`]+", value):
        raise ValueError(f"found {value!r}, want one word, without quotes")
    return value


def _check_time(value: int | str) -> int | str:
    if isinstance(value, str) and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}|UNLIMITED", value):
        raise ValueError(f"found {value!r}, want minutes, or text such as '12:00:00' or '2-12'")
    return value


def _seconds(limit: int | str) -> float:
    """A limit as Slurm reads it: minutes, minutes:seconds or hours:minutes:seconds; after days,
    hours first.
    """
    if limit == "UNLIMITED":
        return math.inf
    days, dash, rest = str(limit).rpartition("-")
    numbers = [*map(int, rest.split(":"))]
    if not dash and len(numbers) < 3:
        numbers.insert(0, 0)
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds


Word = Annotated[str, AfterValidator(_check_word)]
Count = Annotated[int, Field(ge=1)]


class SlurmOptions(BaseModel):
    """The jobs' options, by the names that sbatch has for them; what is null, Slurm decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: Word | None = None
    account: Word | None = None
    time: Annotated[int | str, AfterValidator(_check_time)] | None = None
    """The limit of a job, in minutes or as Slurm writes it. A job that reaches it saves itself and
    is queued again.
    """
    cpus_per_task: Count = 4
    """CPUs of a job, and the threads of its numerics."""
    gpus: Count | Word | None = None
    """GPUs of a job that records or fits: a number, or `h100:1`."""
    mem: Count | Word | None = None
    """Memory of a job: MiB, or text such as 64G."""
    parallel: Count | None = None
    """Layers that run at once at the most; null: as many as there is room for."""
    ranks: Count = 1
    """Processes that share a layer's work on one node."""
    signal_seconds: Annotated[int, Field(ge=1, lt=2**16)] = 120
    """How long before its limit a job is asked to save itself."""
    setup: list[str] = Field(default_factory=list)
    """Lines of shell before the run: modules, a virtual environment."""
    extra: dict[Word, Word | int | None] = Field(default_factory=dict)
    """Further options of sbatch by their long names; null: without a value."""

    @model_validator(mode="after")
    def _are_of_use(self) -> SlurmOptions:
        names = {name.replace("_", "-") for name in SlurmOptions.model_fields} | {*OWN}
        taken = sorted({name.lstrip("-") for name in self.extra} & names)
        if taken:
            raise ValueError(f"extra has {', '.join(taken)}, which the scripts set themselves")
        if self.ranks > self.cpus_per_task:
            raise ValueError(
                f"found ranks {self.ranks} and cpus_per_task {self.cpus_per_task}, want a CPU for"
                " each rank at least"
            )
        if self.time is not None and _seconds(self.time) <= self.signal_seconds:
            minutes = f"{self.time} min" if isinstance(self.time, int) else repr(self.time)
            raise ValueError(
                f"found time {minutes} and signal_seconds {self.signal_seconds}, want a limit"
                " that is longer than that: a job would be asked to stop as it starts"
            )
        return self


def read_options(project: Path, environment: str | None) -> SlurmOptions:
    """The options of an environment: what its `slurm.yml` names, and conf/base's for the rest.

    Raises:
        ValueError: one line a fault: an unknown key, or a value that is none.
    """
    loader = ConfigLoader(str(project / "conf"), env=environment, **settings.CONFIG_LOADER_ARGS)
    loader.config_patterns["slurm"] = ["slurm*", "slurm*/**", "**/slurm*"]
    try:
        return SlurmOptions.model_validate({**loader["slurm"]})
    except MissingConfigException:
        return SlurmOptions()
    except ValidationError as error:
        # A value that may be of several kinds has a fault for each: of them ours says the most.
        faults: dict[Any, Any] = {}
        for fault in error.errors():
            if fault["loc"][:1] not in faults or fault["type"] == "value_error":
                faults[fault["loc"][:1]] = fault
        raise ValueError("\n".join(map(_explain, faults.values()))) from None


def _explain(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"][:1]))
    known = SlurmOptions.model_fields
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        return f"slurm.yml: unknown key `{name}`: {hint}There are {', '.join(known)}."
    if fault["type"] == "value_error":
        return f"slurm.yml: {f'`{name}`: ' if name else ''}{fault['ctx']['error']}."
    return f"slurm.yml: `{name}` is {fault['input']!r}: {fault['msg']}."
