import pytest

SQL = """
SELECT 'name=' || name || '=' || setting || coalesce(unit, '') FROM pg_settings WHERE name IN
  ('jit', 'data_checksums', 'listen_addresses', 'shared_buffers', 'server_version_num', 'max_connections');
SELECT 'identifier=' || system_identifier FROM pg_control_system();
SELECT 'database=' || datname || '=' || pg_get_userbyid(datdba) || '=' || pg_encoding_to_char(encoding) || '='
  || datlocprovider::text || datlocale || '=' || has_database_privilege('pg_read_all_data', datname, 'CONNECT')
  FROM pg_database;
SELECT 'password=' || count(*) FROM pg_authid WHERE rolpassword IS NOT NULL;
"""
AS = "setpriv --reuid=%s --regid=%s --clear-groups /usr/lib/postgresql/17/bin/psql -XAtq -h /run/postgresql"


@pytest.fixture(scope="module")
def seen(host):
    told = host.check_output(AS + " -d postgres -c %s", "postgres", "postgres", SQL).splitlines()
    facts = {}
    for line in told:
        kind, *rest = line.split("=")
        facts.setdefault(kind, []).append(rest)
    facts["name"] = dict(facts["name"])
    return facts


def test_version(seen):
    """It is PostgreSQL 17"""
    assert seen["name"]["server_version_num"].startswith("17")


def test_socket_only(host, seen):
    """It listens on its socket only"""
    assert seen["name"]["listen_addresses"] == ""
    assert not host.socket("tcp://127.0.0.1:5432").is_listening


def test_tuned(host, seen):
    """Its buffers follow the node's memory share, and queries are not compiled"""
    lines = host.file("/etc/postgresql/postgresql.conf").content_string.splitlines()
    wanted = next(line.split("=")[1].strip(" MB") for line in lines if line.startswith("shared_buffers"))
    assert int(seen["name"]["shared_buffers"].removesuffix("8kB")) * 8 == int(wanted) * 1024
    assert seen["name"]["jit"] == "off"


def test_checksums(seen):
    """Its pages carry checksums"""
    assert seen["name"]["data_checksums"] == "on"


def test_own_identity(seen):
    """The cluster has an identifier of its own, not the template's"""
    assert int(seen["identifier"][0][0]) != 0


def test_locale(seen):
    """Every database is UTF-8 with an order that no library's update can change"""
    assert {(encoding, locale) for _, _, encoding, locale, _ in seen["database"]} == {("UTF8", "bC.UTF-8")}


@pytest.mark.needs("samepage")
def test_component_database(host, seen):
    """A component's database belongs to its role, which only its own user can be"""
    databases = {name: (owner, others) for name, owner, _, _, others in seen["database"]}
    assert databases["samepage"] == ("samepage", "false")
    asked = "SELECT current_user || '@' || current_database()"
    assert host.check_output(AS + " -d samepage -c %s", "samepage", "samepage", asked) == "samepage@samepage"
    for role in ("samepage", "postgres"):
        refused = host.run(AS + " -U %s -d samepage -c 'SELECT 1'", "www-data", "www-data", role)
        assert refused.rc != 0
        assert "Peer authentication failed" in refused.stderr


def test_root_is_postgres(host):
    """A root shell, and what looks after the server as root, is the role postgres"""
    asked = "/usr/lib/postgresql/17/bin/psql -XAtq -h /run/postgresql -U postgres -c 'SELECT current_user'"
    assert host.check_output(asked) == "postgres"


def test_no_passwords(seen):
    """No role has a password"""
    assert seen["password"] == [["0"]]


def test_data_is_private(host):
    """Only the server's user can enter its data"""
    folder = host.file("/var/lib/postgresql/17/main")
    assert (folder.user, folder.group, folder.mode) == ("postgres", "postgres", 0o700)


def test_no_leftovers(host):
    """No half-made cluster is left over from the first boot"""
    assert host.check_output("ls /var/lib/postgresql/17") == "main"
