"""The files around the code: make targets, the CI entry, the Vagrantfile, the pinned requirements."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from appliance import cli

ROOT = Path(__file__).parents[2]
# Stands for Vagrant: writes down what the Vagrantfile asks of it.
VAGRANT = r"""
class Recorder
  def initialize(name) = @name = name
  def respond_to_missing?(*) = true
  def method_missing(name, *values, **named, &block)
    puts ["#{@name}.#{name}", *values, *named.values].join(" ") unless values.empty? && named.empty?
    inner = Recorder.new(values.first.is_a?(Symbol) ? values.first.to_s : name.to_s)
    block&.call(*[inner, Recorder.new("override")].first(block.arity))
    inner
  end
end
module Vagrant
  def self.configure(_version) = yield(Recorder.new("config"))
end
ARGV.replace([ENV.fetch("VERB")])
load "Vagrantfile"
"""


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    shown = subprocess.run(["make", "-s", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in targets[1].split():
        assert re.search(rf"^make {target} ", shown, re.MULTILINE), target


def test_make_targets_call_verbs() -> None:
    for verb in re.findall(r"^\t\./build\.py (\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert verb in cli.Verbs.home


def test_the_ci_entry_parses() -> None:
    subprocess.run(["sh", "-n", ROOT / ".ci/run"], check=True)
    script = (ROOT / ".ci/run").read_text()
    assert "make test" in script
    compile(script.split("<<'PYTHON'\n")[1].split("\nPYTHON\n")[0], ".ci/run", "exec")


def test_requirements_fit_the_project() -> None:
    def names(text: str) -> set[str]:
        return {re.split("[=<>]", line)[0].lower() for line in text.splitlines() if line and line[0] != "#"}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = names((ROOT / "requirements.txt").read_text())
    assert names("\n".join(project["dependencies"])) <= pinned
    extra = names("\n".join(project["optional-dependencies"]["dev"]))
    assert extra <= names((ROOT / "requirements-dev.txt").read_text())


@pytest.fixture
def vagrant(tmp_path: Path) -> Path:
    if shutil.which("ruby") is None:
        pytest.skip("ruby is not installed")
    if shutil.which("qemu-img") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("qemu-img or ssh-keygen is not installed")
    shutil.copy(ROOT / "Vagrantfile", tmp_path)
    return tmp_path


def run_vagrant(folder: Path, verb: str) -> subprocess.CompletedProcess[str]:
    command = ["ruby", "-W", "-e", VAGRANT]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "/usr/bin:/bin", "VERB": verb}, capture_output=True, text=True
    )


def test_vagrant_boots_the_newest_disk_with_its_own_key(vagrant: Path) -> None:
    (vagrant / "dist").mkdir()
    disk = vagrant / "dist" / "samepage-appliance-1-amd64.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "8G"], check=True)
    done = run_vagrant(vagrant, "up")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"qemu.image_path= {disk}" in done.stdout
    assert "ssh.username= root" in done.stdout
    assert done.stdout.count("io.systemd.credential.binary:ssh.authorized_keys.root=") == 2
    box = vagrant / ".samepage" / "vagrant" / "samepage.box"
    listed = subprocess.run(["tar", "-tf", box], capture_output=True, text=True, check=True).stdout.split()
    assert listed == ["metadata.json", "box.img"]


def test_vagrant_says_how_to_make_the_disk(vagrant: Path) -> None:
    done = run_vagrant(vagrant, "up")
    assert done.returncode == 1
    assert "./build.py disk --format qcow2" in done.stderr
    assert run_vagrant(vagrant, "status").returncode == 0
