"""Names of classes: the forms in which data sets bring them, and what is refused, by file and line."""

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.io.class_names import read_class_names

ADE20K = (
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    "1\t0.1576\t11664\t1172\t1\twall                            \n"
    "2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
    '150\t0.0001\t57\t10\t0\tflag "of truce"\n'
)
OBJECT_INFO = 'Idx,Ratio,Train,Val,Stuff,Name\n1,0.1576,11664,1172,1,wall\n2,0.1,6046,612,1,"door, ""double"""'


@pytest.fixture
def write(tmp_path):
    def make(content: str | bytes, name: str = "names.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        (
            "objectInfo150.txt",
            ADE20K,
            {1: "wall", 2: "building, edifice", 150: 'flag "of truce"'},
        ),
        ("object150_info.csv", OBJECT_INFO, {1: "wall", 2: 'door, "double"'}),
        ("labels.txt", "0: unlabeled\n1: person\n2: bicycle", {0: "unlabeled", 1: "person", 2: "bicycle"}),
        ("names.csv", '3,person\n007,"door, ""double"""\n', {3: "person", 7: 'door, "double"'}),
        ("names.txt", "3 traffic light\n65535 sky: blue", {3: "traffic light", 65_535: "sky: blue"}),
        ("names.tsv", "3\tperson\n4\t5: five", {3: "person", 4: "5: five"}),
        ("names", "wall\nbuilding, edifice\n2D art\n\n\n", {1: "wall", 2: "building, edifice", 3: "2D art"}),
        ("digits.txt", "0\n1\n2", {1: "0", 2: "1", 3: "2"}),
        ("crlf.txt", b"\xef\xbb\xbfwall\r\nM\xc3\xa4hne", {1: "wall", 2: "Mähne"}),
        ("bom.txt", b"\xef\xbb\xbf1: wall", {1: "wall"}),
        ("bom.yml", b"\xef\xbb\xbf1: wall\n'2': building, edifice", {1: "wall", 2: "building, edifice"}),
        ("bom.JSON", b'\xef\xbb\xbf{"1": "wall", "02": "\\ud83d\\udc1f"}', {1: "wall", 2: "🐟"}),
        ("flow.yaml", "{1: wall, 2: 'no', 3: \"4\"}", {1: "wall", 2: "no", 3: "4"}),
    ],
)  # fmt: skip
def test_names_are_read_as_data_sets_have_them(write, name, content, names):
    assert read_class_names(write(content, name)) == names


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "a.txt names no label; wanted a name for each class"),
        ("a.json", "{}", "a.json names no label"),
        ("a.yml", "# nothing", "a.yml names no label"),
        ("a.txt", "wall\n\nsky", "a.txt, line 2: found no name of label 2; wanted one, or no line"),
        ("a.txt", "1: wall\n2:", "a.txt, line 2: found no name of label 2"),
        ("a.csv", '1,wall\n2,""', "a.csv, line 2: found no name of label 2"),
        ("a.yml", "1: wall\n2:", "a.yml, line 2: found no name of label 2"),
        ("a.txt", "1: wall\n2: sky\n01 sea", "line 3: label 1 has a name already, in line 1; wanted each label once"),
        ("a.yml", "1: wall\n'01': sea", "line 2: label 1 has a name already, in line 1"),
        ("a.yml", "1: wall\n'1': sea", "line 2: `1` is there already, in line 1"),
        ("a.json", '{"1": "wall", "01": "sea"}', "label 01: label 1 has a name already, in label 1"),
        ("a.json", '{"1": "wall", "1": "sea"}', "a.json: the key '1' is there twice"),
        ("a.txt", "1: wall\nsky", "line 2: found 'sky', without a label, where line 1 begins with one; wanted a label in each line"),
        ("a.txt", "wall\n2: sky", "line 1: found 'wall', without a label, where line 2"),
        ("a.txt", "1: wall\n65536: sky", "line 2: found label 65536, wanted at most 65,535"),
        ("a.txt", f"{'9' * 5000}: sky", "line 1: found label 999"),
        ("a.yml", "-1: sky", "a.yml, line 1: found '-1', wanted a label, a whole number of at most 65,535"),
        ("a.json", '{"one": "sky"}', "a.json, label one: found 'one', wanted a label"),
        ("a.json", '{"١": "sky"}', "wanted a label"),
        ("a.json", '{"\\u001b[2J": "sky"}', r"found '\x1b[2J', wanted a label"),
        ("a.json", '["wall"]', "a.json: found a list, wanted a mapping"),
        ("a.json", '{"1": 2}', "label 1: found a int, wanted its name: put it in quotes"),
        ("a.json", "{1: wall}", "a.json: key must be a string at line 1 column 2; wanted valid JSON"),
        ("a.json", "[" * 100_000, "a.json: recursion limit exceeded"),
        ("a.yml", "[" * 3000, "a.yml is nested too deeply"),
        ("a.yml", "- wall", "a.yml, line 1, column 1: found no key"),
        ("a.yml", "1: wall\n2: no", "line 2: found no, which YAML takes for a bool, wanted a name: put it in quotes"),
        ("a.yml", "1: wall\n2: 3", "line 2: found 3, which YAML takes for a int"),
        ("a.yml", "1: [wall]", "line 1: found a sequence, wanted a name"),
        ("a.yml", "? [1]\n: wall", "line 1: found a sequence, wanted a label"),
        ("a.yml", "010: wall", "010 is 8 in YAML"),
        ("a.yml", "1: *a", "undefined alias"),
        ("a.yml", "1: !!python/name:os.system x", "want plain YAML"),
        ("a.yml", "<<: {1: wall}", "line 1: found a mapping, wanted a name"),
        ("a.txt", "1: wall\n2: s\x1b[31mky", r"line 2: found 's\x1b[31mky', wanted a name of printable characters"),
        ("a.txt", "wall\na\u2028b", r"line 2: found 'a\u2028b', wanted a name of printable"),
        ("a.txt", "wall\x00", r"line 1: found 'wall\x00', wanted a name of printable"),
        ("a.json", '{"1": "\\u0000"}', r"label 1: found '\x00', wanted a name of printable"),
        ("a.txt", "sky\n" + "x" * 201, "line 2: found a name of 201 characters, wanted at most 200: shorten it"),
        ("a.txt", b"wall\nsky\n\xff\xfew\x00", "line 3: found byte 0xff, wanted UTF-8 text: save it as that"),
        ("a.txt", b"x\n" * (2**23 + 1), "has more than 16777216 bytes: it is no list of classes"),
        ("a.txt", ADE20K + "3\t0.5\tsky", "line 5: found 3 columns, wanted the 6 of the header, idx, ratio"),
        ("a.txt", ADE20K + "wall\t0\t1\t1\t1\tsky", "line 5: found 'wall', wanted a label"),
        ("a.txt", ADE20K + "2\t0\t1\t1\t1\tsky", "line 5: label 2 has a name already, in line 3"),
        ("a.csv", OBJECT_INFO + "\n3," + "0" * 200_000, "line 4: field larger than field limit (131072); wanted a line of a CSV"),
        ("a.csv", OBJECT_INFO + '\n3,0,1,1,1,"sky', None),
    ],
)  # fmt: skip
def test_what_names_no_classes_is_refused_by_file_and_line(write, name, content, said):
    path = write(content, name)
    if said is None:  # a quote that is never closed ends with its line
        assert read_class_names(path)[3] == "sky"
        return
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_class_names(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500


def test_a_file_that_is_not_there_or_none_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(
            FileNotFoundError, match="is no file; wanted one that names the classes"
        ):
            read_class_names(path)


@given(
    st.dictionaries(
        st.integers(0, 65_535),
        st.text(string.ascii_letters + " \"':,#%&<>äß-", min_size=1, max_size=20)
        .map(str.strip)
        .filter(lambda name: name and not name.startswith(('"', ":", ","))),
        min_size=1,
        max_size=8,
    )
)
def test_every_form_says_the_same(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    lines = [f"{label}: {name}" for label, name in names.items()]
    texts = {
        "a.txt": "\n".join(lines),
        "a.tsv": "\n".join(line.replace(": ", "\t", 1) for line in lines),
        "a.json": json.dumps(names),
        "a.yml": "\n".join(f"{label}: {json.dumps(name)}" for label, name in names.items()),
        "table.txt": "\n".join(["Idx\tName", *(f"{n}\t{name}" for n, name in names.items())]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        assert read_class_names(folder / name) == names
