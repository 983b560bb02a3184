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
from deconvd_client.residents.resident import Kept, KeptState
from deconvd_client.residents.session import Handle
from deconvd_client.residents.source_array import Source

SPEC = TensorSpec((3,), np.dtype(np.float32))


@pytest.fixture
def mailbox() -> SimpleQueue[Any]:
    """Where handles say that nobody refers to them."""
    return SimpleQueue()


def handle(mailbox: SimpleQueue[Any], session: bytes = b"first") -> Handle:
    return Handle(session, pb.Resident(handle=b"h"), SPEC.nbytes, mailbox)


def source() -> Source:
    return Source(np.zeros(3, np.float32))


def test_it_is_resident_once_it_was_sent_and_again_once_it_was_lost(
    mailbox: SimpleQueue[Any],
) -> None:
    kept, first, second = Kept(SPEC, source=source()), handle(mailbox), handle(mailbox)
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
    kept, gone = Kept(SPEC, source=origin), handle(mailbox)
    origin.array[...] = 1

    assert kept.source_unchanged("x") is origin
    kept.adopt(gone)
    kept.lose(gone)
    with pytest.raises(LostTensorError, match="has been changed since"):
        kept.source_unchanged("x")


def test_a_call_that_ends_after_the_tensor_was_closed_does_not_open_it(
    mailbox: SimpleQueue[Any],
) -> None:
    kept = Kept(SPEC, source=source())
    kept.close()

    kept.adopt(handle(mailbox))

    assert kept.state is KeptState.CLOSED
    assert not mailbox.empty()  # the server is told to drop what the call has left there
    with pytest.raises(InvalidArgumentError):
        kept.check_open("x")
    with pytest.raises(LostTensorError, match="closed during the call"):
        kept.source_unchanged("x")


def test_only_the_handle_in_use_can_be_lost(mailbox: SimpleQueue[Any]) -> None:
    kept, old, new = Kept(SPEC, source=source()), handle(mailbox), handle(mailbox, b"second")
    kept.adopt(old)
    kept.adopt(new)

    kept.lose(old)

    assert kept.state is KeptState.RESIDENT
    assert kept.handle_in(b"second") is new
    assert kept.handle_in(b"first") is None


def test_of_two_calls_that_send_it_at_once_the_first_is_taken(mailbox: SimpleQueue[Any]) -> None:
    kept, first, second = Kept(SPEC, source=source()), handle(mailbox), handle(mailbox)
    kept.adopt(first)
    kept.adopt(second)

    assert kept.handle is first


def test_another_of_the_same_tensor_outlives_it_in_its_state(mailbox: SimpleQueue[Any]) -> None:
    kept, lost = Kept(SPEC, source=source()), handle(mailbox)
    kept.adopt(lost)
    kept.lose(lost)
    other = kept.shared()
    kept.close()

    assert other.state is KeptState.LOST
    assert other.source is not None
    assert kept.shared().is_closed


def test_a_finalizer_may_close_it_in_the_midst_of_a_change(mailbox: SimpleQueue[Any]) -> None:
    """A handle goes while the tensor adopts another, and whatever goes may have finalizers of the caller's."""
    kept = Kept(SPEC, source=source())

    class Closing(Handle):
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
        kept = Kept(SPEC, source=source())
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
