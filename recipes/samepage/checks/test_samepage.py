import json
import secrets
import time

import pytest

# One Python on the node asks for everything: each start of one takes a second on an emulated CPU.
ASK = """
import http.client, json, socket, ssl, sys

class Local(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(50)
        self.sock.connect("/run/samepage-app/api.sock")

def front_door():
    return http.client.HTTPSConnection("127.0.0.1", timeout=50, context=ssl._create_unverified_context())

answers = []
for door, verb, path, body in json.loads(sys.argv[1]):
    connection = front_door() if door == "front" else Local("localhost")
    connection.request(verb, path, body, {"Content-Type": "application/json", "Host": "localhost"})
    response = connection.getresponse()
    answers.append([response.status, response.read().decode(), dict(response.getheaders())])
print(json.dumps(answers))
"""
BOOTSTRAP = '{"jsonrpc":"2.0","id":7,"method":"Bootstrap.bootstrap"}'
RECORDS = "/var/lib/samepage/calls"


def ask(host, *requests):
    return json.loads(host.check_output("python3 -I -c %s %s", ASK, json.dumps(requests)))


def sql(host, statement):
    psql = "runuser -u samepage -- psql -X -A -t -v ON_ERROR_STOP=1 -h /run/postgresql samepage -c %s"
    return host.check_output(psql, statement)


@pytest.fixture(scope="module")
def answers(host):
    health, api, page = ask(
        host,
        ("local", "GET", "/healthz", None),
        ("local", "POST", "/api", BOOTSTRAP),
        ("local", "GET", "/", None),
    )
    return {"health": health, "api": api, "page": page}


@pytest.fixture(scope="module")
def release(host):
    return json.loads(host.file("/run/samepage/release.json").content_string)


@pytest.mark.parametrize("unit", ["samepage.service", "samepage-worker.service"])
def test_service(host, unit):
    """It runs, as its own user and without any capability"""
    service = host.service(unit)
    assert service.is_running
    lines = host.check_output("cat /proc/%s/status", service.systemd_properties["MainPID"]).splitlines()
    status = dict(line.split(":", 1) for line in lines)
    assert status["Uid"].split() == ["820"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0


@pytest.mark.parametrize("unit", ["samepage.service", "samepage-worker.service"])
def test_exposure(host, unit):
    """Its unit is sandboxed: an exposure below 4.0"""
    last = host.check_output("systemd-analyze security --no-pager %s", unit).splitlines()[-1]
    assert float(last.split(":")[1].split()[0]) < 4.0


def test_socket(host):
    """The API has its socket, and no port on a node of its own"""
    assert host.file("/run/samepage-app/api.sock").is_socket
    if "listen_port\": 0" in host.file("/etc/samepage/samepage.json").content_string:
        assert not host.socket("tcp://8000").is_listening


def test_health(answers):
    """The health address answers"""
    assert answers["health"][:2] == [200, "ok\n"]


def test_api(answers, release):
    """The API answers, with the version of the running release"""
    status, body, _ = answers["api"]
    answer = json.loads(body)
    assert (status, answer["id"]) == (200, 7)
    assert answer["result"]["release"] == release["version"]
    assert answer["result"]["user"] is None


def test_page(answers):
    """The web page is served under a strict content security policy"""
    status, body, headers = answers["page"]
    assert status == 200
    assert "<title>Samepage</title>" in body
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")


def test_records(host, answers):
    """A call leaves one record in the private spool, whose size is bounded"""
    assert answers["api"]
    folder = host.file(RECORDS)
    assert (folder.user, folder.group, folder.mode) == ("samepage", "samepage", 0o700)
    records = [json.loads(line) for line in host.check_output("tail -n 50 %s/calls.jsonl", RECORDS).splitlines()]
    ours = [record for record in records if record["method"] == "Bootstrap.bootstrap"][-1]
    assert (ours["v"], ours["outcome"]) == (1, 0)
    assert ours["cpu_ms"] >= 0
    assert int(host.check_output("du -sm %s", RECORDS).split()[0]) <= 65


def test_first_login(host):
    """The first password is for the console alone, and gone once it has been used"""
    shown, kept = host.file("/run/samepage-app/first-login.json"), host.file("/var/lib/samepage/first-login.json")
    assert shown.exists == kept.exists
    if shown.exists:
        assert (shown.user, shown.group, shown.mode) == ("samepage", "console", 0o640)
        assert (kept.user, kept.mode) == ("samepage", 0o600)
        assert shown.content_string == kept.content_string
        assert set(json.loads(shown.content_string)) == {"user", "password"}
    assert host.file("/var/lib/samepage").mode == 0o700


@pytest.mark.needs("postgresql")
def test_schema_level(host, release):
    """The database has the schema level of the running release"""
    assert int(sql(host, "SELECT max(level) FROM schema_migrations")) == release["schema_level"]


@pytest.mark.needs("postgresql", "valkey")
def test_login(host):
    """Signing in reaches the database and the brake on guessing: a stranger is refused"""
    params = {"login": f"nobody-{secrets.token_hex(4)}", "password": "guess"}
    call = {"jsonrpc": "2.0", "id": 1, "method": "Session.login", "params": params}
    ((status, body, headers),) = ask(host, ("local", "POST", "/api", json.dumps(call)))
    assert status == 200
    # Wrong credentials; or, after many rounds of this check, too many attempts.
    assert json.loads(body)["error"]["code"] in (-32007, -32005)
    assert "set-cookie" not in headers


@pytest.mark.needs("postgresql", "postfix")
def test_worker_mails(host):
    """The worker mails a job once and forgets its secret; the mail is caught on the node"""
    if "virtual_mailbox_base" not in host.file("/etc/postfix/main.cf").content_string:
        pytest.skip("this node sends its mail")
    address = f"check-{secrets.token_hex(6)}@example.com"
    link = f"https://localhost/invitation#{secrets.token_hex(8)}"
    mail = {"to": address, "name": "Check", "from_name": "The verification", "link": link, "days": 7}
    insert = f"INSERT INTO jobs (kind, payload) VALUES ('invitation', '{json.dumps(mail)}') RETURNING id"
    job = sql(host, insert).split()[0]
    deadline = time.monotonic() + 40  # less than the time that verification gives a check
    state = ""
    while time.monotonic() < deadline and not state.startswith("done"):
        time.sleep(1)
        state = sql(host, f"SELECT state, attempts, payload FROM jobs WHERE id = {job}")
    assert state == "done|1|{}"
    while time.monotonic() < deadline:
        found = host.run("grep -rlF %s /var/mail-catcher/Maildir", link).stdout.split()
        if found:
            break
        time.sleep(1)
    assert len(found) == 1
    assert f"To: Check <{address}>" in host.file(found[0]).content_string


@pytest.mark.needs("nginx")
def test_through_the_front_door(host, release):
    """The front door passes calls on over TLS"""
    ((status, body, _),) = ask(host, ("front", "POST", "/api", BOOTSTRAP))
    assert status == 200
    assert json.loads(body)["result"]["release"] == release["version"]
