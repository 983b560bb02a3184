"""A folder for the workers' plans where the owner has named none, so that none dies at what another has died at.

It ends with the supervisor. If that is killed, the next supervisor of the same user removes it. A folder in use is
locked: the supervisor holds the lock, and so does each worker, which inherits the descriptor and may outlive it. The
kernel ends the lock with the last of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PlansFolder", "temporary_plans_folder"]

_PREFIX: Final = "deconvd-workers-"

_RANDOM_BYTES: Final = 8

_MOST_TRIES_COUNT: Final = 8
"""How often a folder is made. Another supervisor that starts may remove one before it is locked."""

_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlansFolder:
    """A folder in use.

    Attributes:
        path: The folder.
        descriptor: Has its lock. Processes that use the folder inherit it.
    """

    path: Path
    descriptor: int


@contextmanager
def temporary_plans_folder() -> Iterator[PlansFolder | None]:
    """Make a folder for the block, and remove those of supervisors that were killed.

    Give None where none can be made, as on a read-only root without a ``/tmp``. Then plans are not shared, and a
    problem that one worker has died at may end another.
    """
    try:
        folder = _make()
    except OSError as error:
        _log.warning(
            "processes share no plans, and a call that ends one may end another: no folder can be made for them (%s); "
            "--plan-store names one",
            error,
        )
        yield None
        return
    try:
        _remove_abandoned(folder.path.parent)
        yield folder
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
        os.close(folder.descriptor)


def _make() -> PlansFolder:
    for _ in range(_MOST_TRIES_COUNT):
        path = Path(tempfile.gettempdir(), _marked_name(secrets.token_hex(_RANDOM_BYTES)))
        path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            if (descriptor := _lock(path)) is not None:
                return PlansFolder(path, descriptor)
    raise OSError("others remove it at once")


def _marked_name(random: str) -> str:
    """Return the name of a folder, which nobody else gives to one by chance: with a digest of its random part.

    So it is known as ours as soon as it is there. A mark in the folder would come after it, and a supervisor may be
    killed in between.
    """
    digest = hashlib.sha256(f"{_PREFIX}{random}".encode()).hexdigest()
    return f"{_PREFIX}{random}-{digest[: 2 * _RANDOM_BYTES]}"


def _is_marked(name: str) -> bool:
    return name == _marked_name(name.removeprefix(_PREFIX).partition("-")[0])


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user that no process has locked."""
    try:
        names = os.listdir(parent)
    except OSError as error:  # others may make folders there, and not look at them
        _log.debug("folders of plans in %s are left: %s", parent, error)
        return
    for path in (parent / name for name in names if _is_marked(name)):
        try:
            _remove_if_abandoned(path)
        except OSError as error:  # somebody else's, or another supervisor removes it now
            _log.debug("%s is left: %s", path, error)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = _lock(path)
    if descriptor is None:
        return
    try:
        shutil.rmtree(path, ignore_errors=True)
        _log.info("%s, of a server that was killed, is removed", path)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Lock a folder of this user, and return the descriptor that has the lock; None if another process has it.

    Raises:
        OSError: It is no folder, or it cannot be opened. FileNotFoundError: it is there no longer.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{path} is of user {found.st_uid}")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.lstat(), found):  # and it was not removed since
            return descriptor
        raise FileNotFoundError(path)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
