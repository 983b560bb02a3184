"""A tensor's states on the client: what a call learns too late changes nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from deconvd.errors import InvalidArgumentError, LostTensorError
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.residents.resident import Resident, ResidentState
from deconvd_client.residents.session import ResidentHandle
from deconvd_client.residents.source_array import SourceArray

SPEC = TensorSpec((3,), np.dtype(np.float32))


@pytest.fixture
def mailbox() -> SimpleQueue[Any]:
    """Where handles say that nobody refers to them."""
    return SimpleQueue()


def handle(mailbox: SimpleQueue[Any], session: bytes = b"first") -> ResidentHandle:
    return ResidentHandle(session, pb.Resident(handle=b"h"), SPEC.nbytes, mailbox)


def source() -> SourceArray:
    return SourceArray(np.zeros(3, np.float32))


def test_it_is_resident_once_it_was_sent_and_again_once_it_was_lost(
    mailbox: SimpleQueue[Any],
) -> None:
    kept, first, second = Resident(SPEC, source=source()), handle(mailbox), handle(mailbox)
    states = [kept.state]
    kept.adopt(first)
    states.append(kept.state)
    kept.lose(first)
    states.append(kept.state)
    kept.adopt(second)
    states.append(kept.state)
    kept.close()
    states.append(kept.state)

    assert [state.name for state in states] == ["UNSENT", "RESIDENT", "LOST", "RESIDENT", "CLOSED"]
    assert kept.handle is None
    assert kept.source is None


def test_what_was_never_sent_is_not_compared_with_what_it_was(mailbox: SimpleQueue[Any]) -> None:
    origin = source()
    assert origin.digest.blake3
    kept, gone = Resident(SPEC, source=origin), handle(mailbox)
    origin.array[...] = 1

    assert kept.require_source("x") is origin
    kept.adopt(gone)
    kept.lose(gone)
    with pytest.raises(LostTensorError, match="has changed since"):
        kept.require_source("x")


def test_a_call_that_ends_after_the_tensor_was_closed_does_not_open_it(
    mailbox: SimpleQueue[Any],
) -> None:
    kept = Resident(SPEC, source=source())
    kept.close()

    kept.adopt(handle(mailbox))

    assert kept.state is ResidentState.CLOSED
    assert not mailbox.empty()  # the server is told to drop what the call has left there
    with pytest.raises(InvalidArgumentError):
        kept.check_open("x")
    with pytest.raises(LostTensorError, match="closed during the call"):
        kept.require_source("x")


def test_only_the_handle_in_use_can_be_lost(mailbox: SimpleQueue[Any]) -> None:
    kept, old, new = Resident(SPEC, source=source()), handle(mailbox), handle(mailbox, b"second")
    kept.adopt(old)
    kept.adopt(new)

    kept.lose(old)

    assert kept.state is ResidentState.RESIDENT
    assert kept.handle_for(b"second") is new
    assert kept.handle_for(b"first") is None


def test_of_two_calls_that_send_it_at_once_the_first_is_taken(mailbox: SimpleQueue[Any]) -> None:
    kept, first, second = Resident(SPEC, source=source()), handle(mailbox), handle(mailbox)
    kept.adopt(first)
    kept.adopt(second)

    assert kept.handle is first


def test_another_of_the_same_tensor_outlives_it_in_its_state(mailbox: SimpleQueue[Any]) -> None:
    kept, lost = Resident(SPEC, source=source()), handle(mailbox)
    kept.adopt(lost)
    kept.lose(lost)
    other = kept.duplicate()
    kept.close()

    assert other.state is ResidentState.LOST
    assert other.source is not None
    assert kept.duplicate().is_closed


def test_a_finalizer_may_close_it_in_the_midst_of_a_change(mailbox: SimpleQueue[Any]) -> None:
    """A handle goes while the tensor adopts another, and whatever goes may have finalizers of the caller's."""
    kept = Resident(SPEC, source=source())

    class Closing(ResidentHandle):
        __slots__ = ()

        def __del__(self) -> None:
            kept.close()

    kept.adopt(Closing(b"first", pb.Resident(), 1, mailbox))
    changing = threading.Thread(target=kept.adopt, args=(handle(mailbox, b"second"),), daemon=True)
    changing.start()
    changing.join(30)

    assert not changing.is_alive()
    assert kept.is_closed


def test_whatever_threads_do_a_closed_tensor_has_no_handle(mailbox: SimpleQueue[Any]) -> None:
    def race(_: int) -> bool:
        kept = Resident(SPEC, source=source())
        begin = threading.Barrier(3)

        def adopt() -> None:
            begin.wait(30)
            kept.adopt(handle(mailbox))

        def close() -> None:
            begin.wait(30)
            kept.close()

        with ThreadPoolExecutor(3) as threads:
            for work in (adopt, close, adopt):
                threads.submit(work)
        return kept.is_closed and kept.handle is None

    assert all(map(race, range(100)))
