"""What is recorded here is checked before any work, and its sources are in the catalog."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from assay import configuration
from assay import extraction as module
from assay.extraction import Extraction, MadeOf, check_extraction, check_room
from assay.io.shards.provenance import RecordedGeometry
from assay.parameters import parse_parameters
from assay.pipelines.extract.nodes import record_images
from assay.plan import make_plan
from assay.preflight import check_pipeline, check_recorded_labels, check_shards, find_d_model
from vits import BLOCKS, WIDTH, write_images, write_model

SPLITS = ("fit", "val", "probe_train", "probe_val")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_model(root / "model")
    write_images(root / "train", 6, seed=1)
    write_images(root / "val", 4, seed=2)
    return root


@pytest.fixture
def project(sources, tmp_path) -> Path:
    """A project beside its sources, which a test may change."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    return tmp_path


def parse(extract=(), shards=(), **rest):
    """Parameters of all four splits, recorded."""
    given: dict[str, Any] = {"model": "model"}
    for split in SPLITS:
        folder = "train" if split in ("fit", "probe_train") else "val"
        given[split] = {"images": f"{folder}/images"}
        if split.startswith("probe"):
            given[split]["masks"] = f"{folder}/masks"
    for name, value in dict(extract).items():
        given[name] = given[name] | value if isinstance(value, dict) and name in given else value
    places = {split: f"data/01_raw/images/{split}" for split in SPLITS} | dict(shards)
    return parse_parameters(
        {"layers": [0, 2], "shards": places, "kmeans": {"n_clusters": 4}, "extract": given} | rest
    )


def record(parameters, project, split):
    """What a run does for a split."""
    extraction = Extraction(parameters, project)
    datasets = extraction.datasets()
    masks = datasets.get(f"extract_masks_{split}")
    recording = record_images(
        datasets["extract_model"].load(),
        datasets[f"extract_images_{split}"].load(),
        "cpu",
        masks.load() if masks else None,
        layers=extraction.layers(split),
        how=parameters.extract.recording,
    )
    from assay.io.datasets import ShardsDataset

    ShardsDataset(filepath=str(extraction.place(split))).save(recording)


def test_what_is_to_be_recorded_is_known_before_it_is(project):
    parameters = parse()
    assert find_d_model(parameters, project) == WIDTH
    assert check_extraction(parameters, project) == dict(zip(SPLITS, (6, 4, 6, 4), strict=True))
    check_shards(parameters, project)
    plan = make_plan(parameters, WIDTH)
    assert (plan.extracted, plan.gallery_classes) == (SPLITS, parameters.images.classes)
    assert set(Extraction(parameters, project).datasets()) == {
        "extract_model",
        *(f"extract_images_{split}" for split in SPLITS),
        *(f"extract_masks_{split}" for split in SPLITS if split.startswith("probe")),
    }
    assert (
        Extraction(
            parse_parameters(
                {
                    "layers": [0],
                    "shards": dict.fromkeys(SPLITS, "a"),
                }
            ),
            project,
        ).datasets()
        == {}
    )


def test_a_model_that_is_not_there_leaves_the_width_open(project):
    assert find_d_model(parse({"model": "nowhere/at-all/x"}), project) is None


FAULTS = [
    ({}, {}, {"layers": [0, BLOCKS]}, ["extract: found layer 3", "0 to 2", "has 3 blocks"]),
    ({}, {}, {"layers": [-2]}, ["extract: found layer -2"]),
    ({"resize": 8}, {}, {}, ["extract: resize 8", "32 x 32"]),
    ({"max_tokens_per_shard": 3}, {}, {}, ["extract: found max_tokens_per_shard 3", "least"]),
    ({"model": "gone"}, {}, {}, ["extract.model", "gone"]),
    ({"fit": {"images": "gone"}}, {}, {}, ["extract.fit.images", "gone"]),
    ({"fit": {"pattern": "*.gif"}}, {}, {}, ["extract.fit.images", "no image", "pattern"]),
    ({"probe_val": {"masks": "train/masks"}}, {"probe_val": "x"}, {}, None),
    ({"probe_val": {"masks": "gone"}}, {}, {}, ["extract.probe_val.masks", "gone"]),
    (
        {"labels": {"replace": {"a/": "c/"}}},
        {},
        {},
        ["extract.probe_train.masks", str(Path("masks") / "c")],
    ),
    (
        {},
        {"val": "data/01_raw/images/fit"},
        {},
        ["shards.fit is data/01_raw/images/fit", "shards.val is", "a folder of its own"],
    ),
    (
        {},
        {"val": "data/01_raw/images/fit/val"},
        {},
        ["shards.fit is data/01_raw/images/fit", "shards.val is", "a folder of its own"],
    ),
    ({}, {}, {"images": {"path": "photos"}}, ["images.path is photos", "val/images", "null"]),
    ({}, {}, {"kmeans": {"n_clusters": 97}}, ["n_clusters is 97", "has only 96 tokens"]),
    ({}, {}, {"pca": {"topk": [33]}}, ["pca.topk is [33]", "d_model, 32"]),
    ({}, {}, {"latent_topk": 33}, ["latent_topk is 33", "32"]),
]


