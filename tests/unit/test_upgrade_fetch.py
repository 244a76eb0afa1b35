"""Downloads of the node: broken off, resumed, changed in between, endless; and the channel's index."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from appliance.node import refusals
from appliance.node.channel import INDEX_LIMIT, BundleEntry, Index, ReleaseEntry, dump_index, read_seen
from appliance.node.upgrade import fetch as module
from appliance.node.upgrade.fetch import FetchError, bundle_url, fetch, fetch_index, remember
from tests.unit.downloads import broken, get, left, whole
from tests.unit.releases import OTHER, SIGNER, TRUST
from tests.webserver import CONTENT, SHA256, SIZE, Site, serving

pytestmark = pytest.mark.usefixtures("no_proxies")


# --- downloads -------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_and_told_how_far(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BETWEEN", 0)
    seen: list[tuple[int, int]] = []
    assert get(site, target, progress=lambda done, total: seen.append((done, total))) == SHA256
    assert whole(target)
    assert seen == sorted(seen)
    assert seen[-1] == (SIZE, SIZE)
    assert len(seen) > 5


def test_a_file_that_is_there_is_not_fetched_again(site: Site, target: Path) -> None:
    target.write_bytes(CONTENT)
    assert get(site, target) == SHA256
    assert site.asked == []
    target.write_bytes(b"something else")
    get(site, target)
    assert whole(target)


@pytest.mark.parametrize("chunked", [False, True])
def test_nothing_need_be_known_of_a_file(site: Site, target: Path, chunked: bool) -> None:
    site.chunked, site.etag, site.length = chunked, "", False
    assert get(site, target, size=None, sha256=None) == SHA256
    assert whole(target)


@pytest.mark.parametrize("content", [b"", b"x"])
def test_the_smallest_files(site: Site, target: Path, content: bytes) -> None:
    site.content = content
    digest = hashlib.sha256(content).hexdigest()
    assert get(site, target, size=len(content), sha256=digest) == digest
    assert target.read_bytes() == content
    assert left(target) == {""}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cuts", [[0], [1], [SIZE - 1], [1_000_000, 7, 0, 1_500_000], [262_144, 262_144]])
def test_a_download_goes_on_after_each_break(site: Site, target: Path, cuts: list[int], chunked: bool) -> None:
    site.cuts, site.chunked = list(cuts), chunked
    get(site, target)
    assert whole(target)
    done, expected = 0, [("/a.bundle", "", "")]
    for cut in cuts:
        done += cut
        expected.append(("/a.bundle", f"bytes={done}-", '"one"') if done else ("/a.bundle", "", ""))
    assert site.asked == expected


def test_the_time_of_the_last_change_serves_where_there_is_no_strong_etag(site: Site, target: Path) -> None:
    site.etag, site.modified, site.cuts = 'W/"one"', "Sat, 31 Jan 2026 12:00:00 GMT", [1000]
    get(site, target)
    assert whole(target)
    assert site.asked[1][1:] == ("bytes=1000-", site.modified)


@pytest.mark.parametrize("etag", ["", 'W/"one"', '"\xe9"'])
def test_without_a_validator_it_begins_anew(site: Site, target: Path, etag: str) -> None:
    site.etag, site.cuts = etag, [1000]
    get(site, target)
    assert whole(target)
    assert site.asked == [("/a.bundle", "", "")] * 2


def test_a_server_without_ranges_sends_it_all_again(site: Site, target: Path) -> None:
    site.ranges, site.cuts = False, [1000, 2_000_000]
    get(site, target)
    assert whole(target)
    assert len(site.asked) == 3


@pytest.mark.parametrize("conditions", [True, False])
def test_a_file_that_changed_in_between_is_fetched_anew(site: Site, target: Path, conditions: bool) -> None:
    """Also from a server that ignores If-Range."""
    site.content, site.cuts, site.conditions = CONTENT[::-1], [1_000_000], conditions

    def change(site: Site) -> None:
        site.content, site.etag = CONTENT, '"two"'

    site.after = change
    get(site, target)
    assert whole(target)


def test_a_shorter_file_in_between_is_fetched_anew(site: Site, target: Path) -> None:
    site.content, site.cuts, site.conditions = CONTENT * 2, [SIZE], False

    def change(site: Site) -> None:
        site.content, site.etag = CONTENT, '"two"'

    site.after = change
    get(site, target, size=None)
    assert whole(target)
    assert len(site.asked) == 3  # one found nothing there


def test_a_change_that_the_server_hides_costs_one_more_download(site: Site, target: Path) -> None:
    site.content, site.cuts = CONTENT[::-1], [1_000_000]
    site.after = lambda site: setattr(site, "content", CONTENT)
    get(site, target)
    assert whole(target)
    assert [asked for _, asked, _ in site.asked] == ["", "bytes=1000000-", ""]


def test_errors_of_the_server_pass(site: Site, target: Path) -> None:
    site.statuses = [500, 503, 429, 502]
    get(site, target)
    assert whole(target)


def test_attempts_end(site: Site, target: Path) -> None:
    site.statuses = [500] * 9
    with pytest.raises(FetchError, match="the server answers 500 Internal Server Error") as caught:
        get(site, target, attempts=3)
    assert len(site.asked) == 3
    assert caught.value.hint
    assert not isinstance(caught.value, refusals.Refusal)


def test_attempts_that_bring_much_do_not_count(site: Site, target: Path) -> None:
    site.cuts = [1_048_576, 1_048_576, 10]
    get(site, target, attempts=2)
    assert whole(target)


def test_a_server_that_always_breaks_off_at_the_same_place_ends_the_attempts(site: Site, target: Path) -> None:
    site.ranges, site.cuts = False, [2_000_000] * 20
    with pytest.raises(FetchError, match="breaks off after 2000000 of 3000000 bytes"):
        get(site, target, attempts=3)
    assert len(site.asked) == 4


def test_pauses_grow_up_to_a_bound(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    site.statuses = [500] * 9
    with pytest.raises(FetchError):
        get(site, target, attempts=8, pause=1.0)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("status", [403, 404, 410, 204])
def test_what_a_server_does_not_have_is_asked_for_once(site: Site, target: Path, status: int) -> None:
    site.statuses = [status] * 9
    with pytest.raises(FetchError, match=f"/a.bundle: the server answers {status}"):
        get(site, target)
    assert len(site.asked) == 1


def test_a_stall_is_a_break(site: Site, target: Path) -> None:
    site.stall, site.cuts = True, [1000]
    get(site, target, timeout=0.2)
    assert whole(target)
    assert site.asked[1][1] == "bytes=1000-"


def test_a_trickle_is_a_break(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOWEST", 10_000)
    site.trickle = True
    with pytest.raises(FetchError, match="all but stands still"):
        get(site, target, timeout=0.2, attempts=1)


def test_a_server_that_is_not_there(target: Path) -> None:
    with serving(Site()) as site:
        url = site.url
    with pytest.raises(FetchError, match=r"/x: Connection refused\n  hint: look at the network"):
        fetch(f"{url}/x", str(target), attempts=2, pause=0)


# --- later runs ------------------------------------------------------------------------------------------------------


def test_a_later_run_goes_on(site: Site, target: Path) -> None:
    broken(site, target)
    get(site, target)
    assert whole(target)
    assert site.asked == [("/a.bundle", "bytes=1000000-", '"one"')]


def test_a_partial_that_is_whole_needs_no_server(target: Path) -> None:
    with serving(Site()) as site:
        broken(site, target)
    with target.with_name(target.name + ".partial").open("ab") as file:
        file.write(CONTENT[1_000_000:])
    get(site, target)
    assert whole(target)


def test_a_torn_partial_costs_one_more_download(site: Site, target: Path) -> None:
    broken(site, target)
    with target.with_name(target.name + ".partial").open("r+b") as file:
        file.write(bytes(4096))
    get(site, target)
    assert whole(target)
    assert [asked for _, asked, _ in site.asked] == ["bytes=1000000-", ""]


def test_the_note_says_where_a_partial_is_from(site: Site, target: Path) -> None:
    broken(site, target)
    note = json.loads(target.with_name(target.name + ".partial.json").read_text())
    assert note == {"url": f"{site.url}/a.bundle", "validator": '"one"'}


NOTES = [
    b"", b"{", b"[]", b"null", b"[" * 60_000, b"\xff", b'{"url": 1}', b'{"url": "URL", "validator": 7}',
    b'{"url": "URL", "validator": "a\\nb: c"}', b'{"url": "http://elsewhere/", "validator": "\\"one\\""}',
]  # fmt: skip


@pytest.mark.parametrize("content", NOTES)
def test_a_partial_of_unknown_origin_is_not_used(site: Site, target: Path, content: bytes) -> None:
    broken(site, target)
    url = f"{site.url}/a.bundle".encode()
    target.with_name(target.name + ".partial.json").write_bytes(content.replace(b"URL", url))
    get(site, target)
    assert whole(target)
    assert site.asked == [("/a.bundle", "", "")]


def test_a_partial_larger_than_the_file_is_not_used(site: Site, target: Path) -> None:
    broken(site, target)
    site.content, site.etag = CONTENT[:500_000], '"small"'
    digest = hashlib.sha256(site.content).hexdigest()
    assert get(site, target, size=500_000, sha256=digest) == digest
    assert site.asked == [("/a.bundle", "", "")]


def test_a_partial_of_an_empty_file_with_a_stale_rest(site: Site, target: Path) -> None:
    target.with_name(target.name + ".partial").write_bytes(b"stale")
    get(site, target, size=0, sha256=None)
    assert target.read_bytes() == b""


# --- too much and wrong ----------------------------------------------------------------------------------------------


def test_a_wrong_digest_leaves_nothing(site: Site, target: Path) -> None:
    site.content = CONTENT[::-1]
    with pytest.raises(refusals.Damaged, match="was promised"):
        get(site, target)
    assert left(target) == set()
    assert len(site.asked) == 1


@pytest.mark.parametrize("extra", [1, 2_000_000, -1])
def test_another_size_than_promised_is_not_even_read(site: Site, target: Path, extra: int) -> None:
    with pytest.raises(FetchError, match=f"has 3000000 bytes, but {SIZE - extra} were promised"):
        get(site, target, size=SIZE - extra)
    assert len(site.asked) == 1


@pytest.mark.parametrize("chunked", [True, False])
def test_never_more_than_allowed_is_written(site: Site, target: Path, chunked: bool) -> None:
    site.length, site.chunked = False, chunked
    for values in ({"size": 1_000_000}, {"size": None, "limit": 1_000_000}):
        with pytest.raises(FetchError, match="more than the 1000000 bytes"):
            get(site, target, **values)
        assert target.with_name(target.name + ".partial").stat().st_size <= 1_000_000
    target.with_name(target.name + ".partial").unlink()
    with pytest.raises(FetchError, match="ends after 3000000 of 4000000"):
        get(site, target, size=4_000_000, attempts=1)


def test_a_size_over_the_limit_is_not_asked_for(site: Site, target: Path) -> None:
    with pytest.raises(FetchError, match="more than the 1000000 bytes"):
        get(site, target, size=None, limit=1_000_000)
    site.asked.clear()
    with pytest.raises(FetchError, match="more than the 1000 that are allowed"):
        get(site, target, limit=1000)
    assert site.asked == []


def test_a_full_disk_ends_it_with_what_came(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 1_000_000

    def write(file: int, block: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(file, block[:room])
        room -= count
        return count

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(FetchError, match=r"(?s)No space left on device.*cleanup"):
            get(site, target)
    assert len(site.asked) == 1
    get(site, target)
    assert whole(target)
    assert site.asked[1][1] == "bytes=1000000-"


def test_a_folder_that_is_missing(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="cannot be written: No such file"):
        get(site, tmp_path / "none" / "file")


def test_a_link_in_the_place_of_the_partial_is_not_followed(site: Site, target: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    target.with_name(target.name + ".partial").symlink_to(tmp_path / "other")
    with pytest.raises(FetchError, match="cannot be written"):
        get(site, target)
    assert (tmp_path / "other").read_text() == "kept"


# --- channels --------------------------------------------------------------------------------------------------------

A, B = "a" * 64, "b" * 64
NOW = 1_800_000_000
ENTRY = BundleEntry("samepage-1.0-to-1.1+b2~rc.bundle", A, B, 10, "0" * 64)
INDEX = Index(7, NOW - 100, NOW + 1000, "test", "amd64", (ReleaseEntry("1.1", B),), (ENTRY,))


def index_of(site: Site, seen: Path, now: float = NOW, layout: str = "test") -> Index:
    return fetch_index(f"{site.url}/channel/", TRUST, str(seen), layout, "amd64", now, pause=0, attempts=2)


def test_a_channel_is_read_and_remembered(site: Site, tmp_path: Path) -> None:
    seen = tmp_path / "counter"
    site.content, site.cuts = dump_index(INDEX, SIGNER), [20]
    assert index_of(site, seen) == INDEX
    assert site.asked[0][0] == "/channel/channel.index"
    assert not seen.exists()
    remember(str(seen), INDEX)
    assert read_seen(str(seen)) == 7
    assert index_of(site, seen) == INDEX
    older = Index(6, NOW - 100, NOW + 1000, "test", "amd64", INDEX.releases, ())
    remember(str(seen), older)
    assert read_seen(str(seen)) == 7
    site.content = dump_index(older, SIGNER)
    with pytest.raises(refusals.Replayed):
        index_of(site, seen)


def test_a_channel_that_is_not_for_this_node(site: Site, tmp_path: Path) -> None:
    seen = tmp_path / "counter"
    site.content = dump_index(INDEX, SIGNER)
    with pytest.raises(refusals.WrongLayout):
        index_of(site, seen, layout="production")
    with pytest.raises(refusals.Expired):
        index_of(site, seen, NOW + 2000)
    site.content = dump_index(INDEX, OTHER)
    with pytest.raises(refusals.UnknownKey):
        index_of(site, seen)
    own = Index(7, NOW - 100, NOW + 1000, "test", "amd64", INDEX.releases, (), frozenset({SIGNER.id}))
    site.content = dump_index(own, SIGNER)
    with pytest.raises(refusals.RevokedKey):
        index_of(site, seen)


def test_an_endless_index_is_not_read(site: Site, tmp_path: Path) -> None:
    site.content, site.length = bytes(INDEX_LIMIT + 1), False
    with pytest.raises(FetchError, match=f"more than the {INDEX_LIMIT} bytes"):
        index_of(site, tmp_path / "counter")


def test_addresses_inside_a_channel() -> None:
    name = "samepage-1.0-to-1.1%2Bb2~rc.bundle"
    assert bundle_url("https://host/channel", ENTRY) == f"https://host/channel/{name}"
    assert bundle_url("https://host/a/channel//", ENTRY) == f"https://host/a/channel/{name}"
    assert bundle_url("https://host?sig=x", ENTRY) == f"https://host/{name}?sig=x"
    assert bundle_url("file:///srv/channel", ENTRY) == f"file:///srv/channel/{name}"
