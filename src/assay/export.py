"""Codes and probes of an encoding for saev's notebooks: a folder that lies as one of saev's runs.

What is written was made by `kedro run`, and is found and checked as a run finds its inputs: by the
configuration in force.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from kedro.config import MissingConfigException
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.io import DatasetError
from torch import Tensor

from assay import __version__
from assay.codes import Codes
from assay.configuration import current_configuration
from assay.encodings import Encoding, layer_name
from assay.io.codes.saev_writer import (
    check_room,
    write_metrics,
    write_probe_metrics,
    write_token_acts,
)
from assay.io.datasets import find_shards
from assay.io.publish import publishing_folder
from assay.io.shards import Shards
from assay.numerics.codes import TopKCodes
from assay.numerics.probe import LogisticProbe1d, Progress, count_predictions
from assay.parameters import Parameters
from assay.pipelines.dictionaries.nodes import sum_squares
from assay.pipelines.probe.labels import classify, read_labels
from assay.pipelines.signs_of_life import Bar, staged_bar
from assay.pipelines.stream import pick_device
from assay.plan import make_plan
from assay.preflight import check_shards, find_d_model
from assay.results import Results, held
from assay.work import current_freshness

FOLDER = Path("data/09_export/saev/runs")
"""saev opens a folder as a run where it lies in one of this name."""

ABOUT = "export.json"
"""What an export says of itself. A folder without it is never replaced."""

SPLITS = ("probe_train", "probe_val")
MEASURED = (*SPLITS, "val")
BATCH = 8192
"""Tokens of a pass for sums of squares."""


def export_saev(
    project: Path,
    encoding: str,
    layer: int,
    *,
    env: str | None = None,
    params: Mapping[str, Any] | None = None,
    out: Path | None = None,
    force: bool = False,
) -> list[str]:
    """Write the codes of both probe splits and their probes as saev's notebooks read them.

    Args:
        project: the Kedro project's root.
        encoding: a row of the table, by its name.
        layer: the block number.
        env: the configuration environment; None: local.
        params: parameters that override it, nested.
        out: the folder to write; None: `FOLDER`/<encoding>-<layer> in the project.
        force: whether an older export there is replaced.

    Returns:
        Lines that say what was written.

    Raises:
        click.ClickException: there is no such encoding or layer, results are missing or out of
            date, the disk has no room, or the folder is there already.
    """
    bootstrap_project(project)
    target = project / FOLDER / f"{encoding}-{layer_name(layer)}" if out is None else out
    with KedroSession.create(
        project_path=project, env=env, runtime_params=dict(params or {})
    ) as session:
        assert isinstance(session, KedroSession)
        try:
            session.load_context()._get_catalog()
            _, parameters = current_configuration()
            row = _find(encoding, layer, parameters, project)
            _check_target(target, force=force)
            check_shards(parameters, project)
            wanted = _wanted(row, layer, parameters)
            again = [wanted["errors"]] if "errors" in wanted else []
            with held(current_freshness(), wanted.values(), again) as load:
                return _export(load, wanted, row, layer, parameters, project, target, force=force)
        except (ValueError, OSError, MissingConfigException, DatasetError) as error:
            raise click.ClickException(str(error)) from error


def _find(encoding: str, layer: int, parameters: Parameters, project: Path) -> Encoding:
    if layer not in parameters.layers:
        layers = ", ".join(map(str, parameters.layers))
        raise ValueError(
            f"found layer {layer}, wanted one of {layers}: type the --env and --params of the run"
            " that has it"
        )
    rows = {
        row.name: row
        for row in make_plan(parameters, find_d_model(parameters, project)).rows_of(layer)
    }
    if encoding not in rows:
        raise ValueError(
            f"layer {layer} has no encoding {encoding!r}, wanted one of {', '.join(sorted(rows))}"
        )
    return rows[encoding]


def _check_target(target: Path, *, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(
            f"{target} exists already and is not replaced; name another folder with --out, or"
            " --force"
        )
    if not (target / ABOUT).is_file():
        raise ValueError(
            f"{target} has no {ABOUT}, so it is no export, and --force does not replace it: name"
            " another folder with --out"
        )


def _wanted(row: Encoding, layer: int, parameters: Parameters) -> dict[str, str]:
    """The names of the results that an export reads, by what they are. Where saev trained the
    dictionary there are no errors: they are in saev's own run.
    """
    namespace, dictionary = layer_name(layer), parameters.dictionaries.get(row.model.method)
    wanted = {split: f"{namespace}.codes_{row.codes}_{split}" for split in SPLITS}
    wanted["probes"] = f"{namespace}.probes_{row.name}"
    if dictionary is None or dictionary.saev_run is None:
        wanted["errors"] = f"{namespace}.{row.model.name}_errors"
    return wanted | {f"shards_{split}": f"shards_{split}" for split in MEASURED}


def _codes(codes: Codes, row: Encoding) -> Codes:
    """An encoding's codes, of those that contain them."""
    return codes if row.stored_k is None or row.k is None else TopKCodes(codes, row.k)


