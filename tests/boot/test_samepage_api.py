"""The product's API on a running node, over HTTPS through the front door."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from typing import Any

import pytest

from tests.boot.samepage_site import Client, Failed, Site, Unavailable, administrator, clients, site, wait_for

pytestmark = pytest.mark.boot
__all__ = ["administrator", "clients", "site"]

NOT_SIGNED_IN, NOT_ALLOWED, NOT_FOUND, CONFLICT, TOO_MANY, CHANGE_FIRST, WRONG = range(-32001, -32008, -1)
INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, PARSE_ERROR = -32600, -32601, -32602, -32700


def fails(code: int, client: Client, method: str, **params: Any) -> Failed:
    with pytest.raises(Failed) as caught:
        client.call(method, **params)
    assert caught.value.code == code, caught.value
    return caught.value


def word() -> str:
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz") for _ in range(12))


# --- the protocol over HTTP ------------------------------------------------------------------------------------------


def test_bootstrap_tells_strangers_the_release_and_nothing_else(site: Site) -> None:
    answer = site.client().call("Bootstrap.bootstrap")
    assert answer["release"] != "unknown"
    assert set(answer) == {"release", "node", "user"}
    assert answer["user"] is None


def test_batch_answers_calls_in_order_and_notifications_not_at_all(site: Site) -> None:
    call = {"jsonrpc": "2.0", "method": "Bootstrap.bootstrap"}
    missing = {**call, "method": "No.such", "id": 3}
    answers = site.client().post([{**call, "id": "a"}, call, 7, {**call, "id": 1.5}, missing])
    assert [(answer["id"], answer.get("error", {}).get("code")) for answer in answers] == [
        ("a", None), (None, INVALID_REQUEST), (1.5, None), (3, METHOD_NOT_FOUND),
    ]  # fmt: skip


def test_notifications_alone_get_no_content(site: Site) -> None:
    call = {"jsonrpc": "2.0", "method": "Bootstrap.bootstrap"}
    assert site.client().send(json.dumps([call, call]).encode()) == (204, b"")
    assert site.client().send(json.dumps(call).encode()) == (204, b"")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", PARSE_ERROR),
        (b'{"jsonrpc":', PARSE_ERROR),
        (b"[" * 100_000, PARSE_ERROR),
        (b'"\xff"', PARSE_ERROR),
        (b"[]", INVALID_REQUEST),
        (b"7", INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","method":"Items.get","id":true}', INVALID_REQUEST),
    ],
    ids=["empty", "cut", "deep", "not-utf8", "empty-batch", "number", "boolean-id"],
)
def test_broken_requests_get_the_specified_error(site: Site, body: bytes, code: int) -> None:
    status, content = site.client().send(body)
    answer = json.loads(content)
    assert (status, answer["error"]["code"], answer["id"]) == (200, code, None)


def test_http_itself_is_strict(site: Site) -> None:
    call = json.dumps({"jsonrpc": "2.0", "method": "Bootstrap.bootstrap", "id": 1}).encode()
    client = site.client()
    assert client.send(b"", verb="GET")[0] == 405
    assert client.headers is not None
    assert client.headers["Allow"] == "POST"
    assert client.send(call, Content_Type="text/plain")[0] == 415
    assert client.send(b" " * (1024 * 1024 + 1))[0] == 413
    assert client.send(call, Origin="https://evil.example")[0] == 403
    assert client.send(call, Origin="null")[0] == 403
    assert client.send(call, Sec_Fetch_Site="cross-site")[0] == 403
    assert client.send(call, Sec_Fetch_Site="same-site")[0] == 403
    assert client.send(call, Origin=site.url)[0] == 200


def test_pages_have_a_strict_policy_and_are_revalidated(site: Site) -> None:
    client = site.client()
    for path in ("/", "/invitation", "/app.js", "/style.css", "/logo.svg"):
        status, _ = client.send(b"", verb="GET", path=path)
        assert status == 200
        assert client.headers is not None
        assert "default-src 'none'; script-src 'self'" in client.headers["Content-Security-Policy"]
        assert "unsafe" not in client.headers["Content-Security-Policy"]
        assert client.headers["X-Content-Type-Options"] == "nosniff"
        assert client.send(b"", verb="GET", path=path, If_None_Match=client.headers["ETag"])[0] == 304
    for path in ("/nothing", "/../api.py", "/%2e%2e/api.py", "/web/app.js"):
        assert client.send(b"", verb="GET", path=path)[0] in (400, 404)


# --- sessions --------------------------------------------------------------------------------------------------------


def test_the_first_login_is_shown_to_the_console_until_it_is_used(site: Site) -> None:
    shown = site.run("cat /run/samepage-app/first-login.json 2>/dev/null || true")
    if shown:
        mode = site.run("stat -c '%U %G %a' /run/samepage-app/first-login.json")
        assert mode.split() == ["samepage", "console", "640"]
        login = json.loads(shown)
        client = site.client()
        client.call("Session.login", login=login["user"], password=login["password"])
        fails(CHANGE_FIRST, client, "Items.getList")
        client.call("Session.changePassword", current=login["password"], password=word() * 2)
    assert site.run("ls /run/samepage-app /var/lib/samepage | grep first-login || true") == ""


def test_a_one_time_password_must_be_changed_and_works_once(site: Site) -> None:
    one_time, client = site.one_time_password(), site.client()
    assert client.call("Session.login", login="ADMIN", password=one_time)["user"]["mustChangePassword"]
    assert client.call("Bootstrap.bootstrap")["user"]["login"] == "admin"
    fails(CHANGE_FIRST, client, "Items.getList")
    fails(CHANGE_FIRST, client, "Members.invite", email="a@example.com", name="A")
    fails(INVALID_PARAMS, client, "Session.changePassword", current=one_time, password="short")
    fails(INVALID_PARAMS, client, "Session.changePassword", current=one_time, password=one_time)
    fails(WRONG, client, "Session.changePassword", current="something else", password=word() * 2)
    client.call("Session.changePassword", current=one_time, password=word() * 2)
    client.call("Items.getList")
    fails(WRONG, site.client(), "Session.login", login="admin", password=one_time)


def test_a_new_password_ends_other_sessions(site: Site, administrator: Client) -> None:
    second = site.administrator()
    fails(NOT_SIGNED_IN, administrator, "Items.getList")
    second.call("Items.getList")


def test_the_cookie_is_safe_and_signing_out_ends_the_session(site: Site) -> None:
    client = site.client()
    client.call("Session.login", login="admin", password=site.one_time_password())
    assert client.headers is not None
    cookie = client.headers["Set-Cookie"]
    assert cookie.startswith("__Host-samepage=")
    assert {"Secure", "HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    stolen = Client(site.url, dict(client.cookies))
    fails(CHANGE_FIRST, stolen, "Items.getList")
    client.call("Session.logout")
    fails(NOT_SIGNED_IN, stolen, "Items.getList")


def test_a_planted_session_is_replaced_at_sign_in(site: Site) -> None:
    victim = Client(site.url, {"__Host-samepage": "planted"})
    one_time = site.one_time_password()
    victim.call("Session.login", login="admin", password=one_time)
    assert victim.cookies["__Host-samepage"] != "planted"
    fails(NOT_SIGNED_IN, Client(site.url, {"__Host-samepage": "planted"}), "Members.get")


def test_guessing_is_braked_per_login(site: Site) -> None:
    client, login = site.client(), f"nobody-{word()}"
    for _ in range(5):
        fails(WRONG, client, "Session.login", login=login, password="guess")
    braked = fails(TOO_MANY, client, "Session.login", login=login, password="guess")
    assert 0 < braked.data["retryAfter"] <= 900
    fails(WRONG, client, "Session.login", login=f"nobody-{word()}", password="guess")


@pytest.mark.parametrize(
    "method",
    ["Items.get", "Items.getList", "Items.create", "Items.update", "Items.delete", "Activities.getItemStream",
     "Comments.add", "Members.get", "Members.invite", "Stats.save", "Session.changePassword"],
)  # fmt: skip
def test_strangers_may_do_nothing(site: Site, method: str) -> None:
    fails(NOT_SIGNED_IN, site.client(), method)


# --- items -----------------------------------------------------------------------------------------------------------


def test_an_item_from_creation_to_deletion(administrator: Client) -> None:
    title = f"Plan {word()}"
    item = administrator.call("Items.create", title=f"  {title} ", body="one\r\ntwo")
    assert (item["title"], item["body"], item["version"]) == (title, "one\ntwo", 1)
    comment = administrator.call("Comments.add", item["id"], "Looks good: 好")
    changed = administrator.call("Items.update", id=item["id"], version=1, body="three")
    assert (changed["title"], changed["body"], changed["version"]) == (title, "three", 2)
    read = administrator.call("Items.get", id=item["id"])
    assert [one["body"] for one in read["comments"]] == [comment["body"]] == ["Looks good: 好"]
    assert administrator.call("Items.delete", id=item["id"]) == {"deleted": item["id"]}
    fails(NOT_FOUND, administrator, "Items.get", id=item["id"])
    fails(NOT_FOUND, administrator, "Items.update", id=item["id"], version=2, title="x")
    fails(NOT_FOUND, administrator, "Items.delete", id=item["id"])
    fails(NOT_FOUND, administrator, "Comments.add", itemId=item["id"], body="late")
    stream = administrator.call("Activities.getItemStream", itemId=item["id"])["activities"]
    assert [one["kind"] for one in stream] == ["delete", "update", "comment", "create"]
    assert {one["item"]["exists"] for one in stream} == {False}


def test_a_second_writer_is_told_of_the_first(administrator: Client) -> None:
    item = administrator.call("Items.create", title=word())
    administrator.call("Items.update", id=item["id"], version=1, title="first")
    conflict = fails(CONFLICT, administrator, "Items.update", id=item["id"], version=1, title="second")
    assert conflict.data["current"]["title"] == "first"
    assert administrator.call("Items.get", id=item["id"])["title"] == "first"


def test_of_writers_at_the_same_time_one_wins(site: Site, administrator: Client) -> None:
    item = administrator.call("Items.create", title=word())
    outcomes: list[int] = []

    def write(name: str) -> None:
        client = Client(site.url, dict(administrator.cookies))
        try:
            client.call("Items.update", id=item["id"], version=1, title=name)
            outcomes.append(0)
        except Failed as failed:
            outcomes.append(failed.code)

    writers = [threading.Thread(target=write, args=(f"writer {number}",)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(outcomes) == sorted([0, *[CONFLICT] * 5])
    assert administrator.call("Items.get", id=item["id"])["version"] == 2


def test_search_ranks_marks_and_pages(administrator: Client) -> None:
    key = "q" + word()
    for title, body in ((f"{key} first", "apples"), ("other", f"{key} pears and plums"), (f"{key} second", "pears")):
        administrator.call("Items.create", title=title, body=body)

    def titles(query: str, **page: int) -> list[str]:
        return [item["title"] for item in administrator.call("Items.getList", query=query, **page)["items"]]

    assert titles(key) == [f"{key} second", f"{key} first", "other"]  # words in titles weigh more
    assert titles(key[:9]) == titles(key), "plain words are found by their beginnings"
    assert titles(f"{key} pear") == [f"{key} second", "other"]
    assert titles(f"{key} -pears") == [f"{key} first"]
    assert titles(f'"{key} pears"') == ["other"]
    assert titles(key, limit=1, offset=1) == [f"{key} first"]
    assert administrator.call("Items.getList", query=key, limit=1)["total"] == 3
    assert "\ue000" + key + "\ue001 pears" in administrator.call("Items.getList", query=key)["items"][2]["snippet"]
    for strange in ("'", "& | !", "()", ":*", "\\", "%", "a or", "-", '"', "the", "ž" * 200):
        titles(strange)


def test_values_that_the_database_cannot_hold_are_refused(administrator: Client) -> None:
    for title in ("a\x00b", "\ud800", "", "   ", "x" * 201, "two\nlines"):
        failed = fails(INVALID_PARAMS, administrator, "Items.create", title=title)
        assert list(failed.data["faults"]) == ["title"]
    for wrong in (True, 1.0, "1", 0, -1, 2**63, None):
        fails(INVALID_PARAMS, administrator, "Items.get", id=wrong)
    failed = fails(INVALID_PARAMS, administrator, "Items.create", titel="x", body=3)
    assert set(failed.data["faults"]) == {"title", "titel", "body"}


def test_the_stream_pages_without_gaps(administrator: Client) -> None:
    item = administrator.call("Items.create", title=word())["id"]
    for number in range(4):
        administrator.call("Comments.add", itemId=item, body=str(number))
    everything = administrator.call("Activities.getItemStream", itemId=item)
    assert everything["next"] is None
    seen, before = [], None
    while True:
        page = administrator.call("Activities.getItemStream", itemId=item, before=before, limit=2)
        seen += page["activities"]
        before = page["next"]
        if before is None:
            break
    assert seen == everything["activities"]


def test_time_zones_and_figures(administrator: Client) -> None:
    assert administrator.call("GlobalSettings.detectTimezone", zone="Europe/Prague") == {"timezone": "Europe/Prague"}
    assert administrator.call("Members.get")["timezone"] == "Europe/Prague"
    by_offsets = administrator.call("GlobalSettings.detectTimezone", zone="../etc/passwd", january=-300, july=-240)
    assert by_offsets == {"timezone": "America/New_York"}
    assert administrator.call("Stats.save", name="page.start", value={"milliseconds": 12}) == {}
    fails(INVALID_PARAMS, administrator, "Stats.save", name="page.start", value="x" * 3000)


# --- invitations -----------------------------------------------------------------------------------------------------


def test_an_invitation_works_once_and_makes_a_plain_member(site: Site, administrator: Client) -> None:
    address, password = f"{word()}@example.com", f"long enough {word()}"
    member_id = administrator.call("Members.invite", email=address, name="Ida Invited")["id"]
    link = site.invitation(address)
    assert link.startswith(f"{site.url.rstrip('/')}/invitation#")
    token = link.partition("#")[2]
    guest = site.client()
    fails(NOT_FOUND, guest, "Invitations.get", token=token[:-1] + "?")
    assert guest.call("Invitations.get", token=token) == {"name": "Ida Invited", "login": address}
    fails(INVALID_PARAMS, guest, "Invitations.accept", token=token, password="short")
    fails(INVALID_PARAMS, guest, "Invitations.accept", token=token, password=address)
    assert guest.call("Invitations.accept", token=token, password=password)["user"]["id"] == member_id
    fails(NOT_FOUND, site.client(), "Invitations.accept", token=token, password=password)
    fails(CONFLICT, administrator, "Members.invite", email=address.upper(), name="Again")

    fails(NOT_ALLOWED, guest, "Members.invite", email="x@example.com", name="X")
    theirs = administrator.call("Items.create", title=word())
    fails(NOT_ALLOWED, guest, "Items.delete", id=theirs["id"])
    own = guest.call("Items.create", title=word())
    guest.call("Items.delete", id=own["id"])
    assert "login" not in guest.call("Members.get", id=1)
    assert site.client().call("Session.login", login=address.upper(), password=password)["user"]["role"] == "member"


def test_inviting_again_replaces_the_link(site: Site, administrator: Client) -> None:
    address = f"{word()}@example.com"
    administrator.call("Members.invite", email=address, name="Ida")
    first = site.invitation(address).partition("#")[2]
    administrator.call("Members.invite", email=address, name="Ida")
    second = site.invitation(address, count=2).partition("#")[2]
    fails(NOT_FOUND, site.client(), "Invitations.get", token=first)
    assert site.client().call("Invitations.get", token=second)["login"] == address
    assert len(site.mails(address)) == 2, "each invitation is mailed exactly once"


# --- records ---------------------------------------------------------------------------------------------------------


def test_every_call_leaves_one_record_with_its_cost(site: Site, administrator: Client) -> None:
    marker = administrator.call("Items.create", title=word())["id"]

    def records() -> list[dict[str, Any]]:
        lines = site.run("tail -n 400 /var/lib/samepage/calls/calls.jsonl").splitlines()
        return [json.loads(line) for line in lines]

    before = len(records()) if len(records()) < 380 else None
    administrator.post([
        {"jsonrpc": "2.0", "id": 1, "method": "Items.get", "params": [marker]},
        {"jsonrpc": "2.0", "method": "Items.update", "params": {"id": marker, "version": 1, "title": "new"}},
        {"jsonrpc": "2.0", "id": 2, "method": "Items.get", "params": [2**40]},
        {"jsonrpc": "2.0", "id": 3, "method": "No.such\nmethod"},
    ])  # fmt: skip
    last = records()[-4:]
    assert [one["method"] for one in last] == ["Items.get", "Items.update", "Items.get", "unknown"]
    assert [one["outcome"] for one in last] == [0, 0, NOT_FOUND, METHOD_NOT_FOUND]
    # The first call also reads who calls; an update is one transaction of three statements.
    assert [(one["statements"], one["transactions"]) for one in last] == [(3, 3), (3, 1), (1, 1), (0, 0)]
    assert {one["group"] for one in last} == {"all"}
    assert {one["release"] for one in last} == {administrator.call("Bootstrap.bootstrap")["release"]}
    for one in last[:3]:
        assert 0 < one["db_ms"] <= one["real_ms"]
        assert 0 < one["cpu_ms"] <= one["real_ms"] * 1.1 + 1
    if before is not None:
        assert len(records()) == before + 5
    assert site.run("stat -c '%U %a' /var/lib/samepage/calls").split() == ["samepage", "700"]


# --- outages ---------------------------------------------------------------------------------------------------------

@pytest.mark.fault
@pytest.mark.parametrize("unit", ["postgresql.service", "valkey-server.service"])
def test_calls_wait_for_a_restarted_service(site: Site, administrator: Client, unit: str) -> None:
    item = administrator.call("Items.create", title=word())
    site.run(f"systemctl restart --no-block {unit}")
    for _ in range(10):
        with contextlib.suppress(Unavailable):
            administrator.call("Items.get", id=item["id"])
        time.sleep(0.5)
    assert administrator.call("Items.get", id=item["id"])["title"] == item["title"]
    assert site.run("systemctl is-active samepage.service samepage-worker.service").split() == ["active", "active"]


@pytest.mark.fault
def test_no_request_is_lost_over_a_restart(site: Site, administrator: Client) -> None:
    faults: list[object] = []
    done = threading.Event()

    def read() -> None:
        client = Client(site.url, dict(administrator.cookies))
        while not done.is_set():
            try:
                client.call("Items.getList", limit=1)
            except Exception as fault:
                faults.append(fault)
            time.sleep(0.2)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    site.run("systemctl restart samepage.service")
    wait_for(lambda: site.run("systemctl is-active samepage.service").strip() == "active")
    time.sleep(2)
    done.set()
    for reader in readers:
        reader.join()
    assert not faults


@pytest.mark.fault
def test_the_product_counts_as_healthy_without_the_database(site: Site) -> None:
    site.run("systemctl stop postgresql.service")
    try:
        site.run("/opt/samepage/bin/samepage-health samepage")
        assert site.client().call("Bootstrap.bootstrap")["user"] is None
    finally:
        site.run("systemctl start postgresql.service")


@pytest.mark.fault
def test_a_newer_database_is_refused_with_a_clear_message(site: Site, administrator: Client) -> None:
    psql = "runuser -u samepage -- psql -q -h /run/postgresql samepage -c"
    site.run(f"{psql} \"INSERT INTO schema_migrations VALUES (9999, 'future', '', 'next')\"")
    try:
        site.run("systemctl restart samepage.service || true")
        assert site.run("systemctl show -P ExecMainStatus samepage.service").strip() == "78"
        time.sleep(3)
        assert site.run("systemctl show -P ActiveState samepage.service").strip() == "failed", "it must not be retried"
        journal = site.run("journalctl -b -u samepage.service -n 20")
        assert "schema level 9999, this release knows levels up to" in journal
    finally:
        site.run(f'{psql} "DELETE FROM schema_migrations WHERE level = 9999"')
        site.run("systemctl reset-failed samepage.service; systemctl start samepage.service")
    administrator.call("Items.getList")
