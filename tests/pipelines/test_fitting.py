"""Fits that are cut off: killed, stopped by SIGTERM, gone on with to the bit, and never with
another fit's checkpoint.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.io.tensors import write_with_header
from assay.numerics.kmeans.estimator import MiniBatchKMeans
from assay.numerics.pca import Convergence
from assay.parameters import KMeansParameters, PCAParameters, StandardizeParameters
from assay.pipelines import fitting, stopping
from assay.pipelines.kmeans.nodes import fit_kmeans
from assay.pipelines.pca.nodes import fit_pca
from assay.pipelines.standardize.nodes import fit_statistics

KMEANS = {
    "n_clusters": 8,
    "batch_size": 40,
    "n_init": 2,
    "init_size": 100,
    "max_iter": 3,
    "max_no_improvement": None,
}
PARAMETERS: dict[str, Any] = {
    "kmeans": KMeansParameters(**KMEANS, checkpoint_steps=4),
    "pca": PCAParameters(batch_size=16, checkpoint_steps=4),
    "statistics": StandardizeParameters(batch_size=16, checkpoint_steps=4),
}


def fit_raw(
    shards: Shards,
    statistics: dict[str, torch.Tensor],
    parameters: StandardizeParameters,
    checkpoints: Checkpoints,
    device: str,
    *,
    layer: int,
) -> tuple[dict[str, torch.Tensor], None]:
    """The statistics, as the methods that are fitted to standardized tokens are called."""
    del statistics
    return fit_statistics(shards, parameters, checkpoints, device, layer=layer), None


FITS: dict[str, Callable[..., Any]] = {
    "kmeans": fit_kmeans,
    "pca": fit_pca,
    "statistics": fit_raw,
}
STEPS = {"kmeans": 3 * 20, "pca": 48, "statistics": 48}  # of 768 tokens


class Watchers:
    """Who is told of the steps of the fits that `fit` makes."""

    now = ()


@pytest.fixture
def statistics(planted, tmp_path):
    checkpoints = Checkpoints(tmp_path / "statistics")
    return fit_statistics(Shards(planted[0]), StandardizeParameters(), checkpoints, "cpu", layer=5)


@pytest.fixture
def fit(planted, statistics):
    """Fits a method on layer 5, or another, and gives its model's tensors, as if they were saved."""

    def run(
        method,
        checkpoints,
        *,
        layer=5,
        shards=0,
        statistics=statistics,
        parameters=None,
        saved=True,
    ):
        parameters = parameters or PARAMETERS[method]
        checkpoints.observers = list(Watchers.now)
        model, _ = FITS[method](
            Shards(planted[shards]), statistics, parameters, checkpoints, "cpu", layer=layer
        )
        if saved:
            checkpoints.clear_finished()
        return model

    return run


@pytest.fixture
def seen(monkeypatch):
    """What observers are told."""
    told = []
    monkeypatch.setattr(Watchers, "now", [lambda *step: told.append(step)])
    return told


class Cut(Exception):  # noqa: N818
    """Ends a fit from within."""


def cut_after(monkeypatch, steps):
    """Have a fit end in the middle of its step after so many."""
    step = fitting.Fit.step

    def cutting(self, *metrics):
        if self._step == steps:
            raise Cut
        step(self, *metrics)

    monkeypatch.setattr(fitting.Fit, "step", cutting)


@pytest.fixture
def cut(fit, monkeypatch):
    """Fits a method on layer 5 and ends it in the middle of the step after so many."""

    def run(method, checkpoints, steps):
        with monkeypatch.context() as patch:
            cut_after(patch, steps)
            with pytest.raises(Cut):
                fit(method, checkpoints)

    return run


