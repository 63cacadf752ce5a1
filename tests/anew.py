"""Files that a test writes again and again."""

from pathlib import Path


def write_anew(path: Path, content: bytes) -> None:
    """Write a file that may be there: to empty one that is there costs some disks sixty times the time."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
