"""JUnit XML of a verification. One suite of checks per recipe; the steps are a suite of their own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from xml.etree import ElementTree

from appliance.verification.results import Check, Results, Step


def junit_xml(results: Results) -> bytes:
    """The file's content, UTF-8."""
    root = ElementTree.Element("testsuites", name="Samepage appliance")
    if results.steps:
        suite = _suite(root, "steps", *_span(results.steps))
        for step in results.steps:
            case = _case(suite, "samepage.steps", step.name, step.seconds)
            if not step.ok:
                _problem(case, "failure", step.detail)
    for recipe, checks in results.by_recipe().items():
        suite = _suite(root, recipe, *_span(checks))
        for check in checks:
            _add_check(suite, check)
    for element in (*root, root):
        for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(name, str(sum(1 for _ in element.iter(tag))))
    start, finish = results.span
    root.set("time", f"{finish - start:.3f}")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _span(entries: Sequence[Step] | Sequence[Check]) -> tuple[float, float]:
    return min(entry.start for entry in entries), max(entry.finish for entry in entries)


def _suite(root: ElementTree.Element, name: str, start: float, finish: float) -> ElementTree.Element:
    when = datetime.fromtimestamp(start, UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")
    return ElementTree.SubElement(root, "testsuite", name=clean(name), timestamp=when, time=f"{finish - start:.3f}")


def _case(suite: ElementTree.Element, classname: str, name: str, seconds: float) -> ElementTree.Element:
    names = {"classname": clean(classname), "name": clean(name)}
    return ElementTree.SubElement(suite, "testcase", names, time=f"{seconds:.3f}")


def _add_check(suite: ElementTree.Element, check: Check) -> None:
    case = _case(suite, f"samepage.{check.recipe}", check.name, check.seconds)
    if check.outcome == "skipped":
        ElementTree.SubElement(case, "skipped", message=clean(check.detail))
    elif check.outcome != "passed":
        _problem(case, "failure" if check.outcome == "failed" else "error", check.detail)
    if check.output:
        ElementTree.SubElement(case, "system-out").text = clean(check.output)


def _problem(case: ElementTree.Element, kind: str, detail: str) -> None:
    problem = ElementTree.SubElement(case, kind, message=clean(first_line(detail)))
    problem.text = clean(detail)


def first_line(detail: str) -> str:
    """The line of a failure that says most: pytest's first `E` line, else the first line."""
    lines = [line for line in detail.splitlines() if line.strip()]
    if lines and lines[0].startswith("cut at"):
        return lines[0]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or [""])[0]


def clean(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(
        letter if letter in "\t\n\r" or " " <= letter <= "\ud7ff" or "\ue000" <= letter <= "\ufffd" or letter > "\uffff"
        else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )
