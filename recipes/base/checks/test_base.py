import json
import re

import pytest

# One shell on the node tells what most checks below look at: each command by itself costs a second on an emulated CPU.
ASK = r"""
section() { printf '\n=== %s\n' "$1"; }
section mounts;    cat /proc/self/mounts
section listening; ss -Hlntu
section failed;    systemctl --failed --no-legend --plain
section timers;    systemctl list-timers --no-legend --plain
section cycles;    journalctl -b --quiet -o cat _PID=1 --grep 'ordering cycle' || true
section sshd;      sshd -T
section firewall;  nft list ruleset
section addresses; ip -o -4 address show scope global
section memory;    cat /proc/meminfo
section journal;   ls -d /var/log/journal/*; du -sm /var/log/journal
section processes; ps -eo comm=
"""
LOOPBACK = ("127.", "[::1]", "[::ffff:127.")


@pytest.fixture(scope="module")
def node(host):
    return json.loads(host.file("/etc/samepage/node.json").content_string)


@pytest.fixture(scope="module")
def seen(host):
    told = host.run("sh -c %s", ASK).stdout
    sections = (part.partition("\n") for part in told.split("\n=== ")[1:])
    return {name: [line for line in body.splitlines() if line] for name, _, body in sections}


@pytest.fixture(scope="module")
def mounts(seen):
    return {fields[1]: (fields[2], fields[3].split(",")) for fields in map(str.split, seen["mounts"])}


@pytest.mark.machine
def test_root_is_read_only(host, mounts):
    """The root is the release's image, read-only"""
    kind, options = mounts["/"]
    assert kind == "erofs"
    assert "ro" in options
    assert host.run("touch /usr/samepage-check").rc != 0


@pytest.mark.machine
def test_etc_is_read_only(host, mounts):
    """/etc is an overlay of the layers, read-only"""
    kind, options = mounts["/etc"]
    assert kind == "overlay"
    assert "ro" in options
    assert host.run("touch /etc/samepage-check").rc != 0


@pytest.mark.machine
def test_product_is_read_only(mounts):
    """/opt/samepage is the app layer, read-only"""
    kind, options = mounts["/opt/samepage"]
    assert kind == "erofs"
    assert "ro" in options


def test_temporary_files(mounts):
    """/tmp is in memory and honours neither devices nor setuid"""
    kind, options = mounts["/tmp"]
    assert kind == "tmpfs"
    assert {"nosuid", "nodev"} <= set(options)


@pytest.mark.machine
def test_state_is_writable(mounts):
    """/var and /state can be written to"""
    for place in ("/var", "/state"):
        kind, options = mounts[place]
        assert kind in ("btrfs", "tmpfs")
        assert "rw" in options


def test_no_failed_unit(seen):
    """No unit has failed"""
    assert seen["failed"] == []


def test_no_ordering_cycle(seen):
    """systemd found no ordering cycle"""
    assert seen["cycles"] == []


def test_timers(seen, node):
    """The only timers are the cleaning of temporary files and the recipes' own"""
    named = {word for line in seen["timers"] for word in line.split() if word.endswith(".timer")}
    assert named <= {"systemd-tmpfiles-clean.timer", *node["units"]}


def test_nothing_else_runs(seen):
    """No bus, login manager, getty or package job runs"""
    running = set(seen["processes"])
    assert not running & {"dbus-daemon", "dbus-broker", "systemd-logind", "agetty", "cron", "apt-get"}


def test_listening(seen, node):
    """Nothing listens beyond loopback but the declared ports"""
    declared = {port["number"] for port in node["ports"] if port["exposure"] in ("public", "cluster")}
    open_to_all = set()
    for line in seen["listening"]:
        protocol, _, _, _, address = line.split()[:5]
        host_part, _, port = address.rpartition(":")
        loopback = host_part.startswith(LOOPBACK) or host_part.endswith("%lo")
        dhcp = protocol == "udp" and port in ("68", "546")
        if not loopback and not dhcp:
            open_to_all.add(int(port))
    assert open_to_all <= declared


def test_firewall(seen, node):
    """The firewall drops what comes in, except for the public ports"""
    rules = [line.strip() for line in seen["firewall"]]
    assert any("hook input" in rule and "policy drop" in rule for rule in rules)
    public = {port["number"] for port in node["ports"] if port["exposure"] == "public"}
    opened = [rule for rule in rules if rule.startswith("tcp dport") or rule.startswith("udp dport")]
    assert {int(rule.split()[2]) for rule in opened} == public


