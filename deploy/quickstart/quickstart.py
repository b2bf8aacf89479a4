"""The quickstart: model and data if missing, a coordinator on free ports, one job, a table of results.

Called by run.sh. Everything it makes lies under run/quickstart; everything it starts ends with it,
also on Ctrl-C. Standard library only.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "deploy/quickstart"
RUN = ROOT / "run/quickstart"
BIN = pathlib.Path(os.environ.get("SIMPO_BIN_DIR") or ROOT / "build/bin")
JOB_FILE = ROOT / "configs/quickstart.yaml"
DATA_DIR = RUN / "coordinator"
# Processors with matrix units for bfloat16; on others float32 is as quick and closer to the truth.
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
READY = re.compile(r"ready: grpc (\S+?), http (\S+?),")


class Failed(Exception):
    pass


def say(text):
    print(f"[quickstart] {text}", file=sys.stderr, flush=True)


def relative(path):
    return os.path.relpath(path, ROOT)


def run(command, **options):
    """The program's exit code. In a session of its own, so that Ctrl-C is ours alone; then the program ends too."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def check_programs():
    missing = [name for name in ("simpo-coordinator", "simpo-worker", "simpoctl") if not os.access(BIN / name, os.X_OK)]
    if missing:
        raise Failed(f"{' and '.join(missing)} missing in {relative(BIN)}; run `make build` first")


def make_inputs():
    try:
        if run([sys.executable, HERE / "make_model.py", RUN / "model"]) != 0:
            raise Failed("there is no model to train")
    finally:
        shutil.rmtree(RUN / "model.partial", ignore_errors=True)
    if run([sys.executable, HERE / "make_preferences.py", RUN / "data"]) != 0:
        raise Failed("there is no data to train on")


def compute_dtype():
    flags = re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return "bfloat16" if flags and BF16_FLAGS & set(flags.group(1).split()) else "float32"


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Coordinator:
    """simpo-coordinator on free ports. In a session of its own, so that Ctrl-C reaches it through us, in order."""

    def __init__(self):
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        self.log = RUN / "coordinator.log"
        slots = max(2, len(os.sched_getaffinity(0)))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [BIN / "simpo-coordinator", "--data-dir", DATA_DIR, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0",
                 "--slots", str(slots)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def wait_ready(self):
        ready = lambda: READY.search(self.log.read_text(errors="replace")) or self.process.poll() is not None
        if not wait_until(ready, 60) or self.process.poll() is not None:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
            raise Failed(f"the coordinator did not start; {relative(self.log)} ends with:\n{last}")
        self.address, http = READY.search(self.log.read_text(errors="replace")).groups()
        self.metrics_page = f"http://{http}/metrics"

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        end_gangs()


def end_gangs():
    """Ends the supervisors (and so the ranks) that a coordinator which died has left behind."""
    for file in DATA_DIR.glob("attempts/*/*/supervisor.json"):
        try:
            pid = json.loads(file.read_text())["pid"]
            proc = pathlib.Path(f"/proc/{pid}")
            if str(file.parent).encode() not in (proc / "cmdline").read_bytes():
                continue
            os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError, KeyError):
            continue  # it has ended
        if not wait_until(lambda: not proc.exists(), 30):
            say(f"process {pid} of an earlier attempt does not end; see ps -p {pid}")


