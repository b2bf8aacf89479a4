"""SIGSTOP of everything that can stop: what stands still is named and replaced, and a coordinator that stood still blames
nobody."""

import os
import signal
import time

import pytest

import conftest
import programs
from test_service_faults import assert_undisturbed, fault_job, victim_pid  # noqa: F401 (a fixture)
from test_service_jobs import assert_nothing_runs, make_slow

HEARTBEAT_S = 4
KILL_BOUND_S = 5 + 15  # of a gang: SIGTERM to SIGKILL by its supervisor, and by the coordinator


def events(coordinator, job_id, kind):
    return [event for event in coordinator.get(job_id)["events"] if event["type"] == kind]


def assert_restarted_once(coordinator, workspace, job_id, undisturbed):
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"], job["machine_faults"]) == (2, 0, 1), coordinator.story(job_id)
    assert job["attempts"][1]["first_step"] >= 4, coordinator.story(job_id)
    undisturbed(coordinator, workspace, job_id, "job")
    assert_nothing_runs(coordinator)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=conftest.long), 1])
def test_a_stopped_rank_is_named_and_replaced(workspace, coordinators, assert_undisturbed, rank):  # noqa: F811
    coordinator = coordinators.start(**{"heartbeat-timeout-s": HEARTBEAT_S})
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job"))
    coordinator.wait_step(job_id, 7)
    begin = time.monotonic()
    os.kill(victim_pid(coordinator, f"rank {rank}"), signal.SIGSTOP)
    lost = programs.wait_for("the stopped rank's name", lambda: events(coordinator, job_id, "rank_lost"))
    named = time.monotonic() - begin
    assert f"rank {rank} " in lost[0]["message"], coordinator.story(job_id)
    assert named < HEARTBEAT_S + 3, f"named after {named:.1f} s"
    coordinator.wait_for(job_id, "the end of the attempt", lambda job: job["machine_faults"] == 1)
    ended = time.monotonic() - begin - named
    assert ended < KILL_BOUND_S, f"ended {ended:.1f} s later"
    print(f"rank {rank}: named after {named:.1f} s, ended {ended:.1f} s later")
    assert_restarted_once(coordinator, workspace, job_id, assert_undisturbed)


@conftest.long
def test_a_stopped_mpirun_or_supervisor_ends_within_a_bound(workspace, coordinators):
    # Without either, ranks train on; what is missing is the end, and that has a deadline of its own.
    coordinator = coordinators.start(**{"heartbeat-timeout-s": HEARTBEAT_S})
    make_slow(workspace)
    jobs = {}
    for victim in ("mpirun", "supervisor"):
        values = dict(save_strategy="steps", save_steps=4, max_steps=20, global_batch_size=16,
                      resources={"ranks_per_node": 1, "threads_per_rank": 1})
        jobs[victim] = coordinator.submit(workspace.job(victim, **values))
        coordinator.wait_step(jobs[victim], 5)
        folder = coordinator.data_dir / "attempts" / jobs[victim]
        pids = {"supervisor": programs.supervisor_pids(folder)[0],
                "mpirun": next(pid for pid in programs.attempt_pids(folder)
                               if programs.command_of(pid)[0].endswith("mpirun"))}
        os.kill(pids[victim], signal.SIGSTOP)
    begin = time.monotonic()
    for victim, job_id in jobs.items():
        job = coordinator.wait_state(job_id, "SUCCEEDED", deadline_s=150)
        print(f"{victim}: done after {time.monotonic() - begin:.1f} s: {job['attempts'][0]['reason']}")
        assert job["restarts"] + job["machine_faults"] <= 1, coordinator.story(job_id)
        assert [point["step"] for point in coordinator.metrics(job_id)] == list(range(1, 21))
    assert_nothing_runs(coordinator)


@pytest.mark.parametrize("stalls", [1, pytest.param(3, marks=conftest.long)])
def test_a_stalled_coordinator_blames_nobody(workspace, coordinators, stalls):
    coordinator = coordinators.start(**{"heartbeat-timeout-s": HEARTBEAT_S})
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job", max_steps=2000))
    coordinator.wait_step(job_id, 3)
    before = programs.rank_pids(coordinator.data_dir)
    for _ in range(stalls):
        coordinator.process.send_signal(signal.SIGSTOP)
        time.sleep(HEARTBEAT_S + 3)
        coordinator.process.send_signal(signal.SIGCONT)
        step = coordinator.get(job_id)["progress"]["step"]
        coordinator.wait_step(job_id, step + 5)
    job = coordinator.get(job_id)
    assert (job["state"], job["attempt"], job["restarts"], job["machine_faults"]) == ("RUNNING", 1, 0, 0), coordinator.story(job_id)
    assert programs.rank_pids(coordinator.data_dir) == before
    assert not events(coordinator, job_id, "rank_lost"), coordinator.story(job_id)
    steps = [point["step"] for point in coordinator.metrics(job_id)]
    assert steps == list(range(1, len(steps) + 1))
    # A rank that stands still is found all the same.
    os.kill(before[1], signal.SIGSTOP)
    lost = programs.wait_for("the stopped rank's name", lambda: events(coordinator, job_id, "rank_lost"))
    assert "rank 1 " in lost[0]["message"]
    coordinator.ctl("cancel", job_id, "--yes").expect(0)
    coordinator.ctl("wait", job_id)
    assert_nothing_runs(coordinator)