def test_ssh_wants_keys(seen):
    """ssh takes keys only, from root too"""
    settings = dict(line.split(" ", 1) for line in seen["sshd"] if " " in line)
    assert settings["authenticationmethods"] == "publickey"
    assert settings["passwordauthentication"] == settings["kbdinteractiveauthentication"] == "no"
    assert settings["permitrootlogin"] == "without-password"
    assert settings["permituserenvironment"] == "no"
    assert settings["hostkey"] == "/state/identity/ssh/ssh_host_ed25519_key"


def test_ssh_refuses_passwords(host):
    """A login without a key is refused before any password is asked for"""
    told = host.check_output(
        "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o IdentityFile=/dev/null"
        " -o LogLevel=ERROR root@127.0.0.1 echo inside 2>&1 || true"
    )
    assert "Permission denied (publickey)" in told
    assert "inside" not in told


def test_host_key(host):
    """The host key was made on this machine and only root can read it"""
    key = host.file("/state/identity/ssh/ssh_host_ed25519_key")
    assert (key.user, key.group, key.mode) == ("root", "root", 0o600)
    assert host.run("ls /etc/ssh/ssh_host_*").rc != 0


def test_root_has_no_password(host):
    """Nobody can sign in as root with a password"""
    assert host.check_output("getent shadow root").split(":")[1] in ("*", "!*", "!")


@pytest.mark.machine
def test_machine_id(host):
    """The machine has an identity of its own, kept with its keys"""
    machine = host.file("/etc/machine-id").content_string.strip()
    assert len(machine) == 32
    assert int(machine, 16)
    assert host.file("/state/identity/etc/machine-id").content_string.strip() == machine


def test_network(host, seen):
    """The network is up, and addresses stay when its manager restarts"""
    assert seen["addresses"]
    assert "KeepConfiguration=yes" in host.file("/etc/systemd/network/20-ethernet.network").content_string


@pytest.mark.machine
def test_names(host):
    """Names are resolved by systemd-resolved"""
    assert host.file("/etc/resolv.conf").linked_to.startswith("/run/systemd/resolve/")
    assert host.check_output("getent hosts localhost")


@pytest.mark.machine
def test_time(host):
    """The clock is set from the network and not before the release was made"""
    assert host.service("systemd-timesyncd.service").is_running
    epoch = json.loads(host.file("/run/samepage/release.json").content_string)["epoch"]
    assert int(host.check_output("date +%s")) > epoch


def test_journal(seen):
    """The journal is kept and bounded"""
    assert seen["journal"]
    assert int(seen["journal"][-1].split()[0]) <= 72


@pytest.mark.machine
def test_memory(seen):
    """The idle node uses at most 300 MB, besides what a live system keeps in memory as files"""
    values = {line.split(":")[0]: int(line.split()[1]) for line in seen["memory"]}
    used = values["MemTotal"] - values["MemAvailable"] - values["Shmem"]
    assert used / 1024 <= 300


def test_debian(host):
    """It is Debian 13"""
    assert (host.system_info.distribution, host.system_info.codename) == ("debian", "trixie")


@pytest.mark.timeout(180)
def test_own_units_are_confined(host, node):
    """Every own service has a `systemd-analyze security` exposure below 4.0, or below the limit that its file states"""
    own = [name for name, unit in node["units"].items() if unit["own"] and name.endswith(".service")]
    assert len(own) >= 8
    files = " ".join(f"/etc/systemd/system/{name}" for name in own)
    told = host.run(f"grep -H '^Exposure=' {files}").stdout
    limits = {file.rpartition("/")[2]: float(limit) for file, limit in re.findall("^(.*):Exposure=(.*)$", told, re.M)}
    told = host.run(f"systemd-analyze security --offline=true --no-pager --threshold=39 {files}").stdout
    levels = re.findall(r"exposure level for (\S+): ([0-9.]+)", told)
    found = {re.sub("@.*[.]", "@.", name): float(level) for name, level in levels}
    assert found.keys() == set(own)
    assert {name: level for name, level in found.items() if level >= limits.get(name, 4.0)} == {}
