"""Starts the programs as a user would, waits with deadlines, and ends by process id what is left."""

import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time

BIN_DIR = pathlib.Path(os.environ.get("SIMPO_BIN_DIR", ""))
DEADLINE_S = float(os.environ.get("SIMPO_TEST_DEADLINE_S", "120"))  # of one program or one condition
SECRET_FILE = "SIMPO_ATTEMPT_SECRET_FILE"  # is in the environment of every process of an attempt


def program(name):
    path = BIN_DIR / name
    assert os.access(path, os.X_OK), f"{path} is not there: set SIMPO_BIN_DIR to the folder of the built programs"
    return str(path)


def wait_for(what, condition, deadline_s=None, on_timeout=lambda: ""):
    """Polls until condition() is true and returns its value."""
    end = time.monotonic() + (deadline_s or DEADLINE_S)
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s or DEADLINE_S:.0f} s for {what}\n{on_timeout()}")
        time.sleep(0.02)


# --- processes

def environment_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def command_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class HungThread:
    """The main thread of a process, held while its other threads go on; runs again at the end of the scope."""

    SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17

    def __init__(self, pid):
        self.pid = pid
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

    def _ptrace(self, request):
        if self.libc.ptrace(request, self.pid, None, None) != 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request:#x} of {self.pid}")

    def __enter__(self):
        self._ptrace(self.SEIZE)
        self._ptrace(self.INTERRUPT)
        os.waitpid(self.pid, 0x40000000)  # __WALL
        return self

    def __exit__(self, *_):
        try:
            self._ptrace(self.DETACH)
        except OSError:
            pass  # it has been killed


def catches(pid, number):
    """Whether the process has a handler for the signal."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def running_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and is_running(int(name))]


def attempt_pids(folder):
    """Processes of attempts whose secret lies under `folder`: mpirun, ranks, everything that they started."""
    prefix = f"{SECRET_FILE}={folder}/".encode()
    return [pid for pid in running_pids() if any(item.startswith(prefix) for item in environment_of(pid))]


def parent_of(pid):
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def is_rank(pid):
    """Whether it is a worker, and not the child in which a worker reads files."""
    worker = [program("simpo-worker")]
    return command_of(pid)[:1] == worker and command_of(parent_of(pid))[:1] != worker


def rank_pids(folder):
    """{rank: pid} of the ranks that train."""
    ranks = {}
    for pid in attempt_pids(folder):
        if is_rank(pid):
            for item in environment_of(pid):
                if item.startswith(b"OMPI_COMM_WORLD_RANK="):
                    ranks[int(item.split(b"=")[1])] = pid
    return ranks


def supervisor_pids(folder):
    return [pid for pid in running_pids()
            if "supervise" in command_of(pid)[1:3] and any(str(folder) in word for word in command_of(pid))]


def scratch_folders(folder):
    """Where attempts of this coordinator keep shared memory and sockets, as far as it is there."""
    return scratch_folders_of([path.name for path in (pathlib.Path(folder) / "attempts").glob("*")])


def scratch_folders_of(jobs):
    return [path for base in ("/dev/shm", "/tmp") for job in jobs for path in pathlib.Path(base).glob(f"simpo-{job}-*")]


def kill_all(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def children_of(pid):
    """All descendants of a process."""
    parents = {}
    for other in running_pids():
        try:
            stat = pathlib.Path(f"/proc/{other}/stat").read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(stat[1]), []).append(other)
        except OSError:
            pass
    found, todo = [], [pid]
    while todo:
        more = parents.get(todo.pop(), [])
        found += more
        todo += more
    return found


# --- the worker alone

@dataclasses.dataclass
class Result:
    command: list
    code: int
    stdout: str
    stderr: str

    def __str__(self):
        return (f"$ {' '.join(map(str, self.command))}\nexit code {self.code}\n--- stdout\n{self.stdout[-4000:]}"
                f"\n--- stderr\n{self.stderr[-6000:]}")

    def metrics(self):
        """The JSON lines of standard output."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    def expect(self, code):
        assert self.code == code, f"expected exit code {code}\n{self}"
        return self


class WorkerRun:
    """simpo-worker under mpirun, as a user types it."""

    def __init__(self, job, cache_dir, ranks=2, args=()):
        self.command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
                        program("simpo-worker"), "--job", str(job), *args]
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                           SIMPO_CACHE_DIR=str(cache_dir))
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, errors="backslashreplace", env=environment)

    def signal(self, number):
        self.process.send_signal(number)

    def finish(self, deadline_s=None):
        try:
            out, err = self.process.communicate(timeout=deadline_s or DEADLINE_S)
        except subprocess.TimeoutExpired:
            left = children_of(self.process.pid)
            self.process.kill()
            kill_all(left)
            out, err = self.process.communicate()
            raise AssertionError(f"not finished in time\n{Result(self.command, -9, out, err)}") from None
        return Result(self.command, self.process.returncode, out, err)


def run_program(command, deadline_s=None, env=None, cwd=None, stdin=None):
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL if stdin is None else None,
                          input=stdin, capture_output=True, text=True, timeout=deadline_s or DEADLINE_S,
                          env=dict(os.environ, **(env or {})), cwd=cwd)
    return Result([str(word) for word in command], done.returncode, done.stdout, done.stderr)
