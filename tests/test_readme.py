"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.servers import ServerProcess, server_process

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(server: ServerProcess) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    script = "\n".join(blocks).replace("unix:deconvd.sock", server.target)

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )

    assert len(blocks) > 1
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_lines_of_who_may_call_make_a_server_that_knows_its_caller(tmp_path: Path) -> None:
    _, _, section = README.read_text().partition("\n## Who may call\n")
    lines = re.findall(r"^    (\S.*)", section.partition("\n## ")[0], flags=re.MULTILINE)
    (block,) = re.findall(r"```python no-run\n(.*?)```", section, flags=re.DOTALL)[:1]
    certificate, token, serve = (
        shlex.split(line.replace("gpu-host", "localhost"), comments=True) for line in lines
    )
    module = [sys.executable, "-m", "deconvd_server"]

    run(*certificate, cwd=tmp_path)
    (tmp_path / "alice.token").write_text(run(*module, *token[1:], cwd=tmp_path))
    assert serve[:3] == ["deconvd-server", "--listen", "0.0.0.0:50051"]
    options = [str(tmp_path / word) if "." in word else word for word in serve[3:]]
    with server_process(tmp_path, *options, listen=("0.0.0.0:0",)) as server:
        script = "import deconvd_client\nfrom pathlib import Path\n" + block.replace(
            "gpu-host:50051", f"localhost:{server.target.rpartition(':')[2]}"
        )
        script += "\nwith F: print(F.health(), len(F.server_info().devices))"
        said = run(sys.executable, "-W", "error", "-c", script, cwd=tmp_path)

    assert said == "SERVING 1\n"


def run(*words: str, cwd: Path) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
