"""Numbers to text and text to numbers: the only place where a quantity gets or loses its unit."""

from __future__ import annotations

import math
import re

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _split(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match:
        raise ValueError(f"'{text}' is not a number with a unit")
    return float(match[1]), match[2].lower()


def _whole(value: float, text: str) -> int:
    if value != int(value):
        raise ValueError(f"'{text}' is not a whole number")
    return int(value)


def parse_length(text: str | int) -> int:
    """A context length in tokens: `512`, `2k` = 2048, `1m` = 1,048,576. Lengths are powers of two, so k is 1024."""
    if isinstance(text, int):
        return text
    value, unit = _split(text)
    if unit not in _BINARY:
        raise ValueError(f"'{text}': a length is a whole number, or one with k or m (2k = 2048)")
    return _whole(value * _BINARY[unit], text)


def parse_count(text: str | int) -> int:
    """A budget in tokens or steps: `5000`, `300k`, `5M`, `1.2B`, decimal as budgets are quoted."""
    if isinstance(text, int):
        return text
    value, unit = _split(text)
    if unit not in _DECIMAL:
        raise ValueError(f"'{text}': a count is a whole number, or one with k, M, B or T (5M = 5,000,000)")
    return _whole(round(value * _DECIMAL[unit], 6), text)


def parse_bytes(text: str | int) -> int:
    """An amount of memory: `16GiB`, `500MB`, or plain bytes."""
    if isinstance(text, int):
        return text
    value, unit = _split(text)
    if (unit or "b") not in _BYTES:
        raise ValueError(f"'{text}': memory is a number with B, kB, MB, GB, KiB, MiB or GiB (16GiB)")
    return round(value * _BYTES[unit or "b"])


def parse_seconds(text: str | float) -> float:
    """A duration: `90`, `90s`, `15min`, `2h`."""
    if isinstance(text, int | float):
        return float(text)
    value, unit = _split(text)
    if (unit or "s") not in _SECONDS:
        raise ValueError(f"'{text}': a time is a number with s, min, h or d (15min)")
    return value * _SECONDS[unit or "s"]


def format_bytes(n: float) -> str:
    """`1536` -> `1.5 KiB`: binary units, three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}" if abs(n) < 999.5 else f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.3g} TiB" if abs(n) < 999.5 else f"{n:.0f} TiB"


def format_count(n: float) -> str:
    """`3145728` -> `3.15M`: decimal units, three significant digits."""
    for unit in ("", "k", "M", "B"):
        if abs(n) < 999.5:
            return f"{n:.0f}" if unit == "" else f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


def format_operations(n: float) -> str:
    """Floating-point operations: `3.82e13` -> `38.2 TFLOP`."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(n) < 999.5:
            return f"{n:.3g} {unit}FLOP"
        n /= 1000
    return f"{n:.3g} EFLOP"


def format_length(n: int) -> str:
    """A context length: `256`, `2k`, `128k`; lengths that are no multiple of 1024 stay whole."""
    if n >= 1024 and n % 1024 == 0:
        return f"{n // 1024}k" if n < 2**20 or n % 2**20 else f"{n // 2**20}m"
    return str(n)


def format_seconds(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`; `75` -> `1:15 min`; `4000` -> `1:06 h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
