"""TLS beneath direct connections: what is encrypted arrives, in both directions at once, and a cut is no end."""

from __future__ import annotations

import math
import random
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial

import pytest

from deconvd.direct.connection_errors import ConnectionClosedError, ConnectionTimeoutError
from deconvd.direct.tls_engine import MAX_RECORD_BYTES, TlsEngine
from deconvd.direct.tls_stream import TlsStream
from tests.certificates import Authority, CertificateFiles
from tests.processes import exit_code, wait_until
from tests.tls_streams import client_context, established_engines, taken, tls_streams

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]

_RECORDS_COUNT = 5_000
"""Without a lock in the engine, a few hundred were enough for OpenSSL to fail."""

Engines = tuple[TlsEngine, TlsEngine]


@pytest.fixture(params=VERSIONS, ids=lambda version: str(version.name))
def engines(
    request: pytest.FixtureRequest, authority: Authority, loopback_certificate: CertificateFiles
) -> Engines:
    return established_engines(authority, loopback_certificate, version=request.param)


def exchange(stream: TlsStream, sent: bytes, expected: bytes, seed: int) -> None:
    """Write and read at the same time, in pieces of all sizes, with polls and waits between them."""
    sizes = random.Random(seed)

    def write() -> None:
        begin = 0
        while begin < len(sent):
            size_bytes = sizes.choice([1, 100, 16 << 10, 70_000, 600_000])
            stream.write(sent[begin : begin + 7], sent[begin + 7 : begin + size_bytes])
            begin += max(size_bytes, 7)

    writer = threading.Thread(target=write)
    writer.start()
    sizes_read = random.Random(seed + 1)
    received = bytearray()
    while len(received) < len(expected):
        match sizes_read.randrange(4):
            case 0:
                stream.wait()
            case 1:
                stream.poll(0)
            case 2:
                space = memoryview(bytearray(sizes_read.choice([1, 3000, 40_000])))
                received += space[: stream.read_into(space)]
            case 3:
                size_bytes = sizes_read.choice([5, 20_000, 500_000])
                received += taken(stream, min(size_bytes, len(expected) - len(received)))
    writer.join()
    assert received == expected
    assert not stream.poll(0)


def test_both_ends_write_and_read_at_the_same_time(engines: Engines) -> None:
    there, back = random.Random(0).randbytes(12 << 20), random.Random(1).randbytes(12 << 20)
    with tls_streams(engines) as (client, server), ThreadPoolExecutor(2) as pool:
        for stream in (client, server):
            stream.set_deadline(60)
        ends = [
            pool.submit(exchange, client, there, back, 2),
            pool.submit(exchange, server, back, there, 4),
        ]
        for end in ends:
            end.result()


def test_a_thread_that_reads_does_not_disturb_one_that_writes(engines: Engines) -> None:
    client, server = engines
    records: list[bytes] = []
    writer = threading.Thread(
        target=lambda: records.extend(client.encrypt(bytes(20_000)) for _ in range(_RECORDS_COUNT))
    )
    writer.start()
    target = memoryview(bytearray(1 << 20))
    while writer.is_alive():
        client.has_received = True  # so that OpenSSL is asked, though nothing has come
        assert client.decrypt_into(target) == 0
    assert len(records) == _RECORDS_COUNT
    for record in records:
        server.feed(record)
        assert server.decrypt_into(target) == 20_000


def test_what_openssl_has_received_counts_as_arrived(engines: Engines) -> None:
    with tls_streams(engines) as (client, server):
        client.write(b"one")
        client.write(b"two")
        assert taken(server, 1) == b"o"
        arrived = select.poll()
        arrived.register(server.descriptor, select.POLLIN)
        assert not arrived.poll(0)
        for expected in (b"n", b"e", b"tw", b"o"):
            assert server.poll(0)
            server.wait()
            assert taken(server, len(expected)) == expected
        assert not server.poll(0)


def test_a_cut_is_told_from_an_end(engines: Engines) -> None:
    with tls_streams(engines) as (client, server):
        client.write(b"abc")
        client.shutdown()  # as whoever is on the way could do it
        assert taken(server, 3) == b"abc"
        assert server.poll(30)
        with pytest.raises(ConnectionClosedError, match="was cut"):
            taken(server, 1)


def test_an_end_is_told(engines: Engines) -> None:
    with tls_streams(engines) as (client, server):
        client.write(b"abc")
        client.close()
        assert taken(server, 3) == b"abc"
        assert server.poll(30)
        server.wait()
        with pytest.raises(ConnectionClosedError, match="the peer has closed the connection"):
            taken(server, 1)


def test_what_was_changed_on_the_way_is_refused(engines: Engines) -> None:
    client, server = engines
    server.feed(client.encrypt(b"abc"))
    record = bytearray(client.encrypt(b"defg"))
    record[-1] ^= 1
    server.feed(bytes(record))
    target = memoryview(bytearray(10))
    assert server.decrypt_into(target) == 3
    for _ in range(2):
        with pytest.raises(ConnectionClosedError, match="TLS has failed"):
            server.decrypt_into(target)


@contextmanager
def stream_from_wire(engine: TlsEngine) -> Iterator[tuple[TlsStream, socket.socket]]:
    """Give a stream, and the socket that it receives from: what is encrypted can be cut and changed there."""
    one, other = socket.socketpair()
    with one, closing(TlsStream(other, engine)) as stream:
        stream.set_deadline(60)
        yield stream, one


