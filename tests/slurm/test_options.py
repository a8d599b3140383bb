"""`slurm.yml`: what it may say."""

import shutil
from pathlib import Path

import pytest

from assay.slurm.options import SlurmOptions, read_options

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    for environment in ("base", "ade20k", "local"):
        (tmp_path / "conf" / environment).mkdir(parents=True)
    shutil.copy(ROOT / "conf/base/slurm.yml", tmp_path / "conf/base/slurm.yml")
    return tmp_path


def write(project, text, environment="base"):
    (project / "conf" / environment / "slurm.yml").write_text(text)


def test_the_file_that_is_there_says_the_defaults(project):
    assert read_options(project, None) == SlurmOptions()
    (project / "conf/base/slurm.yml").unlink()
    assert read_options(project, None) == SlurmOptions()


def test_an_environment_says_what_is_different_there(project):
    write(project, "partition: cpu\nmem: 8G\n")
    write(project, "partition: gpu\ngpus: 1\n", "ade20k")
    options = read_options(project, "ade20k")
    assert (options.partition, options.gpus, options.mem) == ("gpu", 1, "8G")
    assert read_options(project, None).partition == "cpu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "partitoin: main",
            "slurm.yml: unknown key `partitoin`: did you mean `partition`? There are partition, account, time, cpus_per_task, gpus, mem, parallel, ranks, signal_seconds, setup, extra.",
        ),
        ("partition: 'a b'", "slurm.yml: `partition`: found 'a b', want one word, without quotes."),
        ("time: 2 days", "slurm.yml: `time`: found '2 days', want minutes, or text such as '12:00:00' or '2-12'."),
        (
            "time: 2",
            "slurm.yml: found time 2 min and signal_seconds 120, want a limit that is longer than that: a job would be asked to stop as it starts.",
        ),
        (
            "time: '00:02:00'",
            "slurm.yml: found time '00:02:00' and signal_seconds 120, want a limit that is longer than that: a job would be asked to stop as it starts.",
        ),
        ("mem: 64 G", "slurm.yml: `mem`: found '64 G', want one word, without quotes."),
        ("cpus_per_task: 0", "slurm.yml: `cpus_per_task` is 0: Input should be greater than or equal to 1."),
        ("ranks: 8", "slurm.yml: found ranks 8 and cpus_per_task 4, want a CPU for each rank at least."),
        ("parallel: true", "slurm.yml: `parallel` is True: Input should be a valid integer."),
        ("extra: {array: 0-3}", "slurm.yml: extra has array, which the scripts set themselves."),
        ("extra: {'--time': 3}", "slurm.yml: extra has time, which the scripts set themselves."),
        ("setup: module load x", "slurm.yml: `setup` is 'module load x': Input should be a valid list."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(project, text, said):
    write(project, text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_options(project, None)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (180, 10800),
        ("180", 10800),
        ("2:30", 150),
        ("12:00:00", 43200),
        ("1-12", 36 * 3600),
        ("0-0:05", 300),
        ("0-00:02:05", 125),
    ],
)
def test_limits_are_written_as_slurm_writes_them(time, seconds):
    assert SlurmOptions(time=time, signal_seconds=min(seconds, 2**16) - 1).time == time
    if seconds < 2**16:
        with pytest.raises(ValueError, match="want a limit that is longer"):
            SlurmOptions(time=time, signal_seconds=seconds)
    assert SlurmOptions(time="UNLIMITED").time == "UNLIMITED"


def test_a_file_that_would_not_be_read_is_told(project):
    (project / "conf/base/slrum.yml").write_text("partition: gpu\n")
    with pytest.raises(ValueError, match=r"slrum\.yml would not be read: call it slurm\.yml"):
        read_options(project, None)
