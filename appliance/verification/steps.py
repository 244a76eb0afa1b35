"""Records the steps that lead to a running node, for the report of its verification."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def record_step(file: Path, name: str) -> Iterator[None]:
    """Append {name, start, finish, seconds, ok, detail} to the JSON list in `file`; not ok when the body raises.

    Times are seconds since the epoch. The file is replaced as a whole.
    """
    start, ok, detail = time.time(), False, ""
    try:
        yield
        ok = True
    except Exception as error:
        detail = str(error)
        raise
    finally:
        finish = time.time()
        steps = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        entry = {"name": name, "start": start, "finish": finish, "seconds": finish - start, "ok": ok, "detail": detail}
        temporary = file.with_name(file.name + ".new")
        temporary.write_text(json.dumps([*steps, entry], indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
