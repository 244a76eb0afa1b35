"""The software bill of materials: SPDX 2.3 as JSON, from the release's packages and wheels.

The same release gives the same bytes: names are numbers in a fixed order, times are the lock's epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from appliance.model import Model, Package, Release, Wheel

DISTRIBUTION = "debian"
_DOCUMENT = "SPDXRef-DOCUMENT"
_ROOT = "SPDXRef-appliance"


def make_sbom(release: Release, model: Model) -> bytes:
    """The SPDX document of a release, ending in a newline.

    Licences are not asserted: Debian's stand, in full, in the base layer under /usr/share/doc/<package>/copyright.
    """
    wheels = sorted({wheel for recipe in model.recipes for wheel in recipe.wheels}, key=lambda wheel: wheel.requirement)
    parts = [_of_package(package) for package in sorted(release.packages, key=lambda package: package.name)]
    parts += [_of_wheel(wheel) for wheel in wheels]
    name = f"samepage-appliance-{release.version}-{release.architecture}"
    made = datetime.fromtimestamp(release.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {
        "SPDXID": _DOCUMENT,
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "name": name,
        # a name that no other document has; nothing needs to be found there
        "documentNamespace": f"urn:samepage-appliance:{hashlib.sha256(release.manifest).hexdigest()}",
        "creationInfo": {"created": made, "creators": ["Tool: samepage-appliance"]},
        "packages": [_of_release(release, name), *parts],
        "relationships": [
            _relationship(_DOCUMENT, "DESCRIBES", _ROOT),
            *(_relationship(_ROOT, "CONTAINS", part["SPDXID"]) for part in parts),
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def _of_release(release: Release, name: str) -> dict[str, Any]:
    layers = [
        f"{layer.kind}{' of ' + layer.node if layer.node else ''} sha256:{layer.digest}" for layer in release.layers
    ]
    return _part(_ROOT, name, release.version, {}, comment="layers: " + ", ".join(layers))


def _of_package(package: Package) -> dict[str, Any]:
    purl = (
        f"pkg:deb/{DISTRIBUTION}/{quote(package.name, safe='')}@{quote(package.version, safe='')}"
        f"?arch={package.architecture}"
    )
    return _part(
        f"SPDXRef-deb-{_identifier(package.name)}", package.name, package.version, {"SHA256": package.sha256}, purl
    )


def _of_wheel(wheel: Wheel) -> dict[str, Any]:
    name, _, version = wheel.requirement.partition("==")
    purl = f"pkg:pypi/{quote(name, safe='')}@{quote(version, safe='')}"
    return _part(f"SPDXRef-wheel-{_identifier(name)}", name, version, {"SHA256": wheel.sha256}, purl)


def _part(
    identifier: str, name: str, version: str, checksums: Mapping[str, str], purl: str = "", comment: str = ""
) -> dict[str, Any]:
    part: dict[str, Any] = {
        "SPDXID": identifier,
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
    }
    if checksums:
        part["checksums"] = [{"algorithm": kind, "checksumValue": value} for kind, value in sorted(checksums.items())]
    if purl:
        reference = {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}
        part["externalRefs"] = [reference]
    if comment:
        part["comment"] = comment
    return part


def _relationship(one: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}


def _identifier(name: str) -> str:
    """SPDX identifiers hold letters, digits, dots and hyphens; others are written as their code point."""
    return "".join(letter if letter.isalnum() or letter in ".-" else f"-{ord(letter):x}-" for letter in name)
