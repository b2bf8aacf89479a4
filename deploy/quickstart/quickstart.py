"""The quickstart: model and data if missing, a coordinator on free ports, one job, a table of results.

Called by run.sh. Everything it makes lies under run/quickstart; everything it starts ends with it,
also on Ctrl-C. Standard library only.
"""

import argparse
import fcntl
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
FINAL_STATES = {"SUCCEEDED", "FAILED", "CANCELLED"}
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


def on_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def lock():
    """Held until the program ends: two at once would make the same model twice."""
    RUN.mkdir(parents=True, exist_ok=True)
    file = open(RUN / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failed(f"another quickstart is running in {ROOT}; wait for it, or end it with Ctrl-C") from None
    return file


def check_programs():
    missing = [name for name in ("simpo-coordinator", "simpo-worker", "simpoctl") if not os.access(BIN / name, os.X_OK)]
    if missing:
        raise Failed(f"{' and '.join(missing)} missing in {relative(BIN)}; run `make build` first")


def make_inputs():
    try:
        if run([sys.executable, HERE / "make_model.py", relative(RUN / "model")]) != 0:
            raise Failed("there is no model to train")
    finally:
        shutil.rmtree(RUN / "model.partial", ignore_errors=True)
    if run([sys.executable, HERE / "make_preferences.py", relative(RUN / "data")]) != 0:
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
        self.is_ready = False
        slots = max(2, len(os.sched_getaffinity(0)))
        with open(self.log, "ab") as log:
            self.log_begin = log.tell()
            self.process = subprocess.Popen(
                [BIN / "simpo-coordinator", "--data-dir", DATA_DIR, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0",
                 "--slots", str(slots)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def said(self):
        return self.log.read_bytes()[self.log_begin:].decode(errors="replace")

    def wait_ready(self):
        wait_until(lambda: READY.search(self.said()) or self.process.poll() is not None, 60)
        ready = READY.search(self.said())
        if not ready:
            raise Failed(f"the coordinator did not start ({relative(self.log)}):\n{self.said()[-1000:].rstrip()}")
        self.is_ready = True
        self.address, self.metrics_page = ready.group(1), f"http://{ready.group(2)}/metrics"

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # One that was refused does not own what runs there.
        if self.is_ready:
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


class Simpoctl:
    """Our simpoctl, talking to our coordinator."""

    def __init__(self, address):
        self.command = [BIN / "simpoctl", "--address", address]

    def __call__(self, *arguments, **options):
        return run([*self.command, *arguments], **options)

    def json(self, *arguments):
        command = [*self.command, *arguments, "-o", "json"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        if done.returncode != 0:
            raise Failed("the coordinator does not answer any more")
        return json.loads(done.stdout)

    def cancel(self, job):
        """Ends a job and removes what it has written: a checkpoint alone is 1.6 GB."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if self("cancel", job, "--yes", **quiet) == 0:
            self("wait", job, "--timeout", "60", **quiet)
            shutil.rmtree(self.json("get", job)["output_dir"], ignore_errors=True)


def cancel_earlier(simpoctl):
    """What a quickstart that was killed has left; the coordinator would go on with it first."""
    for job in simpoctl.json("list"):
        if job["state"] not in FINAL_STATES:
            say(f"cancelling {job['name']}, which an earlier quickstart left unfinished")
            simpoctl.cancel(job["id"])


def train_job(simpoctl, dtype):
    """Submits the job and follows it to its end; the job as it ended. Cancels it when interrupted."""
    # Known before it is submitted, so that it can be cancelled at any moment.
    name = time.strftime("quickstart-%Y%m%d-%H%M%S")
    ended = False
    try:
        submit = ("submit", JOB_FILE, "--name", name, "--set", f"torch_dtype={dtype}", "-o", "name")
        if simpoctl(*submit, stdout=subprocess.DEVNULL) != 0:
            ended = True
            raise Failed("the job was not accepted")
        code = simpoctl("watch", name, stdout=subprocess.DEVNULL)
        ended = code in (0, 100, 103)
        if code != 0:
            simpoctl("describe", name, stdout=sys.stderr)
            logs = pathlib.Path(simpoctl.json("get", name)["output_dir"]) / "logs"
            raise Failed(f"the job did not succeed; its logs are in {relative(logs)}")
        return simpoctl.json("get", name)
    finally:
        if not ended:
            on_signals(signal.SIG_IGN)
            say("cancelling the job and stopping its processes")
            simpoctl.cancel(name)


def paint(code, text):
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def duration(seconds):
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def print_results(job, dtype, page, began):
    output = pathlib.Path(job["output_dir"])
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
    print(f"  {relative(output)}/")
    for name, what in (
        ("final/", "the model; loads in transformers"),
        ("metrics.jsonl", "every step, full precision"),
        ("logs/", "what each rank said"),
        page,
    ):
        print(f"    {name:<18}{what}")
    seconds = time.monotonic() - began
    print(f"  {duration(seconds)}, of which training {duration(sum(step['step_seconds'] for step in steps))}")
    print(paint(1, "\n  What to run next"))
    for command in (
        f"build/bin/simpo-coordinator --data-dir {relative(DATA_DIR)}     # and in another terminal:",
        f"build/bin/simpoctl describe {job['name']}",
        f"build/bin/simpoctl metrics {job['name']} -o csv",
        f"build/bin/simpoctl submit {relative(JOB_FILE)} --set beta=2.5 --follow",
        "build/bin/simpoctl help job-file",
    ):
        print(f"    {paint(36, command)}")
    sys.stdout.flush()


def save_metrics_page(url, path):
    with urllib.request.urlopen(url, timeout=10) as response:
        path.write_bytes(response.read())


def train(coordinator, keep, began):
    coordinator.wait_ready()
    simpoctl, dtype = Simpoctl(coordinator.address), compute_dtype()
    cancel_earlier(simpoctl)
    say(f"training in {dtype}; metrics while it runs: {coordinator.metrics_page}")
    job = train_job(simpoctl, dtype)
    saved = pathlib.Path(job["output_dir"]) / "metrics_page.txt"
    save_metrics_page(coordinator.metrics_page, saved)
    page = ("metrics page", coordinator.metrics_page) if keep else (saved.name, "the page for Prometheus at the end")
    print_results(job, dtype, page, began)
    if keep:
        say(f"the coordinator stays up until Ctrl-C; export SIMPO_ADDRESS={coordinator.address}")
        signal.pause()


def main():
    parser = argparse.ArgumentParser(prog="run.sh", description="Trains a small real model with SimPO on this machine.")
    parser.add_argument("--keep", action="store_true", help="leave the coordinator up at the end, until Ctrl-C")
    keep = parser.parse_args().keep
    on_signals(signal.default_int_handler)
    began = time.monotonic()
    os.chdir(ROOT)
    check_programs()
    held = lock()
    make_inputs()
    coordinator = Coordinator()
    try:
        train(coordinator, keep, began)
    finally:
        on_signals(signal.SIG_IGN)  # a second Ctrl-C must not cut the clearing up short
        coordinator.stop()
        held.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("stopped; model and data stay for the next time")
        sys.exit(130)
    except (Failed, OSError) as error:
        sys.exit(f"quickstart: {error}")
