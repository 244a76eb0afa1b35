"""Verbs that build: lock, iso, disk, sbom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import appliance
from appliance.cli import Session, pass_session, verb

if TYPE_CHECKING:
    from appliance.pipeline import Options, Output


def archive_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where packages come from."""
    for option in (
        click.option("--mirror", default="", help="Debian archive to use; the host's by default."),
        click.option("--security-mirror", default="", help="Security archive to use; the host's by default."),
    ):
        function = option(function)
    return function


def build_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What every image is built with."""
    for option in (
        click.option(
            "--release", "strong", is_flag=True, help="Smallest image instead of fastest build; implies --locked."
        ),
        click.option("--locked", is_flag=True, help="Stop when the lock does not fit, instead of resolving it anew."),
        click.option(
            "--output-dir", type=click.Path(file_okay=False, path_type=Path), help="Write here instead of dist/."
        ),
        click.option(
            "--release-version", default=appliance.__version__, show_default=True, help="Version of the release."
        ),
        click.option("--node", default="", help="Whose image, where the layout has several nodes."),
        click.option("--explain", is_flag=True, help="Say of each step why it ran or that it was reused."),
        click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON."),
    ):
        function = option(function)
    return archive_options(function)


@verb("iso", "iso --explain", "iso --release --output-dir /srv/releases")
@build_options
@pass_session
def iso(session: Session, /, as_json: bool, **settings: Any) -> None:
    """Build the ISO, with checksum, manifest, package list and SBOM beside it."""
    from appliance import pipeline

    options = options_of(session, **settings)
    show(session, pipeline.build_iso(options, session.console), as_json)


@verb("disk --format qcow2", "disk --format raw")
@click.option(
    "--format",
    "form",
    type=click.Choice(["raw", "qcow2"]),
    default="qcow2",
    show_default=True,
    help="Format of the disk.",
)
@build_options
@pass_session
def disk(session: Session, /, form: str, as_json: bool, **settings: Any) -> None:
    """Build a disk with the appliance installed on it."""
    from appliance import pipeline

    options = options_of(session, **settings)
    show(session, pipeline.build_disk(options, session.console, form), as_json)


@verb("lock", "lock --update", "lock --locked")
@click.option("--update", is_flag=True, help="Take the newest versions of the archive.")
@click.option("--locked", is_flag=True, help="Only check; exit status 2 when the lock does not fit the recipes.")
@archive_options
@pass_session
def lock(session: Session, update: bool, locked: bool, mirror: str, security_mirror: str) -> None:
    """Resolve the recipes' packages to exact versions and hashes, when they changed or with --update."""
    from appliance import pipeline
    from appliance.check import check_project

    options = pipeline.Options(
        project=session.project, layout=session.layout, locked=locked, mirror=mirror, security_mirror=security_mirror
    )
    model, _trees = check_project(options.project, options.layout, options.version)
    found = (
        pipeline.relock(options, model, session.console)
        if update
        else pipeline.settle_lock(options, model, session.console)
    )
    count = len({package for packages in found.sets.values() for package in packages})
    session.console.result(f"{pipeline.LOCK_FILE}: {count} packages of {found.suite}")


@verb("sbom", "sbom --output dist/sbom.json")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it here instead of printing it.")
@pass_session
def sbom(session: Session, output: Path | None) -> None:
    """Print the software bill of materials of the release that the recipes make now."""
    from appliance import pipeline
    from appliance.iso import put_beside
    from appliance.sbom import make_sbom

    built = pipeline.build_release(pipeline.Options(project=session.project, layout=session.layout), session.console)
    content = make_sbom(built.release, built.model)
    if output:
        put_beside(output, content)
    else:
        session.console.result(content.decode().rstrip("\n"))


def options_of(
    session: Session, *, strong: bool, locked: bool, output_dir: Path | None, release_version: str, explain: bool,
    **same: Any,
) -> Options:  # fmt: skip
    """The options of a build; `same` are those that are called alike. What --explain asks for goes to the console."""
    from appliance.pipeline import Options

    session.console.explain = explain
    return Options(
        project=session.project,
        layout=session.layout,
        version=release_version,
        strong=strong,
        locked=locked or strong,
        output=output_dir.absolute() if output_dir else None,
        **same,
    )


def show(session: Session, output: Output, as_json: bool) -> None:
    """Says what stands in dist/ now."""
    artifact = output.artifact
    if as_json:
        stages = session.console.stages
        session.console.result_json(
            {
                "path": str(artifact.path),
                "sha256": artifact.sha256,
                "size": artifact.size,
                "rewritten": output.rewritten,
                "version": output.built.release.version,
                "stages": [
                    {"name": one.name, "seconds": round(one.seconds, 3), "reason": one.reason} for one in stages
                ],
            }
        )
        return
    state = "" if output.rewritten else ", unchanged"
    session.console.result(f"{artifact.path}  {artifact.size / 1e6:.0f} MB{state}")
