"""Verbs about upgrades: bundle, channel, key."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import appliance
from appliance.cli import Session, pass_session, verb
from appliance.verbs.build import archive_options

if TYPE_CHECKING:
    from appliance.bundle import ReleaseFiles
    from appliance.node.keys import Signer, Trust
    from appliance.pipeline import Options
    from appliance.store import Store

key_option = click.option(
    "--key", type=click.Path(dir_okay=False, path_type=Path), help="Secret key to sign with; the user's by default."
)


@verb(
    "bundle --from 2026.10.0", "bundle --from old.iso --from older.iso --to 2026.11.0", "bundle --from dist --full",
    "bundle show dist/samepage-2026.10.0-to-2026.11.0.bundle",
)  # fmt: skip
@click.argument("words", nargs=-1, metavar="[show FILE]")
@click.option(
    "--from",
    "starts",
    multiple=True,
    metavar="RELEASE",
    help="Releases to start from: ISO, manifest, version, folder of any.",
)
@click.option(
    "--to", "goal", default="", metavar="RELEASE", help="Release to lead to; by default what the recipes make now."
)
@click.option("--full", is_flag=True, help="Also a bundle that starts from any release.")
@click.option("--show", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The same as the word show.")
@click.option(
    "--release-version", default=appliance.__version__, show_default=True, help="Version of what is made now."
)
@click.option("--output-dir", type=click.Path(file_okay=False, path_type=Path), help="Write here instead of dist/.")
@click.option("--locked", is_flag=True, help="Stop when the lock does not fit, instead of resolving it anew.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made, or what a bundle does, as JSON.")
@key_option
@archive_options
@pass_session
def bundle(
    session: Session, words: tuple[str, ...], starts: tuple[str, ...], goal: str, full: bool, show: Path | None,
    release_version: str, output_dir: Path | None, locked: bool, as_json: bool, key: Path | None, mirror: str,
    security_mirror: str,
) -> None:  # fmt: skip
    """Make the signed bundles that upgrade nodes from earlier releases, or show what a bundle does."""
    from appliance import bundle as making
    from appliance import signing
    from appliance.pipeline import Options

    if words or show:
        _show(session, _file_to_show(words, show), key, as_json)
        return
    if not starts and not full:
        raise click.UsageError("name the releases to start from with --from, or say --full")
    signer = signing.load(key)
    options = Options(
        project=session.project, layout=session.layout, version=release_version, locked=locked, mirror=mirror,
        security_mirror=security_mirror, output=output_dir.absolute() if output_dir else None,
    )  # fmt: skip
    new, olds = _releases(session, options, goal, starts)
    if not olds and not full:
        raise click.UsageError(f"no other release than {new.manifest.version} is in {', '.join(starts)}")
    for start in olds:
        _tell_apart(session, start, new)
    options.dist.mkdir(parents=True, exist_ok=True)
    made = []
    for old in (*olds, *([None] if full else [])):
        target = options.dist / making.file_name(old, new)
        with session.console.stage(target.name) as progress:
            made.append(making.make(old, new, signer, target, progress=progress))
    if as_json:
        session.console.result_json([{"path": str(one.path), "sha256": one.sha256, "size": one.size} for one in made])
        return
    for one in made:
        session.console.result(f"{one.path}  {one.size:,} bytes")


def _file_to_show(words: tuple[str, ...], show: Path | None) -> Path:
    if show and not words:
        return show
    if show or len(words) != 2 or words[0] != "show":
        raise click.UsageError("say: bundle show FILE, or name the releases to start from with --from")
    if not Path(words[1]).is_file():
        raise click.UsageError(f"there is no file {words[1]}")
    return Path(words[1])


def _tell_apart(session: Session, old: ReleaseFiles, new: ReleaseFiles) -> None:
    """Two releases should have two names. Raises ApplianceError where they are one."""
    from appliance.errors import ApplianceError

    version = new.manifest.version
    if old.digest == new.digest:
        hint = "change something first, and give what is made now a version of its own with --release-version"
        raise ApplianceError(f"release {version} is what --from names: there is nothing to upgrade", hint=hint)
    if old.manifest.version == version:
        session.console.warn(f"two different releases are called {version}; name the new one with --release-version")


def _releases(
    session: Session, options: Options, goal: str, starts: tuple[str, ...]
) -> tuple[ReleaseFiles, list[ReleaseFiles]]:
    """The release to lead to, and those to start from."""
    from appliance import bundle as making
    from appliance import lock as locking
    from appliance import pipeline, releases, tools

    store: Store = pipeline.ReportingStore(options.cache, options.project, session.console.note, session.console)
    if goal:
        lock = locking.read_lock(options.lock_file)
    else:
        built = pipeline.build_release(options, session.console)
        lock = built.lock
    toolbox = tools.prepare(lock, store, pipeline.fetcher(options, lock, store, session.console))
    dist = session.project / "dist"
    new = releases.find(goal, dist, toolbox, store) if goal else making.files_of(built.release)
    olds = [old for start in starts for old in releases.find_all(start, new, dist, toolbox, store)]
    return new, list({old.digest: old for old in olds}.values())


def _show(session: Session, path: Path, key: Path | None, as_json: bool) -> None:
    from appliance.bundle import describe, unchanged
    from appliance.errors import ApplianceError
    from appliance.node.bundle import open_bundle
    from appliance.node.refusals import Refusal

    try:
        with open_bundle(str(path), _trust(session, key)) as opened:
            info = opened.info
    except Refusal as refusal:
        raise ApplianceError(f"{path}: {refusal.message}", hint=refusal.hint) from refusal
    size = path.stat().st_size
    if as_json:
        session.console.result_json({**info.facts(), "path": str(path), "size": size, "unchanged": unchanged(info)})
    else:
        session.console.result(describe(info, size))


@verb("channel add /srv/channel dist/*.bundle", "channel keep /srv/channel --releases 5")
@click.argument("action", type=click.Choice(["add", "keep"]))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--releases", "keep", type=click.IntRange(min=0), default=0, help="How many of the newest releases stay; 0: all."
)
@click.option(
    "--days", type=click.IntRange(min=1), default=14, show_default=True, help="How long nodes trust this index."
)
@click.option("--revoke", multiple=True, metavar="KEY-ID", help="A key that nodes must not trust any more.")
@key_option
@pass_session
def channel(
    session: Session, action: str, folder: Path, bundles: tuple[Path, ...], keep: int, days: int,
    revoke: tuple[str, ...], key: Path | None,
) -> None:  # fmt: skip
    """Keep a static folder of bundles with a signed index: add bundles, or renew the index and drop old ones."""
    from appliance import channel as keeping
    from appliance import signing

    if action == "add" and not bundles:
        raise click.UsageError("name the bundles to add")
    if action == "keep" and bundles:
        raise click.UsageError("keep takes no bundles; say add")
    signer = signing.load(key)
    _take_over(session, folder, signer)
    index = keeping.add(folder, bundles, signer, int(time.time()), keep=keep, lifetime=days * 86400, revoked=revoke)
    session.console.result(
        f"{folder}: index {index.counter}, {len(index.releases)} releases, {len(index.bundles)} bundles, "
        f"newest {index.newest.version}"
    )


def _take_over(session: Session, folder: Path, signer: Signer) -> None:
    """Sign an index with another key than before, where the project trusts that one too: keys are stolen, or expire."""
    from appliance.errors import ApplianceError
    from appliance.iso import put_beside
    from appliance.node.channel import INDEX_NAME, dump_index, parse_index
    from appliance.node.keys import Trust
    from appliance.node.refusals import Refusal, UnknownKey

    place = folder / INDEX_NAME
    if not place.is_file():
        return
    content = place.read_bytes()
    try:
        try:
            parse_index(content, Trust({signer.id: signer.public}))
        except UnknownKey:
            index = parse_index(content, _trust(session, None))
            session.console.warn(f"{place} was signed by another key; from now on it is signed by {signer.id}")
            put_beside(place, dump_index(index, signer))
    except Refusal as refusal:
        raise ApplianceError(f"{place}: {refusal.message}", hint=refusal.hint) from refusal


@verb("key new team", "key show")
@click.argument("action", type=click.Choice(["new", "show"]))
@click.argument("name", default="")
@key_option
@pass_session
def key(session: Session, action: str, name: str, key: Path | None) -> None:
    """Make the key that signs bundles, or show its id."""
    from appliance import signing

    if action == "show":
        found = None if key else signing.find()  # the personal one too
        session.console.result((found or signing.load(key)).id)
        return
    if not name.isidentifier():
        raise click.UsageError("give the key a name of letters, digits and underscores")
    signer, public = signing.create(name, session.project, key)
    session.console.note(f"the secret key is {key or signing.default_place()}: keep it safe, and out of the project")
    session.console.result(f"{public}  {signer.id}")


def _trust(session: Session, key: Path | None) -> Trust:
    """The keys that the project's releases trust, and the user's own."""
    from appliance import signing
    from appliance.errors import ApplianceError
    from appliance.node.keys import KeyFileError, Trust, load_trust

    folder = session.project / signing.TRUSTED
    try:
        known = load_trust(str(folder)) if folder.is_dir() else Trust({})
    except KeyFileError as error:
        raise ApplianceError(str(error), hint="correct the file, or take it from version control again") from error
    own = [signing.load(key)] if key else [
        signing.load(place) for place in (signing.default_place(), signing.personal_place()) if place.is_file()
    ]  # fmt: skip
    return Trust({**known.keys, **{signer.id: signer.public for signer in own}}, known.revoked)