@pytest.mark.parametrize(("extract", "shards", "rest", "words"), FAULTS, ids=str)
def test_what_cannot_be_recorded_is_refused_before_any_work(project, extract, shards, rest, words):
    parameters = parse(extract, shards, **rest)
    if words is None:  # another name of a folder with the same masks
        check_shards(parameters, project)
        return
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check_shards(parameters, project)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_weights_that_are_pickled_are_refused_by_name(project):
    (project / "model" / "model.safetensors").rename(project / "model" / "pytorch_model.bin")
    with pytest.raises((ValueError, FileNotFoundError), match=r"^extract\.model: .*pytorch_model"):
        check_shards(parse(), project)


def test_a_patch_size_that_does_not_divide_the_size_is_refused(project):
    path = project / "model" / "preprocessor_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"size": {"height": 36, "width": 36}}))
    with pytest.raises(ValueError, match=r"^extract: .*36 x 36 pixels, which its patches of 8 do"):
        check_shards(parse(), project)


def test_the_embedded_defaults_place_is_not_for_recordings():
    with pytest.raises(
        ValueError, match=r"shards\.val is data/01_raw/digits/val, the .*env=images"
    ):
        make_plan(parse(shards={"val": "data/01_raw/digits/val"}))


def test_shards_of_others_are_never_replaced(planted, project):
    place = project / "data/01_raw/images/fit"
    shutil.copytree(planted[0], place / planted[0].name)
    with pytest.raises(ValueError, match=r"^extract\.fit\.images: .*cannot replace \(planted"):
        check_shards(parse(), project)
    shutil.rmtree(place)
    shutil.copytree(planted[0], place)
    with pytest.raises(ValueError, match=r"leave extract\.fit\.images out to read them"):
        check_shards(parse(), project)


def test_a_split_that_is_read_must_be_of_this_model_revision_and_geometry(planted, project):
    record(parse(), project, "fit")
    read = parse({"fit": {"images": None}})
    check_shards(read, project)
    theirs = parse({"fit": {"images": None}}, {"fit": str(planted[0])}, layers=[3])
    with pytest.raises(ValueError, match="layer"):
        check_shards(theirs, project)
    wide = parse({"fit": {"images": None}, "grid": (2, 8), "resize": 64})
    with pytest.raises(ValueError, match=r"shards\.fit, .*another geometry \(.*grid"):
        check_shards(wide, project)
    write_model(project / "again" / "model", "dinov2_with_registers")
    config = project / "again" / "model" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"layer_norm_eps": 1e-3}))
    other = parse({"fit": {"images": None}, "model": "again/model"})
    with pytest.raises(ValueError, match=r"shards\.fit, .*another model or revision"):
        check_shards(other, project)
    rough = parse({"fit": {"images": None}, "precision": "bfloat16"})
    with pytest.raises(
        ValueError, match=r"shards\.fit, .*another precision \(bfloat16 and float32"
    ):
        check_shards(rough, project)


def test_splits_that_were_recorded_in_two_precisions_are_refused(project):
    for split in SPLITS:
        precision = "bfloat16" if split == "val" else "float32"
        record(parse({"precision": precision}), project, split)
    masks = {"probe_train": {"masks": None}, "probe_val": {"masks": None}}
    read = parse(
        {"model": None} | {split: {"images": None} | masks.get(split, {}) for split in SPLITS}
    )
    with pytest.raises(
        ValueError, match=r"shards\.val, .*another precision \(bfloat16 and float32"
    ):
        check_shards(read, project)


def test_the_images_of_a_recording_are_named_by_their_real_path(project):
    (project / "link").symlink_to(project / "train")
    parameters = parse({"fit": {"images": "val/../link/images"}})
    record(parameters, project, "fit")
    (metadata,) = (project / "data/01_raw/images/fit").glob("*/metadata.json")
    assert json.loads(metadata.read_text())["dataset"] == str(project / "train/images")


def test_what_files_say_is_escaped_and_cut_where_two_recordings_are_compared():
    said: dict[str, Any] = {"geometry": RecordedGeometry(patch_size=8, n_patches=16)}
    plain = MadeOf({"library": "x"}, precision="float32", **said)
    odd = {"library": "\x1b[2J" * 40} | {f"\x07{number}" * 40: "\u202e" for number in range(9)}
    for other in (
        MadeOf(odd, precision="float32", **said),
        MadeOf({"library": "x"}, precision="\x1b[2J" * 400, **said),
    ):
        for told in (plain.differs(other), other.differs(plain)):
            assert told is not None
            assert told.isprintable()
            assert "\\x" in told
            assert len(told) < 4000
    assert plain.differs(plain) is None


