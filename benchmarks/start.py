"""Where the seconds of a server's start go: ``python -m benchmarks.start --device cuda``.

A new process does what a worker of a server does until it serves, and prints how long each step took. A server that is
alone imports the daemon before it opens its device. The process has an empty folder for each cache. The last line is of
a server itself, from the start of its process until it is ready.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.new_shapes import new_home, timed_server

_STEPS: Final = """
import json, sys, time
begin_s = last_s = float(sys.argv[1])
steps = {}
def step(name):
    global last_s
    now_s = time.time()
    steps[name] = round((now_s - last_s) * 1e3, 1)
    last_s = now_s
step("interpreter")
import numpy
step("import numpy")
import deconvd_server.__main__
step("import the command")
has_card = sys.argv[2] != "cpu"
if has_card:
    from deconvd_server.device.opening import start_devices
    start_devices("cuda:0")
    import cupy
    step("import cupy")
    from cupy.cuda import runtime
    runtime.getDeviceCount(); runtime.setDevice(0); runtime.free(0)
    step("wait for the card")
    from deconvd_server.device.cuda.cudnn import Cudnn
    Cudnn()
    step("load cuDNN")
    import deconvd_server.device.cuda.device
    step("import the device")
    from deconvd_server.device.cuda import open_device
    card = open_device(0)
    step("open the device")
import grpc
step("import grpc")
import deconvd_server.daemon
step("import the daemon")
if has_card:
    card.wait_until_warm()
    step("wait for the rehearsal")
steps["all"] = round((time.time() - begin_s) * 1e3, 1)
bytecode = all(
    module.__spec__.has_location and __import__("os").path.exists(module.__cached__)
    for module in (numpy, grpc)
)
print(json.dumps({"ms": steps, "has_bytecode": bytecode}), flush=True)
__import__("os")._exit(0)
"""


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--starts", "count", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(device: str, count: int, json_file: Path | None) -> None:
    """Print the steps of each start, and the seconds of a server."""
    starts = [_time_steps(device) for _ in range(count)]
    for start in starts:
        print("  ".join(f"{name} {ms:.0f}" for name, ms in start.items()), flush=True)
    servers_s = []
    for _ in range(count):
        with new_home(), timed_server(device) as (_F, start_s):
            servers_s.append(round(start_s, 3))
    print(f"a server until it serves: {servers_s} s", flush=True)
    if json_file is not None:
        report = {
            "card": card_name(device),
            "commit": commit(),
            "steps_ms": starts,
            "servers_s": servers_s,
            "median_s": statistics.median(servers_s),
        }
        json_file.write_text(json.dumps(report, indent=1))


def _time_steps(device: str) -> Mapping[str, float]:
    with new_home():
        command = [sys.executable, "-c", _STEPS, str(time.time()), device]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ended.stdout)
    if not found["has_bytecode"]:
        print("packages have no bytecode: each start compiles them")
    steps: Mapping[str, float] = found["ms"]
    return steps


if __name__ == "__main__":
    main()
