"""Options of the commands: from the command line and from the environment they mean the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import pytest
from click.core import ParameterSource
from click.testing import CliRunner

import deconvd_client
from deconvd.command_line import envvar_of
from deconvd_client.cli import main as deconvd
from deconvd_server.__main__ import main as deconvd_server
from deconvd_server.command_options import ByteSize, unknown_variables
from tests.servers import server_process

OPTIONS = [
    option
    for option in deconvd_server.params
    if isinstance(option, click.Option) and option.name != "version"
]
WRONG = __file__  # neither an address, a number, a yes or no, a device nor a directory
SIZES = {
    "0": 0,
    "4096": 4096,
    "512k": 512_000,
    "512K": 512_000,
    "512M": 512 * 10**6,
    "4G": 4 * 10**9,
    "2T": 2 * 10**12,
    "1Ki": 1 << 10,
    "512Mi": 512 << 20,
    "4Gi": 4 << 30,
    "2Ti": 2 << 40,
}


def own_variable(option: click.Option) -> str:
    """Return the variable of an option, as the README says: from what its user writes."""
    (name,) = [name for name in option.opts if name.startswith("--")]
    return "DECONVD_" + name[2:].upper().replace("-", "_")


@pytest.mark.parametrize("option", OPTIONS, ids=own_variable)
def test_each_option_of_the_server_listens_to_the_variable_of_its_name(
    option: click.Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(own_variable(option), WRONG)

    context = deconvd_server.make_context("deconvd-server", [], resilient_parsing=True)

    assert option.name is not None
    assert context.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT


@pytest.mark.parametrize("option", OPTIONS, ids=own_variable)
def test_a_wrong_value_from_the_environment_is_told_by_its_variable(option: click.Option) -> None:
    ended = command("deconvd_server", environment={own_variable(option): WRONG})

    assert ended.returncode == 2, ended.stderr
    assert f"Invalid value for {own_variable(option)}: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_value_from_the_command_line_is_told_by_its_option() -> None:
    ended = command("deconvd_server", "--threads", WRONG, environment={"DECONVD_THREADS": "2"})

    assert ended.returncode == 2, ended.stderr
    assert "Invalid value for '--threads': " in ended.stderr


@pytest.mark.parametrize(
    "value",
    [
        "-1",
        "",
        "4X",
        "4m",
        "1.5Gi",
        "G",
        "0x10",
        "1e9",
        "4 Gi",
        "\N{ARABIC-INDIC DIGIT FIVE}",
        "9999999T",
    ],
)
def test_what_is_no_size_is_refused(value: str) -> None:
    ended = command("deconvd_server", "--tenant-bytes", value)

    assert ended.returncode == 2
    assert "Invalid value for '--tenant-bytes'" in ended.stderr
    assert repr(value) in ended.stderr


def test_the_forms_that_a_size_may_have_are_named() -> None:
    said = " ".join(command("deconvd_server", "--tenant-bytes", "4X").stderr.split())

    assert "k, M, G or T (powers of 1000) or Ki, Mi, Gi or Ti (powers of 1024)" in said


@pytest.mark.parametrize(("text", "size_bytes"), SIZES.items())
def test_a_size_is_in_powers_of_1000_or_1024(text: str, size_bytes: int) -> None:
    assert ByteSize().convert(text, None, None) == size_bytes


def test_every_option_in_bytes_takes_sizes() -> None:
    in_bytes = [option for option in OPTIONS if own_variable(option).endswith("_BYTES")]

    assert len(in_bytes) >= 6
    assert all(isinstance(option.type, ByteSize) for option in in_bytes)


ALLOWED = {
    "--threads": "'x' is not a whole number from 1 up to 1024",
    "--direct-port": "'x' is not a whole number from 0 up to 65535",
    "--health-port": "'x' is not a whole number from 1 up to 65535",
    "--metrics-port": "'x' is not a whole number from 0 up to 65535",
    "--worker-port": "'x' is not a whole number from 0 up to 65535",
    "--processes": "'x' is not a whole number from 0 up to 64",
    "--parent": "'x' is not a whole number from 1",
    "--session-lease-s": "'x' is not a number of seconds above 0 up to 1000000",
    "--drain-delay-s": "'x' is not a number of seconds from 0 up to 1000000",
}


@pytest.mark.parametrize(("option", "text"), ALLOWED.items(), ids=ALLOWED)
def test_what_is_no_number_is_told_with_what_is_allowed(option: str, text: str) -> None:
    ended = CliRunner().invoke(deconvd_server, [option, "x"], terminal_width=200)

    assert ended.exit_code == 2
    assert f"Invalid value for '{option}': {text}" in ended.output


@pytest.mark.parametrize("option", ["--plan-store", "--tokens", "--tls-cert", "--tls-client-ca"])
def test_a_path_without_a_name_is_refused(option: str) -> None:
    """It would be the current folder, where plans would be kept."""
    ended = CliRunner().invoke(deconvd_server, [option, ""], terminal_width=200)

    kind = "folder" if option == "--plan-store" else "file"
    assert ended.exit_code == 2
    assert f"Invalid value for '{option}': it must name a {kind}, got ''" in ended.output


def client_commands() -> dict[str, click.Command]:
    """Return the client's commands by their names."""
    assert isinstance(deconvd, click.Group)
    context = click.Context(deconvd)
    commands = {name: deconvd.get_command(context, name) for name in deconvd.list_commands(context)}
    return {name: each for name, each in commands.items() if each is not None}


