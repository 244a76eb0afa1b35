"""Reads YAML into values that know their file, line and key, and takes typed fields out of them.

The dialect is a plain subset: one document, text keys, no anchors, aliases or tags. Unquoted words are numbers, `true`,
`false` or `null` only where they can be nothing else, so `no`, `0750`, `22:22` and `2026-11-01` stay text.
Everything wrong becomes a fault; nothing here raises for bad input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from appliance.errors import Faults, nearest
from appliance.model import Place

NAME = r"[a-z][a-z0-9-]{0,30}"  # of a recipe, a layout, a node
MAX_DEPTH = 16
_CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})\.[0-9]{1,17}")
REFUSED = object()  # stands for a value that is a fault already
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar (str, int, float, bool, None), a mapping of Values or a tuple of Values, and where it stands."""

    data: Any
    place: Place

    @property
    def kind(self) -> str:
        """What the value is, in words for a message."""
        match self.data:
            case None:
                return "nothing"
            case bool() | int() | float():
                return f"the {'flag' if isinstance(self.data, bool) else 'number'} {str(self.data).lower()}"
            case str():
                return f"the text {shown(self.data)}"
            case tuple():
                return "a list"
            case _:
                return "a mapping"

    def plain(self) -> Any:
        """The value without places: scalars, tuples and dicts."""
        if isinstance(self.data, Mapping):
            return {name: value.plain() for name, value in self.data.items()}
        if isinstance(self.data, tuple):
            return tuple(value.plain() for value in self.data)
        return self.data


