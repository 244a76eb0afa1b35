"""A project that changes at random, release by release, for the tests of long chains of upgrades."""

from __future__ import annotations

import random
from pathlib import Path


class Evolving:
    """A copy of the project whose generated files come, change, swap and go with every step, in each run the same."""

    def __init__(self, project: Path) -> None:
        self.project, self.chance = project, random.Random(52)
        files = project / "recipes/samepage/files"
        self.folders = [files / "etc/generated", files / "opt/samepage/share/generated"]
        self.code = files / "opt/samepage/lib/generated"
        for folder in (*self.folders, self.code):
            folder.mkdir(parents=True)

    def step(self) -> None:
        chance = self.chance
        for folder in self.folders:
            there = sorted(folder.rglob("*.txt"))
            for file in chance.sample(there, min(len(there), 3)):
                content = file.read_bytes()
                at = chance.randrange(len(content) + 1)
                file.write_bytes(content[:at] + self.text(chance.randrange(200)) + content[at + chance.randrange(90) :])
            if len(there) > 4 and chance.random() < 0.4:
                one, other = chance.sample(there, 2)
                one.rename(folder / "swap")
                other.rename(one)
                (folder / "swap").rename(other)
            if len(there) > 12:
                chance.choice(there).unlink()
            new = folder / f"{chance.randrange(40):02}" / f"{chance.randrange(1000):03}.txt"
            new.parent.mkdir(exist_ok=True)
            new.write_bytes(self.text(chance.randrange(9000)))
        module = self.code / f"module_{chance.randrange(5)}.py"
        lines = "".join(f"VALUE_{chance.randrange(50)} = {chance.randrange(10**9)}\n" for _ in range(30))
        module.write_text(f'"""Generated."""\n\n{lines}')

    def text(self, size: int) -> bytes:
        words = [b"listen", b"80", b"443", b"server", b"upstream", b"{", b"}", b"\n"]
        return b" ".join(self.chance.choices(words, k=size // 5 + 1))[:size]