def client_options() -> dict[str, click.Option]:
    """Return the options of the client's commands by their names."""
    return {
        name: option
        for each in client_commands().values()
        for option in each.params
        if isinstance(option, click.Option)
        for name in option.opts
    }


def test_the_help_of_the_client_has_the_first_line_of_each_commands_own_help() -> None:
    listed = CliRunner().invoke(deconvd, ["--help"], terminal_width=200).output
    commands = client_commands()

    assert {"run", "status"} <= set(commands)
    for name, each in commands.items():
        assert re.search(
            rf"^  {name} +{re.escape(each.get_short_help_str(200))}\.?$", listed, re.MULTILINE
        )


def test_a_command_that_there_is_not_is_told_by_its_name() -> None:
    ended = command("deconvd_client.cli", "state")

    assert ended.returncode == 2
    assert "No such command 'state'" in ended.stderr


def test_what_the_client_reads_from_the_environment_has_its_options_name() -> None:
    read = {name: o for name, o in client_options().items() if o.envvar}

    assert "--target" in read
    for option in read.values():
        assert option.envvar == own_variable(option) == envvar_of(option)


def test_a_wrong_target_from_the_environment_is_told_by_its_variable() -> None:
    ended = command("deconvd_client.cli", "status", environment={"DECONVD_TARGET": "nonsense"})

    assert ended.returncode == 2
    assert "Invalid value for DECONVD_TARGET: " in ended.stderr


@pytest.mark.parametrize(
    "arguments", [["--target", "nonsense"], ["--timeout-s", "-1"], ["--timeout-s", "soon"]]
)
def test_a_wrong_option_of_the_client_is_told_by_its_name(arguments: list[str]) -> None:
    ended = command("deconvd_client.cli", "status", *arguments)

    assert ended.returncode == 2
    assert f"Invalid value for '{arguments[0]}': " in ended.stderr


@pytest.mark.parametrize(("value", "taken"), [("no", False), ("0", False), ("yes", True)])
def test_direct_calls_can_be_forbidden_in_the_environment(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch, value: str, taken: bool
) -> None:
    monkeypatch.setenv("DECONVD_DIRECT_CALLS", value)

    with server_process(socket_directory, listen=("127.0.0.1:0",)) as server:
        with deconvd_client.connect(server.target) as F:
            assert bool(F.server_info().direct_port) == taken


def test_unknown_variables_get_one_warning_that_names_the_nearest(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DECONVD_TAKES_DIRECT_CALLS", "DECONVD_VERSION", "DECONVD_TARGET", "DECONVD_PORT"):
        monkeypatch.setenv(name, "no")

    with server_process(socket_directory) as server:
        warnings = re.findall("WARNING.*", server.log.read_text())

    (warning,) = warnings
    assert "DECONVD_TAKES_DIRECT_CALLS (did you mean DECONVD_DIRECT_CALLS?)" in warning
    assert re.search(r"DECONVD_VERSION(,|$)", warning)  # nothing is like it
    assert "DECONVD_TARGET" not in warning
    assert "DECONVD_PORT" not in warning


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DECONVD_DEVCE", "DECONVD_DEVICE"),
        ("DECONVD_NO_DIRECT_CALLS", "DECONVD_DIRECT_CALLS"),
        ("DECONVD_SHARED_MEMORY_BYTE", "DECONVD_SHARED_MEMORY_BYTES"),
        ("DECONVD_FOO", ""),
        ("DECONVD_HELP", ""),
        ("DECONVD_", ""),
    ],
)
def test_a_variable_is_suggested_if_it_is_like_the_unknown_one(name: str, meant: str) -> None:
    said = f"{name} (did you mean {meant}?)" if meant else name

    assert unknown_variables([name], deconvd_server.variables) == [said]


@pytest.mark.parametrize(
    "name",
    [
        "DECONVD_TARGET",
        "DECONVD_TENANT_KEY",
        "DECONVD_SERVICE_HOST",
        "DECONVD_SERVICE_PORT",
        "DECONVD_SERVICE_PORT_GRPC",
        "DECONVD_PORT",
        "DECONVD_PORT_50051_TCP",
        "DECONVD_PORT_50051_TCP_PROTO",
        "DECONVD_PORT_50051_TCP_PORT",
        "DECONVD_PORT_50051_TCP_ADDR",
    ],
)
def test_what_is_the_clients_or_kubernetes_own_is_not_unknown(name: str) -> None:
    assert not unknown_variables([name, "PATH"], deconvd_server.variables)
    assert name not in deconvd_server.variables


def command(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that must end by itself."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *arguments],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
