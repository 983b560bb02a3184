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
from deconvd_client.calls.call_spec import Asked, Request, Response
from deconvd_client.calls.deadline import Deadline
from deconvd_client.frameworks.framework import host_array
from deconvd_client.residents.known_digests import Contents
from deconvd_client.residents.resident import Kept, KeptState
from deconvd_client.residents.session import Handle
from deconvd_client.residents.source_array import Source

__all__ = ["Attempt", "Call", "Means"]


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
    operands: Mapping[str, Array | Kept]
    results: Mapping[str, TensorSpec]
    stay: bool
    at: Any

    def on_host(self) -> Call:
        """Return the same call with numpy arrays in place of those that are on cards."""
        operands = {
            f: o if isinstance(o, Kept) else host_array(o) for f, o in self.operands.items()
        }
        return replace(self, operands=operands)


@dataclass(frozen=True, slots=True)
class Means:
    """What an attempt needs of its connection.

    Attributes:
        session: The name of the session.
        contents: Digests that the server has.
        deadline: When the caller must have an answer.
        put: Has the server keep a tensor that it has lost.
        handle: Makes a handle of a tensor that the server has kept, and its size in bytes.
    """

    session: bytes
    contents: Contents
    deadline: Deadline
    put: Callable[[Kept, Source], Handle]
    handle: Callable[[pb.Resident, int], Handle]


class Attempt:
    """Makes a call once.

    Args:
        send_all: Send what the server does not keep rather than have it kept or named by a digest:
            for a last attempt, which cannot fail for want of that.

    Raises:
        LostTensorError: The server no longer has an operand, and it cannot be sent again.
    """

    def __init__(self, call: Call, means: Means, *, send_all: bool = False) -> None:
        self._call = call
        self._means = means
        self._send_all = send_all
        self._sent: dict[str, Array] = {}
        self._offered: dict[str, Array] = {}
        self._named: dict[str, tuple[TensorSpec, pb.Digest]] = {}
        self._handles: dict[str, tuple[Kept, Handle]] = {}
        self._unsent: dict[str, tuple[Kept, Source]] = {}
        request: Any = type(call.request)()
        request.CopyFrom(call.request)
        request.session = means.session
        self._request: Request = request
        if call.stay:
            _keep_results(self._request)
        for field, operand in call.operands.items():
            if isinstance(operand, Kept):
                self._locate(field, operand)
            else:
                self._name(field, operand)

    @property
    def asked(self) -> Asked:
        """The call, as it is made this time."""
        knows, session = self._means.contents.knows, self._means.session
        return Asked(
            self._call.operation,
            self._request,
            self._call.problem,
            self._sent,
            {} if self._call.stay else self._call.results,
            self._means.deadline,
            self._offered,
            is_sure=all(knows(session, *content) for content in self._named.values()),
        )

    @property
    def keeps(self) -> bool:
        """Whether the server needs room to keep something."""
        return self._call.stay or bool(self._unsent)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Take the digests of what is sent to be kept while the block runs."""
        with ExitStack() as stack:
            for _, source in self._unsent.values():
                stack.enter_context(source.beside())
            yield

    def settle(self, response: Response) -> None:
        """Take note of what the server has now."""
        for content in self._named.values():
            self._means.contents.learn(self._means.session, *content)
        for field, (kept, _) in self._unsent.items():
            assert isinstance(response, pb.DeconvolveResponse)  # no other keeps operands
            resident = getattr(response.kept, field)
            kept.adopt(self._means.handle(resident, kept.spec.nbytes))

    def results(self, response: Response) -> dict[str, Kept]:
        """Return what stands for the results that stay."""
        kept: dict[str, Kept] = {}
        for field, spec in self._call.results.items():
            resident = getattr(response, field).resident
            kept[field] = Kept(spec, handle=self._means.handle(resident, spec.nbytes))
        return kept

    def forget(self, argument: str) -> bool:
        """Take note that the server lacks an operand; return whether there is another way for it.

        Args:
            argument: Its name; empty if the server does not say.
        """
        fields = [*self._handles, *self._named]
        lost = [f for f in fields if argument in ("", ARGUMENTS[f])]
        for field in lost:
            if field in self._handles:
                kept, handle = self._handles[field]
                kept.lose(handle)
            else:
                self._means.contents.forget(self._means.session, *self._named[field])
        return bool(lost)

    def _locate(self, field: str, kept: Kept) -> None:
        """Name a tensor by its handle, or send it so that the server keeps it."""
        handle = kept.handle_in(self._means.session)
        if handle is None:
            source = kept.source_unchanged(ARGUMENTS[field])
            if kept.state is KeptState.UNSENT and isinstance(self._request, pb.DeconvolveRequest):
                setattr(self._request.keep, field, True)
                self._unsent[field] = kept, source
                self._name(field, source.array, source)
                return
            if self._send_all:
                self._sent[field] = source.array
                return
            handle = self._means.put(kept, source)
        getattr(self._request, field).resident.CopyFrom(handle.resident)
        self._handles[field] = kept, handle

    def _name(self, field: str, array: Array, source: Source | None = None) -> None:
        """Name an array by its digest where that pays, else send it."""
        is_constant = field in self._call.operation.constants
        contents, deadline = self._means.contents, self._means.deadline
        if self._send_all or not is_constant or not contents.is_worth(array, deadline):
            self._sent[field] = array
            return
        digest = digest_of(array) if source is None else source.digest
        getattr(self._request, field).digest.CopyFrom(digest)
        self._named[field] = spec_of(array), digest
        self._offered[field] = array


def _keep_results(request: Request) -> None:
    if isinstance(request, pb.DeconvolveRequest):
        request.keep_y = True
    else:
        request.keep.CopyFrom(request.wanted)
