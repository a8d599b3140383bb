"""What importing the commands costs, how a run ends, what `--force` begins anew, and the table in
the terminal.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from kedro.framework.cli.utils import KedroCliError
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Pipeline, node

import assay.cli
from assay.cli import _check_place, _ended_cleanly, _forget_begun, parse_params, run
from assay.io.datasets import CodesDataset, ShardsDataset
from assay.io.publish import resumable_folder
from assay.late import LateHooks

ROOT = Path(__file__).parents[1]


def test_parameters_that_cannot_be_read_are_an_error_of_the_command_line():
    context = click.Context(run)
    (option,) = (option for option in run.params if option.name == "params")
    assert parse_params(context, option, "layers:[3]") == {"layers": [3]}
    assert parse_params(context, option, {"layers": [3]}) == {"layers": [3]}  # from --config
    with pytest.raises(click.BadParameter, match="`latent_topk` is no key:value"):
        parse_params(context, option, "latent_topk")


def test_what_kedro_reads_for_any_command_imports_neither_torch_nor_the_stages():
    """`kedro --help` is quick, and `kedro run` says something before what takes long is imported."""
    heavy = (
        "{'torch', 'safetensors', 'plotly', 'sklearn', 'assay.io.shards',"
        " 'assay.pipelines.report.tables'}"
    )
    script = f"import sys, assay.settings, assay.cli; print({heavy} & {{*sys.modules}})"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "set()\n"


def test_hooks_are_imported_and_registered_when_a_session_begins():
    manager = _create_hook_manager()
    context: Any = SimpleNamespace(_hook_manager=manager)
    seen = []
    late = LateHooks("assay.configuration:ConfigurationHook", "assay.work:WorkHook")
    assert "hooks" not in vars(late)
    for hook in late.hooks:
        hook.after_context_created = lambda context, hook=hook: seen.append((context, hook))
    late.after_context_created(context)
    assert seen == [(context, hook) for hook in late.hooks]
    assert all(manager.is_registered(hook) for hook in late.hooks)
    # Kedro makes another context when the session runs, and calls them itself.
    late.after_context_created(context)
    assert seen == [(context, hook) for hook in late.hooks]


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    """pip's resolver took 21 s to say something else."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "python3.10"
    old.write_text(
        f"""#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 10, 12); exec(sys.argv[2])' "$@"\n"""
    )
    old.chmod(0o755)
    ended = subprocess.run(
        ["make", "run", f"PYTHON={old}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert (
        f"{old} is Python 3.10; wanted 3.11 to 3.13: name one, as in make run PYTHON=python3.12"
        in ended.stderr
    )
    assert not (tmp_path / ".venv").exists()
    shown = subprocess.run(
        ["make", "-n", "install"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "-m venv --clear .venv" in shown  # not the one of the Python that was refused
    assert "--quiet" not in shown


def test_commands_to_copy_work_in_any_shell():
    """zsh takes brackets for a pattern of files, and what follows # on a line that is typed for
    arguments.
    """
    blocks = []
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        blocks += re.findall(
            r"^(?:\w+=\S+ )?(?:kedro|assay|make|mlflow) .*$", text, flags=re.MULTILINE
        )
        blocks += re.findall(r"`((?:\w+=\S+ )?(?:kedro|assay|make|mlflow) [^`]*)`", text)
    assert len(blocks) > 10
    for command in blocks:
        assert not re.search(r"[][*?{}#]", re.sub(r"'[^']*'", "", command)), command


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_run_is_loading_ends_it_without_a_traceback(ignored):
    lines = [
        "import os, signal, sys",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignored else "",
        "sys.argv = ['kedro', 'run']",
        "import assay.settings",
        "os.kill(os.getpid(), signal.SIGINT)",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        0 if ignored else -signal.SIGINT,
        "Loading Assay ...\n",
        "",
    )


def test_below_the_projects_folder_the_log_is_the_projects_own():
    """Kedro looks for its configuration in the working folder, and tells of every dataset where
    there is none.
    """
    script = "import logging, assay.settings; logging.getLogger('kedro.io').info('loading')"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loading" not in ended.stdout + ended.stderr


def test_an_error_of_kedros_is_told_by_its_message(capsys):
    """It would have been `NoneType: None`."""
    ended = CliRunner().invoke(run, ["--load-versions=x"])
    assert (ended.exit_code, len(ended.stderr.splitlines())) == (1, 1)
    assert ended.stderr.startswith("Error: Expected the form of 'load_versions' to be")
    KedroCliError("bad").show()
    assert capsys.readouterr().err == "Error: bad\n"


@pytest.mark.parametrize(("command", "module"), [("lab", "jupyterlab"), ("notebook", "notebook")])
def test_jupyter_that_is_not_installed_is_told_with_what_installs_it(monkeypatch, command, module):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    ended = CliRunner().invoke(assay.cli.cli, ["jupyter", command])
    assert ended.exit_code == 1
    assert (
        ended.stderr
        == f"Error: {module} is not installed: {sys.executable} -m pip install {module}\n"
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("run: [1\n", "line 2, column 1: while parsing a flow sequence"),
        ("a: 1\n", "has no section `run` with options of `kedro run`"),
        ("run:\n", "has no section `run`"),
        ("run: {params: {kmeans: {seed: 010}}}\n", "010 is 8 in YAML"),
        ("run: {para: 1}\n", "Key `para` in provided configuration is not valid"),
    ],
)
def test_a_file_of_options_that_cannot_be_read_is_named(tmp_path, monkeypatch, text, wanted):
    monkeypatch.setattr(assay.cli, "_run", None)
    path = tmp_path / "options.yml"
    path.write_text(text)
    ended = CliRunner().invoke(run, [f"--config={path}"])
    assert ended.exit_code in (1, 2)
    assert wanted in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_file_of_options_is_what_would_be_typed(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(assay.cli, "_run", lambda **options: seen.update(options))
    (tmp_path / "options.yml").write_text(
        "run: {env: ade20k, params: {images: {path: ~/images}}}\n"
    )
    assert CliRunner().invoke(run, [f"--config={tmp_path / 'options.yml'}"]).exit_code == 0
    assert seen["env"] == "ade20k"
    assert seen["params"] == {"images": {"path": os.path.expanduser("~/images")}}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_run_that_is_stopped_exits_as_shells_have_it(monkeypatch, number, code):
    """A queue counts 1 as a failure, and drops the job."""
    monkeypatch.setattr(
        assay.cli, "_run", lambda **_: (os.kill(os.getpid(), number), time.sleep(5))
    )
    ended = CliRunner().invoke(run, [])
    assert (ended.exit_code, ended.stderr) == (
        code,
        "Stopped. The same command goes on from here.\n",
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_a_signal_came_to_never_counts_as_failed(monkeypatch):
    """Library code that the signal comes into may make another error of the interrupt."""

    def fail(**_):
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise click.ClickException("the connection is gone")

    monkeypatch.setattr(assay.cli, "_run", fail)
    ended = CliRunner().invoke(run, [])
    assert ended.exit_code == 143
    assert (
        ended.stderr
        == "Error: the connection is gone\nStopped. The same command goes on from here.\n"
    )


def test_a_run_that_fails_exits_with_1(monkeypatch):
    def fail(**_):
        raise click.ClickException("Parameter `kmeans.seed` is -1")

    monkeypatch.setattr(assay.cli, "_run", fail)
    ended = CliRunner().invoke(run, [])
    assert (ended.exit_code, ended.stderr) == (1, "Error: Parameter `kmeans.seed` is -1\n")


def test_force_forgets_what_was_begun_of_the_codes_that_it_makes(planted, tmp_path):
    def codes_of(encoding, shards):
        return CodesDataset(
            filepath=str(tmp_path), shards={"path": str(shards)}, encoding=encoding, layer="layer_3"
        )

    made, other = codes_of("kmeans-onehot", planted[0]), codes_of("pca-dense", planted[0])
    for folder in (made.folder, other.folder):
        partial = resumable_folder(folder, "what is written")
        partial.mkdir(parents=True)
        (partial / "values000000.bin").write_bytes(b"half")
    catalog = DataCatalog(
        {
            "made": made,
            "other": other,
            "memory": MemoryDataset(1),
            "early": codes_of("a", "nowhere"),
            "shards": ShardsDataset(filepath=str(tmp_path / "raw" / "fit")),
        }
    )
    resumable_folder(tmp_path / "raw" / "fit", "a recording").mkdir(parents=True)
    outputs = ["made", "memory", "early", "elsewhere", "shards"]
    _forget_begun(
        Pipeline([node(lambda codes: [codes] * 5, "other", outputs, name="encode")]), catalog
    )
    assert list((tmp_path / "raw").iterdir()) == []
    assert list(made.folder.parent.iterdir()) == []
    assert [path.name[:17] for path in other.folder.parent.iterdir()] == [".layer_3.partial-"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "models/pca.safetensors"),
        ValueError("bad"),
        DatasetError("bad"),
    ],
)
def test_bad_input_and_a_full_disk_are_told_and_not_traced(error):
    session: Any = None  # which it asks nothing
    with (
        pytest.raises(click.ClickException) as caught,
        _ended_cleanly(session, Pipeline([]), DataCatalog()),
    ):
        raise error
    assert caught.value.message == str(error)


@pytest.mark.parametrize(
    ("name", "odd"), [("od[1]d", "[ ]"), ("{a,b}", "{ }"), ("what?", "?"), ("a*", "*")]
)
def test_a_project_whose_path_kedro_takes_for_a_pattern_is_told_so(name, odd):
    _check_place(Path("/home/me/my project-1 (copy)"))
    with pytest.raises(click.ClickException, match="takes for patterns") as caught:
        _check_place(Path(f"/home/{name}/project"))
    assert f"/home/{name}/project has {odd} in its path" in caught.value.message
