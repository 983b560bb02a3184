"""The choices on disk, one file each. A restarted server need not make them again.

FOLDER/3f/3f62….json    a choice, by the digest of all that it depends on
FOLDER/journals         see `Quarantine`
"""

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
"""Version of a file's format, counted up whenever that or the meaning of a choice changes."""

_SHARD_PLANS_COUNT = 256
"""The most files in each of the 256 folders, of some 3 KB each: 200 MB in all. A client can make the server choose a
new plan with each call.
"""

_JOURNALS = "journals"
"""Name of the folder, inside, where servers note the searches that they start."""


class PlanStore:
    """A folder of choices. Several servers may share it: a file is written whole or not at all.

    A file that is damaged, or whose content does not fit its name, is ignored with a warning. A file of another card or
    version has another name and is never read. The folder is trusted: anyone who can write to it decides which plans
    run.

    Files are in 256 folders, by the beginnings of their names, which are digests and so spread evenly. A full folder
    takes no new choices, and evicts none: a client with ever new shapes must not push out the others'. Files are
    counted when a choice is saved, in its folder alone, so a store of any size is opened at once.

    Args:
        folder: Made if it does not exist.
        origin: All that a choice depends on, other than its key: versions, and the card.

    Attributes:
        quarantine: The searches that are not made because a server died in them. It does not depend on deconvd's
            version.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str | int]) -> None:
        self._folder = folder
        self._origin = dict(origin)
        self._lock = threading.Lock()
        self._has_warned = False
        folder.mkdir(parents=True, exist_ok=True)
        libraries = {name: value for name, value in origin.items() if name != "deconvd"}
        self.quarantine = Quarantine(folder / _JOURNALS, libraries)

    def load(self, key: PlanKey) -> Choice | None:
        """Return the choice that was stored for a key; None if there is none, or none that can be read."""
        path = self._path(key)
        try:
            return self._parse(path.read_bytes(), key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("ignored the stored plan %s: %s", path, error)
            return None

    def save(self, key: PlanKey, choice: Choice) -> None:
        """Store a choice. A failure is only logged: the choice is then made again after a restart."""
        path = self._path(key)
        content = {
            "identity": self._identity(key),
            "choice": choice.fields(),
            "checksum": digest_of(choice.fields()),
        }
        try:
            path.parent.mkdir(exist_ok=True)
            if self._has_room(path):
                _replace(path, json.dumps(content, indent=1).encode())
        except OSError as error:
            log.warning("could not store the plan %s: %s", path, error)

    def _has_room(self, path: Path) -> bool:
        """Return whether a plan may be stored: it replaces a file, or its folder is not full. Else log that, once."""
        # counted each time, since other servers store plans there, too
        if path.exists() or len(os.listdir(path.parent)) < _SHARD_PLANS_COUNT:
            return True
        with self._lock:
            is_news, self._has_warned = not self._has_warned, True
        if is_news:
            log.warning(
                "%s holds %d plans, which is the limit: new ones are not stored. Delete %s to start over",
                path.parent,
                _SHARD_PLANS_COUNT,
                self._folder,
            )
        return False

    def _identity(self, key: PlanKey) -> dict[str, Any]:
        return {"schema": _SCHEMA, "origin": self._origin, "key": key.fields()}

    def _path(self, key: PlanKey) -> Path:
        digest = digest_of(self._identity(key))
        return self._folder / digest[:2] / f"{digest}.json"

    def _parse(self, text: bytes, key: PlanKey) -> Choice:
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("choice"), dict):
            raise ValueError("not a stored plan")
        if content.get("identity") != self._identity(key):
            raise ValueError("its name and its content are of different plans")
        if content.get("checksum") != digest_of(content["choice"]):
            raise ValueError("its checksum is wrong")
        return Choice.from_fields(content["choice"])


def _replace(path: Path, content: bytes) -> None:
    # Written under another name first: a reader never sees half a file.
    number, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
