"""Field types that read a unit: a length (`2k`), a count (`5M`), memory (`16GiB`), a time (`15min`). Values are SI numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ctxlab.units import parse_bytes, parse_count, parse_length, parse_seconds

Length = Annotated[int, BeforeValidator(lambda v: parse_length(v) if isinstance(v, str) else v), Field(gt=0)]
Count = Annotated[int, BeforeValidator(lambda v: parse_count(v) if isinstance(v, str) else v), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(lambda v: parse_bytes(v) if isinstance(v, str) else v), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(lambda v: parse_seconds(v) if isinstance(v, str) else v), Field(gt=0)]

# An absent option is spelled `none`, a derived one `auto`; the union takes the word first.
OrNone = Literal["none"]
OrAuto = Literal["auto"]
