"""The folder that a report goes to. Nothing in it is overwritten but this run's own files."""

import json
import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from jaxreg import _check


class ReportFolder:
    """A folder that can be made, is empty, or holds an earlier report.

    An earlier report stays where it is until there are results to take its place; then its
    folder gets a new name, which is `kept`.

    Raises:
        ArgumentError: where the folder holds something else, or can't be written or renamed.
    """

    def __init__(self, given: str):
        path = Path(given)
        # Only a plain name can be given up for a new one: "." has none, and a link is not the
        # folder. Any other path is shown as the user wrote it.
        plain = path.name not in ("", "..") and not os.path.islink(path)
        self.path = path if plain else Path(os.path.realpath(path))
        self.kept: Path | None = None
        self._ours = False

        def reject(why: str) -> NoReturn:
            accepted = "a folder that is new, empty, or holds an earlier jaxreg report"
            raise _check.ArgumentError("out", f"{given!r}, {why}", accepted)

        try:
            earlier = self._holds_a_report()
            if earlier and (self.path.is_mount() or Path.cwd().is_relative_to(self.path.resolve())):
                reject("which holds an earlier report and can't be renamed while it is in use")
            if self.path.exists() and not earlier and any(self.path.iterdir()):
                reject("which holds something else")
            place = self.path.parent if earlier else self.path
            while not place.exists():
                place = place.parent
            # Permissions, read-only disks and files in the way: trying finds them all.
            tempfile.TemporaryDirectory(prefix=".jaxreg-", dir=place).cleanup()
        except OSError as error:
            reject(f"where nothing can be written ({error.strerror})")

    def save(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``, whole or not at all."""
        if not self._ours:
            self._claim()
        temporary = self.path / ".results.json.tmp"
        try:
            text = json.dumps(results, indent=1, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self.path / "results.json")
        finally:
            temporary.unlink(missing_ok=True)

    def _claim(self) -> None:
        if self._holds_a_report():
            names = (self.path.with_name(f"{self.path.name}-{n}") for n in count(1))
            kept = next(path for path in names if not os.path.lexists(path))
            self.kept = self.path.rename(kept)
        self.path.mkdir(parents=True, exist_ok=True)
        self._ours = True

    def _holds_a_report(self) -> bool:
        try:
            schema = json.loads((self.path / "results.json").read_text(encoding="utf-8"))["schema"]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return False
        return str(schema).startswith("jaxreg.compare/")
