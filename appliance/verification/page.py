"""The HTML page of a verification: one file that needs nothing else, readable in ten years and without scripts."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from itertools import chain

from appliance.verification.junit import first_line
from appliance.verification.results import RED, Check, Results, Step

MARKS = {"passed": "passed", "failed": "failed", "error": "error", "skipped": "left out"}

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--card:#f6f8fa;--line:#d1d9e0;
--good:#1a7f37;--bad:#cf222e;--wait:#9a6700;--bar:#0969da}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--paper:#0d1117;--card:#151b23;--line:#3d444d;
--good:#3fb950;--bad:#f85149;--wait:#d29922;--bar:#4493f8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.6rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h2 small{font-weight:400;color:var(--soft);margin-left:.5rem}
.facts{color:var(--soft);margin:0 0 1.2rem}.facts b{color:var(--ink);font-weight:600}
.counts{display:flex;flex-wrap:wrap;gap:.75rem;margin:0;padding:0;list-style:none}
.counts li{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.5rem 1rem;min-width:7rem}
.counts b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.share{display:flex;height:.5rem;border-radius:.25rem;overflow:hidden;margin:1.1rem 0 0;background:var(--line)}
.share i{display:block}
.facts b.passed,.passed{color:var(--good)}.facts b.failed,.failed,.error{color:var(--bad)}.skipped{color:var(--wait)}
i.passed{background:var(--good)}i.failed,i.error{background:var(--bad)}i.skipped{background:var(--wait)}
table{width:100%;border-collapse:collapse;table-layout:fixed}
th,td{text-align:left;padding:.4rem .6rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
thead th{color:var(--soft);font-size:.8rem;font-weight:500}
.state{width:5.5rem;font-weight:600}.time{width:7.2rem;color:var(--soft);font-variant-numeric:tabular-nums}
.took{width:6.5rem;text-align:right;font-variant-numeric:tabular-nums}
td .name{color:var(--soft);font-size:.85rem;display:block;font-family:ui-monospace,monospace}
.when{position:relative;height:.5rem;margin-top:.35rem;border-radius:.25rem;background:var(--line)}
.when i{position:absolute;top:0;bottom:0;min-width:3px;border-radius:.25rem;background:var(--bar)}
.when i.no{background:var(--bad)}
details{margin:.35rem 0 .2rem}summary{cursor:pointer;color:var(--soft)}
pre{margin:.4rem 0;padding:.7rem .9rem;background:var(--card);border:1px solid var(--line);border-radius:.4rem;
overflow:auto;max-height:34rem;font:12.5px/1.45 ui-monospace,monospace;white-space:pre-wrap}
.index a{color:var(--bad)}
"""


def html_page(results: Results) -> str:
    """The whole page."""
    title = f"Test results ({len(results.checks)} tests)"
    parts = chain(
        [f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n',
         '<meta name="viewport" content="width=device-width,initial-scale=1">\n',
         f"<style>{STYLE}</style></head><body><main>\n<h1>{title}</h1>\n"],
        _header(results), _index(results), _steps(results), _recipes(results), ["</main></body></html>\n"],
    )  # fmt: skip
    return "".join(parts)


