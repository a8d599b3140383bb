"""The pipelines by name: each whole in itself, one namespace a layer, and every dataset an entry of
the catalog.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from kedro.io import CatalogConfigResolver, DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from assay import configuration, extraction
from assay.backbones import Description, Preprocessing
from assay.configuration import ConfigLoader
from assay.encodings import KINDS as FORMS
from assay.encodings import Form
from assay.fingerprints import Fingerprints
from assay.parameters import PCAParameters, SparsityParameters, parse_parameters
from assay.pipeline_registry import register_pipelines
from assay.tracking.describe import sum_by_stage

CONF = Path(__file__).parents[1] / "conf"
STAGES = ("digits", "standardize", "kmeans", "pca", "encode", "probe", "report")

DICTIONARIES = {
    "mine": {"sae": "saes/{layer}", "layers": [3]},
    "theirs": {"saev_run": "runs/{layer}"},
    "random-centres": {"random": "centres"},
    "random-directions": {"random": "directions"},
}
SPLITS = ("fit", "val", "probe_train", "probe_val")
OWN = {split: f"data/01_raw/own/{split}" for split in SPLITS}
EXTRACT = {
    "model": "vit",
    "fit": {"images": "photos"},
    "probe_val": {"images": "scenes", "masks": "masks"},
}
MODEL = Description(
    family="dinov2",
    ckpt="vit",
    d_model=96,
    n_blocks=4,
    patch_size=8,
    cls_token=True,
    preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32), None, "bicubic"),
    identity={"library": "none"},
)
ENCODINGS = [
    "kmeans-invdist",
    "kmeans-onehot",
    "pca-topk-00001",
    "pca-topk-00004",
    "pca-topk-00016",
    "pca-topk-00064",
]

ENCODED = ["kmeans-invdist", "kmeans-onehot", "pca-topk-00064", "pca-dense"]
"""Those whose codes are made: all K of the sweep share those of the largest."""

KINDS: list[dict[str, Any]] = [
    {},
    {"latent_topk": 64},
    {"kmeans": {"more_seeds": (1, 7)}},
    {"standardize": {"statistics": "own/{layer}.safetensors"}},
    {"shards": OWN},
    {"dictionaries": DICTIONARIES},
    {"shards": OWN, "images": {"path": "photos"}},
    {"class_names": "names.txt"},
    {"shards": OWN, "extract": EXTRACT},
]
"""The default, and the changes that lead to other nodes."""


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Builds the pipelines as a session with these parameters over conf/base would."""

    def build(**changes) -> dict[str, Pipeline]:
        raw = ConfigLoader(str(CONF), base_env="base", default_run_env="base")["parameters"]
        session = tmp_path, parse_parameters({**raw, "layers": [0, 3], **changes})
        monkeypatch.setitem(configuration._current, "session", session)
        monkeypatch.setattr(extraction, "look", lambda *_: MODEL)
        return register_pipelines()

    return build


def names(pipeline: Pipeline) -> set[str]:
    return {node.name for node in pipeline.nodes}


def of_stage(pipeline: Pipeline, stage: str) -> set[str]:
    return {name for name in names(pipeline) if re.search(rf"(^|\.){stage}\.", name)}


def test_there_are_seven_pipelines_and_the_whole(register):
    pipelines = register()
    assert set(pipelines) == {*STAGES, "__default__"}
    assert names(pipelines["__default__"]) == names(
        sum((pipelines[stage] for stage in STAGES), Pipeline([]))
    )
    beside_the_table = names(pipelines["__default__"]) - names(pipelines["report"])
    assert beside_the_table == {
        name for name in names(pipelines["pca"]) if "encode.pca-dense" in name
    }


def test_there_is_no_digits_pipeline_where_all_shards_are_the_users(register):
    pipelines = register(shards=OWN)
    assert set(pipelines) == {*STAGES[1:], "__default__"}
    assert not of_stage(pipelines["__default__"], "digits")