@pytest.mark.parametrize("method", FITS)
@pytest.mark.parametrize("steps", [3, 4, 20, 47])
def test_a_fit_goes_on_from_its_last_checkpoint_to_the_same_bits(
    fit, cut, tmp_path, method, steps, seen
):
    whole = fit(method, Checkpoints(tmp_path / "whole"))
    checkpoints = Checkpoints(tmp_path / "cut")
    assert not (tmp_path / "whole").exists()
    del seen[:]
    cut(method, checkpoints, steps)
    seeded = method == "kmeans"  # is saved at step 0
    assert len(list((tmp_path / "cut").rglob("*.safetensors"))) == min(2, steps // 4 + seeded)
    again = fit(method, checkpoints)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not (tmp_path / "cut").exists(), "checkpoints go when the fit is done and saved"
    first = steps // 4 * 4 + 1
    assert [step for _, _, step, _ in seen] == [
        *range(1, steps + 1),
        *range(first, STEPS[method] + 1),
    ]


@pytest.mark.parametrize("method", FITS)
def test_a_fit_whose_model_could_not_be_saved_goes_on_from_its_last_checkpoint(
    fit, tmp_path, method, seen
):
    unsaved = fit(method, Checkpoints(tmp_path / "fit"), saved=False)
    assert list((tmp_path / "fit").rglob("*.safetensors"))
    del seen[:]
    again = fit(method, Checkpoints(tmp_path / "fit"))
    assert all(torch.equal(again[name], unsaved[name]) for name in unsaved)
    assert len(seen) < 4, "no more than was done since it was last saved"
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("method", FITS)
def test_a_fit_goes_on_where_the_shards_were_copied_to(
    fit, cut, tmp_path, planted, statistics, method, seen
):
    whole = fit(method, Checkpoints(tmp_path / "whole"))
    checkpoints = Checkpoints(tmp_path / "cut")
    cut(method, checkpoints, 10)
    staged = shutil.copytree(
        planted[0], tmp_path / "scratch" / planted[0].name, copy_function=shutil.copyfile
    )
    for path in staged.iterdir():
        os.utime(path, ns=(0, 12345))
    (staged / "labels.bin").write_bytes(bytes(48 * 16))  # no fit looks at them
    del seen[:]
    checkpoints.observers = list(Watchers.now)
    again = FITS[method](
        Shards(staged), statistics, PARAMETERS[method], checkpoints, "cpu", layer=5
    )[0]
    assert seen[0][2] == 9
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_where_no_checkpoint_is_taken_up_it_is_said_what_differs(
    cut, tmp_path, planted, statistics, caplog
):
    checkpoints = Checkpoints(tmp_path / "cut")
    cut("pca", checkpoints, 10)
    other = shutil.copytree(planted[0], tmp_path / "scratch" / planted[0].name)
    raw = bytearray((other / "acts000000.bin").read_bytes())
    raw[400] ^= 1
    (other / "acts000000.bin").write_bytes(raw)
    FITS["pca"](Shards(other), statistics, PARAMETERS["pca"], checkpoints, "cpu", layer=5)
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "of the nearest of them its shards.content is " in record.getMessage()
    assert "its shards.name" not in record.getMessage()


@pytest.mark.parametrize("method", FITS)
def test_checkpoint_steps_is_how_often_a_fit_is_saved_and_changes_nothing_else(
    fit, tmp_path, method, monkeypatch
):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, about, step, *rest: (saved.append(step), save(self, about, step, *rest))[1],
    )
    models = []
    for steps in (4, 15):
        parameters = PARAMETERS[method].model_copy(update={"checkpoint_steps": steps})
        models.append(fit(method, Checkpoints(tmp_path), parameters=parameters))
        after_each_seeding = [0] * PARAMETERS["kmeans"].n_init if method == "kmeans" else []
        assert saved == [*after_each_seeding, *range(steps, STEPS[method] + 1, steps)]
        del saved[:]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (method, change)
        for method in FITS
        for change in ("layer", "shards", "statistics", "parameters")
        if method != change
    ],
)
def test_another_fits_checkpoint_is_not_gone_on_with(
    fit, cut, tmp_path, method, change, statistics, seen
):
    checkpoints = Checkpoints(tmp_path)
    cut(method, checkpoints, 10)
    other = {
        "layer": {"layer": 3},
        "shards": {"shards": 1},
        "statistics": {"statistics": statistics | {"mean": statistics["mean"] + 1e-3}},
        "parameters": {"parameters": PARAMETERS[method].model_copy(update={"max_tokens": 700})},
    }[change]
    del seen[:]
    found = fit(method, checkpoints, **other)
    assert seen[0][2] == 1, "from the beginning"
    wanted = fit(method, Checkpoints(tmp_path / "fresh"), **other)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    del seen[:]
    fit(method, checkpoints)
    assert seen[0][2] == 9, "the other fit has left this one's checkpoints alone"


