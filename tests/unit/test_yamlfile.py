"""YAML with places: what is understood, what is refused, and that nothing makes it fall over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import Faults
from appliance.yamlfile import MAX_DEPTH, Fields, Value, load_yaml, parse_yaml


def read(text: str) -> tuple[Value | None, list[str]]:
    faults = Faults()
    value = parse_yaml(text, "f.yaml", faults)
    return value, [str(fault) for fault in faults.found]


def fields(text: str) -> Fields:
    faults = Faults()
    value = parse_yaml(text, "f.yaml", faults)
    assert value is not None
    return Fields(value, faults)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", True), ("false", False), ("null", None), ("~", None), ("", None), ("7", 7), ("-7", -7), ("0", 0),
        ("1.5", 1.5), ("no", "no"), ("on", "on"), ("0750", "0750"), ("0x10", "0x10"), ("22:22", "22:22"),
        ("1e3", "1e3"), ("2026-11-01", "2026-11-01"), (".inf", ".inf"), ('"7"', "7"), ("'true'", "true"),
        ("1" * 30, "1" * 30),
        ("{a: 1, b: [x, 2]}", {"a": 1, "b": ("x", 2)}), ("|\n  one\n  two\n", "one\ntwo\n"),
    ],
)  # fmt: skip
def test_plain_values(text: str, expected: object) -> None:
    value, faults = read(f"key: {text}")
    assert value is not None
    assert not faults
    assert value.plain() == {"key": expected}
    assert type(value.plain()["key"]) is type(expected)


def test_every_value_knows_its_place() -> None:
    value, _ = read("# comment\na:\n  b:\n    - x\n    -\n      c: 1\nd: {e: 2,\n    f: 3}\n")
    assert value is not None
    found: dict[str, int] = {}

    def visit(one: Value) -> None:
        found[one.place.key] = one.place.line
        if isinstance(one.data, Mapping | tuple):
            for inner in one.data.values() if isinstance(one.data, Mapping) else one.data:
                visit(inner)

    visit(value)
    expected = {"": 2, "a": 2, "a.b": 3, "a.b[0]": 4, "a.b[1]": 6, "a.b[1].c": 6, "d": 7, "d.e": 7, "d.f": 8}
    assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "f.yaml:2: is not YAML"),
        ("a: 1\na: 2\n", "f.yaml:2: a: the key stands twice; the first is in line 1"),
        ("a: &x 1\nb: *x\n", "f.yaml:1: a: anchors and aliases are not allowed"),
        ("a: !!binary aGVsbG8=\n", "f.yaml:1: a: the tag 'tag:yaml.org,2002:binary' is not allowed"),
        ("a: !own 1\n", "f.yaml:1: a: the tag '!own' is not allowed"),
        ("1: x\n", "f.yaml:1: the key '1' is not text"),
        ("a:\n  ? [1, 2]\n  : x\n", "f.yaml:2: a: a key must be plain text"),
        ("a:\n  {b: {c: d}}: x\n  e: f\n", "f.yaml:2: a: a key must be plain text"),
        ("*x : 1\n", "f.yaml:1: a key must be plain text"),
        ("&x a: 1\n", "f.yaml:1: a key must be plain text"),
        ("", "f.yaml: is empty"),
        ("--- 1\n--- 2\n", "f.yaml: holds several documents"),
        ('a: "\\ud800"\n', "f.yaml:1"),
        ('a: "\\UFFFFFFFF"\n', "f.yaml"),
        ("a: \x00\n", "f.yaml: is not YAML"),
        ("%YAML 99999999999999999999.1\n---\na: 1\n", "f.yaml"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    _, faults = read(text)
    assert faults
    assert faults[0].startswith(expected)


def test_reading_goes_on_after_a_refused_value() -> None:
    value, faults = read("a: &x [1]\nb: *x\n{c: d}: e\nf: 6\n")
    assert value is not None
    assert len(faults) == 3
    assert value.data["f"].data == 6
    assert value.data["f"].place.line == 4


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 5_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_depth_is_limited(depth: int, brackets: str) -> None:
    opening = "[" if brackets == "[]" else "{a: "
    _, faults = read("a: " + opening * depth + ("1" if brackets == "{}" else "") + brackets[1] * depth)
    assert bool(faults) == (depth >= MAX_DEPTH)


def test_an_alias_bomb_costs_nothing() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    _, faults = read("\n".join(lines))
    assert any("anchors and aliases are not allowed" in fault for fault in faults)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    faults = Faults()
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    (tmp_path / "folder.yaml").mkdir()
    assert load_yaml(tmp_path, tmp_path / "latin.yaml", faults) is None
    assert load_yaml(tmp_path, tmp_path / "folder.yaml", faults) is None
    assert load_yaml(tmp_path, tmp_path / "missing.yaml", faults) is None
    assert [fault.file for fault in faults.found] == ["latin.yaml", "folder.yaml", "missing.yaml"]
    assert faults.found[0].line == 2
    bom = load_yaml(tmp_path, tmp_path / "bom.yaml", faults)
    assert bom is not None
    assert bom.plain() == {"a": 1}


# --- typed fields --------------------------------------------------------------------------------------------------


def test_fields_of_the_right_type() -> None:
    one = fields("t: text\ni: 5\nn: 2.5\nf: true\nc: red\nl: [a, b]\nm: {x: {y: 1}}\ns: [{z: 1}]\n")
    assert one.text("t") == "text"
    assert one.integer("i", 1, 9) == 5
    assert one.number("n", 0, 9, 1) == 2.5
    assert one.flag("f", False)
    assert one.choice("c", ("red", "blue")) == "red"
    assert [item.data for item in one.texts("l", "[a-z]", "a letter")] == ["a", "b"]
    assert [(name, inner.integer("y", 0, 9)) for name, inner in one.entries("m", "[a-z]", "a letter")] == [("x", 1)]
    assert [inner.integer("z", 0, 9) for inner in one.items("s")] == [1]
    one.finish()
    assert not one.faults.found


def test_absent_fields_take_their_defaults() -> None:
    one = fields("{}")
    assert one.text("t", "default") == "default"
    assert one.integer("i", 1, 9, 3) == 3
    assert one.choice("c", ("red", "blue"), "blue") == "blue"
    assert one.flag("f", True)
    assert not one.texts("l", ".*", "anything")
    assert not [*one.entries("m", ".*", "anything"), *one.items("s")]
    assert not one.faults.found
    assert (one.text("required"), one.integer("also", 1, 9), one.choice("too", ("red", "blue"))) == ("", 0, "red")
    assert [fault.message for fault in one.faults.found] == [
        "lacks the key 'required'", "lacks the key 'also'", "lacks the key 'too'",
    ]  # fmt: skip


def test_fields_of_a_wrong_type_are_faults_with_places() -> None:
    one = fields("t: 1\ni: true\nn: x\nf: yes\nc: rot\nl: x\nm: [1]\ns: {a: 1}\nk: [1, a, a]\nu: 1\n")
    one.text("t")
    one.integer("i", 1, 9)
    one.number("n", 0, 9, 1)
    one.flag("f", False)
    one.choice("c", ("red", "blue"))
    one.texts("l", "x", "x")
    list(one.entries("m", ".", "a letter"))
    list(one.items("s"))
    one.texts("k", "a", "the letter a")
    one.finish()
    assert [(fault.line, fault.key, fault.message) for fault in one.faults.found] == [
        (1, "t", "must be one line of text, not the number 1"),
        (2, "i", "must be a whole number from 1 to 9, not the flag true"),
        (3, "n", "must be a number from 0 to 9, not the text 'x'"),
        (4, "f", "must be true or false, not the text 'yes'"),
        (5, "c", "must be one of red, blue, not the text 'rot'"),
        (6, "l", "must be a list, not the text 'x'"),
        (7, "m", "must be a mapping, not a list"),
        (8, "s", "must be a list, not a mapping"),
        (9, "k[0]", "must be the letter a, not the number 1"),
        (9, "k[2]", "'a' stands twice; the first is in line 9"),
        (10, "u", "unknown key 'u'"),
    ]


def test_what_is_no_mapping_is_one_fault_only() -> None:
    one = fields("just text")
    assert one.text("required") == ""
    one.finish()
    assert [fault.message for fault in one.faults.found] == ["must be a mapping, not the text 'just text'"]


# --- properties ----------------------------------------------------------------------------------------------------

plain = st.one_of(
    st.booleans(), st.none(), st.integers(-(10**17), 10**17), st.text(st.characters(exclude_categories=["Cs", "Cc"])),
)  # fmt: skip
names = st.text(st.characters(categories=["L"]), min_size=1, max_size=8)
trees = st.dictionaries(
    names, st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=15)
)


def as_lists(value: object) -> object:
    if isinstance(value, dict):
        return {name: as_lists(inner) for name, inner in value.items()}
    return [as_lists(inner) for inner in value] if isinstance(value, tuple | list) else value


@given(trees)
def test_what_is_written_is_read_back(tree: dict[str, object]) -> None:
    value, faults = read(yaml.dump(tree, Dumper=Quoting, allow_unicode=True, sort_keys=False))
    assert not faults
    assert value is not None
    assert as_lists(value.plain()) == as_lists(tree)


class Quoting(yaml.SafeDumper):
    """Quotes every text and repeats what is equal."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


@given(
    st.dictionaries(names, st.integers(0, 9), min_size=1),
    st.lists(st.sampled_from(["", "# comment", "   "]), max_size=6),
)
def test_lines_are_those_of_the_text(entries: dict[str, int], noise: list[str]) -> None:
    lines = list(noise)
    expected = {}
    for name, number in entries.items():
        lines += [f'"{name}": {number}', *noise]
        expected[name] = len(lines) - len(noise)
    value, faults = read("\n".join(lines))
    assert not faults
    assert value is not None
    assert {name: inner.place.line for name, inner in value.data.items()} == expected


@given(st.text() | st.text(alphabet="[]{}:,-&*!|>'\"%@` \n\t#?ab1\\u"))
def test_no_text_makes_it_fall_over(text: str) -> None:
    value, faults = read(text)
    assert value is not None or faults
