"""One attempt at a call whose tensors may stay on the server: how each of them goes, and what comes of it."""

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
    """A call some of whose tensors may stay on the server.

    Attributes:
        operation: What is computed.
        request: Describes it; it is not to be changed.
        problem: Of what shapes, types and geometry.
        operands: By the names of their fields, in the order of streams.
        results: What they will be, by the names of their fields.
        stay: Whether the results stay on the server.
        at: The operand that results are wanted beside, which need not be sent: an array of numpy's, one of
            cupy's on its card, or a Kept.
    """

    operation: Operation
    request: Request
    problem: Problem
    operands: Mapping[str, Array | Resident]
    results: Mapping[str, TensorSpec]
    keep_results: bool
    results_like: Any

    def with_host_arrays(self) -> Call:
        """Return the same call with numpy arrays in place of those that are on cards."""
        operands = {
            f: o if isinstance(o, Resident) else host_array(o) for f, o in self.operands.items()
        }
        return replace(self, operands=operands)


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What an attempt needs of its connection.

    Attributes:
        session: The name of the session.
        contents: Digests that the server has.
        deadline: When the caller must have an answer.
        put: Has the server keep a tensor that it has lost.
        handle: Makes a handle of a tensor that the server has kept, and its size in bytes.
    """

    session: bytes
    known_digests: KnownDigests
    deadline: Deadline
    put: Callable[[Resident, SourceArray], ResidentHandle]
    make_handle: Callable[[pb.Resident, int], ResidentHandle]


class Attempt:
    """Makes a call once.

    Args:
        send_all: Send what the server does not keep rather than have it kept or named by a digest:
            for a last attempt, which cannot fail for want of that.

    Raises:
        LostTensorError: The server no longer has an operand, and it cannot be sent again.
    """

    def __init__(self, call: Call, means: AttemptContext, *, send_all: bool = False) -> None:
        self._call = call
        self._context = means
        self._send_all = send_all
        self._sent_operands: dict[str, Array] = {}
        self._offered_operands: dict[str, Array] = {}
        self._digests: dict[str, tuple[TensorSpec, pb.Digest]] = {}
        self._handles: dict[str, tuple[Resident, ResidentHandle]] = {}
        self._operands_to_keep: dict[str, tuple[Resident, SourceArray]] = {}
        request: Any = type(call.request)()
        request.CopyFrom(call.request)
        request.session = means.session
        self._request: Request = request
        if call.keep_results:
            _keep_results(self._request)
        for field, operand in call.operands.items():
            if isinstance(operand, Resident):
                self._locate(field, operand)
            else:
                self._name(field, operand)

    @property
    def call_spec(self) -> CallSpec:
        """The call, as it is made this time."""
        knows, session = self._context.known_digests.knows, self._context.session
        return CallSpec(
            self._call.operation,
            self._request,
            self._call.problem,
            self._sent_operands,
            {} if self._call.keep_results else self._call.results,
            self._context.deadline,
            self._offered_operands,
            are_digests_known=all(knows(session, *content) for content in self._digests.values()),
        )

    @property
    def needs_room(self) -> bool:
        """Whether the server needs room to keep something."""
        return self._call.keep_results or bool(self._operands_to_keep)

    @contextmanager
    def hash_in_background(self) -> Iterator[None]:
        """Take the digests of what is sent to be kept while the block runs."""
        with ExitStack() as stack:
            for _, source in self._operands_to_keep.values():
                stack.enter_context(source.hash_in_background())
            yield

    def record_response(self, response: Response) -> None:
        """Take note of what the server has now."""
        for content in self._digests.values():
            self._context.known_digests.learn(self._context.session, *content)
        for field, (kept, _) in self._operands_to_keep.items():
            assert isinstance(response, pb.DeconvolveResponse)  # no other keeps operands
            resident = getattr(response.kept, field)
            kept.adopt(self._context.make_handle(resident, kept.spec.nbytes))

    def results(self, response: Response) -> dict[str, Resident]:
        """Return what stands for the results that stay."""
        kept: dict[str, Resident] = {}
        for field, spec in self._call.results.items():
            resident = getattr(response, field).resident
            kept[field] = Resident(spec, handle=self._context.make_handle(resident, spec.nbytes))
        return kept

    def forget(self, argument: str) -> bool:
        """Take note that the server lacks an operand; return whether there is another way for it.

        Args:
            argument: Its name; empty if the server does not say.
        """
        fields = [*self._handles, *self._digests]
        lost = [f for f in fields if argument in ("", ARGUMENTS[f])]
        for field in lost:
            if field in self._handles:
                kept, handle = self._handles[field]
                kept.lose(handle)
            else:
                self._context.known_digests.forget(self._context.session, *self._digests[field])
        return bool(lost)

    def _locate(self, field: str, kept: Resident) -> None:
        """Name a tensor by its handle, or send it so that the server keeps it."""
        handle = kept.handle_for(self._context.session)
        if handle is None:
            source = kept.require_source(ARGUMENTS[field])
            if kept.state is ResidentState.UNSENT and isinstance(
                self._request, pb.DeconvolveRequest
            ):
                setattr(self._request.keep, field, True)
                self._operands_to_keep[field] = kept, source
                self._name(field, source.array, source)
                return
            if self._send_all:
                self._sent_operands[field] = source.array
                return
            handle = self._context.put(kept, source)
        getattr(self._request, field).resident.CopyFrom(handle.resident)
        self._handles[field] = kept, handle

    def _name(self, field: str, array: Array, source: SourceArray | None = None) -> None:
        """Name an array by its digest where that pays, else send it."""
        is_constant = field in self._call.operation.constants
        contents, deadline = self._context.known_digests, self._context.deadline
        if self._send_all or not is_constant or not contents.is_worth_hashing(array, deadline):
            self._sent_operands[field] = array
            return
        digest = digest_of(array) if source is None else source.digest
        getattr(self._request, field).digest.CopyFrom(digest)
        self._digests[field] = spec_of(array), digest
        self._offered_operands[field] = array


def _keep_results(request: Request) -> None:
    if isinstance(request, pb.DeconvolveRequest):
        request.keep_y = True
    else:
        request.keep.CopyFrom(request.wanted)
