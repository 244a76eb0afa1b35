import json

import pytest

# One Python on the node makes all the requests: each start of one takes a second on an emulated CPU.
ASK = """
import http.client, json, socket, ssl
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
def get(connection, path):
    connection.request("GET", path)
    answer = connection.getresponse()
    return [answer.status, dict((k.lower(), v) for k, v in answer.getheaders()), answer.read().decode()]
def front(path):
    return get(http.client.HTTPSConnection("127.0.0.1", 443, context=context, timeout=50), path)
def tls(**limits):
    own = ssl.create_default_context()
    own.check_hostname, own.verify_mode = False, ssl.CERT_NONE
    own.set_alpn_protocols(["h2", "http/1.1"])
    own.set_ciphers("ALL:@SECLEVEL=0")
    for name, value in limits.items():
        setattr(own, name, value)
    try:
        with socket.create_connection(("127.0.0.1", 443), 20) as raw, own.wrap_socket(raw) as wrapped:
            return [wrapped.version(), wrapped.selected_alpn_protocol()]
    except (OSError, ssl.SSLError) as fault:
        return ["refused", str(fault)]
print(json.dumps({
    "health": front("/healthz"),
    "plain": get(http.client.HTTPConnection("127.0.0.1", 80, timeout=30), "/some/where?a=b"),
    "modern": tls(),
    "old": tls(minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1),
}))
"""

ONE = ASK.rpartition("print(")[0] + "print(json.dumps(front('PATH')))"

# Connects again and again, about 20 times a second, while nginx is restarted; counts what did not answer 200.
RESTART = """
import json, socket, ssl, subprocess, sys, time
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
command = subprocess.Popen(["systemctl", *sys.argv[1:], "nginx.service"])
faults, asked, longest, after = [], 0, 0.0, 0
while after < 5:
    start = time.monotonic()
    asked += 1
    try:
        with socket.create_connection(("127.0.0.1", 443), 30) as raw:
            raw.settimeout(30)
            with context.wrap_socket(raw) as wrapped:
                wrapped.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: node\\r\\nConnection: close\\r\\n\\r\\n")
                head = wrapped.recv(15)
        if head != b"HTTP/1.1 200 OK":
            faults.append(repr(head))
    except OSError as fault:
        faults.append(repr(fault))
    longest = max(longest, time.monotonic() - start)
    after += command.poll() is not None
    time.sleep(0.05)
print(json.dumps({"status": command.wait(), "asked": asked, "faults": faults, "longest": longest}))
"""


@pytest.fixture(scope="module")
def answers(host):
    return json.loads(host.check_output("python3 -I -S -c %s", ASK))


def test_health_page(answers):
    """nginx answers /healthz by itself, over TLS"""
    status, headers, body = answers["health"]
    assert (status, body) == (200, "ok\n")
    assert headers["server"] == "nginx"


def test_redirect(answers):
    """Plain HTTP is sent to HTTPS, method and path kept"""
    status, headers, _ = answers["plain"]
    assert status == 308
    assert headers["location"].startswith("https://")
    assert headers["location"].endswith("/some/where?a=b")


def test_http2(answers):
    """HTTP/2 and TLS 1.3 are spoken"""
    assert answers["modern"] == ["TLSv1.3", "h2"]


def test_old_tls(answers):
    """TLS 1.0 and 1.1 are refused"""
    assert answers["old"][0] == "refused"


def test_no_hsts(answers):
    """Browsers are not bound to a certificate that nobody vouches for"""
    assert "strict-transport-security" not in answers["health"][1]


def test_certificate(host):
    """The certificate is this machine's own, and its key readable by nginx only"""
    key = host.file("/state/identity/nginx/key.pem")
    assert (key.user, key.mode & 0o077) == ("www-data", 0)
    told = host.check_output("openssl x509 -in /state/identity/nginx/certificate.pem -noout -text")
    assert "prime256v1" in told
    assert "DNS:localhost" in told


def test_sockets_are_kept(host):
    """The service manager holds the listening sockets"""
    assert host.check_output("systemctl show -P NFileDescriptorStore nginx.service") == "4"


def test_unprivileged(host):
    """Master and workers run as www-data, with one capability at most"""
    processes = host.process.filter(comm="nginx")
    assert len(processes) >= 2
    assert {process.user for process in processes} == {"www-data"}
    told = host.check_output(f"grep -h CapEff {' '.join(f'/proc/{process.pid}/status' for process in processes)}")
    assert {int(line.split()[1], 16) & ~(1 << 10) for line in told.splitlines()} == {0}  # 10: CAP_NET_BIND_SERVICE


@pytest.mark.timeout(180)
def test_restart_drops_nothing(host):
    """No connection is refused or cut while nginx restarts"""
    told = json.loads(host.check_output("python3 -I -S -c %s restart", RESTART))
    assert told["status"] == 0
    assert told["asked"] > 5
    assert told["faults"] == []


@pytest.mark.timeout(120)
def test_reload_drops_nothing(host):
    """No connection is refused or cut while nginx reads its configuration anew"""
    told = json.loads(host.check_output("python3 -I -S -c %s reload", RESTART))
    assert told["status"] == 0
    assert told["faults"] == []


@pytest.mark.needs("console")
def test_status_is_passed_on(host):
    """/status comes from the console"""
    told = json.loads(host.check_output("python3 -I -S -c %s", ONE.replace("PATH", "/status.json")))
    assert told[0] in (200, 503)
    assert "recipes" in json.loads(told[2])


@pytest.mark.needs("samepage")
def test_product_is_passed_on(host):
    """Everything else comes from the product"""
    told = json.loads(host.check_output("python3 -I -S -c %s", ONE.replace("PATH", "/")))
    assert told[0] == 200
    assert "html" in told[1]["content-type"]