def test_only_the_splits_that_lie_in_the_defaults_folder_are_made(register):
    shards = OWN | {split: f"data/01_raw/digits/{split}" for split in ("fit", "val")}
    assert names(register(shards=shards)["digits"]) == {
        "digits.train",
        "digits.record.fit",
        "digits.record.val",
    }


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_each_pipeline_holds_its_ancestors(register, changes):
    pipelines = register(**changes)
    whole = pipelines["__default__"]
    made = whole.all_outputs()
    for name, pipeline in pipelines.items():
        assert names(pipeline) <= names(whole)
        assert not pipeline.inputs() & made, name
        assert names(whole.to_nodes(*names(pipeline))) == names(pipeline)
    sources = {source for source in whole.inputs() if not source.startswith("params:")}
    methods = [
        "kmeans",
        "pca",
        *(["kmeans-seed-1", "kmeans-seed-7"] if "kmeans" in changes else []),
    ]
    if "standardize" not in changes:
        methods.append("statistics")
    wanted = {f"layer_{n}.{method}_checkpoints" for n in (0, 3) for method in methods}
    probes = [node.name for node in whole.nodes if ".probe." in node.name]
    wanted |= {f"{name.replace('probe.', 'probe-')}_checkpoints" for name in probes}
    wanted |= (
        {"layer_0.given_statistics", "layer_3.given_statistics"}
        if "standardize" in changes
        else set()
    )
    if "dictionaries" in changes:
        theirs = ("codes_theirs_probe_train", "codes_theirs_probe_val", "metrics_theirs")
        wanted |= {
            "layer_3.sae_mine",
            *(f"layer_{n}.{name}" for n in (0, 3) for name in theirs),
        }
    wanted |= {"images_probe_val"} if "images" in changes else set()
    wanted |= {"class_names"} & changes.keys()
    wanted |= {f"shards_{split}" for split in SPLITS} if "shards" in changes else set()
    if "extract" in changes:
        wanted -= {"shards_fit", "shards_probe_val"}
        wanted |= {f"extract_{name}" for name in ("model", "images_fit", "images_probe_val")}
        wanted |= {"extract_masks_probe_val", "images_probe_val"}
    assert sources == wanted


def test_splits_are_recorded_before_anything_is_fitted_to_them(register):
    pipelines = register(shards=OWN, extract=EXTRACT)
    wanted = {"extract.record.fit", "extract.record.probe_val"}
    assert names(pipelines["extract"]) == wanted
    assert of_stage(pipelines["standardize"], "extract") == {"extract.record.fit"}
    assert of_stage(pipelines["probe"], "extract") == wanted
    assert "extract" not in register(shards=OWN)
    assert "report.illustrate" in names(pipelines["report"])


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({"batch_size": 8}, True),
        ({"geometry": "stretch"}, True),
        ({"precision": "bfloat16"}, True),
        ({"cls_token": False}, True),
        ({"max_tokens_per_shard": 10_000}, True),
        ({"grid": [4, 4]}, True),
        ({"val": {"images": "others"}}, False),
        ({"labels": {"offset": 1}}, False),  # the masks' own fingerprint says it
    ],
    ids=str,
)
def test_a_recording_depends_on_what_changes_it(register, change, remade):
    before, after = (
        told(register(shards=OWN, extract=EXTRACT | each)["extract"]) for each in ({}, change)
    )
    assert (before["shards_fit"] != after["shards_fit"]) is remade
    layers = told(register(shards=OWN, extract=EXTRACT, layers=[0, 3, 5])["extract"])
    assert layers["shards_fit"] != before["shards_fit"]
    turned = told(register(shards=OWN, extract=EXTRACT, layers=[3, 0])["extract"])
    assert turned == before


def test_a_pipeline_holds_no_stage_that_it_does_not_need(register):
    pipelines = register()
    for name, strangers in {
        "standardize": ["kmeans", "pca", "encode", "probe", "report"],
        "kmeans": ["pca", "encode", "probe", "report"],
        "pca": ["kmeans", "probe", "report"],
        "encode": ["probe", "report"],
        "probe": ["report"],
    }.items():
        assert of_stage(pipelines[name], name)
        for stranger in strangers:
            assert not of_stage(pipelines[name], stranger), (name, stranger)


