"""All targets, by the names under which the command runs them."""

from __future__ import annotations

from typing import Final

from tests.fuzz.array_files import ArrayFiles
from tests.fuzz.clients import Clients
from tests.fuzz.credential_files import CredentialFiles
from tests.fuzz.decoders import Decoders
from tests.fuzz.frames import Frames
from tests.fuzz.request_checks import RequestChecks
from tests.fuzz.rpcs import Rpcs
from tests.fuzz.scrapes import Scrapes
from tests.fuzz.secured_sockets import SecuredSockets
from tests.fuzz.sockets import Sockets
from tests.fuzz.target import Target
from tests.fuzz.tls import TlsEnds
from tests.fuzz.tls_clients import TlsClients

__all__ = ["TARGETS"]

TARGETS: Final[dict[str, type[Target]]] = {
    "decoders": Decoders,
    "frames": Frames,
    "requests": RequestChecks,
    "array_files": ArrayFiles,
    "credentials": CredentialFiles,
    "scrapes": Scrapes,
    "tls": TlsEnds,
    "rpcs": Rpcs,
    "sockets": Sockets,
    "secured_sockets": SecuredSockets,
    "clients": Clients,
    "tls_clients": TlsClients,
}
