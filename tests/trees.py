"""A small valid project, and the changes that break it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

Change = Callable[[Path], None]

VALID = {
    "recipes/base/recipe.yaml": """\
summary: What every node boots from
packages: [systemd, openssh-server]
ports:
  ssh: {port: 22, exposure: public}
units:
  ssh.service: {on_change: reload}
mask: [apt-daily.timer]
memory: {weight: 0, minimum: 100}
health:
  - {name: ssh, tcp: "127.0.0.1:{{ ports.ssh }}"}
""",
    "recipes/base/templates/etc/hostname.j2": "{{ node.name }}\n",
    "recipes/store/recipe.yaml": """\
summary: Keeps the data
packages: [store-server]
users:
  store: {uid: 810, home: /var/lib/store}
ports:
  store: {port: 5000, exposure: cluster}
provides:
  store: {port: store, socket: /run/store/socket}
units:
  store.service: {}
state:
  /var/lib/store: {owner: store, mode: "0700", class: data}
memory: {weight: 3, minimum: 64}
files:
  /etc/store/store.conf: {owner: root, group: store, mode: "0640"}
health:
  - {name: running, unit: store.service}
  - {name: answers, unix: /run/store/socket, timeout: 2}
settings:
  connections: 20
  durable: true
  label: main
""",
    "recipes/store/templates/etc/store/store.conf.j2": """\
# rendered for {{ node.name }}
memory = {{ memory }}
port = {{ ports.store }}
connections = {{ settings.connections }}
{% if settings.durable %}
durable
{% endif %}
""",
    "recipes/web/recipe.yaml": """\
summary: Answers requests
packages: [python3]
wheels:
  - requirement: tiny==1.0
    sha256: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
users:
  web: {uid: 820, groups: [store]}
ports:
  web: {port: 443, exposure: public}
provides:
  web: {port: web}
needs:
  - store
units:
  web.service: {on_change: reload, watch: [/etc/web/]}
state:
  /var/lib/web: {owner: web, class: data}
  /state/identity/web: {owner: web, mode: "0700"}
memory: {weight: 1, minimum: 32}
health:
  - {name: page, http: "http://127.0.0.1:{{ ports.web }}/", expect: "200 ok"}
settings:
  workers: 4
  colours: {page: white, text: black}
schema_level: 2
""",
    "recipes/web/templates/etc/web/web.json.j2": """\
{"store": {{ endpoints.store.socket | tojson }}, "host": {{ endpoints.store.host | tojson }},
 "workers": {{ settings.workers }}}
""",
    "recipes/web/templates/etc/systemd/system/web.service.j2": """\
[Service]
User=web
ExecStart=/opt/samepage/bin/web --port {{ ports.web }}

[Install]
WantedBy=multi-user.target
""",
    "recipes/web/files/opt/samepage/bin/web": "#!/bin/sh\nexec true\n",
    "recipes/layouts/one.yaml": """\
summary: Everything on one node
nodes:
  all:
    recipes: [base, store, web]
    memory: 512
settings:
  web:
    workers: 8
""",
    "recipes/layouts/two.yaml": """\
summary: The data on a node of its own
nodes:
  front:
    recipes: [base, web]
    memory: 256
    address: 10.0.0.1
  data:
    recipes: [base, store]
    memory: 512
    address: 10.0.0.2/16
