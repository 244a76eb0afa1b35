"""A build on what looks like another host, for test_reproducible: prints a digest of everything it made, as JSON.

Usage: rebuild.py PROJECT CACHE DIST
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.pipeline import Output


def digests(output: Output) -> dict[str, str]:
    """What two builds are compared by."""
    release = output.built.release
    found = {"kernel": release.kernel.vmlinuz_digest, "initrd": release.kernel.initrd_digest}
    for layer in release.layers:
        found[" ".join(filter(None, [layer.kind, layer.node]))] = layer.digest
        found[" ".join(filter(None, [layer.kind, layer.node, "packed"]))] = layer.packed_digest
    with output.built.tree.tar.open("rb") as tar:
        found["tree"] = hashlib.file_digest(tar, "sha256").hexdigest()
    return {**found, "release": hashlib.sha256(release.manifest).hexdigest(), "iso": output.artifact.sha256}


def main() -> None:
    project, cache, dist = map(Path, sys.argv[1:4])
    sys.path.insert(0, str(project))
    from appliance.console import Console
    from appliance.pipeline import Options, build_iso

    output = build_iso(Options(project, output=dist, cache=cache, locked=True), Console("none"))
    print(json.dumps(digests(output)))


if __name__ == "__main__":
    main()