def test_a_node_is_named_by_layer_stage_and_verb(register):
    whole = register()["__default__"]
    both = ("probe_train", "probe_val")
    in_layer = {"standardize.fit", "kmeans.fit", "kmeans.measure", "pca.fit", "pca.measure"}
    in_layer |= {"report.merge", "report.summarise", "report.gather"}
    in_layer |= {f"probe.{encoding}" for encoding in ENCODINGS if "topk" not in encoding} | {
        "probe.pca-topk"
    }
    in_layer |= {f"encode.{encoding}.{split}" for encoding in ENCODED for split in both}
    shared = {
        "digits.train",
        "digits.draw.probe_val",
        *(f"digits.record.{split}" for split in SPLITS),
    }
    shared |= {
        f"report.{verb}" for verb in ("tabulate", "view", "draw", "illustrate", "describe", "page")
    }
    assert names(whole) == shared | {
        f"layer_{layer}.{name}" for layer in (0, 3) for name in in_layer
    }


def test_a_layer_is_a_namespace(register):
    whole = register()["__default__"]
    assert {node.namespace for node in whole.nodes} == {None, "layer_0", "layer_3"}
    for node in whole.nodes:
        if node.namespace:
            assert node.name.startswith(f"{node.namespace}.")
            strangers = {
                name
                for name in (*node.inputs, *node.outputs)
                if not name.startswith(f"{node.namespace}.")
            }
            assert {name for name in strangers if not name.startswith(("shards_", "params:"))} <= {
                f"rows_{node.namespace}",
                f"curves_{node.namespace}",
                f"examples_{node.namespace}",
            }
    one = whole.filter(node_namespaces=["layer_3"])
    assert {node.namespace for node in one.nodes} == {"layer_3"}
    assert len(one.nodes) == len(whole.filter(node_namespaces=["layer_0"]).nodes)


def test_layers_come_from_the_parameters(register):
    whole = register(layers=[3])["__default__"]
    assert {node.namespace for node in whole.nodes} == {None, "layer_3"}
    assert "rows_layer_3" in whole.all_outputs()


def test_nodes_are_bound_to_their_layer_and_encoding(register):
    whole = register()["__default__"]
    for node in whole.nodes:
        if not node.namespace or node.name.endswith("report.merge"):
            continue
        bound = node.func.keywords
        assert f"layer_{bound['layer']}" == node.namespace
        assert "name" not in bound or bound["name"] in node.name
        assert bound.get("ks", ()) == ((1, 4, 16, 64) if node.name.endswith("pca.measure") else ())


def test_latent_topk_takes_the_place_of_the_dense_codes(register):
    dense, topk = register()["pca"], register(latent_topk=7)["pca"]
    assert {name for name in names(dense) if "encode" in name and "probe_val" in name} == {
        f"layer_{layer}.encode.pca-dense.probe_val" for layer in (0, 3)
    }
    assert {name for name in names(topk) if "encode" in name and "probe_val" in name} == {
        f"layer_{layer}.encode.pca-topk-00007.probe_val" for layer in (0, 3)
    }
    # That is pca's to leave.
    assert not any("pca-topk-00007" in name for name in names(register(latent_topk=7)["encode"]))
    assert "layer_3.scores_pca-topk-00007" in register(latent_topk=7)["__default__"].all_outputs()
    assert "layer_3.scores_pca-topk-00007" not in register()["__default__"].all_outputs()


@pytest.mark.parametrize(("latent_topk", "widest"), [(None, 64), (7, 64), (64, 64), (70, 70)])
def test_every_k_is_probed_by_one_node_on_the_codes_of_the_largest(register, latent_topk, widest):
    whole = register(latent_topk=latent_topk)["__default__"]
    (node,) = [node for node in whole.nodes if node.name == "layer_3.probe.pca-topk"]
    assert node.inputs[:2] == [
        f"layer_3.codes_pca-topk-{widest:05d}_probe_{split}" for split in ("train", "val")
    ]
    ks = sorted({1, 4, 16, 64} | {latent_topk} - {None})
    assert node.func.keywords["rows"] == tuple((f"pca-topk-{k:05d}", k) for k in ks)
    assert node.outputs == [
        f"layer_3.{kind}_pca-topk-{k:05d}"
        for k in ks
        for kind in ("probes", "scores", "pairs", "examples")
    ]
    made = {
        name.partition("codes_")[2] for name in whole.all_outputs() if ".codes_pca-topk" in name
    }
    assert len(made) == 2 * len({widest, latent_topk} - {None})


