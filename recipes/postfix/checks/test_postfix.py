import json

import pytest

# Mails two recipients through the local port and waits for both copies.
MAIL = """
import glob, json, os, smtplib, time
mark = f"samepage-check-{os.urandom(8).hex()}"
with smtplib.SMTP("127.0.0.1", 25, timeout=40) as server:
    to = ["one@example.test", "two@elsewhere.test"]
    server.sendmail("check@node.test", to, f"Subject: {mark}\\n\\nIs it caught?\\n")
end, found = time.monotonic() + 40, {}
while len(found) < 2 and time.monotonic() < end:
    for name in glob.glob("/var/mail-catcher/Maildir/new/*"):
        text = open(name).read()
        if mark in text:
            found[name] = text
    time.sleep(0.2)
for name in found:
    os.unlink(name)
print(json.dumps(sorted(found.values())))
"""


@pytest.fixture(scope="module")
def settings(host):
    told = host.run("postconf")
    assert told.rc == 0
    assert "warning" not in told.stderr
    return dict(line.split(" =", 1) for line in told.stdout.splitlines() if " =" in line)


def test_greets(host):
    """It takes mail on loopback"""
    assert host.socket("tcp://127.0.0.1:25").is_listening


def test_local_only(host):
    """It takes mail from this node only"""
    addresses = {line.split()[3] for line in host.check_output("ss -Hlnt sport = :25").splitlines()}
    assert addresses <= {"127.0.0.1:25", "[::1]:25"}


@pytest.mark.timeout(120)
def test_catches_mail(host, settings):
    """On a private cloud every mail is caught, one copy per recipient"""
    if settings["default_transport"].strip() != "virtual":
        pytest.skip("this node sends its mail")
    copies = json.loads(host.check_output("python3 -I -c %s", MAIL))
    assert len(copies) == 2
    assert "Delivered-To: one@example.test" in copies[0]
    assert "Delivered-To: two@elsewhere.test" in copies[1]


def test_nothing_leaves(host, settings):
    """Where mail is caught, the program that would send it is not even there to start"""
    if settings["default_transport"].strip() != "virtual":
        pytest.skip("this node sends its mail")
    assert host.run("postconf -M smtp/unix").stdout.strip() == ""


def test_catcher_is_private(host):
    """Caught mail can be read by its own user and root only"""
    folder = host.file("/var/mail-catcher")
    assert (folder.user, folder.mode & 0o007) == ("mailbox", 0)


def test_no_mail_waits(host):
    """No mail is stuck in the queue"""
    assert host.check_output("find /var/spool/postfix/deferred /var/spool/postfix/corrupt -type f") == ""


def test_unprivileged(host):
    """Only the master is root; its programs are not"""
    master = host.check_output("systemctl show -P MainPID postfix.service")
    pids = ",".join([master, *host.check_output("pgrep -P %s", master).split()])
    running = [line.split() for line in host.check_output("ps -o user=,comm= -p %s", pids).splitlines()]
    assert ["postfix", "qmgr"] in running
    assert [name for user, name in running if user == "root"] == ["master"]


def test_confined(host):
    """The master has few of root's powers and no way to get others"""
    pid = host.check_output("systemctl show -P MainPID postfix.service")
    status = dict(line.split(":", 1) for line in host.check_output("cat /proc/%s/status", pid).splitlines())
    assert status["NoNewPrivs"].strip() == "1"
    assert bin(int(status["CapBnd"], 16)).count("1") <= 5
