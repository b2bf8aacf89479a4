"""The clock is set forward and back while jobs run: nothing is restarted, ended, delayed or forgotten for it."""

import calendar
import os
import signal
import time

import fault_shim
import programs
from test_security import new_token
from test_service_faults import assert_undisturbed, fault_job  # noqa: F401 (a fixture)
from test_service_jobs import assert_nothing_runs, make_slow

HOUR = 3600
HEARTBEAT_S = 6


def seconds(timestamp):
    return calendar.timegm(time.strptime(timestamp[:19], "%Y-%m-%dT%H:%M:%S"))


def test_an_hour_forward_and_back(workspace, coordinators, tmp_path):
    faults = fault_shim.Faults(tmp_path)
    flags = {"heartbeat-timeout-s": HEARTBEAT_S, "attach-timeout-s": 60, "restart-pause-s": 2, "env": faults.env,
             "history-days": 0.01, "slots": 2}
    coordinator = coordinators.start(**flags)
    make_slow(workspace)
    ended = coordinator.submit(fault_job(workspace, "ended", max_steps=2))
    coordinator.wait_state(ended, "SUCCEEDED")
    job_id = coordinator.submit(fault_job(workspace, "job", max_steps=100000, time_limit="30m", save_steps=20))
    coordinator.wait_step(job_id, 3)
    waiting = coordinator.submit(fault_job(workspace, "waiting", max_steps=2))
    before = programs.rank_pids(coordinator.data_dir)
    start = coordinator.get(job_id)["start_time"]
    for ahead_s in (HOUR, 0, -HOUR, 0, HOUR):
        faults.set(clock_ahead_s=ahead_s)
        time.sleep(1)
        coordinator.wait_step(job_id, coordinator.get(job_id)["progress"]["step"] + 3)
        # It is in force: what is new bears the new time.
        probe = coordinator.submit(workspace.job(f"probe-{ahead_s}", max_steps=1), "--set", "priority=-5")
        probed = coordinator.get(probe)
        assert abs(seconds(probed["create_time"]) - time.time() - ahead_s) < 60, probed["create_time"]
        coordinator.ctl("cancel", probe, "--yes").expect(0)
    job = coordinator.get(job_id)
    assert (job["state"], job["attempt"], job["restarts"]) == ("RUNNING", 1, 0), coordinator.story(job_id)
    assert programs.rank_pids(coordinator.data_dir) == before
    assert coordinator.get(waiting)["state"] == "QUEUED"
    assert coordinator.get(ended)["state"] == "SUCCEEDED", "history was pruned by a clock that was set"
    # A coordinator that starts by the wrong clock adopts the gang and knows how long it has run.
    coordinator.kill()
    coordinator = coordinators.start(**flags)
    coordinator.wait_step(job_id, job["progress"]["step"] + 3)
    job = coordinator.get(job_id)
    assert (job["state"], job["attempt"], job["restarts"]) == ("RUNNING", 1, 0), coordinator.story(job_id)
    # A pause before a restart is no longer for that the clock goes back in it.
    os.kill(programs.rank_pids(coordinator.data_dir)[1], signal.SIGKILL)
    coordinator.wait_for(job_id, "the end of the attempt", lambda job: job["restarts"] == 1)
    faults.set(clock_ahead_s=-HOUR)
    coordinator.wait_for(job_id, "the second attempt", lambda job: job["state"] == "RUNNING", deadline_s=60)
    job = coordinator.get(job_id)
    assert (job["attempt"], job["restarts"]) == (2, 1), coordinator.story(job_id)
    assert [event["sequence"] for event in job["events"]] == sorted(event["sequence"] for event in job["events"])
    coordinator.ctl("cancel", job_id, "--yes").expect(0)
    assert coordinator.ctl("wait", job_id).code == 103
    for attempt in coordinator.get(job_id)["attempts"]:
        assert seconds(attempt["end_time"]) >= seconds(attempt["start_time"]), coordinator.story(job_id)
    assert seconds(start) > 0
    assert coordinator.wait_state(waiting, "SUCCEEDED")["restarts"] == 0
    assert_nothing_runs(coordinator)


def test_a_time_limit_is_of_time_that_has_passed(workspace, coordinators, tmp_path):
    faults = fault_shim.Faults(tmp_path)
    coordinator = coordinators.start(env=faults.env)
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job", max_steps=100000, time_limit="15s"))
    coordinator.wait_step(job_id, 3)
    faults.set(clock_ahead_s=-HOUR)
    job = coordinator.wait_state(job_id, "CANCELLED", deadline_s=60)
    assert "time limit of 15 s" in job["reason"], coordinator.story(job_id)
    assert_nothing_runs(coordinator)


def test_tokens_expire_by_the_clock(coordinators, tmp_path):
    faults = fault_shim.Faults(tmp_path)
    token = new_token(coordinators.data_dir(), "read", "rita", "--days", "1")
    coordinator = coordinators.start(env=faults.env)

    def answer():
        return programs.run_program([programs.program("simpoctl"), "list"],
                                    env={"SIMPO_ADDRESS": coordinator.grpc, "SIMPO_TOKEN": token}).code
    for ahead_s, code in ((0, 0), (HOUR, 0), (25 * HOUR, 4), (-HOUR, 0)):
        faults.set(clock_ahead_s=ahead_s)
        assert answer() == code, ahead_s
