"""What `inspect` found, as lines to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.memory import memory_lines

SHOWN = 50  # lines of metadata


def as_text(info: Mapping[str, Any]) -> str:
    """The result of `inspect` as lines to read; long lists and texts are cut."""
    lines = [("", info["path"])]
    for key in ("kind", "what", "format", "title", "prediction_type", "base_model", "resolution", "run"):
        if info.get(key):
            lines.append((key.replace("_", " ").replace("title", "family"), info[key]))
    for key, value in info.get("lora", {}).items():
        lines.append((key.replace("_", " "), json.dumps(value) if isinstance(value, dict) else value))
    if few := info.get("few_steps"):
        lines.append(("few steps", ", ".join(f"{name} {value}" for name, value in few.items())))
    lines.append(("parameters", f"{info['parameters']:,} ({_list(info['dtypes'])})"))
    for part, entry in info.get("parts", {}).items():
        lines.append(
            (f"  {part}", f"{entry['parameters']:,} {entry.get('class', '')} {_list(entry.get('dtypes', {}))}")
        )
    if memory := info.get("memory"):
        lines += memory_lines(memory)
    for key, value in list(info.get("metadata", {}).items())[:SHOWN]:
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append((f"  {key}", text if len(text) <= 100 else f"{text[:100]}… ({len(text):,} characters)"))
    for note in info.get("notes", ()):
        lines.append(("note", note))
    unapplied = info.get("unapplied", [])
    if unapplied:
        lines.append(("unapplied", f"{len(unapplied)} keys would not be applied"))
    for entry in unapplied[:10]:
        lines.append((f"  {entry['key']}", entry["why"]))
    return "\n".join(_printable(f"{name:<16} {value}" if name else str(value)) for name, value in lines)


def _list(dtypes: Mapping[str, int]) -> str:
    return ", ".join(dtypes)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in " ".join(text.split("\n"))).rstrip()