def test_a_checkpoint_of_another_width_put_in_its_place_is_refused(fit, cut, tmp_path):
    cut("pca", Checkpoints(tmp_path), 10)
    for path in tmp_path.rglob("*.safetensors"):
        header = {
            "schema": "assay.checkpoint",
            "version": "2",
            "about": '{"d": 81}',
            "state": '{"step": 8}',
        }
        write_with_header(path, load_file(path), header)
    with pytest.raises(ValueError, match="a checkpoint of another fit: its d is 81, wanted 80"):
        fit("pca", Checkpoints(tmp_path))


def test_observers_are_told_of_rates_and_of_what_is_fitted(fit, tmp_path, seen):
    fit("kmeans", Checkpoints(tmp_path))
    fit("pca", Checkpoints(tmp_path))
    kmeans, pca = ([step for step in seen if step[1] == method] for method in ("kmeans", "pca"))
    assert {layer for layer, *_ in seen} == {5}
    always = {"tokens_per_second", "data_wait"}
    for *_, metrics in kmeans:
        assert set(metrics) == always | {"inertia", "ewa_inertia", "learning_rate", "dead_clusters"}
    for _, _, step, metrics in pca:  # of 16 tokens each; a look takes more than 20
        watched = (
            {"reconstruction_error", "subspace_drift"} if step > 2 else {"reconstruction_error"}
        )
        assert set(metrics) == always | (watched if step in (2, 4, 8, 16, 32) else set())
    for *_, metrics in seen:
        assert metrics["tokens_per_second"] > 0
        assert 0 <= metrics["data_wait"] <= 1
    drifts = [metrics["subspace_drift"] for *_, metrics in pca if "subspace_drift" in metrics]
    assert 0 <= drifts[-1] < drifts[0] < 1


