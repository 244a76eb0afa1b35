"""Nodes as system containers under a Docker engine: the same layers, systemd as the first process, seconds to start.

The container gets the few capabilities that systemd and the firewall need instead of --privileged. Its root is
read-only like a machine's; /var and /state are volumes that end with it.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from appliance.container import ARCHIVES, BASE_RECORD
from appliance.errors import HostError
from appliance.model import frozen_map
from appliance.store import digest_of_files
from appliance.targets.base import GUEST_PORTS, Instance, NodeError, Request, State, Target, save

REPOSITORY = "samepage-appliance"
CAPABILITIES = (
    "SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "MKNOD", "SYS_CHROOT", "NET_BIND_SERVICE", "AUDIT_WRITE", "SYSLOG",
)  # fmt: skip
CREDENTIALS = "/run/host/credentials"
INIT = "/usr/lib/systemd/systemd"


@contextmanager
def engine() -> Iterator[Any]:
    """A connection to the engine. Raises HostError where none answers, NodeError with the engine's own words."""
    import docker
    from docker.errors import APIError, BuildError, DockerException

    try:
        client = docker.from_env(timeout=300)
        client.ping()
    except DockerException as error:
        raise HostError(
            "no Docker engine answers", hint="run ./build.py doctor, which says how to start one"
        ) from error
    try:
        yield client
    except (APIError, BuildError) as error:
        raise NodeError(
            f"the Docker engine refused: {getattr(error, 'explanation', None) or error}",
            hint="docker logs may say more",
        ) from error
    finally:
        client.close()


class Docker(Target):
    """System containers under Docker."""

    name = "docker"

    def up(self, request: Request, folder: Path) -> Instance:
        with engine() as client:
            image = ensure_image(client, request.image)
            container = client.containers.create(image, **options(request, folder))
            instance = Instance(
                name=request.name, target=self.name, folder=folder, address="127.0.0.1", ports=frozen_map(),
                details=frozen_map({"container": container.name, "image": image}),
            )  # fmt: skip
            try:
                save(instance)
                container.start()
                container.reload()
                instance = Instance(
                    name=instance.name, target=self.name, folder=folder, address=instance.address,
                    ports=frozen_map(published(container.attrs)), details=instance.details,
                )  # fmt: skip
                save(instance)
            except BaseException:
                container.remove(force=True, v=True)
                raise
        return instance

    def down(self, instance: Instance) -> None:
        from docker.errors import NotFound

        with engine() as client, suppress(NotFound):
            client.containers.get(instance.details["container"]).remove(force=True, v=True)

    def state(self, instance: Instance) -> State:
        from docker.errors import NotFound

        with engine() as client:
            try:
                status = client.containers.get(instance.details["container"]).status
            except NotFound:
                return "absent"
        return "running" if status == "running" else "stopped"

    def how_it_ended(self, instance: Instance) -> str:
        from docker.errors import NotFound

        with engine() as client:
            try:
                state = client.containers.get(instance.details["container"]).attrs["State"]
            except NotFound:
                return "is gone"
        killed = " for want of memory" if state["OOMKilled"] else ""
        return f"ended with status {state['ExitCode']}{killed}"

    def command(self, instance: Instance, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        options = ["-i", *(["-t"] if terminal else [])]
        return ["docker", "exec", *options, instance.details["container"], *(words or ["/bin/bash", "-l"])]

    def connection(self, instance: Instance) -> tuple[str, tuple[str, ...]]:
        return f"docker://{instance.details['container']}", ()

    def console(self, instance: Instance) -> str:
        with engine() as client:
            log: bytes = client.containers.get(instance.details["container"]).logs()
        return log.decode(errors="replace").rstrip()


def ensure_image(client: Any, description: Path) -> str:
    """The image of the description, made where the engine lacks it; the base is imported once per digest."""
    from docker.errors import ImageNotFound

    base = json.loads((description / BASE_RECORD).read_text(encoding="utf-8"))
    base_tag, tag = base["digest"][:16], digest_of_files({name: description / name for name in ARCHIVES})[:16]
    try:
        client.images.get(f"{REPOSITORY}:{base_tag}-{tag}")
    except ImageNotFound:
        try:
            client.images.get(f"{REPOSITORY}-base:{base_tag}")
        except ImageNotFound:
            client.api.import_image(src=base["tar"], repository=f"{REPOSITORY}-base", tag=base_tag)
        context = build_context(description, f"{REPOSITORY}-base:{base_tag}")
        client.images.build(fileobj=context, custom_context=True, tag=f"{REPOSITORY}:{base_tag}-{tag}", rm=True)
    return f"{REPOSITORY}:{base_tag}-{tag}"


def forget_images() -> int:
    """Remove the images that no container uses; returns how many. Raises HostError without an engine."""
    from docker.errors import APIError

    removed = 0
    with engine() as client:
        for name in (REPOSITORY, f"{REPOSITORY}-base"):
            for tag in [tag for image in client.images.list(name) for tag in image.tags]:
                with suppress(APIError):  # in use
                    client.images.remove(tag)
                    removed += 1
    return removed


def build_context(description: Path, base: str) -> io.BytesIO:
    """What the engine builds the image from, as a tar."""
    lines = [f"FROM {base}", *(f"ADD {name} {target}" for name, target in ARCHIVES.items())]
    lines += ["ENV container=docker", "STOPSIGNAL SIGRTMIN+3", f'CMD ["{INIT}"]']
    recipe = ("\n".join(lines) + "\n").encode()
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        member = tarfile.TarInfo("Dockerfile")
        member.size = len(recipe)
        tar.addfile(member, io.BytesIO(recipe))
        for name in ARCHIVES:
            tar.add(description / name, name)
    context.seek(0)
    return context


def options(request: Request, folder: Path) -> dict[str, Any]:
    """What the engine is asked for besides the image."""
    volumes = {"/sys/fs/cgroup": {"bind": "/sys/fs/cgroup", "mode": "rw"}}  # systemd manages its own part of it
    environment: dict[str, str] = {"container": "docker"}
    if request.credentials:
        place = folder / "credentials"
        place.mkdir(mode=0o700)
        for name, value in request.credentials.items():
            (place / name).write_bytes(value)
        volumes[str(place.resolve())] = {"bind": CREDENTIALS, "mode": "ro"}
        environment["CREDENTIALS_DIRECTORY"] = CREDENTIALS
    return {
        "name": f"{REPOSITORY}-{request.name}-{os.getpid()}",
        "hostname": request.name,
        "command": [INIT],
        "tty": True,
        "cgroupns": "host",  # the tree above is the host's, and so must be the paths in it
        "read_only": True,
        "cap_add": list(CAPABILITIES),
        "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
        "tmpfs": {"/run": "mode=755,exec", "/tmp": "mode=1777", "/run/lock": ""},
        "volumes": [*(f"{host}:{bound['bind']}:{bound['mode']}" for host, bound in volumes.items()), "/var", "/state"],
        "ports": {f"{port}/tcp": ("127.0.0.1", None) for port in GUEST_PORTS},
        "environment": environment,
        "mem_limit": f"{request.memory}m",
        "labels": {"samepage.node": request.name, "samepage.folder": str(folder)},
    }


def published(attributes: Mapping[str, Any]) -> dict[str, int]:
    """Guest port -> host port out of the engine's description of a container."""
    ports = attributes["NetworkSettings"]["Ports"] or {}
    return {name.removesuffix("/tcp"): int(bound[0]["HostPort"]) for name, bound in ports.items() if bound}
