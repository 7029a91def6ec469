"""Lengths of time and sizes as people write them."""


def span(seconds: float | None) -> str:
    """Return a length of time in its two largest units."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(abs(seconds)), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def size_text(num_bytes: float) -> str:
    """Return a size in the unit that suits it, with three digits: 900 bytes, 1.59 MB, 63.4 GB."""
    for unit, factor in {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if num_bytes >= factor:
            in_unit = num_bytes / factor
            return f"{in_unit:.3g} {unit}" if in_unit < 999.5 else f"{in_unit:,.0f} {unit}"
    return f"{num_bytes:.0f} bytes"
