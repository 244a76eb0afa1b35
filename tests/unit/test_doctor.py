"""The doctor names what is missing and the exact command that mends it."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest

from appliance import doctor, hostsetup


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_root_needs_no_namespaces() -> None:
    [found] = doctor.user_namespaces(uid=0)
    assert found.level == "ok"


@pytest.mark.parametrize(
    ("file", "value", "fix"),
    [
        ("kernel/unprivileged_userns_clone", "0\n", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0\n", "sudo sysctl -w user.max_user_namespaces=15000"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1\n",
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_a_kernel_that_refuses_namespaces(file: str, value: str, fix: str, tmp_path: Path) -> None:
    [found] = doctor.user_namespaces(uid=1000, proc=write(tmp_path, {file: value}), etc=tmp_path)
    assert (found.level, found.fix) == ("missing", fix)


def test_subordinate_numbers(tmp_path: Path) -> None:
    user = getpass.getuser()
    etc = write(tmp_path, {"subuid": f"{user}:100000:65536\n", "subgid": "other:100000:65536\n"})
    [found] = doctor.user_namespaces(uid=1000, proc=tmp_path / "none", etc=etc)
    assert found.fix == f"sudo usermod --add-subgids 100000-165535 {user}"
    assert doctor.subordinate(etc / "subuid", user) == 65536
    assert doctor.subordinate(etc / "absent", user) == 0


def test_kvm_counts_only_with_the_processor(tmp_path: Path) -> None:
    files = write(tmp_path, {"with": "flags : fpu vmx\n", "without": "flags : fpu\n", "kvm": ""})
    assert next(doctor.virtualisation(files / "with", files / "kvm")).level == "ok"
    assert "neither vmx nor svm" in next(doctor.virtualisation(files / "without", files / "kvm")).detail
    assert "modprobe" in next(doctor.virtualisation(files / "with", files / "absent")).fix


def test_memory() -> None:
    [good] = doctor.memory("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    [little] = doctor.memory("MemAvailable: 1000000 kB\n")
    assert good.level == "ok"
    assert "1.0 GB available" in little.detail
    assert "--memory" in little.fix


def test_disk_space_has_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda _folder: 1_000_000_000)
    cache, dist = doctor.disk_space(tmp_path, tmp_path / "not" / "yet")
    assert (cache.level, dist.level) == ("missing", "ok")
    assert "1.0 GB free" in cache.detail
    assert "5.0 GB wanted" in cache.detail
    assert "SAMEPAGE_CACHE" in cache.fix


def test_free_space_of_a_folder_to_come(tmp_path: Path) -> None:
    assert doctor.free_bytes(tmp_path / "a" / "b") > 0


def test_missing_packages_come_in_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = hostsetup.HostPackage("no-such-package", ("no-such-program",), "proves this test")
    there = hostsetup.HostPackage("sh", ("sh",), "is everywhere")
    monkeypatch.setattr(hostsetup, "SETS", {"python": (), "build": (absent, there), "test": (absent,)})
    build, test = doctor.packages()
    assert (build.level, test.level) == ("missing", "optional")
    assert build.fix.endswith("apt-get install no-such-package")
    assert [package.name for package in hostsetup.missing("build")] == ["no-such-package"]
    assert [package.name for package in hostsetup.missing("test")] == ["no-such-package"] * 2


def test_installing_asks_nothing() -> None:
    assert hostsetup.install_command(["a"], geteuid=1000)[:2] == ["sudo", "DEBIAN_FRONTEND=noninteractive"]
    assert hostsetup.install_command(["a"], geteuid=0)[0] == "apt-get"
    assert {"-y", "--no-install-recommends"} <= set(hostsetup.install_command(["a"]))
