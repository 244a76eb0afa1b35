"""The numbers of users and groups: Debian's static ones, which every system has, and those the recipes fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from appliance.model import Recipe


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (entry.partition(":") for entry in text.split())}


_BOTH = _numbers("root:0 daemon:1 bin:2 sys:3 lp:7 mail:8 news:9 uucp:10 proxy:13 www-data:33 backup:34 list:38 irc:39")
STATIC_USERS = _BOTH | _numbers("sync:4 games:5 man:6 _apt:42 nobody:65534")
STATIC_GROUPS = _BOTH | _numbers(
    "adm:4 tty:5 disk:6 man:12 kmem:15 dialout:20 fax:21 voice:22 cdrom:24 floppy:25 tape:26 sudo:27 audio:29 dip:30 "
    "operator:37 src:40 shadow:42 utmp:43 video:44 sasl:45 plugdev:46 staff:50 games:60 users:100 nogroup:65534"
)


def user_ids(recipes: Iterable[Recipe]) -> Mapping[str, int]:
    """Every user an owner may name, with its number."""
    own = {user.name: user.uid for recipe in recipes for user in recipe.users if not user.group_only}
    return STATIC_USERS | own


def group_ids(recipes: Iterable[Recipe]) -> Mapping[str, int]:
    """Every group an owner may name, with its number."""
    return STATIC_GROUPS | {user.name: user.uid for recipe in recipes for user in recipe.users}
