"""Files of certificates and keys that cannot be used: they are refused, and nobody is asked about them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"

AT_A_TERMINAL = """
import fcntl, os, sys, termios
from pathlib import Path
from deconvd_client.credentials import Credentials, Tls
from deconvd_server.access.server_tls import ServerTls

_, terminal = os.openpty()
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # where OpenSSL would ask for a passphrase
cert, *keys = map(Path, sys.argv[1:])
for key in keys:
    for read in (
        lambda: ServerTls(cert, key, None),
        lambda: Credentials(tls=Tls(cert=cert, key=key)),
    ):
        try:
            read()
        except (OSError, ValueError):
            print("refused")
        else:
            print("read")
"""


def test_a_key_with_a_passphrase_is_refused_without_a_question() -> None:
    files = [str(DATA / f"fuzzed-{name}.pem") for name in ("cert", "key", "encrypted-key")]

    ended = subprocess.run(
        [sys.executable, "-c", AT_A_TERMINAL, *files],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )

    assert ended.stdout.split() == ["read", "read", "refused", "refused"], ended.stderr
