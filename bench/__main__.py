"""`python -m bench`: runs the benchmarks, prints the table and writes dist/bench.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from appliance.console import Console
from appliance.errors import ApplianceError
from bench import boots, builds, bundle, upgrades
from bench.measure import BenchError
from bench.report import Report, table
from bench.workshop import Workshop, machine, open_workshop

BENCHMARKS: dict[str, Callable[[Workshop], None]] = {
    "cold": builds.cold, "change": builds.change, "write": builds.write, "size": builds.size,
    "mkosi": builds.beside_mkosi, "live": boots.live, "installed": boots.installed,
    "bundle": bundle.bundle, "upgrades": upgrades.upgrades,
}  # fmt: skip


@click.command(epilog="\b\nExample:\n  .venv/bin/python -m bench cold change --rounds 5")
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--rounds", default=3, show_default=True, help="Runs of each side of a comparison; medians are shown.")
@click.option("--iso", type=click.Path(exists=True, path_type=Path), help="Boot this ISO instead of building one.")
@click.option("--mirror", default="", help="Debian archive to use; the host's by default.")
@click.option(
    "--lock",
    "locks",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="An older packages.lock that `bundle` may start from, if its packages are still to be had.",
)
@click.option("--output", default="dist/bench.json", show_default=True, type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...], rounds: int, iso: Path | None, mirror: str, locks: tuple[Path, ...], output: Path
) -> None:
    """Measure the builder and the appliance beside plain mmdebstrap, mkosi, an untuned Debian VM and other updaters.

    NAMES are cold, change, write, size, mkosi, live, installed, bundle and upgrades; all when none is given. Needs
    root for the peers. A missed goal is shown, not an error; the exit status is 1 only when a benchmark could not run.
    """
    console = Console()
    failures: dict[str, str] = {}
    facts = machine()
    root = Path(__file__).parent.parent.resolve()
    with open_workshop(root, rounds, iso and iso.resolve(), mirror, locks, console.note) as shop:
        for name in names or BENCHMARKS:
            try:
                with console.stage(f"bench {name}"):
                    BENCHMARKS[name](shop)
            except (ApplianceError, BenchError) as error:
                failures[name] = str(error)
                console.warn(f"{name}: {error}")
        report = Report(facts, tuple(shop.figures), failures)
    console.result(table(report.figures))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report.to_json())
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
