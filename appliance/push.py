"""Pushes the working tree to a running node: makes the bundle from what runs there, sends it and has it applied.

It takes two round trips: what the node runs, asked while the release is built, and the bundle together with the command
that applies it. A node that starts anew meanwhile breaks the second one off; it is asked again when it is back.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from appliance import bundle as making
from appliance import pipeline, releases, signing
from appliance.bundle import ReleaseFiles
from appliance.console import Console
from appliance.node.bundle import Info, read_info
from appliance.node.keys import Signer, Trust
from appliance.node.release import Manifest, dump
from appliance.node.versions import order
from appliance.targets.base import Instance, NodeError, Target, read_release, tail

TOOL = "/opt/samepage/bin/samepage-upgrade-node"
NOTHING = 2  # exit status of the node's tool: it runs this release already
NO_TOOL = 127
BROKEN_OFF = (129, 137, 143, 255)  # ended by a signal as the node stopped, or the connection was lost
RESTARTING = "restarting"  # outcome that the tool tells before it starts the node anew; the next boot decides
DIED = "died"  # reason that it tells where its service was ended, perhaps by the restart
LOST = "connection-lost"  # reason given here where nothing else is known
ENDINGS = {"committed": 0, "failed": 1, "rolled-back": 5}  # statuses by the outcome of an entry of the history
PAUSE = 1.0  # seconds between two attempts to reach a node that starts anew

# Takes a bundle on standard input: the key's id and public line, the bundle's name, and more options for the tool.
INSTALL = f"""
umask 077
[ -x {TOOL} ] || exit {NO_TOOL}
key=/state/upgrade/keys/$1.pub line=$2 file=/state/upgrade/incoming/$3
shift 3
mkdir -p /state/upgrade/keys /state/upgrade/incoming || exit 1
[ -e "$key" ] || {{ printf '%s\\n' "$line" >"$key.new" && mv "$key.new" "$key"; }} || exit 1
cat >"$file.part" && mv "$file.part" "$file" || {{ rm -f "$file.part"; exit 1; }}
{TOOL} install "$file" --yes --json "$@"
status=$?
rm -f "$file"
exit $status
"""

# Waits on the node, at most so many seconds, until no upgrade is unfinished; tells what runs, and how the last ended.
AFTERWARDS = """
end=$(( $(cut -d. -f1 /proc/uptime) + $1 ))
while [ -e /state/upgrade/journal.json ]; do
  [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ] || exit 4
  sleep 1
done
sha256sum </run/samepage/release.json || exit 1
tail -n 1 /state/upgrade/history.jsonl 2>/dev/null
exit 0
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What to push, and where to. `apply` is a class of upgrade or auto; the node's part has `deadline` seconds."""

    options: pipeline.Options
    target: Target
    instance: Instance
    key: Path | None = None
    apply: str = "auto"
    allow_downgrade: bool = False
    dry_run: bool = False
    deadline: float = 900.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a push. `answer` is what the node's tool said, or stands for it where that was not asked."""

    node: str
    answer: Mapping[str, Any]
    bundle: int  # bytes; 0 where none was needed
    seconds: float  # from the command to the end
    plan: str = ""  # of a dry run: the bundle in words

    @property
    def status(self) -> int:
        return int(self.answer["status"])

    def text(self, key: str) -> str:
        """A text out of the answer; empty where it has none."""
        return str(self.answer.get(key) or "")

    def record(self) -> dict[str, Any]:
        """As plain values: the node's answer, and what is known here."""
        total = round(self.seconds, 3)
        return {**self.answer, "node": self.node, "bundle_bytes": self.bundle, "total_seconds": total}


