"""The cable between a gang and its coordinator is pulled: for less than heartbeat_timeout nothing is restarted, for longer
the attempt is ended and replaced, and never do two gangs of one job run."""

import os
import pathlib
import subprocess
import threading
import time

import pytest

import conftest
import programs
import servers
from test_service_faults import assert_undisturbed, fault_job  # noqa: F401 (a fixture)
from test_service_jobs import assert_nothing_runs, make_slow

HEARTBEAT_S = 8
# The coordinator's host; the gang's is a network namespace in it, joined by a virtual cable.
HOST = """set -e
mount -t tmpfs tmpfs /run
ip netns add gang
ip link add cable type veth peer name cable netns gang
ip addr add 10.78.0.1/24 dev cable
ip -n gang addr add 10.78.0.2/24 dev cable
for on in "" "-n gang"; do ip $on link set cable up; ip $on link set lo up; done
exec "$@"
"""


class CabledCoordinator(servers.Coordinator):
    """A coordinator whose gangs run in another network namespace."""

    def __init__(self, data_dir, **flags):
        data_dir.parent.mkdir(exist_ok=True)
        mpirun = data_dir.parent / "mpirun-beyond-the-cable"
        mpirun.write_text('#!/bin/bash\nexec ip netns exec gang mpirun "$@"\n')
        mpirun.chmod(0o755)
        config = data_dir.parent / "coordinator.yaml"
        config.write_text("insecure: true\n")
        super().__init__(data_dir, listen="10.78.0.1:0", config=config, mpirun=mpirun, **flags)
        self.within = ["nsenter", "--target", self.process.pid, "--net"]

    def start_process(self, log, environment):
        host = ["unshare", "--net", "--mount", "bash", "-c", HOST, "host"]
        return subprocess.Popen(host + self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def ctl(self, *args, deadline_s=None, **kwargs):
        env = {"SIMPO_ADDRESS": self.grpc, "NO_COLOR": "1"}
        return programs.run_program([*self.within, programs.program("simpoctl"), *args], deadline_s, env, **kwargs)

    def cable(self, state):
        programs.run_program([*self.within, "ip", "link", "set", "cable", state]).expect(0)


class GangWatch:
    """Notes the attempts whose ranks run at the same time."""

    def __init__(self, data_dir):
        self.data_dir, self.most, self.seen, self.stop = data_dir, 0, set(), threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.stop.wait(0.02):
            attempts = set()
            for pid in programs.attempt_pids(self.data_dir):
                if programs.is_rank(pid):
                    for item in programs.environment_of(pid):
                        if item.startswith(programs.SECRET_FILE.encode()):
                            attempts.add(pathlib.Path(item.split(b"=", 1)[1].decode()).parent.name)
            self.most = max(self.most, len(attempts))
            self.seen |= attempts

    def end(self):
        self.stop.set()
        self.thread.join()


@pytest.fixture
def cabled(coordinators):
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root here")
    coordinator = CabledCoordinator(coordinators.data_dir(), **{"heartbeat-timeout-s": HEARTBEAT_S})
    coordinators.started.append(coordinator)
    return coordinator.ready()


@conftest.long
def test_a_short_cut_restarts_nothing(workspace, cabled):
    make_slow(workspace)
    job_id = cabled.submit(fault_job(workspace, "job", max_steps=1000, save_strategy="no", save_steps=None))
    cabled.wait_step(job_id, 5)
    ranks = programs.rank_pids(cabled.data_dir)
    for cut_s in (1, 4):
        before = cabled.get(job_id)["progress"]["step"]
        cabled.cable("down")
        time.sleep(cut_s)
        assert cabled.get(job_id)["progress"]["step"] <= before + 200, "nothing was cut"
        at_end = cabled.get(job_id)["progress"]["step"]
        cabled.cable("up")
        cabled.wait_step(job_id, at_end + 1)
    job = cabled.get(job_id)
    assert (job["state"], job["attempt"], job["restarts"], job["machine_faults"]) == ("RUNNING", 1, 0, 0), cabled.story(job_id)
    assert programs.rank_pids(cabled.data_dir) == ranks
    assert not [event for event in job["events"] if event["type"] == "rank_lost"]
    steps = [point["step"] for point in cabled.metrics(job_id)]
    assert steps == list(range(1, len(steps) + 1))
    cabled.ctl("cancel", job_id, "--yes").expect(0)
    assert cabled.ctl("wait", job_id).code == 103
    assert_nothing_runs(cabled)


def test_a_long_cut_replaces_the_gang_and_never_doubles_it(workspace, cabled, assert_undisturbed):  # noqa: F811
    make_slow(workspace)
    job_id = cabled.submit(fault_job(workspace, "job"))
    cabled.wait_step(job_id, 5)
    watch = GangWatch(cabled.data_dir)
    ranks = programs.rank_pids(cabled.data_dir)
    for pid in ranks.values():
        os.kill(pid, programs.signal.SIGSTOP)  # so that the run does not end within the cut
    cabled.cable("down")
    for pid in ranks.values():
        os.kill(pid, programs.signal.SIGCONT)
    cabled.wait_for(job_id, "a second attempt", lambda job: job["attempt"] == 2)
    time.sleep(2)
    assert cabled.get(job_id)["state"] == "LAUNCHING", "its ranks cannot report yet"
    cabled.cable("up")
    job = cabled.wait_state(job_id, "SUCCEEDED")
    watch.end()
    assert (job["attempt"], job["restarts"], job["machine_faults"]) == (2, 0, 1), cabled.story(job_id)
    assert "has been silent for" in job["attempts"][0]["reason"], cabled.story(job_id)
    assert (watch.seen, watch.most) == ({"1", "2"}, 1), "two gangs of one job ran at once"
    assert_undisturbed(cabled, workspace, job_id, "job")
    assert_nothing_runs(cabled)