def _export(
    load: Results,
    wanted: Mapping[str, str],
    row: Encoding,
    layer: int,
    parameters: Parameters,
    project: Path,
    target: Path,
    *,
    force: bool,
) -> list[str]:
    folders = {
        split: find_shards(project / getattr(parameters.shards, split))
        for split in ("fit", *MEASURED)
    }
    names = {split: path.name for split, path in folders.items()}
    if names["probe_train"] == names["probe_val"]:
        raise ValueError(
            f"both probe splits are called {names['probe_val']}, and saev has one folder for each"
            " name: rename a folder of shards"
        )
    if parameters.probe.class_weight is not None:
        raise ValueError(
            f"probe.class_weight is {parameters.probe.class_weight}, and saev's probes weigh every"
            " patch alike: `kedro run --params=probe.class_weight:null`, and export those"
        )
    codes = {split: _codes(load(wanted[split]), row) for split in SPLITS}
    labels = {split: read_labels(load(f"shards_{split}")) for split in SPLITS}
    check_room(target, codes.values())
    said = [f"{target}: {row.name}, layer {layer}, as a run of saev's"]
    with publishing_folder(target, replace=force) as folder:
        place = {split: folder / "inference" / names[split] for split in MEASURED}
        for split in SPLITS:
            place[split].mkdir(parents=True)
            doing = f"{row.name}, {split}"
            entries = _write_acts(place[split], codes[split], f"{doing}: codes")
            with staged_bar(f"{doing}: probes") as progress:
                arrays = probe_metrics(
                    load(wanted["probes"]),
                    codes[split],
                    labels[split].to(pick_device(parameters.device)),
                    parameters.probe.void,
                    train=split == "probe_train",
                    progress=progress,
                )
            write_probe_metrics(place[split], arrays)
            said.append(
                f"  inference/{names[split]}: {split}, {codes[split].n_rows} tokens,"
                f" {entries} entries"
            )
        # One folder may be that of two splits.
        for split in {names[split]: split for split in MEASURED}.values():
            if "errors" in wanted:
                place[split].mkdir(exist_ok=True)
                _write_errors(place[split], load, wanted["errors"], split, row, layer, parameters)
        # Without these two saev takes the folder for no run.
        (folder / "checkpoint").mkdir()
        (folder / "links").mkdir()
        for link, split in (("train-shards", "fit"), ("val-shards", "val")):
            (folder / "links" / link).symlink_to(folders[split].resolve())
        about = {
            "assay": __version__,
            "encoding": row.name,
            "layer": layer,
            "k": row.k,
            "void": parameters.probe.void,
            **{f"shards_{split}": name for split, name in names.items()},
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if parameters.probe.void != "class":
        said.append(
            f"note: with probe.void: {parameters.probe.void} there is no probe of label 0, void:"
            " column 0 is NaN, and so are means over all columns; with --params=probe.void:class a"
            " run, and then an export, have one, as saev has"
        )
    return said


def _write_errors(
    folder: Path,
    load: Results,
    name: str,
    split: str,
    row: Encoding,
    layer: int,
    parameters: Parameters,
) -> None:
    other = {"shards_val": f"shards_{split}"}
    rows = (load(name) if split == "val" else load.make(name, other))["rows"]
    # Of all K of a sweep there is a row; what is measured once has one.
    found = rows[0] if len(rows) == 1 else next(each for each in rows if each["k"] == row.k)
    shards: Shards = load(f"shards_{split}")
    about_train, about_own = sum_squares(
        shards,
        load(f"{layer_name(layer)}.statistics"),
        parameters.device,
        layer,
        f"{row.name}, {split}",
        BATCH,
    )
    write_metrics(
        folder,
        sse_recon=found["nmse_raw"] * about_train,
        sse_baseline=about_own,
        n_tokens=shards.n_tokens,
        d_model=shards.d_model,
    )


def _write_acts(folder: Path, codes: Codes, doing: str) -> int:
    with Bar(desc=doing, total=codes.n_rows, unit=" tokens") as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        return write_token_acts(folder, codes, progress=advance)


def probe_metrics(
    probes: Mapping[str, Tensor],
    codes: Codes,
    labels: Tensor,
    void: str,
    *,
    train: bool,
    progress: Progress | None = None,
) -> dict[str, npt.NDArray[np.float64]]:
    """What saev's `probe1d_metrics.npz` says of a split, from the probes that were fitted on probe
    train.

    Args:
        probes: as `fit_probes` leaves them.
        codes: of the split.
        labels: of the split's patches, int64 (rows,), 0 for void.
        void: what became of void patches: `probe.void`.
        train: whether the split is probe train.
        progress: called with what is done, how much of it, and of how much.

    Returns:
        By saev's names, each float64 (features, labels), a column for each label from 0 on: `loss`,
        mean CE in nats over the split's patches that take part, without the ridge; `weights` and
        `biases` on features as they are stored; and how many patches are predicted, p >= 0.5, and
        are of the class: `tp`, `fp`, `tn`, `fn`. The column of a class that was not fitted is NaN,
        and so is that of label 0, void, unless it was made a class.
    """
    codes, classes, _ = classify(codes, labels, void)
    if train:
        loss, counts = probes["train_ce"], probes["train_counts"]
        fitted = LogisticProbe1d.from_state(probes).fitted_
        hits, predicted = count_predictions(fitted, codes, classes, progress=progress)
    else:
        loss, counts = probes["val_ce"], probes["val_counts"]
        hits, predicted = probes["val_true_positives"], probes["val_predicted"]
    hits, predicted = hits.cpu(), predicted.cpu()
    missed = counts - hits
    found = {
        "loss": loss,
        "weights": probes["coef"],
        "biases": probes["intercept"],
        "tp": hits,
        "fp": predicted - hits,
        "tn": len(classes) - predicted - missed,
        "fn": missed,
    }
    first = 0 if void == "class" else 1
    return {
        name: torch.nn.functional.pad(array.double(), (first, 0), value=torch.nan).numpy()
        for name, array in found.items()
    }