def push(request: Request, console: Console) -> Outcome:
    """Build the tree, and have the node run it where it does not yet.

    Raises ApplianceError, NodeError among them; a node that refuses or goes back to what it had is an outcome.
    """
    started = time.monotonic()
    name = request.instance.name
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, request.target, request.instance)
        built = pipeline.build_release(request.options, console)
        running = asked.result()
    new = dev_release(making.files_of(built.release))
    dist = request.options.project / "dist"
    old = releases.held(running, new.files, dist, built.tools, built.store)
    if same(old.manifest, new.manifest):
        return Outcome(name, nothing(old.manifest.version), 0, time.monotonic() - started)
    tell_missing(old, new, console)
    signer = choose_signer(request, console)
    with tempfile.TemporaryDirectory(prefix="samepage-push-") as folder:
        with console.stage("bundle") as progress:
            path = Path(folder) / making.file_name(old, new)
            making.make(old, new, signer, path, progress=progress)
        info, content = read_info(str(path), Trust({signer.id: signer.public})), path.read_bytes()
    if request.dry_run:
        plan = making.describe(info, len(content))
        return Outcome(name, planned(info), len(content), time.monotonic() - started, plan)
    console.note(f"{info.version}: {info.summary['class']}, {len(content):,} bytes to send")
    words = [f"--apply={request.apply}"]
    if request.allow_downgrade or not goes_back(old.manifest, new.manifest):
        words.append("--allow-downgrade")  # versions of pushed releases have no order
    with console.stage(f"upgrade {name}"):
        answer = send(request, content, path.name, signer, words)
        if answer is None or answer.get("outcome") == RESTARTING or answer.get("reason") == DIED:
            ended = await_end(request, old, new)
            answer = answer if answer and ended["reason"] == LOST else ended
    answer = {"from": old.manifest.version, "to": new.manifest.version, **answer}  # a refusal may lack them
    return Outcome(name, answer, len(content), time.monotonic() - started)


def ask(target: Target, instance: Instance) -> bytes:
    """The manifest of what the node runs; tries again where a shared connection went stale. Raises NodeError."""
    try:
        return read_release(target, instance)
    except NodeError:
        target.hang_up(instance)
        return read_release(target, instance)


# --- the release and its bundle --------------------------------------------------------------------------------------


def dev_release(release: ReleaseFiles) -> ReleaseFiles:
    """The same release under a version that stands for its content: <version>+dev.<8 hex digits>.

    The version is given to a finished release, so that it can change no layer and make no step run again.
    """
    manifest = release.manifest
    content = [[layer.kind, layer.node, layer.digest] for layer in manifest.layers]
    content.append(["kernel", manifest.kernel.id, manifest.kernel.cmdline])
    digest = sha256(json.dumps(content).encode()).hexdigest()
    named = manifest._replace(version=f"{manifest.version}+dev.{digest[:8]}")
    return ReleaseFiles(dump(named), named, release.files)


def same(running: Manifest, new: Manifest) -> bool:
    """Whether a node would run the very same files, whatever the versions are called."""
    return (running.layout, running.layers, running.kernel) == (new.layout, new.layers, new.kernel)


def goes_back(running: Manifest, new: Manifest) -> bool:
    """Whether the tree is of an older version than what runs; what was pushed of the same version is not older."""
    before, after = (order(one.version.partition("+")[0]) for one in (running, new))
    return after < before


def tell_missing(old: ReleaseFiles, new: ReleaseFiles, console: Console) -> None:
    """Say what will be sent whole because neither the cache nor an ISO has the file it could be made from."""
    wanted = {layer.digest for layer in old.manifest.layers} - {layer.digest for layer in new.manifest.layers}
    missing = [layer for layer in old.manifest.layers if layer.digest in wanted and layer.digest not in old.files]
    kinds = ", ".join(sorted({layer.kind for layer in missing}))
    if kinds:
        console.note(f"release {old.manifest.version} is not here any more, so these layers are sent whole: {kinds}")


def choose_signer(request: Request, console: Console) -> Signer:
    """The key to sign with; a dry run makes none that would stay."""
    if request.key:
        return signing.load(request.key)
    if request.dry_run:
        return signing.find() or Signer(secrets.token_bytes(32))
    return signing.ensure(console.note)


def nothing(version: str) -> dict[str, Any]:
    """What stands for the node's answer where it runs the tree already."""
    return {
        "status": NOTHING, "outcome": "nothing", "class": "nothing", "from": version, "to": version, "units": {},
    }  # fmt: skip


