"""The files in conf/: what is read of them, and what is refused in a line that names the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click
import pytest

from assay import configuration
from assay.configuration import (
    ConfigLoader,
    ConfigurationError,
    _check_dictionaries,
    current_configuration,
    expand_home,
    read_parameters,
)
from assay.parameters import parse_parameters

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture
def conf(tmp_path):
    """A copy of the project's configuration, without what whoever tests has in conf/local."""
    shutil.copytree(CONF, tmp_path / "conf", ignore=lambda *_: ["local"])
    (tmp_path / "conf/local").mkdir()
    return tmp_path / "conf"


def load(conf, env=None, **runtime):
    strategy = {"parameters": "soft", "globals": "soft"}
    return ConfigLoader(
        str(conf), env, runtime, base_env="base", default_run_env="local", merge_strategy=strategy
    )


def refusal(conf, env=None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # whose words the test looks at
        load(conf, env)
    message = str(caught.value)
    assert "\n" not in message
    return message


MISSPELT = {
    "statistic: a.safetensors": (
        "there is no global `statistic`: did you mean `statistics`? There are shards, statistics."
    ),
    "shards: {probe_trian: a}": (
        "there is no global `shards.probe_trian`: did you mean `shards.probe_train`? There are"
        " shards.fit, shards.val, shards.probe_train, shards.probe_val."
    ),
    "zzz: 1": "there is no global `zzz`: There are shards, statistics.",
    "shards: data/all": "`shards` is 'data/all', want fit, val, probe_train, probe_val",
}


@pytest.mark.parametrize("environment", ["base", "ade20k", "local"])
@pytest.mark.parametrize("text", MISSPELT)
def test_globals_are_closed_as_parameters_are(conf, environment, text):
    path = conf / environment / "globals.yml"
    path.write_text(text)
    assert refusal(conf, environment) == f"{path}: {MISSPELT[text]}"


def test_an_environment_may_name_some_of_the_globals_or_none(conf):
    for text, fit in {
        "shards: {val: a}": "data/01_raw/digits/fit",
        "": "data/01_raw/digits/fit",
        "shards: {fit: b}": "b",
    }.items():
        (conf / "local/globals.yml").write_text(text)
        assert load(conf)["parameters"]["shards"]["fit"] == fit


SLIPS = {
    "a: 1\nb:\n\tc: x\n": "line 3, column 1: found a tab; indent with spaces",
    "a: 1\n  b: 2\n": "line 2, column 4: mapping values are not allowed here",
    "a: 1\nb: [1, 2\nc: 3\n": (
        "line 3, column 2: while parsing a flow sequence expected ',' or ']', but got ':', begun in"
        " line 2"
    ),
    'a: "x\n': (
        "line 2, column 1: while scanning a quoted scalar found unexpected end of stream, begun in"
        " line 1"
    ),
    "a: *x\n": "line 1, column 4: found undefined alias 'x'",
    "a: !!python/name:os.system x\n": (
        "line 1, column 4: found the tag tag:yaml.org,2002:python/name:os.system, want plain YAML"
    ),
    "a: 1\nb: 2\na: 3\n": "line 3: `a` is there already, in line 1; name it once",
    "k: {a: 1, a: 2}\n": "line 1: `a` is there already, in line 1; name it once",
    "k:\n  seed: 1:30\n": "line 2, column 9: 1:30 is 90 in YAML; write that, or '1:30' in quotes",
    "k: [1, 010]\n": "line 1, column 8: 010 is 8 in YAML; write that, or '010' in quotes",
    "a: \x01\n": "line 1: found the character 0x1, which YAML has no place for",
    "# mine\n- 1\n": "line 2, column 1: found no key, want `name: value`",
    "seed\n": "line 1, column 1: found no key, want `name: value`",
    "a: 1\n2: {}\n": "line 2, column 1: found the key 2, want a name",
    "on: 1\n": "line 1, column 1: found the key on, want a name",
    "? [a]\n: 1\n": "line 1, column 3: found the key of several, want a name",
    "# caf\xe9\na: caf\xe9\n": "line 1: found byte 0xe9, want UTF-8: save it as that",
}


@pytest.mark.parametrize(
    "name",
    ["parameters.yml", "catalog_mine.yaml", "globals.yml", "deeper/parameters.yml", "mlflow.yml"],
)
@pytest.mark.parametrize("text", SLIPS, ids=repr)
def test_a_slip_in_a_file_is_a_line_with_the_file_and_the_line_counted_from_1(conf, name, text):
    path = conf / "local" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="latin-1")
    assert refusal(conf) == f"{path}, {SLIPS[text]}"


def test_a_file_that_is_nested_3000_deep_is_refused(conf):
    path = conf / "local/parameters.yml"
    path.write_text("a: " + "[" * 3000 + "]" * 3000)
    assert refusal(conf) == f"{path} is nested too deeply to be read"


def test_files_of_other_environments_and_hidden_ones_are_nobodys_concern(conf):
    for path in (
        conf / "other/parameters.yml",
        conf / "local/.parameters.yml",
        conf / "local/.old/parameters.yml",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("a: [")
    assert load(conf)["parameters"]["layers"] == [0, 2, 3]


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("global.yml", "globals"),
        ("globals.yaml", "globals"),
        ("paramters.yml", "parameters"),
        ("catlog.yml", "catalog"),
    ],
)
def test_a_file_whose_name_is_misspelt_is_not_passed_over(conf, name, right):
    (conf / "local" / name).write_text("")
    assert refusal(conf) == f"{conf / 'local' / name} would not be read: call it {right}.yml"