def shown(text: str) -> str:
    """A text from the input as a message shows it: quoted, printable and not longer than a line."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def add_fault(faults: Faults, place: Place, message: str, hint: str = "") -> None:
    """A fault at a place of the input."""
    faults.add(place.file, place.line, place.key, message, hint)


def load_yaml(project: Path, path: Path, faults: Faults) -> Value | None:
    """The document in a file of the project, or None where the file cannot be understood at all."""
    file = path.relative_to(project).as_posix()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        faults.add(file, 0, "", f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        faults.add(file, error.object.count(b"\n", 0, error.start) + 1, "", "is not UTF-8 text")
    else:
        return parse_yaml(text, file, faults)
    return None


def parse_yaml(text: str, file: str, faults: Faults) -> Value | None:
    """The document in a text, or None where its syntax is broken; `file` is the name in faults."""
    try:
        events = list(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        faults.add(file, mark.line + 1 if mark else 0, "", f"is not YAML: {problem}", "look at indentation and quotes")
        return None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        faults.add(file, 0, "", f"is not YAML: {str(error).splitlines()[0]}")
        return None
    return _Builder(events, file, faults).document()


class _Builder:
    """Turns the parser's events into Values; the parser has already proved that they are well nested."""

    def __init__(self, events: list[Any], file: str, faults: Faults) -> None:
        self.events = iter(events)
        self.file = file
        self.faults = faults
        self.documents = sum(isinstance(event, yaml.DocumentStartEvent) for event in events)

    def document(self) -> Value | None:
        if self.documents != 1:
            found = "is empty" if not self.documents else "holds several documents; one is expected"
            self.faults.add(self.file, 0, "", found)
            return None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                break
        return self.value(next(self.events), "", None, 0)

    def refuse(self, line: int, key: str, message: str, hint: str = "") -> None:
        self.faults.add(self.file, line, key, message, hint)

    def value(self, event: Any, key: str, line: int | None, depth: int) -> Value:
        """`line` is that of the mapping key, where there is one."""
        line = line or event.start_mark.line + 1
        place = Place(self.file, line, key)
        if getattr(event, "anchor", None) is not None:
            self.refuse(line, key, "anchors and aliases are not allowed", "write the value out")
        if isinstance(event, yaml.AliasEvent):
            return Value(REFUSED, place)
        if event.tag is not None:
            self.refuse(line, key, f"the tag {shown(event.tag)} is not allowed", "write the plain value")
        if isinstance(event, yaml.ScalarEvent):
            return Value(self.scalar(event, key), place)
        if depth == MAX_DEPTH:
            self.refuse(line, key, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return Value(tuple(self.items(key, depth + 1)), place)
        return Value(self.mapping(key, depth + 1), place)

    def scalar(self, event: Any, key: str) -> Any:
        text = event.value
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            self.refuse(event.start_mark.line + 1, key, "holds half of a surrogate pair, which is no text")
            return text.encode("utf-8", "replace").decode()
        if not event.implicit[0]:
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def items(self, key: str, depth: int) -> Iterator[Value]:
        for number, event in enumerate(iter(lambda: next(self.events), None)):
            if isinstance(event, yaml.SequenceEndEvent):
                return
            if depth > MAX_DEPTH:
                self.skip(event)
            else:
                yield self.value(event, f"{key}[{number}]", None, depth)

    def mapping(self, key: str, depth: int) -> Mapping[str, Value]:
        found: dict[str, Value] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            name = self.name(event, key)
            inner = f"{key}.{name}" if key else str(name)
            if name is None or depth > MAX_DEPTH:
                self.skip(next(self.events))
                continue
            value = self.value(next(self.events), inner, line, depth)
            if name in found:
                self.refuse(line, inner, f"the key stands twice; the first is in line {found[name].place.line}")
            else:
                found[name] = value
        return found

    def name(self, event: Any, key: str) -> str | None:
        """The text of a mapping's key, or None after a fault."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent) and event.tag is None and event.anchor is None:
            name = self.scalar(event, key)
            if isinstance(name, str) and name and name.isprintable():
                return name
            self.refuse(line, key, f"the key {shown(event.value)} is not text", "put the key in quotes")
        else:
            self.refuse(line, key, "a key must be plain text, without anchor, alias, tag or structure")
            self.skip(event)
        return None

    def skip(self, event: Any) -> None:
        """Read past a whole value without looking into it."""
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth == 0:
                return
            event = next(self.events)


@dataclass(slots=True)
class Fields:
    """Takes typed fields out of a mapping. Every method names one key; `finish` refuses the keys nobody named.

    After a fault a method returns its default, or a harmless value of the right type, so that reading goes on.
    """

    value: Value
    faults: Faults
    known: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.value.data, Mapping):
            self.fault(None, f"must be a mapping, not {self.value.kind}")
            self.value = Value({}, self.value.place)
            self.known = [""]  # one fault is enough: nothing is required of it any more

    @property
    def place(self) -> Place:
        return self.value.place

    def fault(self, name: str | None, message: str, hint: str = "") -> None:
        """A fault at a key of this mapping, or at the mapping itself."""
        found = self.value.data.get(name) if name is not None else None
        place = found.place if found is not None else self.value.place
        key = place.key if found is not None or name is None else f"{place.key}.{name}".lstrip(".")
        self.faults.add(place.file, place.line, key, message, hint)

    def has(self, name: str) -> bool:
        return name in self.value.data

    def take(self, name: str, required: bool) -> Value | None:
        """The value of a key, or None where it is absent or empty (a fault when `required` or empty)."""
        broken = self.known[:1] == [""]
        self.known.append(name)
        found: Value | None = self.value.data.get(name)
        if found is None:
            if required and not broken:
                self.fault(None, f"lacks the key {name!r}")
        elif found.data is REFUSED:
            return None
        elif found.data is None:
            add_fault(self.faults, found.place, "has no value", "give one, or leave the key out")
            return None
        return found

    def _scalar(self, name: str, default: Any, expected: str, good: Callable[[Any], bool]) -> Any:
        found = self.take(name, default is None)
        if found is None:
            return default
        if not good(found.data):
            add_fault(self.faults, found.place, f"must be {expected}, not {found.kind}")
            return default
        return found.data

    def text(
        self, name: str, default: str | None = None, *, pattern: str = r"[^\n]+", what: str = "one line of text"
    ) -> str:
        """A text that matches `pattern` as a whole; required when `default` is None, and empty after a fault."""
        found = self._scalar(
            name, default, what, lambda data: isinstance(data, str) and bool(re.fullmatch(pattern, data))
        )
        return cast(str, found if found is not None else "")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number; required when `default` is None, and 0 after a fault."""
        found = self._scalar(
            name,
            default,
            f"a whole number from {low} to {high}",
            lambda data: type(data) is int and low <= data <= high,
        )
        return cast(int, found or 0)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        expected = f"a number from {low:g} to {high:g}"
        return float(
            self._scalar(name, default, expected, lambda data: type(data) in (int, float) and low <= data <= high)
        )

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._scalar(name, default, "true or false", lambda data: isinstance(data, bool)))

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
        found = self.take(name, default is None)
        if found is None or found.data in choices:
            return cast(str, found.data) if found is not None else default or choices[0]
        add_fault(
            self.faults,
            found.place,
            f"must be one of {', '.join(choices)}, not {found.kind}",
            nearest(str(found.data), choices),
        )
        return default or choices[0]

    def texts(self, name: str, pattern: str, what: str, required: bool = False) -> tuple[Value, ...]:
        """A list of different texts, with their places."""
        found = self.take(name, required)
        if found is None:
            return ()
        if not isinstance(found.data, tuple):
            add_fault(self.faults, found.place, f"must be a list, not {found.kind}")
            return ()
        good: dict[str, Value] = {}
        for item in found.data:
            if not isinstance(item.data, str) or not re.fullmatch(pattern, item.data):
                add_fault(self.faults, item.place, f"must be {what}, not {item.kind}")
            elif item.data in good:
                line = good[item.data].place.line
                add_fault(self.faults, item.place, f"{item.data!r} stands twice; the first is in line {line}")
            else:
                good[item.data] = item
        return tuple(good.values())

    def entries(self, name: str, pattern: str, what: str, required: bool = False) -> Iterator[tuple[str, Fields]]:
        """The entries of a mapping of mappings; each is finished when the next one is asked for."""
        found = self.take(name, required)
        if found is None:
            return
        if not isinstance(found.data, Mapping):
            add_fault(self.faults, found.place, f"must be a mapping, not {found.kind}")
            return
        for key, value in found.data.items():
            if not re.fullmatch(pattern, key):
                add_fault(self.faults, value.place, f"{shown(key)} is not {what}")
                continue
            fields = Fields(value, self.faults)
            yield key, fields
            fields.finish()

    def items(self, name: str) -> Iterator[Fields]:
        """The entries of a list of mappings; each is finished when the next one is asked for."""
        found = self.take(name, False)
        if found is None:
            return
        if not isinstance(found.data, tuple):
            add_fault(self.faults, found.place, f"must be a list, not {found.kind}")
            return
        for value in found.data:
            fields = Fields(value, self.faults)
            yield fields
            fields.finish()

    def finish(self) -> None:
        """Refuse every key that no method has named."""
        for name, value in self.value.data.items():
            if name not in self.known:
                add_fault(self.faults, value.place, f"unknown key {shown(name)}", nearest(name, self.known))