def test_layers_that_a_recording_holds_already_are_kept(project):
    parameters = parse()
    record(parameters, project, "fit")
    assert Extraction(parse(layers=[2]), project).layers("fit") == (0, 2)
    assert Extraction(parse(layers=[1]), project).layers("fit") == (1,)
    assert Extraction(parse(layers=[2]), project).layers("val") == (2,)
    for change in ({"geometry": "stretch"}, {"batch_size": 8}, {"precision": "bfloat16"}):
        again = parse(change, layers=[2])
        assert Extraction(again, project).layers("fit") == (2,), change


def test_a_pipeline_that_only_records_wants_no_other_shards(project):
    parameters = parse({"val": {"images": None}}, {"val": "gone"}, kmeans={"n_clusters": 10_000})
    recording: Any = SimpleNamespace(nodes=[SimpleNamespace(name="extract.record.fit")])
    check_pipeline(parameters, project, recording)
    fitting: Any = SimpleNamespace(
        nodes=[*recording.nodes, SimpleNamespace(name="layer_0.pca.fit")]
    )
    with pytest.raises(FileNotFoundError, match=r"shards\.val"):
        check_pipeline(parameters, project, fitting)


def test_a_disk_that_is_too_small_for_all_of_them_is_told_before_the_first(project, monkeypatch):
    parameters = parse()
    each = 2 * 17 * WIDTH * 4
    wanted = {"fit": 6 * each, "probe_val": 4 * (each + 4 * 16)}
    monkeypatch.setattr(module, "free_bytes", lambda _: sum(wanted.values()))
    check_room(parameters, project, ["fit", "probe_val"])
    monkeypatch.setattr(module, "free_bytes", lambda _: sum(wanted.values()) - 1)
    with pytest.raises(ValueError, match=r"shards of fit, probe_val take 4\.38e-05 GB, .*are free"):
        check_room(parameters, project, ["fit", "probe_val"])
    check_room(parameters, project, ["fit"])
    # What an earlier run began is not wanted twice.
    begun = project / "data/01_raw/images/.fit.partial-0123456789abcdef/content"
    begun.mkdir(parents=True)
    (begun / "acts").write_bytes(bytes(4096))
    check_room(parameters, project, ["fit", "probe_val"])


def test_images_in_both_probe_splits_are_told_of(project, caplog):
    check_room(parse(), project, ["fit", "probe_val"])
    assert not caplog.records
    copied = project / "val" / "images" / "a" / "000.png"
    shutil.copy(project / "train" / "images" / "b" / "001.png", copied)
    with caplog.at_level(logging.WARNING):
        check_room(parse(), project, ["fit"])
        assert not caplog.records
        check_room(parse(), project, ["fit", "probe_val"])
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("1 images of probe_train are in probe_val as well")
    assert f"{project / 'train/images/b/001.png'} and {copied}" in said
    # Of equal size, and another content.
    Image.new("RGB", (32, 32), (1, 2, 3)).save(copied)
    caplog.clear()
    check_room(parse(), project, ["probe_val"])
    assert not caplog.records


def test_labels_are_looked_at_once_masks_have_made_them(project, monkeypatch):
    void = parse({"labels": {"void": [0, 1, 2, 3]}})
    record(void, project, "probe_train")
    hook = configuration.ConfigurationHook()
    monkeypatch.setitem(configuration._current, "session", (project, void))
    hook.after_dataset_saved("shards_fit")
    hook.after_dataset_saved("layer_0.kmeans_model")
    with pytest.raises(ValueError, match=r"^shards\.probe_train: every label of .* is 0, void"):
        hook.after_dataset_saved("shards_probe_train")
    later: Any = SimpleNamespace(
        nodes=[SimpleNamespace(name="layer_0.probe.pca")],
        inputs=lambda: {"shards_probe_train", "params:device"},
        all_outputs=set,
    )
    with pytest.raises(ValueError, match=r"^shards\.probe_train: every label"):
        hook.before_pipeline_run(later)
    good = parse()
    record(good, project, "probe_train")
    monkeypatch.setitem(configuration._current, "session", (project, good))
    hook.after_dataset_saved("shards_probe_train")
    hook.before_pipeline_run(later)


def test_probe_splits_without_a_class_in_common_are_told_of(project):
    record(parse({"labels": {"void": [0, 1]}}), project, "probe_train")
    record(parse({"labels": {"void": [0, 2, 3]}}), project, "probe_val")
    with pytest.raises(ValueError, match=r"no class is in both .*\[2, 3\].*\[1\]"):
        check_recorded_labels(parse(), project, ["probe_train", "probe_val"])
