"""A long step shows that it lives: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline, node
from kedro.runner import SequentialRunner
from tqdm import tqdm

from assay.pipelines import signs_of_life, watch
from assay.pipelines.digits.vit import VisionTransformer, train
from assay.pipelines.signs_of_life import EVERY, Bar, staged_bar, told
from assay.pipelines.stopping import signals_stop
from assay.pipelines.watch import Watch, watched


@pytest.fixture
def said(monkeypatch):
    """The lines that are logged, without their time of day."""
    lines = []
    logger = logging.Logger("progress")
    logger.addHandler(handler := logging.Handler())
    monkeypatch.setattr(
        handler, "emit", lambda record: lines.append(record.getMessage().partition(" ")[2])
    )
    monkeypatch.setattr(watch, "logger", logger)
    return lines


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr(signs_of_life, "clock", lambda: now[0])
    return now


def counted(bar: Bar, done: int, seconds: float) -> None:
    """Have a bar count, so many seconds after it began."""
    bar._time = lambda: bar.start_t + seconds  # type: ignore[attr-defined]  # tqdm's own
    bar.update(done)


def test_without_a_terminal_a_long_step_has_a_line_every_30_seconds(said, clock, capsys):
    seen = Watch(1)
    with Bar(desc="layer 3: PCA", total=2000, unit=" tokens") as bar:
        counted(bar, 500, 40)
        clock[0] += EVERY - 1
        seen.show()
        assert said == []
        for _ in range(2):
            clock[0] += EVERY
            seen.show()
            seen.show()
    assert said == ["layer 3: PCA: 25%, 500 of 2.00k, 12.5 tokens/s, 02:00 left"] * 2
    clock[0] += EVERY
    seen.show()
    assert len(said) == 2, "nothing is being done"
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_several_stages_says_which_one_it_is_in(said, clock):
    seen = Watch(1)
    with staged_bar("layer 3: k-means") as tell:
        clock[0] += EVERY
        seen.show()
        tell("seeding 2 of 4", 5, 10)
        clock[0] += EVERY
        seen.show()
    assert said[0] == "layer 3: k-means"
    assert said[1].startswith("layer 3: k-means: seeding 2 of 4: 50%, 5.00 of 10.0, ")


def test_a_step_that_has_no_bar_is_named_with_its_time(said, clock):
    seen = Watch(3)
    seen.before_node_run(node(lambda: 1, None, "a", name="layer_3.pca.fit"))
    clock[0] += 75
    seen.show()
    assert said == ["layer_3.pca.fit: for 01:15"]


def test_a_step_is_done_when_all_that_it_gives_is_saved(said, clock):
    """Codes are computed as they are saved."""
    seen, encode = Watch(7), node(lambda: (1, 2), None, ["a", "b"], name="layer_3.encode")
    seen.before_node_run(encode)
    seen.after_dataset_saved("a", encode)
    assert said == []
    clock[0] += 62
    seen.after_dataset_saved("b", encode)
    assert said == ["1 of 7 steps done: layer_3.encode in 01:02"]


def test_each_step_of_a_run_that_is_done_is_a_line_in_a_log(said, clock):
    del clock  # stands still, however long the machine takes
    hooks = _create_hook_manager()
    steps = Pipeline(
        [node(lambda: 1, None, "a", name="first"), node(lambda a: a, "a", "b", name="second")]
    )
    with watched(hooks, 2) as watch:
        SequentialRunner().run(
            steps, DataCatalog({"a": MemoryDataset(), "b": MemoryDataset()}), hooks
        )
    assert said == ["1 of 2 steps done: first in 00:00", "2 of 2 steps done: second in 00:00"]
    assert not hooks.is_registered(watch)


def test_a_run_stops_at_the_next_step_where_the_interrupt_was_dropped():
    def drop():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return 1

    ran, hooks = [], _create_hook_manager()
    steps = Pipeline(
        [node(drop, None, "a", name="first"), node(ran.append, "a", "b", name="second")]
    )
    with signals_stop(), watched(hooks, 2), pytest.raises(KeyboardInterrupt):
        SequentialRunner().run(
            steps, DataCatalog({"a": MemoryDataset(), "b": MemoryDataset()}), hooks
        )
    assert ran == []


def test_on_a_terminal_bars_are_drawn_and_no_lines_written(said, monkeypatch, capsys):
    for module in (signs_of_life, watch):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
    seen, step = Watch(1), node(lambda: 1, None, "a", name="fit")
    seen.before_node_run(step)
    with Bar(desc="layer 3: PCA", total=2000, unit=" tokens") as bar:
        counted(bar, 500, 40)
        assert "layer 3: PCA:  25%|" in capsys.readouterr().err
    assert seen.head() == "step 1 of 1: fit"
    seen.after_dataset_saved("a", step)
    assert said == []


def test_a_command_that_needs_no_project_says_how_far_it_is_too(monkeypatch, capsys):
    """A verdict on 600 GB takes an hour."""
    lines, looked = [], threading.Event()
    monkeypatch.setattr(signs_of_life, "EVERY", 0)
    with (
        told(lambda line: (lines.append(line), looked.set())),
        Bar(desc="fit", total=8, unit="B") as bar,
    ):
        bar.update(2)
        assert looked.wait(10)
    assert lines[0].partition(" ")[2].startswith("fit: 25%, 2.00 of 8.00, ")
    assert capsys.readouterr().err == ""


def test_bars_import_without_kedro():
    script = "import sys, assay.pipelines.signs_of_life; print('kedro' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


def test_training_has_a_bar(monkeypatch):
    seen = []
    monkeypatch.setattr(Bar, "update", lambda bar, n=1: seen.append((bar.desc, bar.total, n)))
    model = VisionTransformer(
        image_size=4, patch_size=2, d_model=4, n_blocks=1, n_heads=1, n_classes=2
    )
    images, labels = torch.rand(3, 4, 4), torch.ones(3, 4, dtype=torch.uint8)
    train(model, images, labels, n_steps=2, batch_size=2, learning_rate=1e-3, seed=0)
    assert seen == [("training the vision transformer", 2, 1)] * 2


def test_a_line_that_is_logged_beside_several_bars_is_all_that_a_log_gets(capsys):
    with Bar(desc="pass 1", total=3), Bar(desc="seeding", total=3):
        tqdm.write("12:00:00 pass 1: 30%", file=sys.stderr)
    assert capsys.readouterr() == ("", "12:00:00 pass 1: 30%\n")