@pytest.mark.parametrize("latent_topk", [None, 16, 70])
def test_whitened_codes_are_probed_by_a_node_for_each_k(register, latent_topk):
    pipelines = register(latent_topk=latent_topk, pca={"topk": [1, 16], "whiten": True})
    whole = pipelines["__default__"]
    ks = sorted({1, 16} | {latent_topk} - {None})
    probing = [node for node in whole.nodes if ".probe.pca" in node.name and "layer_3" in node.name]
    assert sorted(node.name for node in probing) == [f"layer_3.probe.pca-topk-{k:05d}" for k in ks]
    for node in probing:
        name = node.name.partition("probe.")[2]
        assert node.inputs[0] == f"layer_3.codes_{name}_probe_train"
        assert node.func.keywords["rows"] == ((name, int(name[-5:])),)
    encoded = [name for name in names(whole) if ".encode.pca" in name and "layer_3" in name]
    assert len(encoded) == 2 * len({*ks, latent_topk})
    kinds = {node.name: getattr(node.func, "keywords", {}).get("kind") for node in whole.nodes}
    whitened = {name for name, kind in kinds.items() if isinstance(kind, Form) and kind.whiten}
    assert whitened == {
        name for name in names(whole) if re.search(r"\.(encode\.pca-[^.]+\.|pca\.measure$)", name)
    }


def test_a_change_of_whiten_remakes_what_is_made_with_pca_and_nothing_else(register):
    changes = {"dictionaries": {"floor": {"random": "directions"}}}
    before, after = (
        told(
            register(pca={"topk": [1, 16], "whiten": whiten}, **changes)["__default__"],
            pca=PCAParameters(topk=(1, 16), whiten=whiten),
        )
        for whiten in (False, True)
    )
    remade = re.compile(
        r"layer_\d\.(pca_errors|(codes|scores|probes|pairs|examples)_pca-)"
        r"|(rows|examples)_layer|baselines|paper|matched|classes|figure|gallery|about|report_page"
    )
    assert {name for name in after if before.get(name) != after[name]} == {
        name for name in after if remade.match(name)
    }
    kept = {name for name in after if not remade.match(name)}
    assert {
        "layer_3.pca_model",
        "layer_3.pca_history",
        "layer_3.codes_floor-topk-00016_probe_val",
    } < (kept)


def test_sparsity_is_bound_to_the_nodes_whose_codes_it_may_change(register):
    encodings = [f"kmeans-{kind}" for kind in FORMS["kmeans"]]
    for sparsity in (None, {"top_k": 2}):
        kmeans = {"n_clusters": 8, "sparsity": sparsity, "encodings": encodings}
        for node in register(kmeans=kmeans)["__default__"].nodes:
            sparser = re.search(r"\.encode\.kmeans-(invdist|distance-(cosine|unit))\.", node.name)
            wanted = SparsityParameters(top_k=2) if sparsity and sparser else None
            assert getattr(node.func, "keywords", {}).get("sparsity") == wanted, node.name


def told(pipeline: Pipeline, **parameters: Any) -> dict[str, str]:
    """The fingerprints of what the nodes make of sources that nobody has changed, and of these
    parameters.
    """
    sources: dict[str, Any] = {name: MemoryDataset({"of": name}) for name in pipeline.inputs()}
    sources |= {f"params:{name}": MemoryDataset(each) for name, each in parameters.items()}
    for dataset in sources.values():
        dataset.fingerprint = lambda: "the same"
    fingerprints = Fingerprints(DataCatalog(sources), pipeline)
    return {name: fingerprints.fingerprint(name) for name in pipeline.all_outputs()}


@pytest.mark.parametrize("changes", KINDS)
def test_every_node_can_be_told_from_others(register, changes):
    whole = register(**changes)["__default__"]
    found = told(whole)
    assert len({found[node.outputs[0]] for node in whole.nodes}) == len(whole.nodes)


