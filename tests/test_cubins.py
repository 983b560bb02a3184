"""Machine code of kernels: what travels with deconvd, and the cache on disk of what is compiled. Needs no card."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deconvd_server.device.cuda.api.nvrtc import CompileError, compile_cubin, nvrtc_version
from deconvd_server.device.cuda.kernels import archive
from deconvd_server.device.cuda.kernels.catalog import common_kernels
from deconvd_server.device.cuda.kernels.cubin_cache import CubinCache, default_folder
from deconvd_server.device.cuda.kernels.cubins import Cubins

TEXT = 'extern "C" __global__ void nothing() {}'
OPTIONS = ("-std=c++17",)
ELF = b"\x7fELF"

WRITER = """
import sys
from pathlib import Path
from deconvd_server.device.cuda.kernels.cubin_cache import CubinCache
cache = CubinCache(Path(sys.argv[1]), limit_bytes=150_000)
for turn in range(150):
    name = f"kernel-{turn % 5}"
    assert cache.load(name) in (None, name.encode() * 5000)
    cache.save(name, name.encode() * 5000)
print("done")
"""


@pytest.fixture
def nvrtc() -> None:
    try:
        nvrtc_version()
    except CompileError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "caches" / "kernels"


def test_what_travels_is_of_the_present_kernels() -> None:
    wanted = [kernel.digest for kernel in common_kernels()]
    for capability in archive.CAPABILITIES:
        cubins = archive.read_cubins(capability)
        assert [*cubins] == wanted, "run `make kernels`"
        assert all(cubin.startswith(ELF) for cubin in cubins.values())


def test_cubins_can_be_made_again(nvrtc: None) -> None:
    kernel = next(one for one in common_kernels() if one.file == "crop.cu")
    path = archive.FOLDER / "sm_90.xz"
    head = json.loads(lzma.decompress(path.read_bytes()).partition(b"\n")[0])
    if head["nvrtc"] != nvrtc_version():
        pytest.skip(f"they are of NVRTC {head['nvrtc']}")
    cubin = compile_cubin(kernel.source, kernel.options, 90)
    assert (
        hashlib.sha256(cubin).digest()
        == hashlib.sha256(archive.read_cubins(90)[kernel.digest]).digest()
    )


@pytest.mark.parametrize(
    ("capability", "file"), [(80, 80), (86, 80), (89, 80), (90, 90), (103, 100), (121, 120)]
)
def test_a_card_takes_cubins_of_its_generation(capability: int, file: int) -> None:
    assert archive.has_cubins(capability)
    assert archive.read_cubins(capability) == archive.read_cubins(file)


@pytest.mark.parametrize("capability", [75, 87, 110, 130])
def test_a_card_of_another_generation_has_none(capability: int) -> None:
    assert not archive.has_cubins(capability)
    assert archive.read_cubins(capability) == {}


def test_what_travels_is_not_compiled(folder: Path) -> None:
    cubins, kernel = Cubins(), common_kernels()[0]
    cubins.cache = CubinCache(folder)
    assert cubins.find(kernel.source, kernel.options, 90).startswith(ELF)
    assert not folder.exists()


def test_other_kernels_are_compiled_once(nvrtc: None, folder: Path) -> None:
    cubins = Cubins()
    cubins.cache = CubinCache(folder)
    cubin = cubins.find(TEXT, OPTIONS, 90)
    assert cubin.startswith(ELF)
    (file,) = folder.iterdir()
    cubins.cache.save(file.stem, b"of an earlier server")
    assert cubins.find(TEXT, OPTIONS, 90) == b"of an earlier server"
    assert cubins.find(TEXT, OPTIONS, 80).startswith(ELF)
    assert cubins.find(TEXT, (*OPTIONS, "-DTHREADS=1"), 90).startswith(ELF)
    assert len([*folder.iterdir()]) == 3


def test_threads_compile_different_kernels_at_once(nvrtc: None) -> None:
    cubins, results = Cubins(), dict[int, bytes]()

    def find(number: int) -> None:
        results[number] = cubins.find(TEXT, (*OPTIONS, f"-DTHREADS={number}"), 90)

    threads = [threading.Thread(target=find, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4


def test_a_wrong_text_says_what_is_wrong(nvrtc: None) -> None:
    with pytest.raises(CompileError, match="expected"):
        Cubins().find("__global__ void wrong(", OPTIONS, 90)


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed"])
def test_a_damaged_file_is_compiled_again(
    nvrtc: None, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cubins = Cubins()
    cubins.cache = CubinCache(folder)
    cubin = cubins.find(TEXT, OPTIONS, 90)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "renamed":
        cubins.cache.save("other", b"other code")
        content = bytearray((folder / "other.cubin").read_bytes())
    content[-1] ^= damage == "changed"
    file.write_bytes(content[: 9 if damage == "cut" else None])
    assert cubins.find(TEXT, OPTIONS, 90) == cubin
    assert cubins.cache.load(file.stem) == cubin
    assert [record.message for record in caplog.records] == [
        f"{file} is damaged, and is compiled again"
    ]


def test_the_folder_is_the_users_alone(folder: Path) -> None:
    CubinCache(folder).save("kernel", b"code")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "kernel.cubin").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("way", ["mode", "owner"])
def test_what_others_may_have_written_is_not_run(
    folder: Path, what: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CubinCache(folder)
    cache.save("kernel", b"code")
    place = folder if what == "folder" else folder / "kernel.cubin"
    if way == "mode":
        place.chmod(0o722)
    elif os.geteuid() == 0:
        os.chown(place, 12345, 12345)
    else:
        pytest.skip("needs root")
    assert cache.load("kernel") is None
    assert cache.load("kernel") is None
    (record,) = caplog.records
    assert str(place.name) in record.message
    if what == "folder":
        cache.save("other", b"code")
        assert [path.name for path in folder.iterdir()] == ["kernel.cubin"]


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    cache = CubinCache(folder)
    cache.save("kernel", b"code")
    (folder / "kernel.cubin").rename(tmp_path / "elsewhere")
    (folder / "kernel.cubin").symlink_to(tmp_path / "elsewhere")
    assert cache.load("kernel") is None
    cache.save("kernel", b"new code")  # replaces the link, not what it names
    assert cache.load("kernel") == b"new code"


def test_without_a_folder_each_process_compiles(
    nvrtc: None, caplog: pytest.LogCaptureFixture
) -> None:
    cubins = Cubins()
    cubins.cache = CubinCache(Path("/proc/deconvd/kernels"))
    for number in range(2):
        options = (*OPTIONS, f"-DTHREADS={number}")
        assert cubins.find(TEXT, options, 90).startswith(ELF)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "/proc/deconvd/kernels" in record.message


def test_the_files_are_bounded(folder: Path) -> None:
    cache = CubinCache(folder, limit_bytes=400)
    for age, name in enumerate(("newest", "older", "oldest")):
        cache.save(name, bytes(100))
        os.utime(folder / f"{name}.cubin", (1000 - age, 1000 - age))
    assert cache.load("oldest")  # it is used now, and so the newest
    cache.save("another", bytes(100))
    assert {path.stem for path in folder.iterdir()} == {"newest", "oldest", "another"}


def test_what_a_dead_server_was_writing_is_deleted(folder: Path) -> None:
    cache = CubinCache(folder)
    cache.save("kernel", b"code")
    for name, mtime_s in (("stale.tmp", 0), ("fresh.tmp", None)):
        (folder / name).write_bytes(b"half")
        if mtime_s is not None:
            os.utime(folder / name, (mtime_s, mtime_s))
    cache.save("other", b"code")
    assert {path.name for path in folder.iterdir()} == {
        *("fresh.tmp", "kernel.cubin", "other.cubin")
    }


def test_servers_share_the_folder(folder: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(folder)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [writer.communicate(timeout=60)[0] for writer in writers] == ["done\n"] * 3
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= 150_000


def test_the_folder_is_in_the_users_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "deconvd" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    assert default_folder() == tmp_path / ".cache" / "deconvd" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/deconvd/kernels")
