"""Compiles the Python modules below a folder; a program of its own, for the Python that will run them.

usage: bytecode.py FOLDER SHOWN, where SHOWN is the folder's path on the node, as it will stand in tracebacks

A module's file is that of PEP 552, valid by a hash that is never compared: a layer does not change beneath Python, and
its clock says nothing. The code object is written in version 2 of the marshal format, without references to objects
written before: in later versions one new constant renumbers all references behind it, and whether there is a reference
at all hangs on the interpreter's reference counts.
"""

from __future__ import annotations

import importlib.util
import marshal
import sys
from pathlib import Path

UNCHECKED_HASH = (0b01).to_bytes(4, "little")
WITHOUT_REFERENCES = 2  # https://docs.python.org/3/library/marshal.html: version 3 brought them


def compiled(source: bytes, shown: str) -> bytes:
    """The compiled file of a module. Raises SyntaxError, and ValueError for a null byte."""
    code = compile(source, shown, "exec", dont_inherit=True, optimize=0)
    head = importlib.util.MAGIC_NUMBER + UNCHECKED_HASH + importlib.util.source_hash(source)
    return head + marshal.dumps(code, WITHOUT_REFERENCES)


def main(folder: str, shown: str) -> int:
    """Writes a file for each module; says which do not compile, and is 1 then."""
    status = 0
    for module in sorted(Path(folder).rglob("*.py")):
        path = str(shown / module.relative_to(folder))
        try:
            content = compiled(module.read_bytes(), path)
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            print(f"{path}{line}: {getattr(error, 'msg', error)}", file=sys.stderr)
            status = 1
            continue
        target = Path(importlib.util.cache_from_source(module, optimization=""))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
