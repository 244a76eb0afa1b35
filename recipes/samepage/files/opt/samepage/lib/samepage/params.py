"""Checks of parameters, written as annotations: `title: Annotated[str, Text(200)]`."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from .rpc import INVALID_PARAMS, RpcError

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # what PostgreSQL's UTF-8 text cannot hold
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # in JSON text, where backslashes come in pairs
_CONTROL = re.compile("[\x01-\x1f\x7f]")
_CONTROL_BUT_LINES = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Invalid(ValueError):
    """Why a value is refused, worded to follow the parameter's name: "must be ..."."""


class Check(Protocol):
    def __call__(self, value: Any) -> Any:
        """The value to use. Raises Invalid."""


@dataclass(frozen=True, slots=True)
class Text:
    """Characters: at most `most` and at least `least` after the ends are trimmed, without control characters."""

    most: int
    least: int = 1
    lines: bool = False
    trim: bool = True

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Invalid("must be a string")
        text = value.replace("\r\n", "\n") if self.lines else value
        text = text.strip() if self.trim else text
        if _UNSTORABLE.search(text) or (_CONTROL_BUT_LINES if self.lines else _CONTROL).search(text):
            raise Invalid("must not contain control characters or broken characters")
        if len(text) < self.least:
            raise Invalid("must not be empty" if self.least == 1 else f"must have at least {self.least} characters")
        if len(text) > self.most:
            raise Invalid(f"must have at most {self.most} characters")
        return text


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number between both ends."""

    least: int
    most: int

    def __call__(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise Invalid("must be a whole number")
        if not self.least <= value <= self.most:
            raise Invalid(f"must lie between {self.least} and {self.most}")
        return value


@dataclass(frozen=True, slots=True)
class Pattern:
    """A string that matches a regular expression as a whole."""

    expression: str
    means: str
    most: int = 200

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str) or len(value) > self.most or not re.fullmatch(self.expression, value):
            raise Invalid(f"must be {self.means}")
        return value


@dataclass(frozen=True, slots=True)
class Small:
    """Any JSON value of at most `most` bytes that the database can store."""

    most: int

    def __call__(self, value: Any) -> Any:
        try:
            text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        except ValueError:
            raise Invalid("must hold finite numbers only") from None
        if len(text) > self.most:
            raise Invalid(f"must take at most {self.most} bytes")
        if _UNSTORABLE.search(text) or _ESCAPED_NUL.search(text):
            raise Invalid("must not contain control characters or broken characters")
        return value


Number = Annotated[int, Whole(1, 2**53 - 1)]
MaybeNumber = Annotated[int | None, Whole(1, 2**53 - 1)]
Version = Annotated[int, Whole(1, 2**31 - 1)]
Email = Annotated[
    str, Pattern(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?", "an address")
]
NewPassword = Annotated[str, Text(200, least=12, trim=False)]


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    check: Check
    required: bool
    nullable: bool


def parameters_of(handler: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The checked parameters of a handler: all but its first, each annotated with Annotated[type, check]."""
    found = []
    for parameter in list(inspect.signature(handler).parameters.values())[1:]:
        check = parameter.annotation.__metadata__[0]
        required = parameter.default is inspect.Parameter.empty
        found.append(Parameter(parameter.name, check, required, nullable=parameter.default is None))
    return tuple(found)


def bind(parameters: tuple[Parameter, ...], given: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """The arguments for a handler. Raises RpcError(INVALID_PARAMS) that names every fault in `data`."""
    if not isinstance(given, Mapping):
        if len(given) > len(parameters):
            raise RpcError(INVALID_PARAMS, f"takes at most {len(parameters)} parameters, {len(given)} were given")
        given = {parameter.name: value for parameter, value in zip(parameters, given, strict=False)}
    known = {parameter.name: parameter for parameter in parameters}
    faults = {name[:80]: "is not a parameter of this method" for name in given if name not in known}
    bound = {}
    for name, parameter in known.items():
        if name not in given or (given[name] is None and parameter.nullable):
            if parameter.required:
                faults[name] = "is missing"
            continue
        try:
            bound[name] = parameter.check(given[name])
        except Invalid as why:
            faults[name] = str(why)
    if faults:
        first = next(iter(faults))
        raise RpcError(INVALID_PARAMS, f"{first} {faults[first]}", {"faults": faults})
    return bound
