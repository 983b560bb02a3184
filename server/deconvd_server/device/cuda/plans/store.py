"""Choices on disk, a file each, so that a restarted server need not make them again."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deconvd_server.device.cuda.plans.choice import Choice
from deconvd_server.device.cuda.plans.key import PlanKey, digest_of
from deconvd_server.device.cuda.plans.quarantine import Quarantine

__all__ = ["PlanStore"]

log = logging.getLogger(__name__)

_SCHEMA = 1
"""Counted up whenever a file's form or the meaning of a choice changes."""

_PLANS_COUNT = 1 << 16
"""Files in a folder, of some 3 KB each. A client can make the server choose a new plan by each call."""

_JOURNALS = "journals"
"""The folder in it where servers note what they are about to search."""


class PlanStore:
    """A folder of choices. Several servers may share it; a file is written whole or not at all.

    A file that is damaged, or is not what its name says, is ignored with a warning. One that
    another card or version wrote has another name and is never looked at. The folder is trusted:
    who can write to it decides which plans run. A full one takes no more: what it has is not to be displaced by
    whoever asks for new shapes all the time.

    Args:
        folder: Made if it is not there.
        origin: All that a choice depends on beside its key: versions, and the card.

    Attributes:
        quarantine: What is not searched, since a server died at it. A new version of deconvd alone changes nothing.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str | int]) -> None:
        self._folder = folder
        self._origin = dict(origin)
        self._lock = threading.Lock()
        self._is_full = False
        folder.mkdir(parents=True, exist_ok=True)
        libraries = {name: value for name, value in origin.items() if name != "deconvd"}
        self._count = sum(1 for _ in folder.glob("*.json"))
        self.quarantine = Quarantine(folder / _JOURNALS, libraries)

    def load(self, key: PlanKey) -> Choice | None:
        """Return the choice that was made for `key`; None if none is known here."""
        path = self._path(key)
        try:
            return self._parse(path.read_bytes(), key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("ignored the stored plan %s: %s", path, error)
            return None

    def save(self, key: PlanKey, choice: Choice) -> None:
        """Remember a choice. Where that fails, it is logged and the server goes on without."""
        if not self._has_room():
            return
        content = {
            "identity": self._identity(key),
            "choice": choice.fields(),
            "checksum": digest_of(choice.fields()),
        }
        try:
            self._replace(self._path(key), json.dumps(content, indent=1).encode())
        except OSError as error:
            log.warning("could not store the plan %s: %s", self._path(key), error)

    def _has_room(self) -> bool:
        """Count one more plan, if there is room; if not, say so once."""
        with self._lock:
            was_full, self._is_full = self._is_full, self._count >= _PLANS_COUNT
            self._count += not self._is_full
        if self._is_full and not was_full:
            log.warning(
                "%s holds %d plans, and takes no more: delete it to begin anew",
                self._folder,
                _PLANS_COUNT,
            )
        return not self._is_full

    def _identity(self, key: PlanKey) -> dict[str, Any]:
        return {"schema": _SCHEMA, "origin": self._origin, "key": key.fields()}

    def _path(self, key: PlanKey) -> Path:
        return self._folder / f"{digest_of(self._identity(key))}.json"

    def _parse(self, text: bytes, key: PlanKey) -> Choice:
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("choice"), dict):
            raise ValueError("not a stored plan")
        if content.get("identity") != self._identity(key):
            raise ValueError("it is another plan than its name says")
        if content.get("checksum") != digest_of(content["choice"]):
            raise ValueError("its checksum does not fit")
        return Choice.from_fields(content["choice"])

    def _replace(self, path: Path, content: bytes) -> None:
        number, name = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(content)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
