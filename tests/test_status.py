"""Errors across the wire: what a server raises is what its client raises, by a real channel between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from deconvd import errors
from deconvd.errors import DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.status import status_from_error

CLASSES = [getattr(errors, name) for name in errors.__all__]

Behaviour = Callable[[grpc.ServicerContext], None]


class Meet(Protocol):
    def __call__(self, behaviour: Behaviour, method: str = "Fail") -> DeconvdError: ...


@pytest.fixture(scope="module")
def meet() -> Iterator[Meet]:
    """A function that runs a behaviour as a server's handler and returns what the client makes of it."""
    behaviours: list[Behaviour] = []

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        behaviours.pop()(context)
        return b""

    def meet(behaviour: Behaviour, method: str = "Fail") -> DeconvdError:
        behaviours.append(behaviour)
        return failure_of(channel, method)

    with ThreadPoolExecutor(1) as handlers:
        server = grpc.server(handlers)
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(handle)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test", {"Fail": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield meet
        server.stop(None).wait()


def failure_of(channel: grpc.Channel, method: str) -> DeconvdError:
    rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/test/{method}")
    with pytest.raises(grpc.RpcError) as raised:
        rpc(b"", timeout=10)
    return error_from_rpc(raised.value)


def raising(error: DeconvdError) -> Behaviour:
    return lambda context: context.abort_with_status(rpc_status.to_status(status_from_error(error)))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_client_raises_the_class_and_message_that_the_server_raised(
    meet: Meet, cls: type[DeconvdError]
) -> None:
    arrived = meet(raising(cls("the filter is wider\nthan 100 % of the image: größer")))

    assert type(arrived) is cls
    assert str(arrived) == "the filter is wider\nthan 100 % of the image: größer"


def test_no_two_classes_share_a_status_but_finer_ones_with_theirs() -> None:
    coarse: list[type[DeconvdError]] = [DeconvdError, *DeconvdError.__subclasses__()]

    assert len({cls.status for cls in coarse}) == len(coarse)
    for cls in CLASSES:
        assert cls in coarse or any(issubclass(cls, c) and cls.status == c.status for c in coarse)


@pytest.mark.parametrize("cls", [DeconvdError, *DeconvdError.__subclasses__()])
def test_each_class_is_picked_by_its_status_where_nothing_else_tells(
    meet: Meet, cls: type[DeconvdError]
) -> None:
    arrived = meet(lambda context: context.abort(grpc.StatusCode[cls.status], "from a proxy"))

    assert (type(arrived), str(arrived)) == (cls, "from a proxy")


@pytest.mark.parametrize("argument", ["", "W"])
@pytest.mark.parametrize("cls", [InvalidArgumentError, errors.LostTensorError])
def test_the_argument_at_fault_arrives(
    meet: Meet, cls: type[InvalidArgumentError | errors.LostTensorError], argument: str
) -> None:
    arrived = meet(raising(cls("no", argument=argument)))

    assert isinstance(arrived, cls)
    assert arrived.argument == argument


@pytest.mark.parametrize("retry_after_s", [None, 0.0, 0.25, 3600.0])
def test_the_time_to_come_back_arrives(meet: Meet, retry_after_s: float | None) -> None:
    arrived = meet(raising(UnavailableError("full", retry_after_s=retry_after_s)))

    assert isinstance(arrived, UnavailableError)
    assert arrived.retry_after_s == retry_after_s


@pytest.mark.parametrize("letter", ["a", "%", "\n", "ü", "語", "😀", "\0", "\udc80"])
@pytest.mark.parametrize("cls", [InvalidArgumentError, errors.ExhaustedError])
def test_a_message_too_long_for_headers_is_cut_and_its_class_survives(
    meet: Meet, cls: type[DeconvdError], letter: str
) -> None:
    error = cls("x must not be " + letter * 100_000)
    if isinstance(error, InvalidArgumentError):
        error.argument = "x"

    arrived = meet(raising(error))

    assert type(arrived) is cls
    assert str(arrived).startswith("x must not be ")
    assert 150 < len(str(arrived)) < 2500


def test_a_status_without_a_class_here_is_named(meet: Meet) -> None:
    arrived = meet(lambda context: context.abort(grpc.StatusCode.ABORTED, "in vain"))

    assert (type(arrived), str(arrived)) == (DeconvdError, "ABORTED: in vain")


def test_a_status_without_a_message_is_named(meet: Meet) -> None:
    arrived = meet(lambda context: context.abort(grpc.StatusCode.INTERNAL, ""))

    assert str(arrived) == "the call failed with status INTERNAL"


def test_a_method_that_the_server_lacks_is_unimplemented(meet: Meet) -> None:
    arrived = meet(lambda context: None, method="Later")

    assert isinstance(arrived, errors.UnimplementedError)


def test_a_server_that_nobody_runs_is_unavailable() -> None:
    with grpc.insecure_channel("unix:/nonexistent/deconvd.sock") as channel:
        arrived = failure_of(channel, "Fail")

    assert isinstance(arrived, UnavailableError)
    assert arrived.retry_after_s is None


def test_the_class_survives_a_proxy_that_changes_the_status(meet: Meet) -> None:
    status = status_from_error(InvalidArgumentError("no", argument="W"))
    details = rpc_status.to_status(status).trailing_metadata

    def proxy(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(details)
        context.abort(grpc.StatusCode.INTERNAL, "no")

    arrived = meet(proxy)

    assert isinstance(arrived, InvalidArgumentError)
    assert arrived.argument == "W"


@pytest.mark.parametrize(
    "details",
    [
        b"\xff garbage",
        b"",
        status_pb2.Status(
            details=[
                any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff"),
                any_pb2.Any(type_url="type.googleapis.com/unheard.of", value=b"\xff"),
            ]
        ).SerializeToString(),
    ],
    ids=["no status", "empty", "no details"],
)
def test_details_that_cannot_be_read_are_passed_over(meet: Meet, details: bytes) -> None:
    def fail(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "come back")

    arrived = meet(fail)

    assert (type(arrived), str(arrived)) == (UnavailableError, "come back")


@pytest.mark.parametrize(
    ("domain", "reason"), [("example.org", "InvalidArgumentError"), ("deconvd", "FutureError")]
)
def test_a_class_that_is_not_of_this_version_is_not_made(
    meet: Meet, domain: str, reason: str
) -> None:
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(domain=domain, reason=reason))
    status = status_pb2.Status(code=13, message="strange", details=[packed])

    def fail(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(grpc.StatusCode.INTERNAL, "strange")

    arrived = meet(fail)

    assert type(arrived) is errors.InternalError
