"""Nodes as QEMU virtual machines in the background, on this host.

The guest reaches the world through QEMU's user network; its ports 22, 80 and 443 are forwarded to free ports of
127.0.0.1 that the kernel picks, so nothing can race for them. Uses KVM where the processor really has it.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from appliance.errors import HostError
from appliance.model import frozen_map
from appliance.node import paths
from appliance.node.release import parse
from appliance.run import run
from appliance.steps import STEPS_FILE, record_step
from appliance.targets.base import (
    GUEST_PORTS,
    Instance,
    NodeError,
    Request,
    State,
    Target,
    process_runs,
    runtime_folder,
    save,
    save_request,
    tail,
    wait_for_end,
)
from appliance.targets.qmp import EndedError, Qmp

PROGRAM = "qemu-system-x86_64"
# All that QEMU can emulate but what makes programs choose code that emulation is slow at: AVX (SHA-256 runs at a third)
# and fast string moves, which it makes byte by byte.
EMULATED_CPU = "max,-avx,-avx2,-erms"
OVMF_FOLDERS = ("/usr/share/OVMF", "/usr/share/edk2/x64", "/usr/share/edk2/ovmf")
OVMF_NAMES = (
    ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    ("OVMF_CODE.fd", "OVMF_VARS.fd"),
    ("OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"),
)
QEMU_LOG = "qemu.log"
SHUTDOWN = "qemu_system_shutdown_request"  # the event that QEMU notes in its log whenever it ends as asked
DISK_SIZE = "16G"  # of a fresh disk to install on; grows on the host as it is filled

# Disk controllers by their name in Request.hardware["disk"]: devices before the disk, and the disk's own device.
# "none" makes the disk's file and leaves it to the caller to attach it.
DISKS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "virtio": ((), "virtio-blk-pci"),
    "virtio-scsi": (("virtio-scsi-pci",), "scsi-hd"),
    "ahci": ((), "ide-hd"),
    "pvscsi": (("pvscsi",), "scsi-hd"),
    "lsi": (("lsi53c895a",), "scsi-hd"),
    "nvme": ((), "nvme,serial=samepage"),
}


def hardware_acceleration() -> bool:
    """Whether KVM works here: /dev/kvm may exist without it, and then hang the guest."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return bool(re.search(r"^flags\s*:.*\b(vmx|svm)\b", flags, re.MULTILINE)) and os.access(
        "/dev/kvm", os.R_OK | os.W_OK
    )


def find_firmware() -> tuple[Path, Path]:
    """UEFI code and variable store of the host's OVMF package. Raises HostError where it is missing."""
    for folder in map(Path, OVMF_FOLDERS):
        for code, variables in OVMF_NAMES:
            if (folder / code).is_file() and (folder / variables).is_file():
                return folder / code, folder / variables
    raise HostError("the UEFI firmware for virtual machines is not installed", hint="install the package ovmf")


def credential_options(credentials: Mapping[str, bytes]) -> list[str]:
    """systemd credentials as SMBIOS strings."""
    options: list[str] = []
    for name, value in sorted(credentials.items()):
        encoded = base64.b64encode(value).decode()
        options += ["-smbios", f"type=11,value=io.systemd.credential.binary:{name}={encoded}"]
    return options


def escape(path: Path) -> str:
    """A path inside a comma-separated QEMU option."""
    return str(path).replace(",", ",,")


def command_line(request: Request, folder: Path, sockets: Path, *, accelerated: bool) -> list[str]:
    """QEMU's whole command line, without credentials and direct kernel."""
    nic = request.hardware.get("nic", "virtio-net-pci")
    console, disk = escape(folder / "console.log"), escape(folder / "disk.qcow2")
    forwards = ",".join(f"hostfwd=tcp:127.0.0.1:0-:{port}" for port in GUEST_PORTS)
    words = [
        PROGRAM, "-name", request.name, "-nodefaults", "-no-user-config", "-machine", "q35,usb=off",
        *(["-accel", "kvm", "-cpu", "host"] if accelerated else ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU]),
        "-smp", request.hardware.get("cpus") or str(min(2, os.cpu_count() or 1)), "-m", str(request.memory),
        "-display", "none", "-vga", "std",
        "-chardev", f"socket,id=serial0,path={escape(sockets / 'serial')},server=on,wait=off,logfile={console}",
        "-serial", "chardev:serial0",
        "-qmp", f"unix:{escape(sockets / 'qmp')},server=on,wait=off",
        "-netdev", f"user,id=net0,{forwards}", "-device", f"{nic},netdev=net0",
        "-device", "virtio-rng-pci",
        "-daemonize", "-pidfile", str(folder / "pid"), "-D", str(folder / QEMU_LOG), "-trace", f"enable={SHUTDOWN}",
    ]  # fmt: skip
    if request.firmware == "uefi":
        code, _variables = find_firmware()
        words += [
            "-drive", f"if=pflash,format=raw,readonly=on,file={escape(code)}",
            "-drive", f"if=pflash,format=qcow2,file={escape(folder / 'firmware.qcow2')}",
        ]  # fmt: skip
    if request.kind in ("iso", "install"):
        words += [
            "-drive", f"if=none,id=cd0,media=cdrom,format=raw,readonly=on,file={escape(request.image)}",
            "-device", f"ide-cd,drive=cd0,bus=ide.0,bootindex={2 if request.kind == 'install' else 1}",
        ]  # fmt: skip
    if request.kind in ("usb", "disk", "install") and request.hardware.get("disk") != "none":
        before, device = DISKS[request.hardware.get("disk", "virtio")]
        words += [word for extra in before for word in ("-device", extra)]
        words += [
            "-drive", f"if=none,id=disk0,format=qcow2,discard=unmap,detect-zeroes=unmap,file={disk}",
            "-device", f"{device},drive=disk0,bootindex=1",
        ]  # fmt: skip
    return words


