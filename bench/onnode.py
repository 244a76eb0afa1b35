"""What a node does with a bundle, as a program of its own, so that its CPU time and memory can be measured.

    python -m bench.onnode stage ROOT BUNDLE NODE PUBLIC-KEY    make the new release's files, as the node's tool does
    python -m bench.onnode copy OUT FILE...                     write the same files out in full, and hash them

It imports what the node's tool imports, and nothing else of the bench.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import IO

from appliance.node.bundle import open_bundle
from appliance.node.keys import Trust, key_id
from appliance.node.upgrade import records, staging

_PIECE = 1 << 18  # as the tool does


def stage(root: str, bundle: str, node: str, key: str) -> None:
    public = bytes.fromhex(key)
    held = records.held_releases(root)
    with open_bundle(bundle, Trust({key_id(public): public})) as opened:
        staging.stage(root, opened, node, held, lambda _done, _total: None)


def copy(out: str, *files: str) -> None:
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb") as source, open(out, "wb") as target:  # noqa: PTH123 - as the node does
            _copy(source, target, digest.update)
        digest.hexdigest()


def _copy(source: IO[bytes], target: IO[bytes], seen: Callable[[bytes], None]) -> None:
    while piece := source.read(_PIECE):
        seen(piece)
        target.write(piece)


def leave(root: str) -> None:
    """In the place of a commit: the folder is on no file system of a node."""


def main() -> None:
    records.commit = leave
    what, *words = sys.argv[1:]
    if what == "stage":
        stage(*words)
    else:
        copy(*words)


if __name__ == "__main__":
    main()
