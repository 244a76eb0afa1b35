"""Records the steps that lead to a running node (install, boot), for the report of its verification."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STEPS_FILE = "steps.json"  # in the node's folder


@contextmanager
def record_step(file: Path, name: str, since: float | None = None) -> Iterator[None]:
    """Append {name, start, finish, seconds, ok, detail} to the JSON list in `file`; not ok when the body raises.

    Times are seconds since the epoch. `since` is when the step began, now by default; what was recorded before it had
    ended by then. The file is replaced as a whole; nothing is recorded once its folder is gone.
    """
    start, ok, detail = since if since is not None else time.time(), False, ""
    try:
        yield
        ok = True
    except Exception as error:
        detail = str(error)
        raise
    finally:
        if file.parent.is_dir():
            steps = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            start, finish = max([start, *(step["finish"] for step in steps)]), time.time()
            times = {"start": start, "finish": finish, "seconds": finish - start}
            entry = {"name": name, **times, "ok": ok, "detail": detail}
            temporary = file.with_name(file.name + ".new")
            temporary.write_text(json.dumps([*steps, entry], indent=1) + "\n", encoding="utf-8")
            temporary.replace(file)
