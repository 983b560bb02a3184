"""The command `deconvd`: runs a deconvolution of files, and shows the state of a server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import deconvd
from deconvd.command_line import CliCommand
from deconvd.console import ConsoleGroup
from deconvd.errors import DeconvdError, InvalidArgumentError
from deconvd.model.options import UseCudnn
from deconvd_client import npy_files
from deconvd_client.connection import connect
from deconvd_client.server_info import DeviceDescription, ServerInfo
from deconvd_client.transports.route import TransportName

__all__ = ["main"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _IntOrPair(click.ParamType):  # type: ignore[type-arg]  # older clicks have no types in it
    """``2`` for both axes, or ``2,3`` for height and width."""

    name = "INT|H,W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, ...]:
        """Return an int, or a tuple whose length `Geometry` checks."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # the default
        try:
            parts = tuple(map(int, value.split(",")))
        except ValueError:
            self.fail(f"must be one integer, or two as in 2,3, got {value!r}", param, ctx)
        return parts[0] if len(parts) == 1 else parts


class _OutputSize(click.ParamType):  # type: ignore[type-arg]  # older clicks have no types in it
    """``10,12`` for height and width, each of which can be ``-`` for its natural size."""

    name = "H,W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int | None]:
        """Return the height and the width, each None for the natural size."""
        try:
            h, w = (None if part == "-" else int(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"must be a height and a width as in 10,12, each an integer or - for the natural size, got {value!r}",
                param,
                ctx,
            )
        return h, w


_target = click.option(
    "--target",
    envvar="DECONVD_TARGET",
    default="127.0.0.1:50051",
    show_default=True,
    help="Address of the server: host:port or unix:path. The environment variable DECONVD_TARGET sets it, too.",
)
_timeout = click.option(
    "--timeout-s",
    type=float,
    metavar="SECONDS",
    default=60.0,
    show_default=True,
    help="How long a call may take, retries included.",
)
_transport = click.option(
    "--transport",
    type=click.Choice([name.value for name in TransportName]),
    default=TransportName.AUTO.value,
    show_default=True,
    help="How tensors get to the server. auto takes the fastest transport that works. With another, "
    "the command fails if that transport does not work.",
)


@click.group(cls=ConsoleGroup)
@click.version_option(deconvd.__version__, prog_name="deconvd")
def main() -> None:
    """Run Chainer's deconvolution_2d on a deconvd server."""


@main.command(cls=CliCommand)
@click.argument("x", type=_FILE)
@click.argument("W", type=_FILE)
@click.option("--bias", type=_FILE, help="File with the bias b: c_O elements of X's element type.")
@click.option(
    "--stride",
    type=_IntOrPair(),
    default=1,
    show_default=True,
    help="Steps of the filter over the output, in pixels.",
)
@click.option(
    "--pad",
    type=_IntOrPair(),
    default=0,
    show_default=True,
    help="Pixels cut off at both ends of each axis of the output.",
)
@click.option(
    "--outsize",
    type=_OutputSize(),
    help="Size of the output, in pixels. Use - for the natural size of an axis, as in 10,-. The default is -,-.",
)
@click.option(
    "--dilate",
    type=_IntOrPair(),
    default=1,
    show_default=True,
    help="Distance between neighbouring taps of the filter, in pixels.",
)
@click.option(
    "--groups",
    type=int,
    default=1,
    show_default=True,
    help="Number of groups that the channels are split into.",
)
@click.option(
    "--grad",
    type=_FILE,
    help="File with gy, the gradient with respect to y. The gradients are written instead of y.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    required=True,
    help="File to write: .npy with y; with --grad, .npz with gx, gW and, if there is a bias, gb.",
)
@click.option(
    "--cudnn-deterministic", is_flag=True, help="Two runs on the same device give the same bits."
)
@click.option(
    "--autotune", is_flag=True, help="Measure the candidate algorithms once, and use the fastest."
)
@click.option("--allow-tf32", is_flag=True, help="Allow float32 to be rounded to TF32 in products.")
@click.option(
    "--use-cudnn",
    type=click.Choice([use.value for use in UseCudnn]),
    default=UseCudnn.AUTO.value,
    show_default=True,
    help="When to use cuDNN: if it is the fastest (auto), if it can run the call (always), or never.",
)
@_target
@_transport
@_timeout
def run(
    x: Path,
    w: Path,
    bias: Path | None,
    stride: int | Sequence[int],
    pad: int | Sequence[int],
    outsize: Sequence[int | None] | None,
    dilate: int | Sequence[int],
    groups: int,
    grad: Path | None,
    output: Path,
    target: str,
    transport: str,
    timeout_s: float,
    **options: bool | str,
) -> None:
    """Deconvolve X by W, two .npy files, and write the result to a file.

    X has the shape (n, c_I, h_I, w_I), W has the shape (c_I, c_O / groups, h_K, w_K), and the result y has the shape
    (n, c_O, h_O, w_O). Element types are float16, bfloat16, float32 and float64. Files with bfloat16 are those that
    numpy.save writes for arrays of ml_dtypes.bfloat16: their element type is called V2.

    Exit codes: 0 if the file is written, 1 if the call failed, 2 if an option is wrong.
    """
    with _report_errors(), ExitStack() as stack:
        F = stack.enter_context(
            connect(target, timeout_s=timeout_s, transport=transport, fail_fast=True)
        )
        for name, value in options.items():
            stack.enter_context(F.using_config(name, value))
        operands = (
            npy_files.load(x),
            npy_files.load(w),
            None if bias is None else npy_files.load(bias),
        )
        if grad is None:
            y = F.deconvolution_2d(*operands, stride, pad, outsize, dilate=dilate, groups=groups)
            npy_files.save(output, y)
        else:
            gradients = F.deconvolution_2d_grad(
                *operands, npy_files.load(grad), stride, pad, outsize, dilate=dilate, groups=groups
            )
            npy_files.save_all(output, gradients._asdict())


@main.command(cls=CliCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@_target
@_timeout
def status(as_json: bool, target: str, timeout_s: float) -> None:
    """Show whether a server serves, and its version, devices and caches.

    Exit codes: 0 if it serves, 1 if it does not serve or cannot be reached, 2 if an option is wrong.
    """
    with _report_errors(), connect(target, timeout_s=timeout_s, fail_fast=True) as F:
        health = F.health()
        info = F.server_info() if health == "SERVING" else None
    click.echo(
        _format_json(target, health, info) if as_json else _format_text(target, health, info)
    )
    if health != "SERVING":
        raise SystemExit(1)


def _format_json(target: str, health: str, info: ServerInfo | None) -> str:
    fields = {} if info is None else asdict(info)
    return json.dumps({"target": target, "health": health, **fields}, indent=2)


def _format_text(target: str, health: str, info: ServerInfo | None) -> str:
    lines = [f"{target}: {health}"]
    if info is not None:
        lines.append(f"  deconvd {info.version}, messages up to {info.max_message_bytes} bytes")
        lines.append(f"  element types: {', '.join(info.element_types)}")
        if info.direct_port:
            lines.append(f"  direct connections: TCP port {info.direct_port}")
        for device in info.devices:
            lines += _device_lines(device)
    return "\n".join(lines)


def _device_lines(device: DeviceDescription) -> list[str]:
    threads = f", {device.threads_count} threads" if device.threads_count else ""
    calls = f"{device.running_calls_count} running, {device.waiting_calls_count} waiting"
    return [
        f"  {device.id}: {device.name}, {_format_gibibytes(device.memory_bytes)}{threads}",
        f"    calls: {calls}",
        f"    memory: {_format_gibibytes(device.used_bytes)} of {_format_gibibytes(device.budget_bytes)} in use",
        *(
            f"    {cache.name}: {cache.count} entries, {cache.size_bytes} of {cache.limit_bytes} bytes, "
            f"{cache.hits_count} hits, {cache.misses_count} misses"
            for cache in device.caches
        ),
    ]


def _format_gibibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


@contextmanager
def _report_errors() -> Iterator[None]:
    """End the command with one line, not a traceback, for an error that its user can act on."""
    try:
        yield
    except InvalidArgumentError:
        raise  # `CliCommand` adds the name of the option or environment variable
    except (DeconvdError, OSError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
