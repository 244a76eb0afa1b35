"""Makes a release: the manifest that names one digest per layer and kernel file."""

from __future__ import annotations

from collections.abc import Iterable

from appliance.errors import ApplianceError
from appliance.model import ARCHITECTURE, Kernel, Layer, Lock, Model, Package, Release
from appliance.node.release import File, KernelRecord, LayerRecord, Manifest, PackageRecord, ReleaseError, dump, parse

# Both consoles; the last one is /dev/console. Rate limits would hide what a failing boot says. Huge pages do a small
# node no good: the kernel sets 100 MB aside for making them, and Valkey's forks suffer from them. Security modules:
# those that work without a policy, as no other has one here; for BPF's the service manager loads a program each time.
CMDLINE = (
    "console=tty0 console=ttyS0,115200 quiet loglevel=3 panic=30 transparent_hugepage=never lsm=landlock,lockdown,yama"
)


def make(model: Model, lock: Lock, layers: Iterable[Layer], kernel: Kernel, packages: Iterable[Package]) -> Release:
    """The release of a layout: its layers in the order base, app, config (by node), and its manifest.

    Raises ApplianceError where the version or the command line cannot stand in a manifest.
    """
    order = {"base": 0, "app": 1, "config": 2}
    ordered = tuple(sorted(layers, key=lambda layer: (order[layer.kind], layer.node)))
    installed = tuple(sorted(packages, key=lambda item: (item.name, item.architecture)))
    level = max((recipe.schema_level for recipe in model.recipes), default=0)
    manifest = Manifest(
        version=model.version,
        layout=model.name,
        architecture=ARCHITECTURE,
        epoch=lock.epoch,
        schema_level=level,
        layers=tuple(LayerRecord(item.kind, item.node, item.digest, item.size) for item in ordered),
        kernel=KernelRecord(
            kernel.id, kernel.version, kernel.cmdline,
            File(kernel.vmlinuz_digest, kernel.vmlinuz.stat().st_size),
            File(kernel.initrd_digest, kernel.initrd.stat().st_size),
        ),
        packages=tuple(PackageRecord(item.name, item.version, item.architecture) for item in installed),
    )  # fmt: skip
    content = dump(manifest)
    try:
        parse(content)
    except ReleaseError as error:
        hint = "correct the version or the layout"
        raise ApplianceError(f"no release can be made of this: {error}", hint=hint) from error
    return Release(
        version=model.version, layout=model.name, architecture=ARCHITECTURE, epoch=lock.epoch, schema_level=level,
        layers=ordered, kernel=kernel, packages=installed, manifest=content,
    )  # fmt: skip