SEVERAL = {
    "mine": {"sae": "{layer}-{seed}", "seeds": [0, 1, 2]},
    "theirs": {"saev_run": "runs/{layer}-{seed}", "seeds": [0, 1, 2]},
}


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"seeds": [0, 1]}, r"layer_[03]\.(mine|theirs|codes_mine).*seed-[01]"),
        ({"layers": [3]}, r"layer_3\.(mine|theirs|codes_mine).*seed"),
        ({"batch_size": 9}, r"codes_mine"),
    ],
)
def test_a_change_of_a_dictionary_leaves_what_it_is_no_part_of(register, change, kept):
    before = told(register(dictionaries=SEVERAL)["dictionaries"])
    changed = {name: {**each, **change} for name, each in SEVERAL.items()}
    after = told(register(dictionaries=changed)["dictionaries"])
    same = {name for name in after if re.match(rf"(layer_\d\.)?{kept}", name)}
    assert same
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_a_change_of_what_makes_a_dictionarys_codes_remakes_them(register):
    before = told(register(dictionaries=SEVERAL)["dictionaries"])
    changed = {**SEVERAL, "mine": {**SEVERAL["mine"], "trained_on": "standardized"}}
    after = told(register(dictionaries=changed)["dictionaries"])
    assert {name.split(".")[1] for name in after if after[name] != before[name]} == {
        name.format(seed)
        for name in (
            "mine-seed-{}_errors",
            "codes_mine-seed-{}_probe_train",
            "codes_mine-seed-{}_probe_val",
        )
        for seed in range(3)
    }


def test_each_seed_of_kmeans_is_fitted_encoded_probed_and_reported(register):
    pipelines = register(kmeans={"n_clusters": 8, "seed": 5, "more_seeds": (1,)})
    nodes = {node.name: node for node in pipelines["__default__"].nodes}
    assert nodes["layer_3.kmeans.fit"].func.keywords["seed"] == 5
    assert nodes["layer_3.kmeans-seed-1.fit"].func.keywords["seed"] == 1
    encode = nodes["layer_3.encode.kmeans-seed-1-invdist.probe_val"]
    assert encode.inputs[2] == "layer_3.kmeans-seed-1_model"
    assert (encode.func.keywords["kind"], encode.func.keywords["seed"]) == (Form("invdist"), 1)
    assert nodes["layer_3.encode.kmeans-invdist.probe_val"].func.keywords["seed"] == 5
    assert "layer_3.probe.kmeans-seed-1-invdist" in nodes
    rows = nodes["layer_3.report.merge"].func.keywords["encodings"]
    seeds = {row.name: row.model.seed for row in rows}
    assert (seeds["kmeans-invdist"], seeds["kmeans-seed-1-invdist"], seeds["pca-topk-00004"]) == (
        5,
        1,
        None,
    )
    assert "layer_3.kmeans-seed-1_errors" in nodes["layer_3.report.merge"].inputs
    assert nodes["layer_3.report.summarise"].inputs[-1] == "layer_3.kmeans-seed-1_agreement"
    assert nodes["report.agree"].outputs == ["agreement"]
    assert "agreement" in nodes["report.page"].inputs
    assert "report.agree" not in names(register()["__default__"])


def test_the_gallery_is_drawn_where_the_images_are_at_hand(register):
    assert "report.illustrate" in names(register()["report"])
    assert "report.illustrate" not in names(register(shards=OWN)["report"])
    pipelines = register(shards=OWN, images={"path": "photos", "classes": 3})
    (node,) = [node for node in pipelines["report"].nodes if node.name == "report.illustrate"]
    assert node.func.keywords["most_classes"] == 3
    assert "images_probe_val" in pipelines["report"].inputs()


def test_only_the_views_take_the_names_of_classes(register):
    without, named = register()["__default__"], register(class_names="names.txt")["__default__"]
    assert names(without) == names(named)
    assert [node.name for node in named.nodes if "class_names" in node.inputs] == ["report.view"]
    assert "class_names" not in without.datasets()


def test_given_statistics_are_adopted_and_not_fitted(register):
    pipelines = register(standardize={"statistics": "own/{layer}.safetensors"})
    assert of_stage(pipelines["standardize"], "standardize") == {
        f"layer_{n}.standardize.adopt" for n in (0, 3)
    }


