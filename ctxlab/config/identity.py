"""When two configs are the same computation: the hash that a sweep resumes by."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel


def identity_fields(config: BaseModel) -> dict[str, Any]:
    """The config as plain JSON, without the fields that its schema marks `identity=False` (logger, paths, note)."""
    plain: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        plain[name] = _plain(getattr(config, name))
    return plain


def identity(config: BaseModel, fingerprint: str = "") -> str:
    """sha256 (hex) of a config, read through today's schema, and of its data's fingerprint."""
    text = json.dumps([identity_fields(config), fingerprint], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """`model.d_model is 128 here, 256 there`: every leaf in which two plain configs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(ours.keys() | theirs.keys()):
            here = f"{path}.{key}" if path else key
            lines += differences(ours.get(key, "absent"), theirs.get(key, "absent"), here)
        return lines
    return [] if ours == theirs else [f"{path} is {json.dumps(ours)} here, {json.dumps(theirs)} there"]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity_fields(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value