def forwarded(usernet: str) -> dict[str, int]:
    """Guest port -> host port out of the monitor's `info usernet`."""
    pattern = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)")
    return {guest: int(host) for host, guest in pattern.findall(usernet)}


class Qemu(Target):
    """Virtual machines under QEMU."""

    name = "qemu"

    def up(self, request: Request, folder: Path) -> Instance:
        key = self._make_key(folder)
        credentials = {"ssh.authorized_keys.root": key, **request.credentials}
        prepare_disks(request, folder)
        if request.kind == "install":
            with record_step(folder / STEPS_FILE, "install"):
                install(request, folder, credentials)
            request = replace(request, kind="disk")
        save_request(request, folder)
        return start(request, folder, credentials)

    def down(self, instance: Instance) -> None:
        marker = str(instance.folder)
        sockets = Path(instance.details["sockets"])
        self.hang_up(instance)
        pid = _pid(instance.folder)
        if pid and process_runs(pid, marker):
            with suppress(NodeError), Qmp(sockets / "qmp", timeout=5) as qmp:
                qmp.execute("quit")
            if not wait_for_end(pid, marker, 10):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                wait_for_end(pid, marker, 10)
        shutil.rmtree(sockets, ignore_errors=True)

    def hang_up(self, instance: Instance) -> None:
        """End the shared ssh connection, which does not notice a restart of the node by itself."""
        if (Path(instance.details["sockets"]) / "ssh").exists():
            run(["ssh", "-F", instance.folder / "ssh_config", "-O", "exit", instance.name], check=False, timeout=10)

    def state(self, instance: Instance) -> State:
        pid = _pid(instance.folder)
        return "running" if pid and process_runs(pid, str(instance.folder)) else "stopped"

    def how_it_ended(self, instance: Instance) -> str:
        try:
            asked = SHUTDOWN in (instance.folder / QEMU_LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            asked = False
        return "ended" if asked else f"is gone: {PROGRAM} crashed"

    def command(self, instance: Instance, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        import shlex

        options = ["-t"] if terminal and words else []
        return [
            "ssh",
            "-F",
            str(instance.folder / "ssh_config"),
            *options,
            instance.name,
            *([shlex.join(words)] if words else []),
        ]

    def connection(self, instance: Instance) -> tuple[str, tuple[str, ...]]:
        return f"ssh://{instance.name}", (f"--ssh-config={instance.folder / 'ssh_config'}",)

    def reachable(self, instance: Instance) -> bool:
        return ssh_answers(instance.ports["22"]) and super().reachable(instance)

    @staticmethod
    def _make_key(folder: Path) -> bytes:
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "samepage", "-f", folder / "id_ed25519"])
        return (folder / "id_ed25519.pub").read_bytes()


def ssh_answers(port: int) -> bool:
    """Whether an ssh server greets on the forwarded port; QEMU itself accepts connections long before."""
    import socket

    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.settimeout(5)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def prepare_disks(request: Request, folder: Path) -> None:
    """Makes the node's own files, so that the image itself is never written to."""
    if request.firmware == "uefi":
        _code, variables = find_firmware()
        run(["qemu-img", "convert", "-O", "qcow2", variables, folder / "firmware.qcow2"])
    disk = folder / "disk.qcow2"
    if request.kind == "install":
        run(["qemu-img", "create", "-q", "-f", "qcow2", disk, request.hardware.get("size", DISK_SIZE)])
    elif request.kind in ("usb", "disk"):
        form = "qcow2" if request.image.suffix == ".qcow2" else "raw"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", request.image.resolve(), disk])


