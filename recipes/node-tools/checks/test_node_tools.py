import json

import pytest


@pytest.mark.parametrize("tool", ["samepage-health", "samepage-install"])
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
