"""Verbs about the model: check, render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import appliance
from appliance.cli import Session, pass_session, verb
from appliance.model import RenderedFile, RenderedTree


@verb("check", "check --json")
@click.option("--json", "as_json", is_flag=True, help="Print the layout as JSON.")
@pass_session
def check(session: Session, as_json: bool) -> None:
    """Validate the recipes and show the layout: nodes, components, ports, users, memory, endpoints."""
    from appliance.check import check_project
    from appliance.describe import as_text, describe

    model, _trees = check_project(session.project, session.layout, appliance.__version__)
    if as_json:
        session.console.result_json(describe(model))
    else:
        session.console.result(as_text(describe(model)))


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


@verb("render", "render --node samepage /etc/nginx/nginx.conf", "render --diff")
@click.argument("path", required=False)
@click.option("--node", "node_name", help="Only this node.")
@click.option("--diff", is_flag=True, help="Show what differs from the last ISO or disk built in this checkout.")
@click.option("--json", "as_json", is_flag=True, help="Print the list of files as JSON.")
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Write the files below this folder, one folder per node."
)
@pass_session
def render(
    session: Session, path: str | None, node_name: str | None, diff: bool, as_json: bool, output_dir: Path | None
) -> None:
    """List the rendered files, or print the one at PATH, or say what changed."""
    from appliance.check import check_project
    from appliance.errors import UnknownName, nearest
    from appliance.treefiles import attributes, diff_trees, read_tree, write_tree

    _model, trees = check_project(session.project, session.layout, appliance.__version__)
    chosen = [tree for tree in trees if node_name in (None, tree.node)]
    if not chosen:
        raise UnknownName(
            f"no node is called {node_name!r}", hint=nearest(str(node_name), [tree.node for tree in trees])
        )
    files = [(tree, file) for tree in chosen for file in (*tree.config, *tree.app)]
    if path:
        found = [file for _, file in files if file.path.rstrip("/") == path.rstrip("/")]
        if not found:
            raise UnknownName(f"no file {path} is rendered", hint=nearest(path, {file.path for _, file in files}))
        text = f"link to {found[0].link}" if found[0].link else found[0].content.decode(errors="replace")
        session.console.result(text.removesuffix("\n"))
    elif output_dir:
        for tree in chosen:
            write_tree(tree, output_dir / tree.node)
        session.console.note(f"wrote {len(files)} files below {output_dir}")
    elif diff:
        for tree in chosen:
            text = diff_trees(read_tree(session.state / "rendered" / session.layout / tree.node), tree)
            session.console.result(
                text.removesuffix("\n") if text else f"{tree.node}: nothing changed since the last build"
            )
    elif as_json:
        session.console.result_json([entry(tree, file) for tree, file in files])
    else:
        rows = [("mode and owner", "path", "from")]
        rows += [("link" if file.link else attributes(file), file.path, file.source) for _, file in files]
        for line in table(rows):
            session.console.result(line[2:])


def entry(tree: RenderedTree, file: RenderedFile) -> dict[str, Any]:
    """One rendered file without its content."""
    return {
        "node": tree.node, "path": file.path, "mode": f"{file.mode:04o}", "uid": file.uid, "gid": file.gid,
        "recipe": file.recipe, "source": file.source, "size": len(file.content), "link": file.link,
    }  # fmt: skip