def duration(seconds: float) -> str:
    """As people read it: 0.12 s, 12.3 s, 2 min 05 s."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def clock(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%H:%M:%S.%f")[:-4]


def _header(results: Results) -> list[str]:
    start, finish = results.span
    verdict = '<b class="passed">passed</b>' if results.ok else '<b class="failed">not passed</b>'
    node = escape(str(results.node.get("name", "") or results.host))
    layout = str(results.node.get("layout", ""))
    when = datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    facts = [verdict, f"node <b>{node}</b>"]
    facts += [f"layout <b>{escape(layout)}</b>"] if layout else []
    facts += [f"release <b>{escape(results.release)}</b>"] if results.release else []
    facts += [f"started <b>{when}</b>", f"took <b>{duration(finish - start)}</b>"]
    lines = [f'<p class="facts">{" &middot; ".join(facts)}</p>\n<ul class="counts">']
    total = len(results.checks) or 1
    shares = []
    for outcome, label in MARKS.items():
        count = sum(check.outcome == outcome for check in results.checks)
        if count or outcome == "passed":
            lines.append(f'<li><b class="{outcome}">{count}</b>{label}</li>')
            shares.append(f'<i class="{outcome}" style="width:{100 * count / total:.2f}%"></i>')
    return [*lines, "</ul>\n", f'<div class="share">{"".join(shares)}</div>\n']


def _index(results: Results) -> list[str]:
    """Links to what is red, before everything else."""
    red = [
        f'<li><a href="#{_anchor(check)}">{escape(check.recipe)}: {escape(check.title or check.name)}</a>: '
        f"{escape(first_line(check.detail))}</li>"
        for check in results.checks if check.outcome in RED
    ]  # fmt: skip
    return [f'<h2>Red</h2><ul class="index">{"".join(red)}</ul>\n'] if red else []


def _anchor(check: Check) -> str:
    return escape(check.id.replace(" ", "-"), quote=True)


HEAD = '<table><thead><tr><th class="state"></th><th>{}</th><th class="time">Start</th><th class="time">Finish</th>{}'


def _steps(results: Results) -> list[str]:
    if not results.steps:
        return []
    start, finish = results.span
    lines = ["<h2>Steps</h2>\n", HEAD.format("Step", '<th class="took">Duration</th><th></th></tr></thead>\n')]
    steps = [*results.steps]
    if results.checks:
        first, last = min(check.start for check in results.checks), max(check.finish for check in results.checks)
        steps.append(Step(f"run {len(results.checks)} checks", first, last, not results.count(*RED)))
    for step in steps:
        whole = finish - start or 1.0
        style = f"left:{100 * (step.start - start) / whole:.2f}%;width:{100 * step.seconds / whole:.2f}%"
        bar = f'<div class="when"><i class="{"" if step.ok else "no"}" style="{style}"></i></div>'
        state = _state("passed" if step.ok else "failed")
        lines.append(f"<tr>{state}<td>{escape(step.name)}</td>{_times(step)}<td>{bar}</td></tr>\n")
        if step.detail:
            lines.append(f'<tr><td></td><td colspan="5"><pre>{escape(step.detail)}</pre></td></tr>\n')
    return [*lines, "</table>\n"]


def _state(outcome: str) -> str:
    return f'<td class="state {outcome}">{MARKS[outcome]}</td>'


def _times(entry: Step | Check) -> str:
    return (
        f'<td class="time">{clock(entry.start)}</td><td class="time">{clock(entry.finish)}</td>'
        f'<td class="took">{duration(entry.seconds)}</td>'
    )


def _recipes(results: Results) -> list[str]:
    lines = []
    for recipe, checks in results.by_recipe().items():
        passed = sum(check.outcome == "passed" for check in checks)
        took = duration(sum(check.seconds for check in checks))
        lines.append(f"<h2>{escape(recipe)}<small>{passed} of {len(checks)} passed, {took}</small></h2>\n")
        lines.append(HEAD.format("Check", '<th class="took">Duration</th></tr></thead>\n'))
        lines += [_check(check) for check in checks]
        lines.append("</table>\n")
    return lines


def _check(check: Check) -> str:
    name = f'<span class="name">{escape(check.name)}</span>'
    body = f"{escape(check.title)}{name}" if check.title else escape(check.name)
    if check.outcome in RED:
        body += f"<pre>{escape(check.detail)}</pre>"
    elif check.detail:
        body += f'<span class="skipped">{escape(check.detail)}</span>'
    if check.output:
        body += f"<details><summary>output</summary><pre>{escape(check.output)}</pre></details>"
    return f'<tr id="{_anchor(check)}">{_state(check.outcome)}<td>{body}</td>{_times(check)}</tr>\n'