@pytest.mark.parametrize("environment", ["base", "ade20k"])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_only_catalog_names_join_stages(register, environment, changes):
    loader = ConfigLoader(str(CONF), env=environment, base_env="base", default_run_env="base")
    resolver = CatalogConfigResolver(loader["catalog"])
    catalog = DataCatalog()
    assert not resolver.match_dataset_pattern("layer_3.nonsense")
    pipelines = register(**changes)
    configuration.ConfigurationHook().after_catalog_created(catalog)  # the users' own dictionaries
    known = {*resolver.config, *catalog.keys()}
    assert ("layer_3.sae_mine" in known) == ("dictionaries" in changes)
    assert ("class_names" in known) == ("class_names" in changes)
    assert ("images_probe_val" in known) == (
        "shards" not in changes or "images" in changes or "extract" in changes
    )
    for pipeline in pipelines.values():
        for name in pipeline.datasets() - {"digits_vit"}:
            if not name.startswith("params:"):
                assert name in known or resolver.match_dataset_pattern(name), name


def test_layers_that_were_counted_from_the_end_have_places_of_their_own(register):
    loader = ConfigLoader(str(CONF), base_env="base", default_run_env="base")
    resolver = CatalogConfigResolver(loader["catalog"])
    dictionaries = {"mine": {"sae": "saes/{layer}", "layers": [-2]}}
    pipelines = register(layers=[-2, -1], dictionaries=dictionaries, shards=OWN)
    catalog = DataCatalog()
    configuration.ConfigurationHook().after_catalog_created(catalog)
    weights = catalog.get("layer_-2.sae_mine")
    assert weights is not None
    assert Path(weights._describe()["filepath"]).name == "layer_-2"
    namespaced = [name for name in pipelines["__default__"].all_outputs() if "layer_" in name]
    assert {name.partition(".")[0] for name in namespaced if "." in name} == {
        "layer_-2",
        "layer_-1",
    }
    for name in namespaced:
        entry = resolver.resolve_pattern(name)
        (layer,) = (layer for layer in ("layer_-2", "layer_-1") if layer in name)
        assert layer in entry["filepath"] or entry["layer"] == layer
    assert sum_by_stage({"layer_-2.pca.fit": 1.0, "layer_-1.pca.fit": 2.0, "report.page": 3.0}) == {
        "pca": 3.0,
        "report": 3.0,
    }


def test_every_parameter_of_a_node_is_in_the_configuration(register):
    raw = ConfigLoader(str(CONF), base_env="base", default_run_env="base")["parameters"]
    wanted = {name for name in register()["__default__"].inputs() if name.startswith("params:")}
    assert wanted <= {f"params:{name}" for name in raw}


def test_no_dataset_name_reads_like_a_namespace(register, monkeypatch):
    flag = "__dotted_dataset_name_warned__"  # Kedro warns once in a process
    monkeypatch.setattr(Node, flag, False, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for changes in KINDS:
            register(**changes)
    assert not getattr(Node, flag)


def test_other_dictionaries_are_probed_and_reported_on_the_layers_that_they_are_of(register):
    pipelines = register(dictionaries=DICTIONARIES, kmeans={"n_clusters": 8}, pca={"topk": (1, 4)})
    whole = pipelines["__default__"]
    made = whole.all_outputs()
    rows = ["theirs", "random-centres-onehot", "random-centres-invdist"]
    rows += [f"random-directions-topk-{k:05d}" for k in (1, 4)]
    for layer, wanted in ((0, rows), (3, [*rows, "mine"])):
        (merge,) = [node for node in whole.nodes if node.name == f"layer_{layer}.report.merge"]
        others = {name for name in merge.inputs if not re.search(r"\.(scores_)?(kmeans|pca)", name)}
        names_of = {name.partition(".")[2] for name in others}
        assert {name for name in names_of if name.startswith("scores_")} == {
            f"scores_{row}" for row in wanted
        }
        dictionaries = {"theirs", "random-centres", "random-directions", *({"mine"} & set(wanted))}
        assert {name for name in names_of if name.endswith("_errors")} == {
            f"{name}_errors" for name in dictionaries
        }
        for row in wanted:
            assert f"layer_{layer}.probes_{row}" in made
    (sweep,) = [
        node for node in whole.nodes if node.name == "layer_0.probe.random-directions-topk-00004"
    ]
    assert sweep.inputs[0] == "layer_0.codes_random-directions-topk-00004_probe_train"
    assert sweep.func.keywords["rows"] == (
        ("random-directions-topk-00001", 1),
        ("random-directions-topk-00004", 4),
    )
    assert of_stage(pipelines["dictionaries"], "dictionaries") == of_stage(whole, "dictionaries")
    assert "dictionaries" not in register()
