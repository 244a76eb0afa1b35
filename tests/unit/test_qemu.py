"""QEMU's command line, its ports, and the records of nodes. No machine is started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from appliance.errors import HostError, UnknownName
from appliance.model import frozen_map
from appliance.targets import base, qemu
from appliance.targets.base import Instance, NodeError, Request
from appliance.targets.qmp import EndedError, Qmp, Serial


def line(tmp_path: Path, *, accelerated: bool = False, **changes: object) -> list[str]:
    values: dict[str, object] = {"name": "n", "image": tmp_path / "a,b.iso"} | changes
    return qemu.command_line(Request(**values), tmp_path, tmp_path / "s", accelerated=accelerated)  # type: ignore[arg-type]


def option(words: list[str], name: str, containing: str = "") -> str:
    return next(value for key, value in pairwise(words) if key == name and containing in value)


def test_emulation_uses_every_thread(tmp_path: Path) -> None:
    words = line(tmp_path)
    assert option(words, "-accel") == "tcg,thread=multi"
    assert option(words, "-cpu") == "max,-avx,-avx2,-erms"
    assert "-daemonize" in words


def test_kvm_uses_the_host_s_processor(tmp_path: Path) -> None:
    words = line(tmp_path, accelerated=True)
    assert (option(words, "-accel"), option(words, "-cpu")) == ("kvm", "host")


def test_memory_and_devices(tmp_path: Path) -> None:
    words = line(tmp_path, memory=1024, kind="disk", hardware={"nic": "e1000", "disk": "pvscsi"})
    assert option(words, "-m") == "1024"
    assert option(words, "-device", "e1000") == "e1000,netdev=net0"
    assert option(words, "-device", "scsi-hd").startswith("scsi-hd,drive=disk0")
    assert "pvscsi" in words


@pytest.mark.parametrize("disk", sorted(qemu.DISKS))
def test_every_controller_has_a_disk(disk: str, tmp_path: Path) -> None:
    assert option(line(tmp_path, kind="disk", hardware={"disk": disk}), "-device", "drive=disk0")


def test_a_disk_can_be_left_to_the_caller(tmp_path: Path) -> None:
    words = line(tmp_path, kind="disk", hardware={"disk": "none"})
    assert not [word for word in words if "disk0" in word]


def test_the_iso_is_a_cd_that_is_never_written(tmp_path: Path) -> None:
    cd = option(line(tmp_path), "-drive", "media=cdrom")
    assert "readonly=on" in cd
    assert cd.endswith("a,,b.iso")  # QEMU parts options at single commas


def test_ports_are_picked_by_the_kernel(tmp_path: Path) -> None:
    network = option(line(tmp_path), "-netdev")
    for port in base.GUEST_PORTS:
        assert f"hostfwd=tcp:127.0.0.1:0-:{port}" in network


def test_picked_ports_are_read_back() -> None:
    text = """Hub -1 (net0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  14       127.0.0.1 41693       10.0.2.15   443     0     0
  TCP[HOST_FORWARD]  12       127.0.0.1 38923       10.0.2.15    22     0     0
  UDP[236 sec]       17       10.0.2.15 50000       10.0.2.3     53     0     0
"""
    assert qemu.forwarded(text) == {"443": 41693, "22": 38923}


def test_uefi_has_its_own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "find_firmware", lambda: (Path("/code.fd"), Path("/vars.fd")))
    words = line(tmp_path, firmware="uefi")
    assert "readonly=on,file=/code.fd" in option(words, "-drive", "/code.fd")
    assert str(tmp_path / "firmware.qcow2") in option(words, "-drive", "firmware.qcow2")


def test_missing_firmware_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "OVMF_FOLDERS", (str(tmp_path),))
    with pytest.raises(HostError) as caught:
        qemu.find_firmware()
    assert "ovmf" in caught.value.hint


def test_credentials_become_smbios_strings() -> None:
    assert qemu.credential_options({"b": b"\x00,", "a": b"key"}) == [
        "-smbios", "type=11,value=io.systemd.credential.binary:a=a2V5",
        "-smbios", "type=11,value=io.systemd.credential.binary:b=ACw=",
    ]  # fmt: skip


# --- records ---------------------------------------------------------------------------------------------------------


def instance(folder: Path, **changes: object) -> Instance:
    values = {
        "name": "n", "target": "qemu", "folder": folder, "address": "127.0.0.1",
        "ports": frozen_map({"22": 40022, "443": 40443}),
        "details": frozen_map({"sockets": str(folder / "sockets")}),
    }  # fmt: skip
    return Instance(**(values | changes))  # type: ignore[arg-type]


def test_nodes_are_found_again(tmp_path: Path) -> None:
    folder = base.nodes_folder(tmp_path) / "n"
    folder.mkdir(parents=True)
    base.save(instance(folder))
    assert base.find(tmp_path, "n") == instance(folder)
    assert base.find(tmp_path, "n").url == "https://127.0.0.1:40443/"
    with pytest.raises(UnknownName, match="no node is called 'm'"):
        base.find(tmp_path, "m")


def test_the_ssh_config_is_one_ssh_understands(tmp_path: Path) -> None:
    node = instance(tmp_path)
    qemu.write_ssh_config(node, tmp_path)
    done = subprocess.run(["ssh", "-F", tmp_path / "ssh_config", "-G", "n"], capture_output=True, text=True, check=True)
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert (settings["port"], settings["user"], settings["hostname"]) == ("40022", "root", "127.0.0.1")
    assert qemu.Qemu().command(node, ["ls", "a b"])[-2:] == ["n", "ls 'a b'"]
    assert qemu.Qemu().connection(node) == ("ssh://n", (f"--ssh-config={tmp_path / 'ssh_config'}",))


def test_a_stale_process_number_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    assert qemu.Qemu().state(instance(tmp_path)) == "stopped"
    qemu.Qemu().down(instance(tmp_path))  # ends nothing that is not ours


def test_a_running_name_is_not_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base.nodes_folder(tmp_path) / "n"
    folder.mkdir(parents=True)
    base.save(instance(folder))
    monkeypatch.setattr(qemu.Qemu, "state", lambda *_: "running")
    with pytest.raises(NodeError, match="'n' is running already") as caught:
        base.bring_up(qemu.Qemu(), Request("n", tmp_path), tmp_path)
    assert "--name" in caught.value.hint


def test_a_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: qemu.Qemu, _request: Request, _folder: Path) -> Instance:
        raise KeyboardInterrupt

    monkeypatch.setattr(qemu.Qemu, "up", fail)
    with pytest.raises(KeyboardInterrupt):
        base.bring_up(qemu.Qemu(), Request("n", tmp_path), tmp_path)
    assert not (base.nodes_folder(tmp_path) / "n").exists()


def test_requests_are_kept_for_copies(tmp_path: Path) -> None:
    request = Request(
        "n", tmp_path / "x.iso", kind="usb", memory=512, firmware="uefi", hardware=frozen_map({"nic": "e1000"})
    )
    base.save_request(request, tmp_path)
    again = base.load_request(tmp_path)
    assert (again.image, again.kind, again.memory, again.firmware, dict(again.hardware)) == (
        tmp_path / "x.iso", "usb", 512, "uefi", {"nic": "e1000"},
    )  # fmt: skip


# --- health ----------------------------------------------------------------------------------------------------------


class Scripted(qemu.Qemu):
    """A target whose node answers what the test says."""

    def __init__(self, status: int, output: str, *, reachable: bool = True, state: base.State = "running") -> None:
        self.answer = subprocess.CompletedProcess([], status, output.encode(), b"")
        self.is_reachable, self.now = reachable, state

    def execute(self, *_: object, **__: object) -> subprocess.CompletedProcess[bytes]:
        return self.answer

    def reachable(self, _instance: Instance) -> bool:
        return self.is_reachable

    def state(self, _instance: Instance) -> base.State:
        return self.now


def wait(target: Scripted, folder: Path, deadline: float = 5) -> object:
    return base.wait_healthy(target, instance(folder), deadline, pause=0.01)


def test_a_healthy_node_gives_its_record(tmp_path: Path) -> None:
    record = {"healthy": True, "boot_seconds": 20.5, "recipes": {}}
    assert wait(Scripted(0, json.dumps(record)), tmp_path) == record


def test_an_unhealthy_node_names_its_probes(tmp_path: Path) -> None:
    probe = {"name": "https", "ok": False, "detail": "refused", "ms": 3}
    record = {"healthy": False, "recipes": {"nginx": {"healthy": False, "probes": [probe]}}}
    with pytest.raises(NodeError, match="nginx: https: refused"):
        wait(Scripted(0, json.dumps(record)), tmp_path)


def test_a_failed_unit_ends_the_wait_with_its_journal(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"units failed \(nginx.service\)\n  \| no such file"):
        wait(Scripted(3, "failed: nginx.service\nno such file\n"), tmp_path, deadline=1000)


def test_a_node_that_ended_ends_the_wait(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_bytes(b"\x1b[2J\x1b[1;1Hlast words\r\n")
    (tmp_path / qemu.QEMU_LOG).write_text(f"{qemu.SHUTDOWN} reason=6\n")
    with pytest.raises(NodeError, match=r"ended while it started\n  \| last words"):
        wait(Scripted(0, "", reachable=False, state="stopped"), tmp_path, deadline=1000)


@pytest.mark.parametrize(
    ("log", "words"), [(qemu.SHUTDOWN + " reason=6\n", "ended"), ("", "is gone: qemu-system-x86_64 crashed")]
)
def test_an_emulator_that_crashed_is_told_from_a_node_that_ended(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / qemu.QEMU_LOG).write_text(log)
    assert qemu.Qemu().how_it_ended(instance(tmp_path)) == words


def test_an_emulator_notes_that_it_was_asked_to_end(tmp_path: Path) -> None:
    assert option(line(tmp_path), "-trace", qemu.SHUTDOWN)
    assert option(line(tmp_path), "-D", qemu.QEMU_LOG)


def test_processors_can_be_chosen(tmp_path: Path) -> None:
    words = line(tmp_path, hardware={"cpus": "1"})
    assert words[words.index("-smp") + 1] == "1"


def test_a_panic_ends_the_wait(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text("Kernel panic - not syncing")
    with pytest.raises(NodeError, match="stopped while it started"):
        wait(Scripted(0, "", reachable=False), tmp_path, deadline=1000)


def test_there_is_always_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"could not be reached within 0 s"):
        wait(Scripted(0, "", reachable=False), tmp_path, deadline=0.05)
    with pytest.raises(NodeError, match=r"was not healthy within 0 s\n  \| still starting: x"):
        wait(Scripted(4, "still starting: x"), tmp_path, deadline=0.05)


# --- sockets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def conversation(tmp_path: Path) -> Iterator[tuple[Path, list[bytes]]]:
    """A server on a unix socket that sends the listed messages, one for each thing it is told after the first."""
    path = Path(os.path.relpath(tmp_path / "socket"))
    messages: list[bytes] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            for number, message in enumerate(messages):
                if number:
                    connection.recv(65536)
                connection.sendall(message)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield path, messages
    server.close()
    thread.join(5)


def test_qmp_keeps_events_that_come_between(conversation: tuple[Path, list[bytes]]) -> None:
    path, messages = conversation
    messages += [
        b'{"QMP": {}}\n', b'{"return": {}}\n',
        b'{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\n{"return": {"a": 1}}\n',
    ]  # fmt: skip
    with Qmp(path) as qmp:
        assert qmp.execute("query-status") == {"a": 1}
        event = qmp.next_event("SHUTDOWN", 1)
        assert event is not None
        assert event["data"]["reason"] == "guest-reset"


def test_qmp_reports_errors_and_ends(conversation: tuple[Path, list[bytes]]) -> None:
    path, messages = conversation
    messages += [b'{"QMP": {}}\n', b'{"return": {}}\n', b'{"error": {"desc": "no such command"}}\n']
    with Qmp(path) as qmp:
        with pytest.raises(NodeError, match="refused nonsense: no such command"):
            qmp.execute("nonsense")
        with pytest.raises(EndedError):
            qmp.next_event("SHUTDOWN", 5)


def test_the_serial_console_is_read_up_to_a_pattern(conversation: tuple[Path, list[bytes]]) -> None:
    path, messages = conversation
    messages += [b"login: ", b"welcome\n"]
    with Serial(path) as serial:
        assert serial.expect("log(in)", 5)[1] == "in"
        serial.type("root\n")
        assert serial.expect("welcome", 5)
        with pytest.raises(NodeError, match="did not show 'more'"):
            serial.expect("more", 0.2)