class Clock:
    """Seconds that go on by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(fitting, "clock", lambda: self.now)


@pytest.mark.parametrize("method", FITS)
def test_checkpoint_minutes_is_the_longest_that_a_fit_goes_unsaved_and_changes_nothing_else(
    fit, tmp_path, method, monkeypatch
):
    """A step takes 20 s here, and the checkpoints that are due by their number reset the clock."""
    whole = fit(method, Checkpoints(tmp_path / "whole"))
    time_goes_by, saved = Clock(monkeypatch), []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, about, step, *rest: (saved.append(step), save(self, about, step, *rest))[1],
    )
    step = fitting.Fit.step

    def slow(self, *metrics):
        time_goes_by.now += 20
        step(self, *metrics)

    monkeypatch.setattr(fitting.Fit, "step", slow)
    parameters = PARAMETERS[method].model_copy(
        update={"checkpoint_minutes": 1.5, "checkpoint_steps": 7}
    )
    again = fit(method, Checkpoints(tmp_path), parameters=parameters)
    assert [step for step in saved if 0 < step <= 30] == [5, 7, 12, 14, 19, 21, 26, 28]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.fixture
def cut_seeding(fit, monkeypatch):
    """Fits k-means and ends it when it looks for the `number`-th time; of 2 seedings of 8 centers
    each has 7 looks.
    """

    def run(checkpoints, number, how):
        looks = [0]
        look = fitting.Fit.save_if_due

        def counting(self):
            looks[0] += 1
            if looks[0] == number:
                how(self)
            look(self)

        with monkeypatch.context() as patch:
            patch.setattr(fitting.Fit, "save_if_due", counting)
            with stopping.signals_stop(), pytest.raises((Cut, KeyboardInterrupt)):
                fit("kmeans", checkpoints)

    return run


def centers_made(monkeypatch):
    """Counts the looks of a fit: one a center."""
    looks = []
    look = fitting.Fit.save_if_due
    monkeypatch.setattr(fitting.Fit, "save_if_due", lambda self: (looks.append(1), look(self))[1])
    return looks


def die(_):
    raise Cut


@pytest.mark.parametrize("number", [1, 4, 7, 8, 11, 14])
def test_sigterm_while_the_centers_are_seeded_loses_none(
    fit, cut_seeding, tmp_path, number, monkeypatch, seen
):
    whole = fit("kmeans", Checkpoints(tmp_path / "whole"))
    checkpoints = Checkpoints(tmp_path / "cut")
    cut_seeding(checkpoints, number, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert len(list((tmp_path / "cut").rglob("step000000000.safetensors"))) == 1
    looks = centers_made(monkeypatch)
    del seen[:]
    again = fit("kmeans", checkpoints)
    assert len(looks) == 14 - number
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert seen[0][2] == 1


@pytest.mark.parametrize(("number", "left"), [(1, 14), (7, 14), (8, 7), (14, 7)])
def test_a_fit_killed_while_the_centers_are_seeded_goes_on_after_the_last_whole_seeding(
    fit, cut_seeding, tmp_path, number, left, monkeypatch
):
    whole = fit("kmeans", Checkpoints(tmp_path / "whole"))
    checkpoints = Checkpoints(tmp_path / "cut")
    cut_seeding(checkpoints, number, die)
    looks = centers_made(monkeypatch)
    again = fit("kmeans", checkpoints)
    assert len(looks) == left
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_seeding_that_takes_long_is_saved_by_the_minute(fit, cut_seeding, tmp_path, monkeypatch):
    time_goes_by = Clock(monkeypatch)
    whole = fit("kmeans", Checkpoints(tmp_path / "whole"))

    def wait_then_die(fit):
        time_goes_by.now += 61
        fit.save_if_due()  # which is counted: the next look is the 5th
        raise Cut

    cut_seeding(Checkpoints(tmp_path / "cut"), 4, wait_then_die)
    looks = centers_made(monkeypatch)
    again = fit("kmeans", Checkpoints(tmp_path / "cut"))
    assert len(looks) == 14 - 4
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_fit_killed_at_its_first_step_keeps_its_seeds(fit, cut, tmp_path, monkeypatch):
    whole = fit("kmeans", Checkpoints(tmp_path / "whole"))
    cut("kmeans", Checkpoints(tmp_path / "cut"), 0)
    monkeypatch.setattr(MiniBatchKMeans, "seedings", None)  # there is nothing to seed
    again = fit("kmeans", Checkpoints(tmp_path / "cut"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("method", "number"),
    [*((each, signal.SIGTERM) for each in FITS), ("pca", signal.SIGINT)],
    ids=str,
)
def test_a_signal_is_answered_by_saving_before_anything_that_takes_long(
    fit, tmp_path, method, number, monkeypatch
):
    """PCA's look is an eigendecomposition; the record of the resumed fit has it all the same."""
    order = []
    save, look = Checkpoints.save, Convergence.observe
    monkeypatch.setattr(Checkpoints, "save", lambda *args: (order.append("save"), save(*args))[1])
    monkeypatch.setattr(
        Convergence, "observe", lambda *args, **last: (order.append("look"), look(*args, **last))[1]
    )

    def stop(*told):
        if told[2] == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, stopping.signals_stop():
        patch.setattr(Watchers, "now", [stop])
        with pytest.raises(KeyboardInterrupt):
            fit(method, Checkpoints(tmp_path))
    assert order[-1] == "save"
    saved = max(int(path.stem[4:]) for path in tmp_path.rglob("step*.safetensors"))
    assert saved == 8, "the next step, a power of 2"


def test_a_fit_says_once_from_which_step_it_goes_on(fit, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "assay")

    def stop(*seen):
        if seen[2] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, stopping.signals_stop():
        patch.setattr(Watchers, "now", [stop])
        with pytest.raises(KeyboardInterrupt):
            fit("pca", Checkpoints(tmp_path))
    assert caplog.messages == []
    fit("pca", Checkpoints(tmp_path))
    assert caplog.messages == ["layer 5, pca: resuming after step 8"]


def test_the_record_of_a_pca_that_was_stopped_at_a_look_is_whole(
    planted, statistics, tmp_path, monkeypatch
):
    def run(name):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.observers = list(Watchers.now)
        return fit_pca(
            Shards(planted[0]), statistics, PARAMETERS["pca"], checkpoints, "cpu", layer=5
        )

    _, whole = run("whole")
    assert [look["step"] for look in whole] == [2, 4, 8, 16, 32, 48]
    for stop in (1, 7, 15, 47):

        def observe(*told, stop=stop):
            if told[2] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, stopping.signals_stop():
            patch.setattr(Watchers, "now", [observe])
            with pytest.raises(KeyboardInterrupt):
                run(f"cut {stop}")
        assert run(f"cut {stop}")[1] == whole