def planned(info: Info) -> dict[str, Any]:
    """What a dry run says in place of the node's answer."""
    return {
        "status": 0, "outcome": "planned", "class": info.summary["class"], "from": info.from_version,
        "to": info.version, "units": {
            name: action
            for units in info.summary.get("units", {}).values() for name, action in units.items() if action != "none"
        },
    }  # fmt: skip


# --- the node --------------------------------------------------------------------------------------------------------


def send(request: Request, content: bytes, name: str, signer: Signer, words: Sequence[str]) -> Mapping[str, Any] | None:
    """Send the bundle and wait for the answer of the node's tool; None where the connection broke off.

    Raises NodeError where the tool could not be run or gave no answer.
    """
    line = signing.public_line(signer).decode().strip()
    command = ["sh", "-c", INSTALL, "push", signer.id, line, name, *words]
    done = request.target.execute(request.instance, command, input=content, timeout=request.deadline)
    answer = read_answer(done.stdout)
    if answer is not None or done.returncode in BROKEN_OFF:
        return answer
    node = request.instance.name
    if done.returncode == NO_TOOL:
        raise NodeError(
            f"the release on {node!r} has no {TOOL}", hint="start the node anew: ./build.py down, then ./build.py up"
        )
    said = (done.stdout + done.stderr).decode(errors="replace").strip()
    lines = "".join(f"\n  | {line}" for line in said.splitlines()[-20:])
    raise NodeError(f"{node!r} did not upgrade, status {done.returncode}{lines}", hint=STATUS_HINT)


STATUS_HINT = f"look at it with: ./build.py ssh {TOOL} status"


def read_answer(output: bytes) -> Mapping[str, Any] | None:
    """The tool's JSON object: the whole output, or its last line."""
    text = output.decode(errors="replace").strip()
    for part in (text, text.rpartition("\n")[2]):
        try:
            value = json.loads(part)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("status"), int):
            return value
    return None


def await_end(request: Request, old: ReleaseFiles, new: ReleaseFiles) -> Mapping[str, Any]:
    """Wait until the node is back and its upgrade has ended; how it ended. Raises NodeError after the deadline."""
    target, instance = request.target, request.instance
    end = time.monotonic() + request.deadline
    while (left := end - time.monotonic()) > 0:
        if target.state(instance) != "running":
            raise NodeError(
                f"the node {instance.name!r} ended in its upgrade\n{tail(instance.console_log)}", hint=STATUS_HINT
            )
        target.hang_up(instance)
        if target.reachable(instance):
            share = max(1, min(20, int(left)))
            done = target.execute(instance, ["sh", "-c", AFTERWARDS, "afterwards", str(share)], timeout=share + 60)
            if done.returncode == 0:
                digest, _, rest = done.stdout.partition(b"\n")
                return judge(digest[:64].decode("ascii", "replace"), rest, old, new)
        time.sleep(PAUSE)
    raise NodeError(f"the upgrade of {instance.name!r} did not end within {request.deadline:.0f} s", hint=STATUS_HINT)


def judge(digest: str, last: bytes, old: ReleaseFiles, new: ReleaseFiles) -> Mapping[str, Any]:
    """The answer, by the digest of the manifest that the node runs now and the last line of its history."""
    answer: dict[str, Any] = {"from": old.manifest.version, "to": new.manifest.version, "reason": "", "message": ""}
    try:
        entry = json.loads(last)
    except ValueError:
        entry = None
    known = isinstance(entry, dict) and entry.get("digest") == new.digest
    outcome = str(entry["outcome"]) if known and entry.get("outcome") in ENDINGS else ""
    if (digest == new.digest) == (outcome == "committed") and outcome:
        facts = {name: entry[name] for name in ("from", "to", "class", "seconds", "units") if name in entry}
        texts = {"reason": str(entry.get("state") or ""), "message": str(entry.get("reason") or "")}
        return {**answer, **facts, **texts, "outcome": outcome, "status": ENDINGS[outcome]}
    if digest == new.digest:
        return {**answer, "outcome": "committed", "status": 0}
    message = "the connection broke, and the node runs what it ran before"
    return {**answer, "outcome": "failed", "status": 1, "reason": LOST, "message": message}
