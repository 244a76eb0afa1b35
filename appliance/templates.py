"""Renders Jinja2 templates and reports everything wrong with each one, with its line, not only the first fault."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jinja2
from jinja2.utils import missing

from appliance.errors import Faults, nearest
from appliance.model import Place

Variables = Mapping[str, Any]
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OPERATORS = (
    *("__getitem__", "__call__", "__neg__", "__pos__", "__lt__", "__le__", "__gt__", "__ge__"),
    *(f"__{side}{name}__" for name in _ARITHMETIC for side in ("", "r")),
)
_PLAIN_RESULTS = {
    "__str__": "",
    "__len__": 0,
    "__int__": 0,
    "__bool__": False,
    "__eq__": False,
    "__ne__": True,
    "__hash__": 0,
}


@dataclass(frozen=True, slots=True)
class TemplateText:
    """A template and where its first line stands; `key` is set for one that is a value of recipe.yaml."""

    text: str
    place: Place

    def line(self, number: int) -> int:
        """The line of the file for a line of the template."""
        return self.place.line if self.place.key else number


def render_text(template: TemplateText, variables: Variables, faults: Faults) -> str | None:
    """The rendered text, or None after a fault."""
    found = Faults()

    def fault(line: int, message: str, hint: str = "") -> None:
        found.add(template.place.file, template.line(line), template.place.key, message, hint)

    text = ""
    environment = _environment(lambda name, owner: fault(_template_line(), *_undefined(name, owner, variables)))
    try:
        text = environment.from_string(template.text).render(variables)
    except jinja2.TemplateSyntaxError as error:
        fault(error.lineno, f"template syntax: {error.message}")
    except jinja2.TemplateNotFound as error:
        fault(
            _raised_line(error),
            f"a template stands alone and cannot use {error.name!r}",
            "write the text into this template",
        )
    except Exception as error:  # whatever an expression raises is the template's fault
        if not found.found:  # else it follows from what was undefined
            fault(_raised_line(error), f"cannot be rendered: {error}")
    faults.found += found.found
    return None if found.found else text


def _environment(report: Callable[[str, Any], None]) -> jinja2.Environment:
    """Strict: every use of an undefined name is reported; rendering goes on, to find the next one."""

    def reporting(result: Callable[[Any], Any]) -> Callable[..., Any]:
        def method(self: Any, *_: Any, **__: Any) -> Any:
            report(self._undefined_name or "", self._undefined_obj)
            return result(self)

        return method

    def attribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return reporting(lambda undefined: undefined)(self)

    methods = {name: reporting(lambda undefined: undefined) for name in _OPERATORS}
    methods |= {name: reporting(_always(value)) for name, value in _PLAIN_RESULTS.items()}
    methods |= {"__iter__": reporting(_always(iter(()))), "__getattr__": attribute}
    undefined = type("Reported", (jinja2.StrictUndefined,), {"__slots__": (), **methods})
    return jinja2.Environment(
        undefined=undefined, loader=jinja2.FunctionLoader(lambda _: None), keep_trailing_newline=True, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,
    )  # fmt: skip


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _undefined(name: str, owner: Any, variables: Variables) -> tuple[str, str]:
    """Message and hint for an undefined name; `owner` is what it was looked for in."""
    if owner is missing:
        return f"the variable {name!r} is not defined", nearest(name, variables)
    valid = [str(key) for key in owner] if isinstance(owner, Mapping) else []
    if owner is variables.get("endpoints"):
        return f"the recipe neither needs nor provides the endpoint {name!r}", nearest(name, valid, "add it to needs")
    holder = next((key for key, value in variables.items() if value is owner), "")
    return f"{holder or 'the value'} has no {name!r}", nearest(str(name), valid) if valid else ""


def _template_line() -> int:
    """The template's line that is being rendered, from the compiled code on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        template = frame.f_globals.get("__jinja_template__")
        if template is not None:
            return int(template.get_corresponding_lineno(frame.f_lineno))
        frame = frame.f_back
    return 0


def _raised_line(error: BaseException) -> int:
    """The template's line in which an exception rose; jinja2 has put the template's lines into the traceback."""
    lines = [entry.lineno or 0 for entry in traceback.extract_tb(error.__traceback__) if entry.filename == "<template>"]
    return lines[-1] if lines else 0
