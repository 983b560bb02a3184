"""The command `deconvd run`: deconvolves arrays in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import click
from click.shell_completion import CompletionItem

from deconvd.command_line import CliCommand
from deconvd.model.geometry import Geometry
from deconvd.model.options import UseCudnn, UseCudnnTensorCore
from deconvd_client.cli.file_call import FileCall, Report
from deconvd_client.cli.formats import format_bytes
from deconvd_client.cli.inputs import STANDARD_STREAM, read_array
from deconvd_client.cli.interrupts import exit_on_signals
from deconvd_client.cli.options import (
    IntOrPair,
    open_server,
    report_errors,
    target_option,
    timeout_option,
    transport_option,
)
from deconvd_client.cli.outputs import FileFormat, Output
from deconvd_client.config import Config
from deconvd_client.transports.route import TransportName

__all__ = ["run"]


class _FileName(click.ParamType):  # type: ignore[type-arg]  # older clicks have no types in it
    """A file, ``file.npz:name``, or ``-``. Shells complete it as a file."""

    name = "FILE"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Let the shell complete it."""
        return [CompletionItem(incomplete, type="file")]


_FILE = _FileName()


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


@click.command(cls=CliCommand)
@click.argument("x", type=_FILE)
@click.argument("W", type=_FILE)
@click.option("--bias", type=_FILE, help="File with the bias b: c_O elements of X's element type.")
@click.option(
    "--stride",
    type=IntOrPair(),
    default=1,
    show_default=True,
    help="Steps of the filter over the output, in pixels.",
)
@click.option(
    "--pad",
    type=IntOrPair(),
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
    type=IntOrPair(),
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
    type=_FILE,
    required=True,
    help="File to write: .npy, .npz, .safetensors or .png, or - for standard output. In .npz and .safetensors files y "
    "is called y, or NAME in FILE:NAME. With --grad, .npz or .safetensors with gx, gW and, if there is a bias, gb.",
)
@click.option(
    "--output-format",
    type=click.Choice([each.value for each in FileFormat]),
    default=FileFormat.NPY.value,
    show_default=True,
    help="Format of standard output, and of pipes and devices. Elsewhere the extension says it.",
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
@click.option(
    "--use-cudnn-tensor-core",
    type=click.Choice([use.value for use in UseCudnnTensorCore]),
    default=UseCudnnTensorCore.AUTO.value,
    show_default=True,
    help="When to use tensor cores: where that is the fastest (auto, always), or never, not even for half precision.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON about the call to standard output."
)
@click.option(
    "-q", "--quiet", is_flag=True, help="Show neither a progress bar nor the line at the end."
)
@target_option
@transport_option
@timeout_option
def run(
    x: str,
    w: str,
    bias: str | None,
    stride: int | Sequence[int],
    pad: int | Sequence[int],
    outsize: Sequence[int | None] | None,
    dilate: int | Sequence[int],
    groups: int,
    grad: str | None,
    output: str,
    output_format: str,
    target: str,
    transport: str,
    timeout_s: float,
    as_json: bool,
    quiet: bool,
    **options: bool | str,
) -> None:
    """Deconvolve X by W, two files, and write the result to a file.

    X has the shape (n, c_I, h_I, w_I), W has the shape (c_I, c_O / groups, h_K, w_K), and the result y has the shape
    (n, c_O, h_O, w_O). Element types are float16, bfloat16, float32 and float64.

    Files are .npy, .npz, safetensors or PNG, and are recognized by their content. FILE.npz:NAME and
    FILE.safetensors:NAME name one of several arrays; - is standard input. Files with bfloat16 are safetensors, or those
    that numpy.save writes for arrays of ml_dtypes.bfloat16: their element type is called V2.

    PNG images must be 8-bit gray or RGB. They are arrays of shape (1, channels, h, w) and float32: 0 to 255 is scaled
    to 0 to 1. When one is written, values are clipped to 0 to 1. PNG needs: pip install 'deconvd[cli]'.

    The output is checked before the call, and replaced only once it is complete. Files are mapped into memory, not
    read into it. If tensors have more than 128 MiB together they travel in a stream, not in shared memory, so that the
    command does not need memory for them.

    Exit codes: 0 if the file is written; 1 if the call failed, or a file could not be read or written; 2 if an option
    or the output is wrong; 130 after Ctrl-C, which also ends the call on the server.
    """
    inputs = [name for name in (x, w, bias, grad) if name is not None]
    destination = _parse_output(output, output_format, inputs, as_json=as_json)
    config = Config()
    with report_errors(), exit_on_signals(), ExitStack() as stack:
        server = stack.enter_context(
            closing(open_server(target, TransportName(transport), timeout_s))
        )
        for name, value in options.items():
            stack.enter_context(config.using(name, value))
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        b, gy = (None if name is None else read_array(name) for name in (bias, grad))
        call = FileCall(server, config, read_array(x), read_array(w), b, gy, geometry)
        destination.check_results(call.specs, are_gradients=grad is not None)
        report = call.run(destination, shows_progress=not quiet)
    if as_json:
        click.echo(_format_json(report, destination))
    if not quiet:
        click.echo(_format_line(report, destination), err=True)


def _parse_output(name: str, stream_format: str, inputs: Sequence[str], *, as_json: bool) -> Output:
    if as_json and name == STANDARD_STREAM:
        raise click.UsageError("--json prints to standard output, so -o must be a file")
    if inputs.count(STANDARD_STREAM) > 1:
        raise click.UsageError("only one operand can come from standard input")
    output = Output.parse(name, FileFormat(stream_format))
    output.check_inputs(inputs)
    return output


def _format_line(report: Report, output: Output) -> str:
    results = ", ".join(f"{name}: {spec}" for name, spec in report.results.items())
    bytes_per_s = (report.sent_bytes + report.received_bytes) / report.duration_s
    return (
        f"{results}; {format_bytes(report.sent_bytes)} sent, {format_bytes(report.received_bytes)} received, "
        f"{report.duration_s * 1e3:.0f} ms, {format_bytes(bytes_per_s)}/s by {report.transport}; written to {output}"
    )


def _format_json(report: Report, output: Output) -> str:
    fields = {
        "results": {
            name: {"shape": spec.shape, "dtype": str(spec.dtype), "bytes": spec.nbytes}
            for name, spec in report.results.items()
        },
        "sent_bytes": report.sent_bytes,
        "received_bytes": report.received_bytes,
        "duration_ms": round(report.duration_s * 1e3, 3),
        "bytes_per_s": round((report.sent_bytes + report.received_bytes) / report.duration_s),
        "transport": report.transport,
        "output": str(output),
    }
    return json.dumps(fields)
