import json

import pytest

# One Python on the node asks for everything: each start of one takes a second on an emulated CPU.
ASK = """
import json, socket
answers = {}
for name, head in {"json": "GET /status.json HTTP/1.0", "page": "GET /status HTTP/1.0\\r\\nAccept: text/html",
                   "alive": "GET /alive HTTP/1.0", "other": "GET /etc/passwd HTTP/1.0"}.items():
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(50)
        connection.connect("/run/samepage-console/status.sock")
        connection.sendall(f"{head}\\r\\n\\r\\n".encode())
        data = b""
        while part := connection.recv(65536):
            data += part
    answers[name] = data.decode()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(host):
    return json.loads(host.check_output("python3 -I -S -c %s", ASK))


def body(answer):
    return answer.partition("\r\n\r\n")[2]


def test_service(host):
    """The console runs, as its own user and without any capability"""
    service = host.service("samepage-console.service")
    assert service.is_running
    pid = service.systemd_properties["MainPID"]
    status = dict(line.split(":", 1) for line in host.check_output("cat /proc/%s/status", pid).splitlines())
    assert status["Uid"].split() == ["821"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0


def test_socket(host):
    """The status socket admits the front door and nobody else"""
    socket = host.file("/run/samepage-console/status.sock")
    assert socket.is_socket
    assert (socket.user, socket.group, socket.mode) == ("console", "www-data", 0o660)
    assert host.service("samepage-console.socket").is_running


def test_status_json(host, answers):
    """/status.json tells the release, the addresses and the probes of every recipe"""
    found = json.loads(body(answers["json"]))
    assert found["release"] == json.loads(host.file("/run/samepage/release.json").content_string)["version"]
    assert set(found["recipes"]) == set(json.loads(host.file("/etc/samepage/node.json").content_string)["recipes"])
    assert found["mode"] in ("live", "installed", "container")
    assert all(found["recipes"]["console"]["probes"][0][key] is not None for key in ("name", "ok", "detail", "ms"))


def test_status_page(answers):
    """/status is a page for people, and nothing else is served"""
    assert "Content-Type: text/html" in answers["page"]
    assert "<h2>console</h2>" in answers["page"]
    assert body(answers["alive"]) == "alive\n"
    assert answers["other"].startswith("HTTP/1.1 404 ")


def test_no_password_over_http(host, answers):
    """The one-time password is shown on the console only"""
    shown = host.file("/run/samepage-app/first-login.json")
    if not shown.exists:
        pytest.skip("the first login has been used")
    password = json.loads(shown.content_string)["password"]
    assert password not in "".join(answers.values())


def test_screen(host):
    """tty1 shows the release, the address, the health and how to log in"""
    if not host.file("/dev/vcs1").exists:
        pytest.skip("a container has no screen")
    screen = host.run("cat /dev/vcs1").stdout
    for word in ("Samepage appliance", "Web page", "https://", "Health", "ssh root@", "SHA256:"):
        assert word in screen
    shown = host.file("/run/samepage-app/first-login.json")
    if shown.exists:
        first = json.loads(shown.content_string)
        assert f"{first['user']}  password  {first['password']}" in screen
    assert host.run("pgrep -c getty").stdout.strip() == "0"


@pytest.mark.parametrize("unit", ["samepage-console.service", "samepage-console-health@.service"])
def test_exposure(host, unit):
    """The console's units are sandboxed: an exposure below 4.0"""
    last = host.check_output("systemd-analyze security --no-pager %s", unit.replace("@", "@x")).splitlines()[-1]
    assert float(last.split(":")[1].split()[0]) < 4.0


@pytest.mark.needs("nginx")
def test_through_the_front_door(host):
    """The front door passes /status on"""
    page = host.check_output(
        "printf 'GET /status.json HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n'"
        " | timeout 50 openssl s_client -quiet -connect 127.0.0.1:443 2>/dev/null"
    )
    assert json.loads(body(page.replace("\r\n", "\n").replace("\n\n", "\r\n\r\n", 1)))["recipes"]["console"]["healthy"]
