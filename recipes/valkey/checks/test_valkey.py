import pytest

CLI = "valkey-cli -s /run/valkey/valkey.sock"


def lines(host, path):
    return host.file(path).content_string.splitlines()


@pytest.fixture(scope="module")
def seen(host):
    told = host.check_output(f"printf 'PING\nCONFIG GET maxmemory\nCONFIG GET appendonly\nCONFIG GET save\n' | {CLI}")
    return told.splitlines()


def test_answers(seen):
    """It answers on its socket"""
    assert seen[0] == "PONG"


def test_bounded(host, seen):
    """Its memory is bounded by the node's share"""
    settings = dict(line.split(" ", 1) for line in lines(host, "/etc/valkey/valkey.conf") if " " in line)
    assert int(seen[seen.index("maxmemory") + 1]) == int(settings["maxmemory"].removesuffix("mb")) * 1024 * 1024


def test_durable(seen):
    """Every change is logged, and no snapshot interferes"""
    assert seen[seen.index("appendonly") + 1] == "yes"
    assert seen[seen.index("save") + 1 :] in ([], [""])


def test_socket(host):
    """The socket is for the group valkey"""
    socket = host.file("/run/valkey/valkey.sock")
    assert socket.is_socket
    assert (socket.user, socket.group, socket.mode) == ("valkey", "valkey", 0o770)
    assert host.run(f"setpriv --reuid=nobody --regid=nogroup --clear-groups {CLI} ping").stdout.strip() != "PONG"


def test_no_port(host):
    """It listens on no port"""
    assert not host.socket("tcp://127.0.0.1:6379").is_listening


@pytest.mark.timeout(120)
def test_survives_a_restart(host):
    """What was stored is there after a restart"""
    assert host.check_output(f"{CLI} set samepage-check kept ex 600") == "OK"
    try:
        host.check_output("systemctl restart valkey-server.service")
        assert host.check_output(f"{CLI} get samepage-check") == "kept"
    finally:
        host.run(f"{CLI} del samepage-check")


@pytest.mark.machine
def test_memory_can_be_promised(host):
    """The kernel lets it fork to rewrite its log"""
    assert host.sysctl("vm.overcommit_memory") == 1