class Job:
    def __init__(self, coordinator):
        # Known before it is submitted, so that it can be cancelled at any moment.
        self.name = time.strftime("quickstart-%Y%m%d-%H%M%S")
        self.address = coordinator.address
        self.ended = False

    def simpoctl(self, *arguments, **options):
        return run([BIN / "simpoctl", "--address", self.address, *arguments], **options)

    def submit(self, dtype):
        code = self.simpoctl("submit", JOB_FILE, "--name", self.name, "--set", f"torch_dtype={dtype}", "-o", "name",
                             stdout=subprocess.DEVNULL)
        if code != 0:
            self.ended = True
            raise Failed("the job was not accepted")

    def follow(self):
        code = self.simpoctl("watch", self.name, stdout=subprocess.DEVNULL)
        self.ended = code in (0, 100, 103)
        if code != 0:
            self.simpoctl("describe", self.name, stdout=sys.stderr)
            raise Failed(f"the job did not succeed; its logs are in {relative(self.output_dir() / 'logs')}")

    def output_dir(self):
        command = [BIN / "simpoctl", "--address", self.address, "get", self.name, "-o", "json"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        if done.returncode != 0:
            raise Failed("the coordinator does not know the job any more")
        return pathlib.Path(json.loads(done.stdout)["output_dir"])

    def cancel(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if self.simpoctl("cancel", self.name, "--yes", **quiet) == 0:
            self.simpoctl("wait", self.name, "--timeout", "60", **quiet)


def paint(code, text):
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def duration(seconds):
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def print_results(job, output, dtype, page, began):
    manifest = json.loads((output / "run_manifest.json").read_text())
    evaluations, steps = read_jsonl(output / "eval_metrics.jsonl"), read_jsonl(output / "metrics.jsonl")
    before, after = evaluations[0], evaluations[-1]
    rows = [
        ("reward accuracy", lambda e: f"{100 * e['eval_rewards/accuracies']:.1f} %"),
        ("reward margin", lambda e: f"{e['eval_rewards/margins']:.2f}"),
        ("log-probability of a chosen token", lambda e: f"{e['eval_logps/chosen']:.2f}"),
        ("log-probability of a rejected token", lambda e: f"{e['eval_logps/rejected']:.2f}"),
    ]
    print()
    print(paint(1, "SmolLM2-135M-Instruct after SimPO") +
          f"   {manifest['data']['pairs']} pairs, {len(steps)} steps, {manifest['world_size']} ranks, {dtype}")
    print(paint(1, f"  {'held-out: animal sounds and sums':<38}{'before':>10}{'after':>10}"))
    for label, value in rows:
        print(f"  {label:<38}{value(before):>10}{paint('1;32', format(value(after), '>10'))}")
    print()
    for label, value in (
        ("model", f"{relative(output / 'final')}  (loads in transformers)"),
        ("metrics", page),
        ("steps", f"{relative(output / 'metrics.jsonl')}"),
        ("logs", f"{relative(output / 'logs')}"),
        ("time", f"{duration(time.monotonic() - began)}, of which training "
                 f"{duration(sum(s['step_seconds'] for s in steps))}"),
    ):
        print(f"  {label:<9}{value}")
    print(paint(1, "\n  What to run next"))
    for command in (
        f"build/bin/simpo-coordinator --data-dir {relative(DATA_DIR)}     # and in another terminal:",
        f"build/bin/simpoctl describe {job.name}",
        f"build/bin/simpoctl metrics {job.name} -o csv",
        f"build/bin/simpoctl submit {relative(JOB_FILE)} --set beta=2.5 --follow",
        "build/bin/simpoctl help job-file",
    ):
        print(f"    {paint(36, command)}")
    sys.stdout.flush()


def save_metrics_page(url, path):
    with urllib.request.urlopen(url, timeout=10) as response:
        path.write_bytes(response.read())


def train(coordinator, keep, began):
    """Submits the job and follows it; returns when there is nothing more to show."""
    coordinator.wait_ready()
    job, dtype = Job(coordinator), compute_dtype()
    try:
        job.submit(dtype)
        say(f"job {job.name} in {dtype}; metrics page while it runs: {coordinator.metrics_page}")
        job.follow()
        output = job.output_dir()
        saved = output / "metrics_page.txt"
        save_metrics_page(coordinator.metrics_page, saved)
        page = coordinator.metrics_page if keep else f"{relative(saved)}  (the page at its end)"
        print_results(job, output, dtype, page, began)
        if keep:
            say(f"the coordinator stays up until Ctrl-C; export SIMPO_ADDRESS={coordinator.address}")
            signal.pause()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not job.ended:
            say("cancelling the job and stopping its processes")
            job.cancel()


def main():
    parser = argparse.ArgumentParser(prog="run.sh", description="Trains a small real model with SimPO on this machine.")
    parser.add_argument("--keep", action="store_true", help="leave the coordinator up at the end, until Ctrl-C")
    keep = parser.parse_args().keep
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    began = time.monotonic()
    check_programs()
    make_inputs()
    coordinator = Coordinator()
    try:
        train(coordinator, keep, began)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        coordinator.stop()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("stopped; model and data stay for the next time")
        sys.exit(130)
    except (Failed, OSError) as error:
        sys.exit(f"quickstart: {error}")
