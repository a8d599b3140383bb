"""The pages say what is so: the snippets print what stands below them, and the files that are named
are there.
"""

import contextlib
import io
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
import yaml

from assay.arguments import parse_pairs
from assay.backbones import open_backbone
from assay.commands.extract import extract_command
from assay.configuration import ConfigLoader
from assay.parameters import parse_parameters

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_snippets_on_probing_print_what_the_page_shows():
    page = (ROOT / "docs/probe-your-codes.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, flags=re.DOTALL)
    assert len(snippets) == page.count("```python") == 2
    names: dict[str, object] = {}  # the second uses the first's
    for snippet, shown in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(snippet, names)
        assert printed.getvalue() == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_source_files_that_a_page_names_are_there(page):
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    spans = re.findall(r"`[^`]+`", text)
    named = {name for span in spans for name in re.findall(r"[\w/]*\w\.py\b", span)}
    missing = {
        name
        for name in named
        if not any((folder / name).is_file() for folder in (ROOT, ROOT / "src/assay"))
    }
    assert not missing


def test_the_names_on_a_batchs_way_exist():
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    named = page.partition("## One batch, from shard to table")[2].partition("## Decisions")[0]
    way = named.partition("## Where a change goes")[0]
    steps = re.findall(r"^\d+\. ", way, flags=re.MULTILINE)
    names = [
        name
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", named)
        if not name.endswith((".csv", ".py", ".yml"))
    ]
    assert len(steps) <= 20 <= len(names)
    for name in names:
        pkgutil.resolve_name(f"assay.{name}")


def test_the_dictionaries_that_the_pages_show_can_be_had():
    shards = dict.fromkeys(("fit", "val", "probe_train", "probe_val"), "shards")
    shown = [
        block
        for page in PAGES
        for found in re.findall(
            r"^```yaml\n(.*?)^```|`(dictionaries: \{.*?\})`",
            page.read_text(encoding="utf-8"),
            flags=re.DOTALL | re.MULTILINE,
        )
        for block in found
        if "dictionaries:" in block
    ]
    comments = re.findall(
        r"^# (.*: \{sae: .*?\})", (ROOT / "conf/ade20k/parameters.yml").read_text(), re.M
    )
    shown += [f"dictionaries: {{{each}}}" for each in comments]
    assert len(shown) >= 5
    for block in shown:
        given = yaml.safe_load(block)["dictionaries"]
        parsed = parse_parameters({"layers": [23], "shards": shards, "dictionaries": given})
        assert parsed.dictionaries.keys() == given.keys()


def test_what_the_pages_on_images_have_typed_and_written_down_is_understood():
    page = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    written = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    typed = [
        parse_pairs(word.removeprefix("--params="))
        for line in re.findall(r"^kedro run --env=images .*$", page + readme, flags=re.MULTILINE)
        for word in shlex.split(line)
        if word.startswith("--params=")
    ]
    assert len(written) >= 4 and len(typed) >= 4
    raw = ConfigLoader(str(ROOT / "conf"), env="images", base_env="base")["parameters"]
    for given in (*written, *typed):
        extract = given.pop("extract")
        parsed = parse_parameters(raw | given | {"extract": extract})
        assert parsed.extract.model is not None
        assert parsed.extract.splits == ("fit", "val", "probe_train", "probe_val")


class Vit(torch.nn.Module):
    """Of the page's width and depth: a block adds 1."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [lambda tokens: tokens + 1] * 12

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        n, _, height, width = pixels.shape
        return torch.zeros(n, 1 + height // 16 * (width // 16), 384)


def test_the_pages_model_of_ones_own_is_one(tmp_path, monkeypatch):
    page = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_vit.py").write_text(snippet)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_project", SimpleNamespace(load_vit=Vit))
    (typed,) = re.findall(r"`extract.model=(python:\S+)`", page)
    backbone = open_backbone(typed, None, device=torch.device("cpu"), precision="float32")
    images = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    tokens = backbone.record(images, [5, 0])
    assert tokens.shape == (2, 2, 7, 384)
    assert tokens[:, 0].eq(6).all() and tokens[:, 1].eq(1).all()


def test_assay_extract_has_the_options_that_the_pages_type():
    lines = [
        line
        for page in PAGES
        for line in re.findall(r"^assay extract (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    ]
    assert lines
    parser = extract_command.make_parser(click.Context(extract_command))
    for line in lines:
        options, rest, _ = parser.parse_args(shlex.split(line))
        assert len(rest) == 0 and {"images", "model", "layers", "out"} <= options.keys()
