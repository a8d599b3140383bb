"""Every parameter is typed, has its default in one place, and a fault in it is one line that says
what was wanted.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from assay import fingerprints
from assay.architecture import Activation
from assay.configuration import ConfigLoader
from assay.io.saes.stored import Normalization, Settings
from assay.parameters import (
    DictionaryParameters,
    Parameters,
    PCAParameters,
    parse_parameters,
    result_values,
)
from assay.parameters.fields import ADDED, OPERATIONAL, SELECTS, Section

CONF = Path(__file__).parents[1] / "conf"
SHARDS = {"fit": "a", "val": "b", "probe_train": "c", "probe_val": "d"}
LEAST: dict[str, Any] = {"layers": [3], "shards": SHARDS}
SECTIONS = ("shards", "extract", "standardize", "kmeans", "pca", "probe", "digits")


def fields_of(section: str) -> dict[str, FieldInfo]:
    annotation = Parameters.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation.model_fields


FAULTS = [
    (
        {"layers": 3},
        ["`layers` is 3", "tuple", "Several may be given, so write brackets: layers:[3]."],
    ),
    (
        {"kmeans": {"n_clusters": [64, 128]}},
        ["`kmeans.n_clusters` is [64, 128]", "one value a run: run kmeans.n_clusters:64 first"],
    ),
    (
        {"shards": SHARDS | {"val": 12345678}},
        ["`shards.val` is 12345678", "It is text: put it in quotes in the YAML."],
    ),
    ({"layers": ["three"]}, ["`layers.0` is 'three'", "integer"]),
    ({"layers": [3, -65_537]}, ["`layers.1` is -65537", "greater than or equal to -65536"]),
    ({"layers": [3, 5, 3]}, ["`layers`", "[3, 5, 3]", "none twice"]),
    ({"layers": []}, ["`layers`", "[]", "at least one"]),
    ({"latent_topk": 0}, ["`latent_topk` is 0", "greater than 0"]),
    ({"device": "tpu"}, ["`device` is 'tpu'", "'auto', 'cpu' or 'cuda'"]),
    ({"shards": SHARDS | {"val": [7]}}, ["`shards.val` is [7]", "string"]),
    (
        {"shards": SHARDS | {"val": "/data/{a,b}"}},
        ["`shards.val`", "'/data/{a,b}'", "without braces", "link"],
    ),
    (
        {"standardize": {"statistics": "{layer}/{b}"}},
        ["`standardize.statistics`", "'{layer}/{b}'", "without braces"],
    ),
    ({"standardize": {"statistics": [3]}}, ["`standardize.statistics` is [3]", "string"]),
    ({"standardize": {"batch_size": 0}}, ["`standardize.batch_size` is 0", "greater than 0"]),
    ({"probe": {"parts": 0}}, ["`probe.parts` is 0", "greater than or equal to 1"]),
    ({"pca": {"parts": 4097}}, ["`pca.parts` is 4097", "less than or equal to 4096"]),
    ({"kmeans": 3}, ["`kmeans` is 3", "dictionary"]),
    ({"kmeans": {"n_clusters": 8.5}}, ["`kmeans.n_clusters` is 8.5", "integer"]),
    ({"kmeans": {"n_clusters": "many"}}, ["`kmeans.n_clusters` is 'many'", "integer"]),
    (
        {"kmeans": {"init_size": 7, "n_clusters": 8}},
        ["`kmeans`", "init_size 7", "at least n_clusters, 8"],
    ),
    (
        {"kmeans": {"sparsity": {}}},
        ["`kmeans.sparsity`", "top_k None and margin None", "one of them"],
    ),
    (
        {"kmeans": {"sparsity": {"top_k": 1, "margin": 0.1}}},
        ["`kmeans.sparsity`", "top_k 1 and margin 0.1"],
    ),
    (
        {"kmeans": {"sparsity": {"top_k": 9}, "n_clusters": 8}},
        ["`kmeans`", "top_k 9", "at most n_clusters, 8"],
    ),
    ({"kmeans": {"tol": -0.1}}, ["`kmeans.tol` is -0.1", "greater than or equal to 0"]),
    ({"kmeans": {"tol": float("nan")}}, ["`kmeans.tol` is nan", "finite"]),
    (
        {"kmeans": {"reassignment_ratio": 2}},
        ["`kmeans.reassignment_ratio` is 2", "less than or equal to 1"],
    ),
    (
        {"kmeans": {"encodings": ["kmeans-cosine"]}},
        ["`kmeans.encodings.0` is 'kmeans-cosine'", "'kmeans-invdist'"],
    ),
    ({"kmeans": {"encodings": ["kmeans-onehot"] * 2}}, ["`kmeans.encodings`", "none twice"]),
    ({"kmeans": {"encodings": []}}, ["`kmeans.encodings`", "[]", "at least one"]),
    ({"kmeans": {"seed": -1}}, ["`kmeans.seed` is -1", "greater than or equal to 0"]),
    ({"kmeans": {"seed": "010"}}, ["`kmeans.seed`", "'010'", "want a number, written as 10"]),
    ({"layers": ["1:30"]}, ["`layers`", "'1:30'", "want a number"]),
    ({"kmeans": {"seed": 2**32}}, ["`kmeans.seed` is 4294967296", "less than 4294967296"]),
    ({"pca": {"topk": [1, 0]}}, ["`pca.topk.1` is 0", "greater than 0"]),
    ({"pca": {"topk": [4, 1, 4]}}, ["`pca.topk`", "[4, 1, 4]", "none twice"]),
    ({"pca": {"whiten": 1}}, ["`pca.whiten` is 1", "boolean", "Write true or false"]),
    ({"pca": {"whiten": 0.0}}, ["`pca.whiten` is 0.0", "boolean"]),
    ({"pca": {"whiten": "yes"}}, ["`pca.whiten` is 'yes'", "boolean", "without quotes"]),
    ({"pca": {"whiten": "true"}}, ["`pca.whiten` is 'true'", "boolean"]),
    ({"pca": {"whiten": "01"}}, ["`pca.whiten` is '01'", "boolean"]),
    ({"pca": {"whiten": [True]}}, ["`pca.whiten` is [True]", "boolean"]),
    ({"pca": {"whiten": None}}, ["`pca.whiten` is None", "boolean"]),
    ({"pca": {"topk": [True]}}, ["`pca.topk`", "found [True], want no boolean"]),
    ({"pca": {"batch_size": True}}, ["`pca.batch_size`", "found True, want no boolean"]),
    ({"shards": SHARDS | {"fit": True}}, ["`shards.fit`", "found True, want no boolean"]),
    ({"probe": {"void": "ignore"}}, ["`probe.void` is 'ignore'", "'drop', 'negative' or 'class'"]),
    ({"probe": {"ridge": 0}}, ["`probe.ridge` is 0", "greater than 0"]),
    ({"probe": {"ridge": float("inf")}}, ["`probe.ridge` is inf", "finite"]),
    ({"images": {"patch_size": 1025}}, ["`images.patch_size` is 1025", "equal to 1024"]),
    ({"images": {"grid": [8, 1025]}}, ["`images.grid.1` is 1025", "equal to 1024"]),
    ({"extract": {"resize": 2**20 + 1}}, ["`extract.resize` is 1048577", "equal to 1048576"]),
    ({"images": {"geometry": "pad"}}, ["`images.geometry` is 'pad'", "'stretch' or 'aspect'"]),
    (
        {"images": {"geometry": "aspect", "crop": "centre"}},
        ["`images`", "crop centre and geometry aspect, want one"],
    ),
    (
        {"images": {"geometry": "stretch", "resize": 256}},
        ["`images`", "resize 256 and geometry stretch", "beside crop alone"],
    ),
    (
        {"images": {"geometry": "aspect", "grid": [16, 16]}},
        ["`images`", "grid [16, 16] and geometry aspect, want no grid"],
    ),
    ({"class_names": ""}, ["`class_names` is ''", "at least 1 character"]),
    ({"class_names": ["wall"]}, ["`class_names` is ['wall']", "string"]),
    ({"extract": {"geometry": "pad"}}, ["`extract.geometry` is 'pad'", "'stretch' or 'aspect'"]),
    (
        {"extract": {"geometry": "aspect", "resize": 256}},
        ["`extract`", "resize 256 and geometry aspect", "beside crop alone"],
    ),
    ({"extract": {"grid": [16]}}, ["`extract.grid` is [16]", "it wants 2 values at least"]),
    ({"extract": {"batch_size": 0}}, ["`extract.batch_size` is 0", "greater than 0"]),
    ({"extract": {"cls_token": 1}}, ["`extract.cls_token` is 1", "Write true or false"]),
    ({"extract": {"fit": {"images": "a"}}}, ["`extract`", "fit.images a and no model"]),
    ({"extract": {"model": "a"}}, ["`extract`", "model a and no images", "extract.fit.images"]),
    (
        {"extract": {"model": "a", "probe_val": {"images": "b"}}},
        ["`extract`", "probe_val.images b and probe_val.masks None, want both"],
    ),
    (
        {"extract": {"model": "a", "fit": {"images": "b"}, "probe_train": {"masks": "c"}}},
        ["`extract`", "probe_train.images None and probe_train.masks c, want both"],
    ),
    ({"extract": {"val": {"masks": "a"}}}, ["`extract.val.masks`", "extract.val.images"]),
    ({"extract": {"labels": {"void": [-1]}}}, ["`extract.labels.void.0` is -1", "equal to 0"]),
    ({"extract": {"labels": {"n_classes": 1}}}, ["`extract.labels.n_classes` is 1", "equal to 2"]),
    ({"digits": {"image_size": 33}}, ["`digits`", "image_size 33", "patch_size 4"]),
    ({"digits": {"layers": [0, 4]}}, ["`digits`", "[0, 4]", "0 to 3"]),
]


@pytest.fixture(scope="module", params=["base", "ade20k", "images"])
def configured(request):
    """The parameters of an environment, as Kedro merges it over base."""
    loader = ConfigLoader(str(CONF), env=request.param, base_env="base", default_run_env="base")
    return request.param, loader["parameters"]


def test_what_is_left_out_has_the_papers_default():
    parameters = parse_parameters(LEAST)
    assert parameters.layers == (3,)
    assert (parameters.latent_topk, parameters.device) == (None, "auto")
    kmeans = parameters.kmeans
    assert (kmeans.n_clusters, kmeans.batch_size, kmeans.n_init, kmeans.max_iter) == (
        16_384,
        8_192,
        4,
        200,
    )
    assert kmeans.encodings == ("kmeans-onehot", "kmeans-invdist")
    assert parameters.pca.topk == (1, 4, 16, 64, 256, 1024)
    assert (parameters.probe.void, parameters.probe.ridge) == ("drop", 1e-8)
    assert parameters.standardize.statistics is None


def test_a_section_overrides_only_what_it_names():
    parameters = parse_parameters(LEAST | {"kmeans": {"n_clusters": 8}})
    assert parameters.kmeans.n_clusters == 8
    assert parameters.kmeans.batch_size == 8_192


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_taken_where_it_is_one(value):
    assert parse_parameters(LEAST).pca.whiten is False
    assert parse_parameters(LEAST | {"pca": {"whiten": value}}).pca.whiten is value


def test_parameters_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_parameters(LEAST).kmeans.n_clusters = 3  # type: ignore[misc]  # what is refused


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=str)
def test_a_fault_is_one_line_that_names_the_parameter_what_was_found_and_what_is_wanted(
    change, words
):
    with pytest.raises(ValueError, match=r"^(Parameter|Unknown parameter) `") as caught:
        parse_parameters(LEAST | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("resize", [2**20 + 1, [1, 2**20 + 1]])
def test_a_resize_that_no_image_survives_is_refused(resize):
    with pytest.raises(ValueError, match=r"images\.resize.*equal to 1048576"):
        parse_parameters(LEAST | {"images": {"resize": resize}})


def test_a_layer_may_be_counted_from_the_end_as_it_was_recorded():
    dictionary = {"random": "centres", "layers": [-2]}
    parameters = parse_parameters(
        LEAST | {"layers": [-2, 22], "dictionaries": {"floor": dictionary}}
    )
    assert parameters.layers == (-2, 22)
    assert parameters.dictionaries["floor"].layers == (-2,)


def test_each_of_several_faults_has_its_line():
    with pytest.raises(ValueError, match="\n") as caught:
        parse_parameters(LEAST | {"kmeans": {"n_clusters": 0, "n_cluster": 8}, "device": "tpu"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for name in ("`device`", "`kmeans.n_clusters`", "`kmeans.n_cluster`"):
        assert sum(name in line.partition(":")[0] for line in lines) == 1


@pytest.mark.parametrize(
    ("path", "value"), [(("layers",), LEAST["layers"]), (("shards", "probe_val"), "d")], ids=str
)
def test_a_missing_parameter_is_named_with_what_it_is(path, value):
    raw = LEAST | {"shards": dict(SHARDS)}
    holder = raw if len(path) == 1 else raw[path[0]]
    assert holder.pop(path[-1]) == value
    with pytest.raises(
        ValueError, match=rf"^Parameter `{'.'.join(path)}` is missing: (block|labeled)[^\n]*$"
    ):
        parse_parameters(raw)


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(ValueError, match="`kmean`: did you mean `kmeans`") as caught:
        parse_parameters(LEAST | {"kmean": {}})
    for name in Parameters.model_fields:
        assert name in str(caught.value)
    with pytest.raises(
        ValueError, match=r"`kmeans\.n_cluster`: did you mean `kmeans\.n_clusters`"
    ) as caught:
        parse_parameters(LEAST | {"kmeans": {"n_cluster": 8}})
    assert "kmeans.reassignment_ratio" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"`kmeans\.sparsity\.top_kk`: did you mean `kmeans\.sparsity\.top_k`"
    ):
        parse_parameters(LEAST | {"kmeans": {"sparsity": {"top_kk": 1}}})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_name_like_no_other_gets_no_suggestion(section):
    raw = LEAST | {section: dict(LEAST.get(section, {})) | {"zzz": 1}}
    with pytest.raises(
        ValueError, match=rf"^Unknown parameter `{section}\.zzz`: There are {section}\.\w+"
    ) as caught:
        parse_parameters(raw)
    assert "did you mean" not in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(section=st.sampled_from(SECTIONS), data=st.data())
def test_a_letter_dropped_from_a_name_is_suggested_back(section, data):
    fields = list(fields_of(section))
    name = data.draw(st.sampled_from([field for field in fields if len(field) > 3]))
    at = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:at] + name[at + 1 :]
    if misspelt in fields:
        return
    with pytest.raises(
        ValueError, match=rf"`{section}\.{misspelt}`: did you mean `{section}\.\w+`"
    ):
        parse_parameters(LEAST | {section: dict(LEAST.get(section, {})) | {misspelt: 1}})


def test_every_parameter_says_what_it_is():
    for section in SECTIONS:
        for name, field in fields_of(section).items():
            assert field.description, f"{section}.{name}"


def test_the_configuration_of_each_environment_is_valid(configured):
    environment, raw = configured
    parameters = parse_parameters(raw)
    assert set(raw) == set(Parameters.model_fields)  # Kedro hands nodes only what the YAML names
    assert len(set(parameters.shards)) == len(SHARDS)
    in_default = [path.startswith("data/01_raw/digits/") for _, path in parameters.shards]
    assert all(in_default) if environment == "base" else not any(in_default)


def test_ade20k_is_the_papers_experiment():
    loader = ConfigLoader(str(CONF), env="ade20k", base_env="base", default_run_env="base")
    parameters = parse_parameters(loader["parameters"])
    assert parameters.layers == (18, 19, 20, 21, 22, 23)
    kmeans = parameters.kmeans
    assert (kmeans.n_clusters, kmeans.batch_size, kmeans.n_init, kmeans.max_iter) == (
        16_384,
        8_192,
        4,
        200,
    )
    assert kmeans.encodings == ("kmeans-onehot", "kmeans-invdist")
    assert parameters.pca.topk == (1, 4, 16, 64, 256, 1024)
    assert parameters.latent_topk is None
    assert (parameters.probe.void, parameters.probe.ridge) == ("drop", 1e-8)


def test_splits_that_name_images_are_recorded_here_and_share_what_their_recordings_need():
    assert parse_parameters(LEAST).extract.splits == ()
    given = {
        "model": "hf:owner/name",
        "geometry": "stretch",
        "probe_val": {"images": "a", "masks": "b"},
        "fit": {"images": "c", "examples": 7},
    }
    extract = parse_parameters(LEAST | {"extract": given}).extract
    assert extract.splits == ("fit", "probe_val")
    assert extract.split("fit").examples == 7
    assert extract.recording.geometry == "stretch"
    assert "model" not in extract.recording.model_dump()


def test_base_probes_the_layers_that_the_digits_are_recorded_at():
    loader = ConfigLoader(str(CONF), base_env="base", default_run_env="base")
    parameters = parse_parameters(loader["parameters"])
    assert set(parameters.layers) <= set(parameters.digits.layers)


WEIGHTS = {
    "weights": "a",
    "activation": "relu",
    "trained_on": "standardized",
    "input_bias": "b_dec",
}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "found none, want one of sae, weights, saev_run and random"),
        ({"saev_run": "a", "random": "centres"}, "found saev_run and random, want one of"),
        (
            {"weights": "a"},
            "found weights without activation and trained_on and input_bias, want activation",
        ),
        (
            {"weights": "a", "activation": "relu", "input_bias": "b_dec"},
            r"found weights without trained_on, want activation, trained_on \(standardized or",
        ),
        (
            {"weights": "a", "activation": "relu", "trained_on": "raw"},
            r"found weights without input_bias, want .*input_bias \(b_dec or none\) said",
        ),
        (
            WEIGHTS | {"activation": "groupmax"},
            "found weights with activation groupmax, want relu, topk, batchtopk, jumprelu, or",
        ),
        (WEIGHTS | {"activation": "topk"}, "found k None and activation topk, want k for topk"),
        (WEIGHTS | {"k": 3}, "found k 3 and activation relu, want k for topk"),
        (WEIGHTS | {"threshold": 0.5}, "found threshold beside weights, want it beside sae alone"),
        ({"sae": "a", "input_bias": "none"}, "found input_bias beside sae, want it beside weights"),
        (
            {"random": "centres", "activation": "relu"},
            "found activation beside random, want it beside sae or weights alone",
        ),
        ({"saev_run": "a", "trained_on": "raw"}, "found trained_on beside saev_run, want it"),
        ({"sae": "a", "normalization": "l3"}, "normalization"),
        ({"sae": "a", "activation": "tanh"}, "activation"),
        ({"weight": "a"}, "did you mean `dictionaries.mine.weights`"),
        ({"sae": ""}, "should have at least 1 character"),
        ({"sae": "saes/{layr}/{seed}.pt", "seeds": [1]}, "found {layr} in the path, want no other"),
        ({"saev_run": ""}, "should have at least 1 character"),
        ({"random": "centers"}, "'centres' or 'directions'"),
    ],
    ids=str,
)
def test_a_dictionary_that_cannot_be_is_refused_by_name(given, match):
    with pytest.raises(ValueError, match=rf"`dictionaries\.mine.*{match}") as caught:
        parse_parameters(LEAST | {"dictionaries": {"mine": given}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["kmeans-2", "pca", "My SAE", "a/b", "3", "", "a" * 81, "a-seed-1"]
)
def test_a_dictionarys_name_is_that_of_a_file_and_no_baselines(name):
    with pytest.raises(ValueError, match="want lower-case letters, digits and hyphens"):
        parse_parameters(LEAST | {"dictionaries": {name: {"random": "centres"}}})
    for good in ("relu-16k", "a" * 80):
        assert parse_parameters(
            LEAST | {"dictionaries": {good: {"random": "centres"}}}
        ).dictionaries


def test_every_option_of_a_dictionary_says_what_it_is():
    assert all(field.description for field in DictionaryParameters.model_fields.values())


def test_what_a_parameter_changes_is_said_on_its_field():
    """As it was when results were last made again for it: a field that changes results must not be
    left out of their fingerprints.
    """
    assert {
        "params:device",
        "params:ranks_timeout_seconds",
        "params:threads",
    } == fingerprints.UNHASHED
    assert {
        "params:kmeans": {
            "encodings",
            "sparsity",
            "checkpoint_steps",
            "checkpoint_minutes",
            "seed",
            "more_seeds",
        },
        "params:pca": {"topk", "whiten", "checkpoint_steps", "checkpoint_minutes"},
        "params:probe": {"slab_features", "parts", "checkpoint_minutes"},
        "params:standardize": {"checkpoint_steps", "checkpoint_minutes"},
    } == fingerprints.SHAPING
    assert fingerprints.ADDED == {
        "params:pca": {"parts": 1},
        "params:standardize": {"parts": 1},
    }


def test_a_field_that_was_added_counts_from_where_it_is_not_its_default():
    assert result_values(PCAParameters()) == {"batch_size": 16_384, "max_tokens": None}
    assert result_values(PCAParameters(parts=2, whiten=True)) == {
        "batch_size": 16_384,
        "max_tokens": None,
        "parts": 2,
    }


def test_every_field_is_described():
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert nested or field.description, f"{section.__name__}.{name}"
            assert field.json_schema_extra in (
                None,
                ADDED,
                OPERATIONAL,
                SELECTS,
            ), f"{section.__name__}.{name}"


def test_settings_of_an_autoencoder_are_those_that_its_readers_know():
    known = {
        "activation": {*get_args(Activation), "batchtopk"},
        "normalization": {*get_args(Normalization)},
    }
    for name, values in known.items():
        for value in values:
            parsed = parse_parameters(LEAST | {"dictionaries": {"mine": {"sae": "a", name: value}}})
            assert getattr(parsed.dictionaries["mine"], name) == value
            Settings(**{name: value})
        with pytest.raises(ValueError, match=rf"`dictionaries\.mine\.{name}` is 'bogus'"):
            parse_parameters(LEAST | {"dictionaries": {"mine": {"sae": "a", name: "bogus"}}})
    assert {each.name for each in fields(Settings)} <= DictionaryParameters.model_fields.keys()