def start(request: Request, folder: Path, credentials: Mapping[str, bytes], extra: Sequence[str] = ()) -> Instance:
    """Start the machine and return it with its ports. On failure it is gone again."""
    sockets = runtime_folder()
    instance = Instance(
        name=request.name, target="qemu", folder=folder, address="127.0.0.1", ports=frozen_map(),
        details=frozen_map({"sockets": str(sockets), "firmware": request.firmware, "kind": request.kind}),
    )  # fmt: skip
    try:
        save(instance)
        words = command_line(request, folder, sockets, accelerated=hardware_acceleration())
        run([*words, *credential_options(credentials), *extra], timeout=60, hint="run ./build.py doctor")
        with Qmp(sockets / "qmp") as qmp:
            ports = forwarded(qmp.human("info usernet"))
        instance = replace(instance, ports=frozen_map(ports))
        write_ssh_config(instance, sockets)
        save(instance)
    except BaseException:
        Qemu().down(instance)
        raise
    return instance


def write_ssh_config(instance: Instance, sockets: Path) -> None:
    """An ssh_config with which `ssh`, testinfra and people reach the node; connections are shared."""
    folder = instance.folder
    (folder / "ssh_config").write_text(
        f"""Host {instance.name}
  HostName {instance.address}
  Port {instance.ports["22"]}
  User root
  IdentityFile "{folder / "id_ed25519"}"
  IdentitiesOnly yes
  StrictHostKeyChecking accept-new
  UserKnownHostsFile "{folder / "known_hosts"}"
  LogLevel ERROR
  ServerAliveInterval 20
  ControlMaster auto
  ControlPath {sockets / "ssh"}
  ControlPersist 300
""",
        encoding="utf-8",
    )


def install(request: Request, folder: Path, credentials: Mapping[str, bytes]) -> None:
    """Run the unattended installation of the ISO onto the fresh disk, to its end. Raises NodeError when it fails."""
    kernel, initrd, cmdline = kernel_of_iso(request.image, folder)
    disk = {"ahci": "/dev/sda", "virtio": "/dev/vda", "nvme": "/dev/nvme0n1"}.get(
        request.hardware.get("disk", "virtio"), "/dev/sda"
    )
    line = f"{cmdline} samepage.install=auto samepage.disk={disk} samepage.onfail=poweroff"
    extra = ["-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd), "-append", line]
    instance = start(request, folder, credentials, extra)
    try:
        wait_installed(instance, request.deadline)
    except BaseException:
        Qemu().down(instance)
        raise
    Qemu().down(instance)
    (folder / "console.log").replace(folder / "install.log")
    for file in (kernel, initrd, folder / "known_hosts"):
        file.unlink(missing_ok=True)


def wait_installed(instance: Instance, deadline: float) -> None:
    """The installer restarts the machine when it is done, and switches it off when it failed."""
    end = time.monotonic() + deadline
    reason = ""
    with suppress(EndedError), Qmp(Path(instance.details["sockets"]) / "qmp") as qmp:
        while not reason and time.monotonic() < end:
            event = qmp.next_event("SHUTDOWN", 1.0)
            reason = str(event["data"]["reason"]) if event else ""
    if reason != "guest-reset":
        how = f"ended with {reason}" if reason else f"was not done within {deadline:.0f} s"
        raise NodeError(
            f"the installation of {instance.name!r} {how}\n{tail(instance.console_log)}",
            hint="the lines above are the installer's; give it longer with --timeout",
        )


def kernel_of_iso(iso: Path, folder: Path) -> tuple[Path, Path, str]:
    """Copies kernel and initrd of the ISO's release into the folder; returns them and the live command line."""
    from pycdlib import PyCdlib
    from pycdlib.pycdlibexception import PyCdlibException

    image = PyCdlib()
    image.open(str(iso))
    try:
        releases = f"/{paths.MEDIUM_ROOT}/{paths.RELEASES}"
        names = [
            entry.rock_ridge.name().decode() for entry in image.list_children(rr_path=releases) if entry.rock_ridge
        ]
        version = next(name for name in names if name not in (".", ".."))
        record = io.BytesIO()
        image.get_file_from_iso_fp(record, rr_path=f"{releases}/{version}/release.json")
        kernel = parse(record.getvalue()).kernel
        for name in ("vmlinuz", "initrd"):
            place = f"/{paths.MEDIUM_ROOT}/{paths.KERNELS}/{kernel.id}/{name}"
            image.get_file_from_iso(str(folder / name), rr_path=place)
    except (StopIteration, PyCdlibException) as error:
        raise NodeError(f"{iso} is not an ISO of the appliance", hint="build one with: ./build.py iso") from error
    finally:
        image.close()
    return folder / "vmlinuz", folder / "initrd", f"{kernel.cmdline} samepage.mode=live samepage.release={version}"


def _pid(folder: Path) -> int:
    try:
        return int((folder / "pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
