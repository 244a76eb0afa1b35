import json

import pytest


@pytest.mark.parametrize("tool", ["samepage-health", "samepage-install", "samepage-upgrade-node"])
def test_help(host, tool):
    """The node's tools are on the path and explain themselves"""
    done = host.run("%s --help", tool)
    assert done.rc == 0
    assert "usage: " in done.stdout


def test_boot_record(host):
    """The boot waited for health and recorded how long that took"""
    record = json.loads(host.file("/run/samepage/health.json").content_string)
    assert record["healthy"]
    assert 0 < record["boot_seconds"] < 600
    assert set(record["recipes"]) == set(json.loads(host.file("/etc/samepage/node.json").content_string)["recipes"])


def test_boot_unit(host):
    """The boot's health unit ended well"""
    unit = host.service("samepage-health.service")
    assert unit.is_enabled
    assert unit.systemd_properties["SubState"] == "exited"
    assert unit.systemd_properties["Result"] == "success"


def test_health_command(host):
    """Health of one recipe as JSON; what does not exist is refused as wrong usage"""
    found = json.loads(host.check_output("samepage-health --json node-tools"))
    assert found["healthy"]
    assert list(found["recipes"]) == ["node-tools"]
    refused = host.run("samepage-health no-such-recipe")
    assert refused.rc == 64
    assert "no-such-recipe" in refused.stderr


def test_kernel_and_order(host):
    """No unit was dropped to break an ordering cycle, and the kernel is not tainted"""
    found = json.loads(host.run("samepage-health --json").stdout)["system"]
    assert [probe["name"] for probe in found][:2] == ["no failed unit", "no ordering cycle"]
    assert [probe["detail"] for probe in found[1:] if not probe["ok"]] == []


def test_exposure(host):
    """The health unit is sandboxed: an exposure below 4.0"""
    last = host.check_output("systemd-analyze security --no-pager samepage-health.service").splitlines()[-1]
    assert float(last.split(":")[1].split()[0]) < 4.0


def test_upgrade_status(host):
    """The upgrade tool says what runs and that nothing is unfinished; on a live system it refuses"""
    done = host.run("samepage-upgrade-node status --json")
    found = json.loads(done.stdout)
    if host.run("cat /run/samepage/mode").stdout.strip() != "installed":
        assert (done.rc, found["reason"]) == (3, "not-upgradable")
        return
    assert done.rc == 0
    running = json.loads(host.file("/run/samepage/release.json").content_string)
    assert (found["version"], found["layout"]) == (running["version"], running["layout"])
    name = json.loads(host.file("/etc/samepage/node.json").content_string)["name"]
    layers = (layer for layer in running["layers"] if layer["node"] in ("", name))
    assert found["layers"] == {layer["kind"]: layer["digest"] for layer in layers}
    assert found["unfinished"] is None
    assert found["next_boot"] == {"release": found["release"], "data": found["data"]}


def test_upgrade_gate(host):
    """The gate had nothing to judge at this start, or ended well"""
    unit = host.service("samepage-upgrade-gate.service")
    assert unit.is_enabled
    properties = unit.systemd_properties
    assert properties["ConditionResult"] == "no" or properties["Result"] == "success"
    assert properties["ActiveState"] != "failed"


def test_upgrade_settings(host):
    """The settings are those that the tool knows, and the timer obeys them"""
    settings = json.loads(host.file("/etc/samepage/upgrade.json").content_string)
    assert settings["keep"] >= 1
    assert 0 < settings["budget"] <= 100
    assert settings["hold_seconds"] < settings["trial_seconds"] < 65536
    assert host.service("samepage-upgrade-unattended.timer").is_enabled
    if not settings["unattended"]:
        done = host.run("samepage-upgrade-node --unattended --json")
        assert (done.rc, json.loads(done.stdout)["outcome"]) == (2, "nothing")


def test_trusted_keys(host):
    """Every trusted key can be read, so that no upgrade fails for one"""
    listed = host.run("sh -c 'cat /etc/samepage/keys/*.pub /state/upgrade/keys/*.pub 2>/dev/null'").stdout
    assert all(line.startswith("samepage-public-key-1 ") for line in listed.splitlines())


def test_upgrade_manual(host):
    """The manual page is on the node"""
    page = host.file("/opt/samepage/share/man/man8/samepage-upgrade-node.8")
    assert page.contains("samepage-upgrade-node")
