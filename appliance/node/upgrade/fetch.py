"""Downloads: bundles and the channel's index. Part of the node's own code.

`fetch` writes <target>.partial, and beside it <target>.partial.json: the address, and the validator (ETag or
Last-Modified) that says of which file the partial holds the beginning. A download that breaks off goes on from there,
in the same run or in a later one, as long as the server has that file; otherwise it begins anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from appliance.node.channel import INDEX_LIMIT, INDEX_NAME, check_index, parse_index, read_seen, write_seen
from appliance.node.refusals import Damaged
from appliance.node.upgrade.web import Answer, Broken, ask, inside, shown, usable
from appliance.node.upgrade.web import FetchError as FetchError

if TYPE_CHECKING:
    from appliance.node.channel import BundleEntry, Index
    from appliance.node.keys import Trust

PARTIAL = ".partial"
NOTE = ".json"  # after PARTIAL
LIMIT = 16 << 30  # bytes of a file whose size nobody told
ATTEMPTS = 6  # in a row that bring less than STRIDE
STRIDE = 1 << 20
TIMEOUT = 30.0  # seconds without a byte, or with fewer than SLOWEST a second
SLOWEST = 100
PAUSE = 1.0  # seconds before the second attempt; each later one waits twice as long as the one before it
LONGEST_PAUSE = 30.0
_BLOCK = 1 << 18
_BETWEEN = 0.2  # seconds between two calls of `progress`

Progress = Callable[[int, int], None]  # bytes done, bytes in all or 0
T = TypeVar("T")


class TooLarge(FetchError):
    """The file has more bytes than were allowed."""

    reason = "too-large"


# --- what others call ------------------------------------------------------------------------------------------------


def fetch(
    url: str, target: str, *, size: int | None = None, sha256: str | None = None, progress: Progress | None = None,
    attempts: int = ATTEMPTS, limit: int = LIMIT, timeout: float = TIMEOUT, pause: float = PAUSE,
) -> str:  # fmt: skip
    """Fetch a file of at most `limit` bytes to `target`; returns its sha256. A target that is it already stays.

    Raises Damaged where the content is not what `sha256` says, FetchError for everything else.
    """
    if size is not None and size > limit:
        raise TooLarge(f"{shown(url)} has {size} bytes, more than the {limit} that are allowed")
    if sha256 is not None and _digest(target) == sha256:
        return sha256
    with _Partial(url, target, limit if size is None else size) as partial:

        def attempt() -> None:
            if size is None or partial.have != size:
                _continue(url, partial, size, limit, progress, timeout)

        _persist(attempt, lambda: partial.have, attempts, pause)
        if partial.pieced and sha256 not in (None, partial.digest):
            partial.restart("")  # a power cut may have torn it, or the file changed unnoticed between two of its pieces
            _persist(attempt, lambda: partial.have, attempts, pause)
        if sha256 not in (None, partial.digest):
            partial.remove()
            raise Damaged(f"{shown(url)} has the sha256 {partial.digest}, but {sha256} was promised")
        partial.finish(target)
        return partial.digest


def read(url: str, limit: int, *, attempts: int = ATTEMPTS, timeout: float = TIMEOUT, pause: float = PAUSE) -> bytes:
    """The content of a small file. Raises FetchError, also where it has more than `limit` bytes."""

    def attempt() -> bytes:
        answer = _ask_for_all(url, timeout)
        try:
            return b"".join(_blocks(url, answer, limit, timeout))
        finally:
            answer.close()

    return _persist(attempt, lambda: 0, attempts, pause)


def fetch_index(
    url: str, trust: Trust, seen_file: str, layout: str, architecture: str, now: float, *,
    attempts: int = ATTEMPTS, timeout: float = TIMEOUT, pause: float = PAUSE,
) -> Index:  # fmt: skip
    """The index of the channel in the folder `url`, checked for this node and hour. Raises a Refusal or FetchError."""
    content = read(inside(url, INDEX_NAME), INDEX_LIMIT, attempts=attempts, timeout=timeout, pause=pause)
    index = parse_index(content, trust)
    parse_index(content, trust.revoking(index.revoked))  # a key that is revoked by what it signed itself counts no more
    check_index(index, now, read_seen(seen_file), layout, architecture)
    return index


def remember(seen_file: str, index: Index) -> None:
    """Refuse indexes older than this one from now on."""
    if index.counter > read_seen(seen_file):
        write_seen(seen_file, index.counter)


def bundle_url(channel: str, entry: BundleEntry) -> str:
    """The address of a bundle of the channel in the folder `channel`."""
    return inside(channel, entry.file)


# --- attempts --------------------------------------------------------------------------------------------------------


def _persist(attempt: Callable[[], T], reached: Callable[[], int], attempts: int, pause: float) -> T:
    """What the first attempt that does not break returns. Raises FetchError once `attempts` in a row led nowhere."""
    tries, best = 0, reached()
    while True:
        try:
            return attempt()
        except Broken as error:
            tries += 1
            if reached() >= best + STRIDE:
                tries, best = 0, reached()
            if tries >= attempts:
                hint = "look at the network and the server; what came so far is kept, so run it again"
                raise FetchError(str(error), hint=hint) from error
            time.sleep(min(pause * 2 ** max(0, tries - 1), LONGEST_PAUSE))


def _continue(
    url: str, partial: _Partial, size: int | None, limit: int, progress: Progress | None, timeout: float
) -> None:
    """Fetch what the partial lacks, or all of it where the server has another file now. Raises Broken, FetchError."""
    answer = ask(url, partial.have if partial.validator else 0, partial.validator, timeout)
    if answer is not None and answer.start:
        same = answer.validator in ("", partial.validator)  # servers need not repeat a time that was asked for
        if answer.start != partial.have or not same:
            answer.close()
            answer = None
    if answer is None:
        answer = _ask_for_all(url, timeout)
    try:
        if size is not None and answer.total not in (None, size):
            raise FetchError(
                f"{shown(url)} has {answer.total} bytes, but {size} were promised",
                hint="the server has another file under this name; look at it there",
            )
        if answer.start:
            partial.pieced = True
        else:
            partial.restart(answer.validator)
        total = size or answer.total or 0
        last = time.monotonic()
        for block in _blocks(url, answer, limit if size is None else size, timeout):
            partial.append(block)
            if progress is not None and time.monotonic() - last >= _BETWEEN:
                last = time.monotonic()
                progress(partial.have, total)
    finally:
        answer.close()
    if size is not None and partial.have != size:
        raise Broken(f"{shown(url)} ends after {partial.have} of {size} bytes")
    if progress is not None:
        progress(partial.have, total)


def _ask_for_all(url: str, timeout: float) -> Answer:
    answer = ask(url, 0, "", timeout)
    if answer is None or answer.start:
        if answer is not None:
            answer.close()
        raise Broken(f"{shown(url)}: the server answers what was not asked")
    return answer


def _blocks(url: str, answer: Answer, most: int, timeout: float) -> Iterator[bytes]:
    """The bytes of an answer. Raises FetchError where the file has more than `most`, Broken where it ends early."""
    too_much = TooLarge(f"{shown(url)} has more than the {most} bytes that it may have")
    if answer.total is not None and answer.total > most:
        raise too_much
    have = before = answer.start
    since = time.monotonic()
    while answer.total is None or have < answer.total:
        block = answer.read(_BLOCK)
        if not block:
            if answer.total is None:
                return
            raise Broken(f"{shown(url)} breaks off after {have} of {answer.total} bytes")
        have += len(block)
        if have > most:
            raise too_much
        yield block
        seconds = time.monotonic() - since
        if seconds >= timeout:
            if have - before < SLOWEST * seconds:
                raise Broken(f"{shown(url)} all but stands still: {have - before} bytes in {seconds:.0f} seconds")
            before, since = have, time.monotonic()


# --- the partial file ------------------------------------------------------------------------------------------------


class _Partial:
    """The beginning of a file. `have` bytes of it are there; `pieced` says whether they came in several answers."""

    def __init__(self, url: str, target: str, most: int) -> None:
        self.have = 0
        self.validator = ""
        self.pieced = False
        self._url = url
        self._path, self._note = target + PARTIAL, target + PARTIAL + NOTE
        self._hash = hashlib.sha256()
        self._file = -1
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._resume(most)
        except OSError as error:
            self._close()
            raise self._failure(error) from error

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def append(self, block: bytes) -> None:
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise self._failure(error) from error
        self._hash.update(block)
        self.have += len(block)

    def restart(self, validator: str) -> None:
        """Begin anew, with the file that has this validator; an empty one means that it cannot go on after a break."""
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            with open(self._note, "w", encoding="utf-8") as note:
                json.dump({"url": self._url, "validator": validator}, note)
        except OSError as error:
            raise self._failure(error) from error
        self.have, self.validator, self.pieced = 0, validator, False
        self._hash = hashlib.sha256()

    def remove(self) -> None:
        for path in (self._note, self._path):
            os.unlink(path)

    def finish(self, target: str) -> None:
        try:
            os.rename(self._path, target)
            os.unlink(self._note)
        except OSError as error:
            raise self._failure(error) from error

    def _resume(self, most: int) -> None:
        """Take up what an earlier run left, if it is of this address and can go on."""
        try:
            with open(self._note, encoding="utf-8") as note:
                value = json.loads(note.read(1 << 16))
            validator = usable(value["validator"]) if value["url"] == self._url else ""
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            validator = ""
        if not validator or os.fstat(self._file).st_size > most:
            self.restart("")
            return
        while block := os.read(self._file, _BLOCK):
            self._hash.update(block)
            self.have += len(block)
        self.validator, self.pieced = validator, self.have > 0

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _failure(self, error: OSError) -> FetchError:
        hint = "make room, e.g. with samepage-upgrade-node cleanup" if error.errno == errno.ENOSPC else ""
        return FetchError(f"{self._path} cannot be written: {error.strerror}", hint=hint)


def _digest(path: str) -> str:
    """The sha256 of a file, empty where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
