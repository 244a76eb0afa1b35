"""The builder beside plain mmdebstrap and mkosi, and beside itself when little or nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench import mkosi
from bench.debian import mmdebstrap
from bench.measure import Cost, measure, scratch
from bench.report import Figure, median, of_runs, paired_ratio
from bench.workshop import Workshop

ADDED = ("less", "jq", "tree", "rsync", "file")  # small packages that the appliance has no use for
AGAIN = 5  # runs of what takes about a second


def walls(costs: Sequence[Cost]) -> list[float]:
    return [cost.wall for cost in costs]


def cpus(costs: Sequence[Cost]) -> list[float]:
    return [cost.cpu for cost in costs]


def cold(shop: Workshop) -> None:
    """Empty caches: the ISO beside plain mmdebstrap of the same packages to a directory, in turns."""
    ours: list[Cost] = []
    plain: list[Cost] = []
    shop.builder.restore(shop.root)
    for _ in range(shop.rounds):
        shop.builder.forget()
        ours.append(shop.builder.iso().cost)
        with scratch(shop.cache, "plain") as folder:
            plain.append(mmdebstrap(shop.packages, folder / "tree", shop.mirrors, folder / "log"))
    shop.cold += ours
    shop.add(
        of_runs("cold", "ISO", walls(ours), "s"),
        of_runs("cold", "ISO, CPU", cpus(ours), "CPU s"),
        of_runs("cold", "mmdebstrap", walls(plain), "s"),
        of_runs("cold", "mmdebstrap, CPU", cpus(plain), "CPU s"),
        Figure("cold", "ISO to mmdebstrap", paired_ratio(walls(ours), walls(plain)), "x", 1.25),
    )


def change(shop: Workshop) -> None:
    """A filled cache: nothing changed, one template changed, one package added."""
    builder = shop.warm_builder()
    reference = median(walls(shop.cold))
    nothing = [builder.iso().cost for _ in range(AGAIN)]
    shop.add(
        of_runs("change", "nothing", walls(nothing), "s", 1.0),
        of_runs("change", "nothing, CPU", cpus(nothing), "CPU s"),
    )
    template = []
    for number in range(AGAIN):
        builder.change_template(f"change {number}")
        template.append(builder.iso().cost)
    shop.add(
        of_runs("change", "one template", walls(template), "s", 3.0),
        of_runs("change", "one template, CPU", cpus(template), "CPU s"),
        Figure("change", "one template to cold", median(walls(template)) / reference, "x", 0.05),
    )
    package = []
    for name in [name for name in ADDED if name not in shop.packages][: min(shop.rounds, 2)]:
        builder.add_package(name)
        package.append(builder.iso().cost)
    shop.add(
        of_runs("change", "one package", walls(package), "s"),
        of_runs("change", "one package, CPU", cpus(package), "CPU s"),
        Figure("change", "one package to cold", median(walls(package)) / reference, "x", 0.5),
    )


def beside_mkosi(shop: Workshop) -> None:
    """mkosi's disk image of the same packages: cold, nothing changed, one changed file. One run of each."""
    tree = mkosi.tools_tree(shop.cache, shop.mirrors)
    with scratch(shop.cache, "mkosi-run") as work:
        peer = mkosi.prepare(shop.packages, work / "image", tree, shop.mirrors)

        def run(what: str, before: Callable[[], None]) -> None:
            before()
            cost = peer.build(work / "log")
            shop.add(Figure("mkosi", what, cost.wall, "s"))
            shop.add(Figure("mkosi", f"{what}, CPU", cost.cpu, "CPU s"))

        run("cold", lambda: None)
        run("nothing", lambda: None)
        run("one file", lambda: peer.change_file("second\n"))
        size = peer.output_size()
    shop.add(Figure("mkosi", "image, not bootable", size / 1e6, "MB"))
    shop.add(Figure("mkosi", "our ISO", shop.iso.stat().st_size / 1e6, "MB"))


def size(shop: Workshop) -> None:
    """The ISO as built by default and with `--release`."""
    shop.add(Figure("size", "ISO", shop.iso.stat().st_size / 1e6, "MB", 300.0))
    strong = shop.warm_builder().iso("--release")
    shop.add(Figure("size", "ISO --release", strong.iso.stat().st_size / 1e6, "MB"))
    shop.add(Figure("size", "packing strongly", strong.cost.wall, "s"))


def write(shop: Workshop) -> None:
    """Writing and reopening the ISO beside the floor: copying and hashing as many bytes."""
    iso, builder = shop.warm().iso, shop.builder
    ours: list[float] = []
    floor: list[float] = []
    for number in range(AGAIN):
        builder.change_template(f"rewrite {number}")
        ours.append(builder.iso().stage_seconds("iso"))
        with scratch(shop.cache, "floor") as folder:
            script = 'cp --reflink=never "$1" "$2" && sha256sum "$2"'
            floor.append(measure(["sh", "-c", script, "floor", iso, folder / "copy"], log=folder / "log").wall)
    shop.add(
        of_runs("write", "ISO written and verified", ours, "s"),
        of_runs("write", "cp and sha256sum", floor, "s"),
        Figure("write", "ISO to floor", paired_ratio(ours, floor), "x"),
    )