def test_an_environment_that_is_not_there_is_a_line_with_those_that_are(conf):
    with pytest.raises(
        ConfigurationError, match=r"no environment `nope`, want one of .*base, images, local"
    ):
        read_parameters(conf.parent, "nope")


def test_the_home_folder_and_the_environment_can_be_named(conf, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("ASSAY_SHARDS", "/scratch/shards")
    monkeypatch.setenv("ASSAY_SEED", "7")
    (conf / "local/globals.yml").write_text(
        "shards: {fit: ~/fit, val: '${oc.env:ASSAY_SHARDS}/val'}\nstatistics: ~/mu.safetensors\n"
    )
    (conf / "local/parameters.yml").write_text(
        "dictionaries: {mine: {sae: ~/sae}}\nkmeans: {seed: '${oc.env:ASSAY_SEED}'}\n"
    )
    loader = load(conf, shards={"probe_val": "~/probe"})
    parameters = parse_parameters(loader["parameters"])
    assert parameters.shards.fit == "/home/me/fit" == loader["catalog"]["shards_fit"]["filepath"]
    assert (
        parameters.shards.val
        == "/scratch/shards/val"
        == loader["catalog"]["shards_val"]["filepath"]
    )
    assert (
        parameters.shards.probe_val
        == "/home/me/probe"
        == loader["catalog"]["shards_probe_val"]["filepath"]
    )
    assert parameters.standardize.statistics == "/home/me/mu.safetensors"
    assert parameters.dictionaries["mine"].sae == "/home/me/sae"
    assert parameters.kmeans.seed == 7


def test_commands_that_only_look_say_it_in_a_line_too(conf, monkeypatch):
    """kedro registry list, say: click shows such an error without a traceback."""
    (conf / "local/parameters.yml").write_text("a: [")
    tool = (
        "[tool.kedro]\npackage_name = 'assay'\nproject_name = 'Assay'\nkedro_init_version ="
        " '1.7.0'\n"
    )
    (conf.parent / "pyproject.toml").write_text(tool)
    monkeypatch.chdir(conf.parent)
    monkeypatch.setattr(configuration, "_current", {})
    for wanted in (ValueError, click.ClickException):
        with pytest.raises(wanted, match=r"parameters\.yml, line 1"):
            current_configuration()
    (conf / "local/parameters.yml").write_text("a: 1")
    with pytest.raises(click.ClickException, match=r"^Unknown parameter `a`"):
        current_configuration()


def test_a_key_that_two_files_have_is_a_line(conf):
    for name in ("parameters_a.yml", "parameters_b.yml"):
        (conf / "local" / name).write_text("device: cpu")
    with pytest.raises(
        click.ClickException, match=r"^Duplicate keys found in .*parameters_.\.yml and .*: device$"
    ):
        load(conf)["parameters"]


def test_only_a_path_has_a_home_folder():
    home = os.path.expanduser("~")
    assert expand_home({"a": ["~/x", "~", "a~/b", 3, None]}) == {
        "a": [f"{home}/x", "~", "a~/b", 3, None]
    }


def test_an_environment_variable_that_is_not_set_is_named(conf):
    (conf / "local/globals.yml").write_text("shards: {fit: '${oc.env:ASSAY_NOWHERE}'}\n")
    assert "Environment variable 'ASSAY_NOWHERE' not found" in refusal(conf)
    assert "globals, `shards.fit`" in refusal(conf)


def test_an_interpolation_that_leads_nowhere_is_a_line(conf):
    (conf / "local/parameters.yml").write_text("images: {path: '${globals:nowhere}'}\n")
    with pytest.raises(
        ValueError, match=r"parameters, `images\.path`: .*Globals key 'nowhere' not found[^\n]*$"
    ):
        load(conf)["parameters"]


@pytest.mark.parametrize(
    "name",
    ["pairs", "codes", "probes", "scores", "errors", "model", "rows", "curves", "mine-errors"],
)
def test_a_dictionarys_name_is_none_that_the_catalog_has_a_pattern_for(conf, name):
    loader = load(conf)
    parameters = parse_parameters(
        loader["parameters"] | {"dictionaries": {name: {"random": "centres"}}}
    )
    with pytest.raises(
        ValueError,
        match=(
            rf"^dictionaries: the catalog takes `{name}` for .* than agreement, .* another end than"
        ),
    ):
        _check_dictionaries(parameters, loader["catalog"])


def test_a_pattern_of_the_users_own_reserves_a_name_too(conf):
    (conf / "local/catalog.yml").write_text('"{layer}.maps_{encoding}":\n  type: MemoryDataset\n')
    loader = load(conf)
    given = loader["parameters"] | {
        "dictionaries": {"maps": {"random": "centres"}, "random-centres": {"random": "centres"}}
    }
    with pytest.raises(ValueError, match="`maps`"):
        _check_dictionaries(parse_parameters(given), loader["catalog"])
    del given["dictionaries"]["maps"]
    _check_dictionaries(parse_parameters(given), loader["catalog"])


def test_text_is_written_and_read_as_utf_8_whatever_the_locale(conf):
    """With Latin-1 the page's first dash ended the run, and left a file of 0 bytes."""
    kinds = set()
    for entry in load(conf)["catalog"].values():
        if entry["type"].startswith(("text.", "json.", "plotly.", "pandas.CSV")):
            kinds.add(entry["type"])
            assert entry["fs_args"] == {
                f"open_args_{what}": {"encoding": "utf-8"} for what in ("load", "save")
            }, entry
    assert kinds == {
        "text.TextDataset",
        "json.JSONDataset",
        "plotly.JSONDataset",
        "pandas.CSVDataset",
    }