@pytest.mark.parametrize("is_filled", [True, False], ids=["filled", "read"])
def test_records_and_packets_may_end_anywhere(engines: Engines, is_filled: bool) -> None:
    client, server = engines
    batch_bytes = 256 << 10
    sizes = [1, 2 * MAX_RECORD_BYTES, batch_bytes, batch_bytes + MAX_RECORD_BYTES, 700_000]
    reads, cuts = random.Random(6), random.Random(7)

    def send(data: bytes) -> None:
        sent, begin = b"", 0
        while begin < len(data):
            size_bytes = cuts.choice([1, 1000, 20_000, 400_000])
            sent += client.encrypt(data[begin : begin + size_bytes])
            begin += size_bytes
        begin = 0
        while begin < len(sent):
            size_bytes = cuts.choice([1, 5, 3000, MAX_RECORD_BYTES, 300_000])
            wire.sendall(sent[begin : begin + size_bytes])
            begin += size_bytes

    with stream_from_wire(server) as (stream, wire), ThreadPoolExecutor(1) as pool:
        for size_bytes in sizes * 4:
            expected = reads.randbytes(size_bytes + reads.randrange(3))
            sending = pool.submit(send, expected)
            target = memoryview(bytearray(len(expected)))
            filled = stream.read_into(target[: reads.randrange(1, 30_000)])
            while filled < len(expected):
                if is_filled:
                    stream.fill(target[filled:])
                    break
                filled += stream.read_into(target[filled:])
            sending.result()
            assert target == expected
        assert not stream.poll(0)


@pytest.mark.parametrize("number", [0, 1, 15, 16, 40])
def test_nothing_from_a_damaged_record_on_is_received(engines: Engines, number: int) -> None:
    client, server = engines
    data = random.Random(7).randbytes(1 << 20)
    sent = bytearray(client.encrypt(data))
    end = 0
    for _ in range(number + 1):
        end += 5 + int.from_bytes(sent[end + 3 : end + 5])
    sent[end - 1] ^= 1

    def send() -> None:
        with suppress(OSError):  # the stream has ended
            wire.sendall(sent)

    with ThreadPoolExecutor(1) as pool, stream_from_wire(server) as (stream, wire):
        pool.submit(send)
        target = memoryview(bytearray(len(data)))
        for _ in range(2):
            with pytest.raises(ConnectionClosedError, match="TLS has failed"):
                stream.fill(target)
        intact_bytes = number * (16 << 10)
        assert target[:intact_bytes] == data[:intact_bytes]
        assert not any(target[intact_bytes:])
        stream.shutdown()


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_came_before_a_deadline_or_a_shutdown_is_received(
    engines: Engines, is_cancelled: bool
) -> None:
    client, server = engines
    data = random.Random(8).randbytes(100_000)
    with stream_from_wire(server) as (stream, wire), ThreadPoolExecutor(1) as pool:
        wire.sendall(client.encrypt(data))
        stream.set_deadline(60 if is_cancelled else 1)
        target = memoryview(bytearray(1 << 20))
        filling = pool.submit(stream.fill, target)
        if is_cancelled:
            wait_until(lambda: stream.blocked_since_s < math.inf)
            stream.shutdown()
        with pytest.raises(ConnectionClosedError if is_cancelled else ConnectionTimeoutError):
            filling.result()
        assert target[: len(data)] == data


def test_a_part_of_a_record_is_no_data(engines: Engines) -> None:
    client, server = engines

    def waits_again(began_s: float) -> bool:
        return began_s < stream.blocked_since_s < math.inf

    with stream_from_wire(server) as (stream, wire), ThreadPoolExecutor(1) as pool:
        record = client.encrypt(b"abc")
        waiting = pool.submit(stream.wait)
        for size_bytes in (3, 10):
            wait_until(lambda: stream.blocked_since_s < math.inf)
            began_s = stream.blocked_since_s
            wire.sendall(record[:size_bytes])
            record = record[size_bytes:]
            wait_until(partial(waits_again, began_s))
        wire.sendall(record)
        waiting.result()
        assert taken(stream, 3) == b"abc"
        assert not stream.poll(0)


def test_a_record_that_was_sent_again_is_refused(engines: Engines) -> None:
    client, server = engines
    record = client.encrypt(b"abc")
    server.feed(record + record)
    target = memoryview(bytearray(10))
    assert server.decrypt_into(target) == 3
    with pytest.raises(ConnectionClosedError, match="TLS has failed"):
        server.decrypt_into(target)


def test_a_child_process_leaves_the_connection_to_its_parent(engines: Engines) -> None:
    with tls_streams(engines) as (client, server):

        def close() -> bool:
            client.close()
            return True

        assert exit_code(close) == 0
        client.write(b"abc")
        assert taken(server, 3) == b"abc"
        assert not server.poll(0)


def test_a_handshake_has_a_deadline(authority: Authority) -> None:
    one, other = socket.socketpair()
    engine = TlsEngine(client_context(authority.ca), "localhost")
    with other, closing(TlsStream(one, engine)) as stream:
        stream.set_deadline(0.05)
        with pytest.raises(ConnectionTimeoutError):
            stream.shake_hands()
        other.close()
        stream.set_deadline(30)
        with pytest.raises(ConnectionClosedError):
            stream.shake_hands()