""",
}



def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write the files of a project; a file that begins with #! is executable."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if text.startswith("#!"):
            path.chmod(0o755)
    return root


def edit(name: str, old: str, new: str) -> Change:
    """Replace the one occurrence of a text in a file."""

    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        (root / name).write_text(text.replace(old, new))

    return change


def add(name: str, text: str) -> Change:
    """Write a new file, or text at the end of one."""

    def change(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    return change


def add_bytes(name: str, content: bytes) -> Change:
    """Write a new file that need not be text."""

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


def remove(name: str) -> Change:
    return lambda root: (root / name).unlink()


def link(name: str, target: str) -> Change:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)

    return change


STORE = "recipes/store/recipe.yaml"
WEB = "recipes/web/recipe.yaml"
ONE = "recipes/layouts/one.yaml"
TWO = "recipes/layouts/two.yaml"
CONF = "recipes/store/templates/etc/store/store.conf.j2"
WEB_JSON = "recipes/web/templates/etc/web/web.json.j2"
WEB_UNIT = "recipes/web/templates/etc/systemd/system/web.service.j2"

# What is wrong -> the changes that make it so. The complete message of each stands in tests/golden/broken/.
BROKEN: dict[str, list[Change]] = {
    # the syntax of YAML
    "yaml-syntax": [edit(WEB, "users:", "users: [")],
    "yaml-tab": [edit(WEB, "  web: {port: 443", "\tweb: {port: 443")],
    "yaml-duplicate-key": [edit(WEB, "schema_level: 2", "schema_level: 2\nsummary: Another")],
    "yaml-alias": [edit(WEB, "needs:\n  - store", "needs: &needs\n  - store\nmask: *needs")],
    "yaml-tag": [edit(WEB, "summary: Answers", "summary: !!python/name:os.system Answers")],
    "yaml-key-is-no-text": [edit(WEB, "  colours:", "  80: eighty\n  colours:")],
    "yaml-empty-file": [remove(WEB), add(WEB, "# nothing yet\n")],
    "yaml-two-documents": [add(WEB, "---\nsummary: Another\n")],
    "yaml-not-utf8": [remove(WEB), add_bytes(WEB, b"summary: Web\npackages: [caf\xe9]\n")],
    "yaml-too-deep": [add(WEB, "mask: " + "[" * 20 + "]" * 20 + "\n")],
    # the schema of a recipe
    "recipe-without-yaml": [remove(WEB)],
    "recipe-unknown-key": [edit(WEB, "needs:", "neds:")],
    "recipe-missing-summary": [edit(WEB, "summary: Answers requests\n", "")],
    "recipe-no-value": [edit(WEB, "needs:\n  - store", "needs:")],
    "recipe-wrong-types": [
        edit(WEB, "packages: [python3]", "packages: python3"),
        edit(WEB, "schema_level: 2", "schema_level: two"),
        edit(WEB, "memory: {weight: 1, minimum: 32}", "memory: 32"),
    ],
    "recipe-package-name": [edit(WEB, "[python3]", "[Python_3, python3, python3]")],
    "recipe-port-range": [edit(WEB, "port: 443", "port: 70000")],
    "recipe-port-exposure": [edit(WEB, "exposure: public", "exposure: pubic")],
    "recipe-unknown-key-inside": [edit(WEB, "{port: 443,", "{port: 443, protocl: tcp,")],
    "recipe-uid-range": [edit(WEB, "uid: 820", "uid: 1000")],
    "recipe-static-user": [edit(WEB, "  web: {uid: 820", "  www-data: {uid: 830}\n  web: {uid: 820")],
    "recipe-unknown-group": [edit(WEB, "groups: [store]", "groups: [stoer]")],
    "recipe-endpoint-port": [edit(WEB, "web: {port: web}", "web: {port: wb}")],
    "recipe-endpoint-empty": [edit(WEB, "web: {port: web}", "web: {}")],
    "recipe-mode": [edit(WEB, 'mode: "0700"', "mode: rwx")],
    "recipe-state-place": [edit(WEB, "/var/lib/web:", "/srv/web:")],
    "recipe-state-class": [edit(WEB, '{owner: web, mode: "0700"}', "{owner: web, class: data}")],
    "recipe-state-owner": [edit(WEB, "/var/lib/web: {owner: web", "/var/lib/web: {owner: wbe")],
    "recipe-unit-without-file": [remove(WEB_UNIT), edit(WEB, "on_change: reload,", "own: true,")],
    "recipe-unit-undeclared": [add("recipes/web/files/etc/systemd/system/extra.service", "[Service]\nUser=web\n")],
    "recipe-unit-name": [edit(WEB, "web.service: {", "web.servce: {")],
    "recipe-unit-watch": [edit(WEB, "watch: [/etc/web/]", "watch: [/etc/wob/]")],
    "recipe-probe-kind": [edit(WEB, "{name: page, http:", "{name: page, https:")],
    "recipe-probe-two-kinds": [edit(WEB, "{name: page,", "{name: page, unit: web.service,")],
    "recipe-probe-unit": [edit(STORE, "unit: store.service", "unit: stor.service")],
    "recipe-probe-expect": [edit(STORE, "unit: store.service", "unit: store.service, expect: '200'")],
    "recipe-probe-status": [edit(WEB, 'expect: "200 ok"', "expect: 200")],
    "recipe-wheel-hash": [edit(WEB, "sha256: aaaa", "sha256: zzzz")],
    "recipe-setting-name": [edit(WEB, "  workers: 4", "  workers: 4\n  items: 3")],
    "recipe-owned-file": [edit(STORE, "/etc/store/store.conf:", "/etc/store/stor.conf:")],
    "recipe-build-file": [edit(WEB, "schema_level: 2", "schema_level: 2\nbuild: build.sh")],
    "recipe-include-outside": [edit(WEB, "schema_level: 2", "schema_level: 2\ninclude: {opt/samepage/lib/x: ../x}")],
    "recipe-include-missing": [edit(WEB, "schema_level: 2", "include: {opt/samepage/lib/x: product/x}")],
    "recipe-stray-folder": [add("recipes/web/template/etc/x.j2", "x\n")],
    "recipe-folder-name": [add("recipes/Web 2/recipe.yaml", "summary: x\n")],
    # files and links
    "file-outside": [add("recipes/web/files/usr/bin/web", "#!/bin/sh\n")],
    "file-link-climbs": [link("recipes/web/files/etc/web/up", "../../../../secret")],
    "file-twice": [add("recipes/web/files/etc/web/web.json", "{}\n")],
    "file-odd-name": [add("recipes/web/files/etc/web/caf\u00e9", "x\n")],
    "template-is-link": [link("recipes/web/templates/etc/web/other.j2", "web.json.j2")],
    "template-without-j2": [add("recipes/web/templates/etc/web/plain.conf", "x\n")],
    # the layout
    "layout-unknown-recipe": [edit(ONE, "[base, store, web]", "[base, stor, web]")],
    "layout-unknown-key": [edit(ONE, "nodes:", "node:")],
    "layout-unknown-node-key": [edit(ONE, "    memory: 512", "    memroy: 512")],
    "layout-no-nodes": [edit(ONE, "nodes:\n  all:\n    recipes: [base, store, web]\n    memory: 512", "nodes: {}")],
    "layout-without-base": [edit(ONE, "[base, store, web]", "[store, web]")],
    "layout-recipe-twice": [edit(ONE, "[base, store, web]", "[base, store, web, web]")],
    "layout-address": [edit(ONE, "    memory: 512", "    memory: 512\n    address: 10.0.0.256")],
    "layout-memory-too-small": [edit(ONE, "memory: 512", "memory: 192")],
    "layout-needs-not-placed": [edit(ONE, "[base, store, web]", "[base, web]")],
    "layout-setting-unknown": [edit(ONE, "workers: 8", "wokers: 8\n    colours: {pag: red}")],
    "layout-setting-type": [edit(ONE, "workers: 8", "workers: many\n    colours: {page: 7}")],
    "layout-setting-recipe": [edit(ONE, "  web:\n    workers: 8", "  wob:\n    workers: 8")],
    "need-unknown": [edit(WEB, "- store", "- stor")],
    "layout-name": [],  # there is no such layout
    # several nodes
    "nodes-local-endpoint": [edit(STORE, "exposure: cluster", "exposure: local")],
    "nodes-no-address": [edit(TWO, "    address: 10.0.0.2/16\n", "")],
    "nodes-same-address": [edit(TWO, "10.0.0.2/16", "10.0.0.1")],
    "nodes-several-providers": [
        add(TWO, "  more:\n    recipes: [base, store]\n    memory: 512\n    address: 10.0.0.3\n"),
    ],
    # collisions
    "collision-port": [edit(WEB, "port: 443", "port: 5000")],
    "collision-uid": [edit(WEB, "uid: 820", "uid: 810")],
    "collision-user": [edit(WEB, "  web: {uid: 820", "  store: {uid: 811}\n  web: {uid: 820")],
    "collision-state": [edit(WEB, "/var/lib/web:", "/var/lib/store:")],
    "collision-file": [add("recipes/web/files/etc/store/store.conf", "x\n")],
    "collision-file-and-folder": [add("recipes/web/files/etc/store/store.conf/more", "x\n")],
    "collision-unit": [edit(WEB, "  web.service:", "  store.service: {}\n  web.service:")],
    "collision-masked-unit": [edit(WEB, "schema_level: 2", "schema_level: 2\nmask: [store.service]")],
    "collision-endpoint": [edit(WEB, "  web: {port: web}", "  store: {port: web}")],
    "collision-generated-file": [add("recipes/web/files/etc/samepage/node.json", "{}\n")],
    # templates
    "template-syntax": [edit(CONF, "{% endif %}", "{% endfi %}")],
    "template-undefined": [edit(CONF, "{{ memory }}", "{{ memry }}")],
    "template-undefined-setting": [edit(CONF, "settings.connections", "settings.conections")],
    "template-undefined-endpoint": [edit(CONF, "{{ memory }}", "{{ endpoints.web.host }}")],
    "template-wrong-type": [edit(CONF, "{{ memory }}", "{{ memory + 'M' }}")],
    "template-include": [edit(CONF, "durable\n{% endif", "{% include 'durable.conf' %}\n{% endif")],
    "template-not-json": [edit(WEB_JSON, "settings.workers }}", "settings.workers }},")],
    "template-unit-without-section": [edit(WEB_UNIT, "[Service]\n", "")],
    "template-unit-stray-line": [edit(WEB_UNIT, "User=web", "User web")],
    "template-not-utf8": [remove(CONF), add_bytes(CONF, b"# first\nname = caf\xe9\n")],
    "template-node-in-app-layer": [add("recipes/web/templates/opt/samepage/share/where.j2", "{{ node.name }}\n")],
    "template-probe": [edit(WEB, "{{ ports.web }}", "{{ ports.wob }}")],
    # many at once: one run reports them all
    "many-at-once": [
        edit(WEB, "needs:\n  - store", "neds:\n  - store"),
        edit(WEB, "uid: 820", "uid: 20"),
        edit(STORE, "connections: 20", "connections: 20\n  connections: 21"),
        edit(ONE, "workers: 8", "wokers: 8"),
        edit(CONF, "{{ memory }}", "{{ memry }} {{ nod.name }}"),
        add("recipes/web/files/usr/bin/web", "x\n"),
    ],
}


# The same for the lock, which is made for the valid project: the text to replace in it, and what to put there.
BROKEN_LOCK: dict[str, tuple[str, str]] = {
    "lock-not-json": ('"epoch": 1', '"epoch": 1,'),
    "lock-empty": ("*", ""),
    "lock-format": ('"format": 1', '"format": 99'),
    "lock-key-missing": ('"epoch": 1,', ""),
    "lock-other-suite": ('"suite": "trixie"', '"suite": "bookworm"'),
    "lock-package-missing": ('"store-server", ', ""),
    "lock-package-not-asked-for": ('"python3", ', '"python2", "python3", '),
    "lock-sha256": ("b" * 64, "b" * 40),
    "lock-architecture": ('"architecture": "amd64"', '"architecture": "arm64"'),
    "lock-path-leaves": ('"path": "pool/', '"path": "../pool/'),
}


def layout_of(kind: str) -> str:
    """The layout that a kind of BROKEN is tried with."""
    if kind == "layout-name":
        return "on"
    return "two" if kind.startswith("nodes-") else "one"
