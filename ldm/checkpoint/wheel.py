"""The build step that puts `weights/`, `configs/` and `docs/prompts/` into the wheel; see pyproject.toml.

setuptools loads this file by its path while it builds; the package itself never imports it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

SHIPPED = {
    "weights": "ldm/_weights",
    "configs": "ldm/_configs",
    "docs/prompts": "ldm/_prompts",
}  # in the checkout: in the wheel


class BuildWithData(build_py):
    """build_py that copies the shipped folders; an editable install copies nothing and reads the checkout's."""

    def _shipped(self) -> dict[str, str]:
        """Path in the checkout -> path in the wheel, of every shipped file; names with a leading dot are left out."""
        return {
            path.as_posix(): f"{inside}/{path.relative_to(folder).as_posix()}"
            for folder, inside in SHIPPED.items()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.parts)
        }

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for inside in SHIPPED.values():  # what an earlier build left must not ride along
            shutil.rmtree(Path(self.build_lib, inside), ignore_errors=True)
        for source, inside in self._shipped().items():
            target = Path(self.build_lib, inside)
            self.mkpath(str(target.parent))
            self.copy_file(source, str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [] if self.editable_mode else [str(Path(self.build_lib, p)) for p in self._shipped().values()]
        return [*super().get_outputs(include_bytecode), *shipped]

    def get_source_files(self) -> list[str]:
        """What a source distribution takes."""
        return [*super().get_source_files(), *self._shipped()]
