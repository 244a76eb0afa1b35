"""A browser's time zone from what it tells."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

# One well-known zone for each pair of offsets, the more likely ones first.
_LIKELY = (
    "UTC", "Europe/London", "Europe/Prague", "Europe/Athens", "Europe/Istanbul", "America/New_York",
    "America/Chicago", "America/Denver", "America/Los_Angeles", "America/Phoenix", "America/Anchorage",
    "Pacific/Honolulu", "America/Halifax", "America/St_Johns", "America/Bogota", "America/Caracas", "America/Santiago",
    "America/Sao_Paulo", "Atlantic/Azores", "Atlantic/Cape_Verde", "Africa/Lagos", "Africa/Johannesburg",
    "Asia/Tehran", "Asia/Dubai", "Asia/Kabul", "Asia/Karachi", "Asia/Kolkata", "Asia/Kathmandu", "Asia/Dhaka",
    "Asia/Yangon", "Asia/Bangkok", "Asia/Shanghai", "Asia/Tokyo", "Australia/Darwin", "Australia/Brisbane",
    "Australia/Adelaide", "Australia/Sydney", "Pacific/Noumea", "Pacific/Auckland", "Pacific/Tongatapu",
    "Pacific/Kiritimati", "Pacific/Pago_Pago",
)  # fmt: skip
_YEAR = 2025


def detect(zone: str, january: int, july: int) -> str:
    """`zone` if it exists, otherwise a zone with these offsets (minutes east of UTC), otherwise UTC."""
    if zone and _exists(zone):
        return zone
    wanted = (timedelta(minutes=january), timedelta(minutes=july))
    for name in _LIKELY:
        if _exists(name) and _offsets(name) == wanted:
            return name
    return "UTC"


def _exists(zone: str) -> bool:
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _offsets(zone: str) -> tuple[timedelta | None, timedelta | None]:
    there = ZoneInfo(zone)
    return datetime(_YEAR, 1, 15, tzinfo=there).utcoffset(), datetime(_YEAR, 7, 15, tzinfo=there).utcoffset()
