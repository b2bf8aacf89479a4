"""Clients that do not read, or ask a byte at a time, or only hold connections: others are not delayed, and the
coordinator's memory stays bounded."""

import pathlib
import re
import resource
import socket
import struct
import time

import programs
from test_service_faults import fault_job
from test_service_jobs import assert_nothing_runs, make_slow

IDLE = 800


def resident_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text()).group(1))


def connect(address):
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.setblocking(False)
    return connection


def is_closed(connection):
    try:
        while connection.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


# --- as much of HTTP/2 and gRPC as it takes to ask and never to read

def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name, value):
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)


def call(stream, method, message):
    fields = {":method": "POST", ":scheme": "http", ":path": f"/simpo.v1.TrainingService/{method}", ":authority": "here",
              "te": "trailers", "content-type": "application/grpc"}
    headers = b"".join(header(name, value) for name, value in fields.items())
    return frame(1, 4, stream, headers) + frame(0, 1, stream, b"\0" + struct.pack(">I", len(message)) + message)


def text_field(number, text):
    return bytes([number << 3 | 2, len(text)]) + text.encode()


def slowest_answer(coordinator, for_s):
    """Of calls and pages that go on meanwhile."""
    slowest, end = 0, time.monotonic() + for_s
    while time.monotonic() < end:
        begin = time.monotonic()
        assert coordinator.page("/healthz")[0] == 200
        coordinator.exposition()
        coordinator.ctl("list").expect(0)
        slowest = max(slowest, time.monotonic() - begin)
        time.sleep(0.1)
    return slowest


def test_clients_that_never_read(workspace, coordinators):
    coordinator = coordinators.start()
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job", max_steps=100000, save_strategy="no", save_steps=None))
    coordinator.wait_step(job_id, 3)
    log = pathlib.Path(coordinator.get(job_id)["attempts"][0]["log_dir"]) / "rank-1.log"
    with log.open("a") as file:
        file.write("a line of a log that nobody reads\n" * 1_000_000)
    before = resident_kb(coordinator.process.pid)
    connections = []
    for _ in range(10):
        connections.append(connect(coordinator.grpc))
        connections[-1].send(PREFACE)
        for i in range(8):
            watch = text_field(1, job_id)
            logs = text_field(1, job_id) + b"\x18\x01\x20\x01"  # rank 1, follow
            connections[-1].send(call(4 * i + 1, "WatchJob", watch) + call(4 * i + 3, "StreamLogs", logs))
    step = coordinator.get(job_id)["progress"]["step"]
    slowest = slowest_answer(coordinator, 10)
    grown = resident_kb(coordinator.process.pid) - before
    print(f"160 streams that nobody reads: {grown} kB more, slowest answers {slowest:.2f} s")
    assert grown < 160 * 1024, "their streams pile up"
    assert slowest < 5
    coordinator.wait_step(job_id, step + 5)
    coordinator.ctl("cancel", job_id, "--yes").expect(0)
    coordinator.ctl("wait", job_id)
    for connection in connections:
        connection.close()
    assert_nothing_runs(coordinator)


def test_pages_are_there_whoever_asks_slowly(coordinators):
    coordinator = coordinators.start()
    before = resident_kb(coordinator.process.pid)
    # Each a byte at a time.
    slow = [connect(coordinator.http) for _ in range(400)]
    silent = [connect(coordinator.http) for _ in range(100)]
    unread = []
    for letter in "GET /metrics HTTP/1.1":
        for connection in slow:
            try:
                connection.send(letter.encode())
            except OSError:
                pass
        begin = time.monotonic()
        assert coordinator.page("/healthz") == (200, "ok\n")
        assert coordinator.page("/metrics")[0] == 200
        took = time.monotonic() - begin
        assert took < 2, f"a page took {took:.1f} s"
        unread.append(connect(coordinator.http))
        unread[-1].send(b"GET /metrics HTTP/1.1\r\n\r\n")
        time.sleep(0.3)
    programs.wait_for("the end of the slow ones", lambda: all(map(is_closed, slow + silent)), deadline_s=15)
    grown = resident_kb(coordinator.process.pid) - before
    print(f"500 slow connections: {grown} kB more")
    assert grown < 100 * 1024
    for text, status in ((b"nonsense\r\n\r\n", 400), (b"POST / HTTP/1.1\r\n\r\n", 400)):
        connection = connect(coordinator.http)
        connection.setblocking(True)
        connection.sendall(text)
        assert connection.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())


def test_idle_connections_cost_little(coordinators):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * IDLE)), hard))
    coordinator = coordinators.start()
    coordinator.ctl("list").expect(0)
    before = resident_kb(coordinator.process.pid)
    idle = []
    for _ in range(IDLE):
        idle.append(connect(coordinator.grpc))
        idle[-1].send(PREFACE)
    time.sleep(1)
    each = (resident_kb(coordinator.process.pid) - before) / IDLE
    slowest = slowest_answer(coordinator, 3)
    print(f"{IDLE} idle connections: {each:.1f} kB each, slowest answers {slowest:.2f} s")
    assert each < 100
    assert slowest < 5
