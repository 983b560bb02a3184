"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.servers import ServerProcess

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(server: ServerProcess) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    script = "\n".join(blocks).replace("unix:deconvd.sock", server.target)

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )

    assert len(blocks) > 1
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
