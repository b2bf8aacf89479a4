"""Coordinators and a Prometheus server on free ports, ended by process id with all that they started."""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import programs

FINAL = ("SUCCEEDED", "FAILED", "CANCELLED")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy this machine uses


def http_get(url):
    """(status, text) of a page."""
    try:
        with _DIRECT.open(url, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Coordinator:
    """One simpo-coordinator process; its log is beside its data."""

    def __init__(self, data_dir, env=None, **flags):
        self.data_dir = data_dir
        self.command = [programs.program("simpo-coordinator"), "--data-dir", str(data_dir)]
        for name, value in ({"listen": "127.0.0.1:0", "http": "127.0.0.1:0", "slots": 2} | flags).items():
            self.command += [f"--{name}", str(value)]
        number = len(list(data_dir.parent.glob(f"{data_dir.name}-coordinator-*.log")))
        self.log = data_dir.parent / f"{data_dir.name}-coordinator-{number}.log"
        environment = dict(os.environ, SIMPO_CACHE_DIR=str(data_dir.parent / "cache"), **(env or {}))
        with self.log.open("wb") as log:
            self.process = self.start_process(log, environment)
        self.grpc = self.http = None

    def start_process(self, log, environment):
        return subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def ready(self):
        """Waits for the line that tells the addresses."""
        def line():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.log.read_text()}"
            return re.search(r"ready: grpc (\S+), http (\S+),", self.log.read_text(errors="replace"))
        found = programs.wait_for("the coordinator's ready line", line, on_timeout=self.log.read_text)
        self.grpc, self.http = found.groups()
        return self

    def kill(self):
        """As a crash: nothing is said or tidied."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, number=signal.SIGTERM):
        """In order; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=programs.DEADLINE_S)

    def ctl(self, *args, deadline_s=None, **kwargs):
        env = {"SIMPO_ADDRESS": self.grpc, "NO_COLOR": "1"}
        return programs.run_program([programs.program("simpoctl"), *args], deadline_s, env, **kwargs)

    def start_ctl(self, *args):
        """simpoctl that goes on in the background."""
        return subprocess.Popen([programs.program("simpoctl"), *map(str, args)], stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=dict(os.environ, SIMPO_ADDRESS=self.grpc, NO_COLOR="1"))

    def submit(self, job, *args):
        """The id of the new job."""
        return self.ctl("submit", job, "-o", "name", *args).expect(0).stdout.strip()

    def get(self, job_id):
        return json.loads(self.ctl("get", job_id, "-o", "json").expect(0).stdout)

    def metrics(self, job_id, *args):
        return json.loads(self.ctl("metrics", job_id, "-o", "json", *args).expect(0).stdout)

    def story(self, job_id):
        """What failed assertions show."""
        return f"{self.ctl('describe', job_id)}\n--- {self.log.name}\n{self.log.read_text(errors='replace')[-5000:]}"

    def wait_for(self, job_id, what, condition, deadline_s=None):
        """Polls the job until condition(job) is true; a job that has ended in another way fails at once."""
        def check():
            job = self.get(job_id)
            if condition(job):
                return job
            assert job["state"] not in FINAL, f"{job_id} has ended while waiting for {what}\n{self.story(job_id)}"
            return None
        return programs.wait_for(f"{what} of job {job_id}", check, deadline_s, lambda: self.story(job_id))

    def wait_state(self, job_id, *states, deadline_s=None):
        return self.wait_for(job_id, " or ".join(states), lambda job: job["state"] in states, deadline_s)

    def wait_step(self, job_id, step):
        return self.wait_for(job_id, f"step {step}", lambda job: job["progress"]["step"] >= step)

    def page(self, path):
        return http_get(f"http://{self.http}{path}")

    def exposition(self, job_id=None):
        """{(name, labels as a frozenset): value} of /metrics, of one job or of all."""
        status, text = self.page("/metrics")
        assert status == 200, text
        values = {}
        for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
            pairs = frozenset(re.findall(r'(\w+)="([^"]*)"', labels))
            if job_id is None or ("job", job_id) in pairs:
                values[name, pairs] = float(value)
        return values


class Coordinators:
    """All coordinators of a test."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def data_dir(self, name="service"):
        return self.folder / name

    def launch(self, name="service", **flags):
        """Starts one without waiting for it."""
        self.started.append(Coordinator(self.data_dir(name), **flags))
        return self.started[-1]

    def start(self, name="service", **flags):
        return self.launch(name, **flags).ready()

    def gang_pids(self):
        names = {coordinator.data_dir for coordinator in self.started}
        return [pid for name in names for pid in programs.attempt_pids(name) + programs.supervisor_pids(name)]

    def end(self):
        for coordinator in self.started:
            if coordinator.process.poll() is None:
                coordinator.kill()
        # Supervisors first would only be replaced by their orphans: until none is left.
        programs.wait_for("the end of all gangs", lambda: programs.kill_all(self.gang_pids()) or not self.gang_pids())
        for coordinator in self.started:
            for scratch in programs.scratch_folders(coordinator.data_dir):
                shutil.rmtree(scratch, ignore_errors=True)


class Prometheus:
    """A real Prometheus server that scrapes one address."""

    def __init__(self, folder, target, interval_ms=200):
        folder.mkdir()
        config = folder / "prometheus.yml"
        config.write_text(f"global: {{scrape_interval: {interval_ms}ms, scrape_timeout: {interval_ms}ms}}\n"
                          f"scrape_configs:\n- job_name: simpo\n  honor_labels: true\n"
                          f"  static_configs: [{{targets: ['{target}']}}]\n")
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
                 "--web.listen-address=127.0.0.1:0", "--log.level=info"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ready(self):
        """Waits until it answers; finds its port, which the kernel chose."""
        def address():
            assert self.process.poll() is None, self.log.read_text()
            found = self.listening_port()
            if found is None:
                return None
            try:
                return found if http_get(f"http://127.0.0.1:{found}/-/ready")[0] == 200 else None
            except OSError:
                return None
        self.port = programs.wait_for("Prometheus", address, on_timeout=self.log.read_text)
        return self

    def listening_port(self):
        """The TCP port that the process listens on, from /proc."""
        sockets = set()
        for fd in os.listdir(f"/proc/{self.process.pid}/fd"):
            try:
                sockets.add(os.readlink(f"/proc/{self.process.pid}/fd/{fd}"))
            except OSError:
                pass
        with open("/proc/net/tcp", encoding="ascii") as table:
            for line in list(table)[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    return int(fields[1].split(":")[1], 16)
        return None

    def query(self, promql):
        """The result of an instant query, a list of series."""
        parameters = urllib.parse.urlencode({"query": promql})
        status, text = http_get(f"http://127.0.0.1:{self.port}/api/v1/query?{parameters}")
        reply = json.loads(text)
        assert status == 200 and reply["status"] == "success", text
        return reply["data"]["result"]

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
