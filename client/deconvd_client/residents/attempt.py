"""One attempt at a call with residents: decides how each operand gets to the server, and records the response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS, Operation
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.digest import digest_of
from deconvd_client.calls.call_spec import CallSpec, Request, Response
from deconvd_client.calls.deadline import Deadline
from deconvd_client.frameworks.framework import host_array
from deconvd_client.residents.known_digests import KnownDigests
from deconvd_client.residents.resident import Resident, ResidentState
from deconvd_client.residents.session import ResidentHandle
from deconvd_client.residents.source_array import SourceArray

__all__ = ["Attempt", "AttemptContext", "Call"]


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the caller wants it. Its operands and results may be residents.

    Attributes:
        operation: What to compute.
        request: Describes the call. It is shared with other calls and must not be changed.
        problem: The shapes, element types and geometry.
        operands: By the names of their fields, in the order of a stream.
        results: The shapes and element types of the results, by the names of their fields.
        keep_results: Whether the results become residents.
        results_like: The operand that decides where results go: an array of numpy's (results are on the host), an
            array of cupy's (results are on its card), or a Resident (results are on the host). The request
            need not use this operand.
        sources: Operands whose digests are known already or may be needed again, by the names of their fields.
    """

    operation: Operation
    request: Request
    problem: Problem
    operands: Mapping[str, Array | Resident]
    results: Mapping[str, TensorSpec]
    keep_results: bool
    results_like: Any
    sources: Mapping[str, SourceArray] | None = None

    def with_host_arrays(self) -> Call:
        """Return the same call with numpy arrays in place of those that are on cards."""
        operands = {
            f: o if isinstance(o, Resident) else host_array(o) for f, o in self.operands.items()
        }
        return replace(self, operands=operands)


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What an attempt needs from its connection.

    Attributes:
        session: The name of the session.
        known_digests: The digests that the server has for this session.
        deadline: The deadline of the call.
        put: Sends a resident that the server has lost, and returns its new handle.
        make_handle: Returns the handle of a resident that the server now has. Its second argument is the size in
            bytes.
    """

    session: bytes
    known_digests: KnownDigests
    deadline: Deadline
    put: Callable[[Resident, SourceArray], ResidentHandle]
    make_handle: Callable[[pb.Resident, int], ResidentHandle]


class Attempt:
    """One attempt at a call.

    Each operand gets to the server in one of four ways:

        a resident that the server has        by its handle
        a resident that was never sent        with its elements, which the server keeps
        a large constant, as W often is       by its digest; or with its elements, which the server then remembers
        any other array                       with its elements

    Args:
        send_all: Whether to send the elements of every operand that has no handle, without a digest and without
            a PutTensor call first. The last attempt does so: it does not depend on what the server remembers.

    Raises:
        LostTensorError: The server no longer has an operand, and the client cannot send it again.
    """

    def __init__(self, call: Call, context: AttemptContext, *, send_all: bool = False) -> None:
        self._call = call
        self._context = context
        self._send_all = send_all
        self._sent_operands: dict[str, Array] = {}
        self._digests: dict[str, tuple[TensorSpec, pb.Digest]] = {}
        self._handles: dict[str, tuple[Resident, ResidentHandle]] = {}
        self._operands_to_keep: dict[str, tuple[Resident, SourceArray]] = {}
        request: Any = type(call.request)()
        request.CopyFrom(call.request)
        request.session = context.session
        self._request: Request = request
        if call.keep_results:
            _keep_results(self._request)
        sources = call.sources or {}
        for field, operand in call.operands.items():
            if isinstance(operand, Resident):
                self._add_resident(field, operand)
            else:
                self._add_array(field, operand, sources.get(field))

    @property
    def call_spec(self) -> CallSpec:
        """What to send in this attempt."""
        return CallSpec(
            self._call.operation,
            self._request,
            self._call.problem,
            self._sent_operands,
            {} if self._call.keep_results else self._call.results,
            self._context.deadline,
        )

    @property
    def needs_room(self) -> bool:
        """Whether the server will keep an operand or a result."""
        return self._call.keep_results or bool(self._operands_to_keep)

    @contextmanager
    def hash_in_background(self) -> Iterator[None]:
        """Compute the digests of the operands that the server will keep, while the block sends them."""
        with ExitStack() as stack:
            for _, source in self._operands_to_keep.values():
                stack.enter_context(source.hash_in_background())
            yield

    def record_response(self, response: Response) -> None:
        """Note which operands the server has now, by their digests and as residents."""
        for content in self._digests.values():
            self._context.known_digests.learn(self._context.session, *content)
        for field, (resident, _) in self._operands_to_keep.items():
            assert isinstance(response, pb.DeconvolveResponse)  # no other request asks for it
            name = getattr(response.kept, field)
            resident.adopt(self._context.make_handle(name, resident.spec.nbytes))

    def results(self, response: Response) -> dict[str, Resident]:
        """Return the results that the server has kept, by the names of their fields."""
        results: dict[str, Resident] = {}
        for field, spec in self._call.results.items():
            name = getattr(response, field).resident
            results[field] = Resident(spec, handle=self._context.make_handle(name, spec.nbytes))
        return results

    def forget(self, argument: str) -> bool:
        """Note that the server lacks an operand. Return whether another attempt can send it in another way.

        Args:
            argument: The operand's name. Empty if the server did not name it: then all that were named by a handle
                or a digest are forgotten.
        """
        named = [f for f in self._digests if f not in self._sent_operands]
        fields = [*self._handles, *named]
        lost = [f for f in fields if argument in ("", ARGUMENTS[f])]
        for field in lost:
            if field in self._handles:
                resident, handle = self._handles[field]
                resident.lose(handle)
            else:
                self._context.known_digests.forget(self._context.session, *self._digests[field])
        return bool(lost)

    def _add_resident(self, field: str, resident: Resident) -> None:
        """Name a resident by its handle. Send it first if the server does not have it."""
        handle = resident.handle_for(self._context.session)
        if handle is None:
            source = resident.require_source(ARGUMENTS[field])
            if resident.state is ResidentState.UNSENT and isinstance(
                self._request, pb.DeconvolveRequest
            ):
                # the request can carry the elements and ask to keep them: one round trip instead of two
                setattr(self._request.keep, field, True)
                self._operands_to_keep[field] = resident, source
                self._add_array(field, source.array, source)
                return
            if self._send_all:
                self._sent_operands[field] = source.array
                return
            handle = self._context.put(resident, source)
        getattr(self._request, field).resident.CopyFrom(handle.resident)
        self._handles[field] = resident, handle

    def _add_array(self, field: str, array: Array, source: SourceArray | None = None) -> None:
        """Name an array by its digest if the server should have it, else send its elements."""
        is_constant = field in self._call.operation.constants
        known_digests, deadline = self._context.known_digests, self._context.deadline
        if self._send_all or not is_constant or not known_digests.is_worth_hashing(array, deadline):
            self._sent_operands[field] = array
            return
        content = spec_of(array), digest_of(array) if source is None else source.digest
        self._digests[field] = content
        if known_digests.expects(self._context.session, *content):
            getattr(self._request, field).digest.CopyFrom(content[1])
            return
        setattr(self._request.remember, field, True)
        self._sent_operands[field] = array


def _keep_results(request: Request) -> None:
    """Ask the server to keep all results of a request instead of sending them."""
    if isinstance(request, pb.DeconvolveRequest):
        request.keep_y = True
    else:
        request.keep.CopyFrom(request.wanted)
