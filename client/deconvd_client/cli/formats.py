"""How sizes, times and parts are written for people."""

from __future__ import annotations

__all__ = ["format_bytes", "format_duration", "format_part"]

_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(size_bytes: float) -> str:
    """Return a size with a unit of powers of 1000, as ``1.5 MB``."""
    size, units = size_bytes, iter(_UNITS)
    unit = next(units)
    while size >= 999.95 and unit != _UNITS[-1]:
        size, unit = size / 1000, next(units)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def format_duration(duration_s: float) -> str:
    """Return a time in its two largest units, as ``3 h 20 min``."""
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_part(part: float | None) -> str:
    """Return a part of 1 in percent; a dash if it is None."""
    return "-" if part is None else f"{100 * part:.0f} %"