def in_a_child(work):
    """Start `work` in a process of its own: its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        with stopping.signals_stop():
            work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", FITS)
def test_killed_and_stopped_at_20_random_moments_a_fit_ends_with_the_same_bits(
    fit, tmp_path, method, monkeypatch
):
    """Half the signals are SIGKILL, half SIGTERM, which loses no step."""
    log = tmp_path / "steps"

    def observe(*told):
        with open(log, "a") as file:
            file.write(f"{told[2]}\n")
        time.sleep(0.004)

    def work(checkpoints, out):
        save_file(
            {name: tensor.contiguous() for name, tensor in fit(method, checkpoints).items()}, out
        )

    assert (
        os.waitpid(
            in_a_child(lambda: work(Checkpoints(tmp_path / "whole"), tmp_path / "whole.out")), 0
        )[1]
        == 0
    )
    monkeypatch.setattr(Watchers, "now", [observe])
    checkpoints, out = Checkpoints(tmp_path / "cut"), tmp_path / "cut.out"
    chance = random.Random(1)
    signals = finished = 0
    while signals < 20:
        log.unlink(missing_ok=True)
        child = in_a_child(lambda: work(checkpoints, out))
        time.sleep(chance.uniform(0.01, 0.25))
        number = signal.SIGKILL if signals % 2 else signal.SIGTERM
        os.kill(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:  # it was quicker
            finished += 1
            assert_same(out, tmp_path / "whole.out")
            out.unlink()
            continue
        signals += 1
        # On a busy machine SIGTERM can come before the fit looks out for it, and then there is no
        # step to lose.
        stopped = {130} if log.exists() else {130, -signal.SIGTERM}
        assert status in (stopped if number == signal.SIGTERM else {-signal.SIGKILL})
        steps = [int(line) for line in log.read_text().split()] if log.exists() else []
        saved = sorted(int(path.stem[4:]) for path in (tmp_path / "cut").rglob("step*.safetensors"))
        assert len(saved) <= 3
        if number == signal.SIGTERM and steps and steps[-1] < STEPS[method]:
            assert saved[-1] == steps[-1], "the step at which it came is saved"
    assert os.waitpid(in_a_child(lambda: work(checkpoints, out)), 0)[1] == 0
    assert_same(out, tmp_path / "whole.out")


def assert_same(out: Path, whole: Path) -> None:
    assert out.read_bytes() == whole.read_bytes()


def receive(*numbers):
    """Have signals come, and wait for what they do."""
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=str)
def test_a_signal_outside_a_fit_stops_at_once(number):
    before = signal.getsignal(number)
    with stopping.signals_stop(), pytest.raises(KeyboardInterrupt):
        receive(number)
    assert signal.getsignal(number) == before
    assert stopping.exit_code() == 128 + number


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=str)
def test_a_second_signal_stops_a_fit_at_once(number, capfd):
    with stopping.signals_stop(), stopping.fit_in_progress(), pytest.raises(KeyboardInterrupt):
        receive(number, signal.SIGINT)
    assert not stopping.stop_is_asked()
    assert stopping.exit_code() == 130
    assert "the fit in progress saves itself first" in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    """As nohup has SIGHUP, and a shell Ctrl-C of what runs behind its back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.signals_stop():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("method", FITS)
def test_sigterm_after_the_last_step_is_not_lost(fit, tmp_path, method, monkeypatch):
    def observe(*told):
        if told[2] == STEPS[method]:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = fit(method, Checkpoints(tmp_path / "whole"))
    with monkeypatch.context() as patch, stopping.signals_stop():
        patch.setattr(Watchers, "now", [observe])
        with pytest.raises(KeyboardInterrupt):
            fit(method, Checkpoints(tmp_path / "cut"))
    monkeypatch.setattr(fitting.Fit, "step", None)  # there is none to make
    again = fit(method, Checkpoints(tmp_path / "cut"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
