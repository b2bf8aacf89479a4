"""kill -9 of everything that can die: no job is lost, none is started twice, no step is missing."""

import json
import os
import re
import resource
import signal

import pytest

import conftest
import programs
import tiny_model
from test_service_jobs import assert_nothing_runs, make_slow
from test_worker_resume import final_weights
from test_worker_training import values_of

STEPS = 20


def fault_job(workspace, name, **changes):
    """A run of STEPS steps on two ranks that takes some seconds."""
    values = dict(max_steps=STEPS, global_batch_size=16, learning_rate=1e-3, save_strategy="steps", save_steps=4)
    values.update(changes)
    return workspace.job(name, **values)


def job_at_step(workspace, coordinator, step, **changes):
    """The id of a job that has done so many steps, slowly enough to be disturbed in the next one."""
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job", **changes))
    coordinator.wait_step(job_id, step)
    return job_id


@pytest.fixture(scope="module")
def assert_undisturbed(tmp_path_factory):
    """Compares a job with a run that nothing disturbed: the same metrics, in the file and in the service, and the
    same weights, bit for bit."""
    quiet = conftest.Workspace(tmp_path_factory.mktemp("undisturbed"))
    make_slow(quiet)
    quiet.run_worker(quiet.job(max_steps=STEPS, global_batch_size=16, learning_rate=1e-3), 2).expect(0)
    expected = [values_of(line) for line in quiet.metrics()]
    weights = final_weights(quiet, "job")
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))

    def check(coordinator, workspace, job_id, name):
        assert [values_of(line) for line in workspace.metrics(name)] == expected
        points = [values_of(point) for point in coordinator.metrics(job_id)]
        assert [{key: value for key, value in point.items() if key != "attempt"} for point in points] == expected
        ours = final_weights(workspace, name)
        assert set(ours) == set(weights) and all((ours[tensor] == values).all() for tensor, values in weights.items())
    return check


def victim_pid(coordinator, victim):
    data_dir = coordinator.data_dir
    if victim == "supervisor":
        return programs.supervisor_pids(data_dir)[0]
    if victim == "mpirun":
        return next(pid for pid in programs.attempt_pids(data_dir) if "mpirun" in programs.command_of(pid)[0])
    return programs.rank_pids(data_dir)[int(victim[-1])]


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "mpirun", "supervisor"])
def test_a_killed_process_costs_the_steps_since_the_checkpoint(workspace, coordinators, assert_undisturbed, victim):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 7)
    os.kill(victim_pid(coordinator, victim), signal.SIGKILL)
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    fault = "machine" if victim == "supervisor" else "job"  # of a supervisor nothing is left that could tell
    assert (job["attempt"], job["restarts"] + job["machine_faults"]) == (2, 1), coordinator.story(job_id)
    first, second = job["attempts"]
    assert first["reason"] and first["exit_code"] != 0 and (first["fault"], second["fault"]) == (fault, "")
    assert second["exit_code"] == 0 and second["first_step"] >= 4, "it did not go on from the last checkpoint"
    assert_undisturbed(coordinator, workspace, job_id, "job")
    assert {point["attempt"] for point in coordinator.metrics(job_id)} == {1, 2}
    # Both attempts' logs are kept.
    for attempt in ("1", "2"):
        assert "{" in coordinator.ctl("logs", job_id, "--attempt", attempt).expect(0).stdout
    values = coordinator.exposition(job_id)
    assert sum(value for (name, _), value in values.items() if name == "simpo_job_restarts_total") == 1
    assert_nothing_runs(coordinator)


def test_rolling_recovery_checkpoints_are_enough(workspace, coordinators, assert_undisturbed):
    coordinator = coordinators.start()
    make_slow(workspace)
    changes = {"save_strategy": "end", "save_steps": None, "recovery_minutes": 0.01}
    job_id = coordinator.submit(fault_job(workspace, "job", **changes))
    coordinator.wait_for(job_id, "a recovery checkpoint", lambda job: job["progress"]["checkpoint_step"] >= 3)
    os.kill(programs.rank_pids(coordinator.data_dir)[1], signal.SIGKILL)
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    assert job["restarts"] == 1 and job["attempts"][1]["first_step"] >= 3, coordinator.story(job_id)
    assert_undisturbed(coordinator, workspace, job_id, "job")


@pytest.mark.parametrize("crash", [False, True], ids=["", "and the coordinator is killed"])
def test_a_pre_empted_job_goes_on_where_it_was(workspace, coordinators, assert_undisturbed, tmp_path, crash):
    config = tmp_path / "coordinator.yaml"
    config.write_text("preemption: true\n")
    coordinator = coordinators.start(config=config)
    job_id = job_at_step(workspace, coordinator, 7)
    nodes = json.loads(coordinator.ctl("nodes", "-o", "json").expect(0).stdout)
    assert [node["jobs"] for node in nodes] == [[{"job_id": job_id, "slots": 2}]]
    urgent = coordinator.submit(workspace.job("urgent", max_steps=2, global_batch_size=16))
    waiting = coordinator.wait_for(urgent, "its place", lambda job: "1st of 1 in the queue" in job["reason"])
    assert waiting["state"] == "QUEUED", "equal priority takes nothing"
    coordinator.ctl("priority", urgent, "5").expect(0)
    if crash:
        coordinator.kill()
        coordinator = coordinators.start(config=config)
    urgent_end = coordinator.wait_state(urgent, "SUCCEEDED")["end_time"]
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"]) == (2, 0), coordinator.story(job_id)
    first, second = job["attempts"]
    assert first["exit_code"] == 143 and f"pre-empted by job {urgent} (priority 5)" in first["reason"]
    assert second["first_step"] == first["last_step"] >= 7, "it did not go on from where it stopped"
    assert second["start_time"] >= urgent_end
    assert {"preempting", "preempted"} <= {event["type"] for event in job["events"]}
    assert_undisturbed(coordinator, workspace, job_id, "job")
    assert_nothing_runs(coordinator)


def test_restarts_are_limited(workspace, coordinators):
    coordinator = coordinators.start()
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job", max_steps=1000, max_restarts=1))
    for attempt in (1, 2):
        coordinator.wait_for(job_id, f"attempt {attempt} to train",
                             lambda job: job["state"] == "RUNNING" and job["attempt"] == attempt
                             and len(programs.rank_pids(coordinator.data_dir)) == 2)
        os.kill(programs.rank_pids(coordinator.data_dir)[0], signal.SIGKILL)
    job = coordinator.wait_state(job_id, "FAILED")
    assert job["attempt"] == 2 and "restart" in job["reason"], job["reason"]
    assert coordinator.ctl("wait", job_id).code == 100
    assert_nothing_runs(coordinator)


def test_a_rank_that_hangs_while_it_says_that_it_lives_is_named_and_replaced(workspace, coordinators,
                                                                             assert_undisturbed):
    coordinator = coordinators.start(**{"step-timeout-s": 5, "checkpoint-timeout-s": 5})
    job_id = job_at_step(workspace, coordinator, 7)
    with programs.HungThread(programs.rank_pids(coordinator.data_dir)[1]):
        before = coordinator.get(job_id)
        # It is not silent, so that only its phase and its collectives can tell.
        job = coordinator.wait_for(job_id, "the end of the attempt", lambda job: job["attempts"][0]["end_time"])
    reason = job["attempts"][0]["reason"]
    expected = (r"rank 1 \([^)]*\) has not got on for \d+ s \(limit 5 s\): it is in \w+ after step \d+, (not waiting "
                r"since [a-z-]+ \d+ \(\d+ bytes\)|waiting for [a-z-]+ \d+ \(\d+ bytes\) for \d+ s); rank 0 \([^)]*\) waits for it in [a-z-]+ \d+ \(\d+ bytes\)")
    assert re.fullmatch(expected, reason), reason
    assert [rank["rank"] for rank in before["rank_states"]] == [0, 1]
    assert all(rank["connected"] and rank["pid"] and rank["hostname"] for rank in before["rank_states"]), before["rank_states"]
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"]) == (2, 1), coordinator.story(job_id)
    assert_undisturbed(coordinator, workspace, job_id, "job")
    assert_nothing_runs(coordinator)


def test_a_checkpoint_on_request(workspace, coordinators, assert_undisturbed):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 3, save_strategy="end", save_steps=None)
    said = coordinator.ctl("checkpoint", job_id, "--wait").expect(0).stdout
    step = int(re.search(r"has a checkpoint of step (\d+)", said)[1])
    assert step >= 3
    os.kill(programs.rank_pids(coordinator.data_dir)[1], signal.SIGKILL)
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    assert job["attempts"][1]["first_step"] == step, coordinator.story(job_id)
    assert_undisturbed(coordinator, workspace, job_id, "job")
    refused = coordinator.ctl("checkpoint", job_id)
    assert refused.code == 1 and "is SUCCEEDED" in refused.stderr, refused


def test_a_drained_node_is_left_with_a_checkpoint(workspace, coordinators, assert_undisturbed):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 7)
    node = json.loads(coordinator.ctl("nodes", "-o", "json").expect(0).stdout)[0]["name"]
    said = coordinator.ctl("drain", node, "--reason", "new disks").expect(0)
    assert said.stdout == f"Node {node} gets no new gang; 1 job on it\n", said
    job = coordinator.wait_state(job_id, "QUEUED")
    assert "down or drained" in job["reason"] and "was drained: new disks" in job["attempts"][0]["reason"], job
    assert not programs.attempt_pids(coordinator.data_dir)
    assert re.search(r"drained .* new disks", coordinator.ctl("nodes").expect(0).stdout)
    coordinator.kill()
    successor = coordinators.start()
    assert successor.get(job_id)["state"] == "QUEUED"
    successor.ctl("undrain", node).expect(0)
    job = successor.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"], job["machine_faults"]) == (2, 0, 0), successor.story(job_id)
    assert job["attempts"][1]["first_step"] == job["attempts"][0]["last_step"]
    assert_undisturbed(successor, workspace, job_id, "job")
    missing = successor.ctl("drain", "nowhere")
    assert missing.code == 102 and "simpoctl nodes" in missing.stderr, missing


def steps_written(workspace, name):
    lines = workspace.metrics(name)
    return lines[-1]["step"] if lines else 0


@pytest.mark.parametrize("end", ["kill", "SIGTERM", "SIGINT"])
def test_the_next_coordinator_adopts_a_running_gang(workspace, coordinators, assert_undisturbed, end):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 3)
    ranks = programs.rank_pids(coordinator.data_dir)
    if end == "kill":
        coordinator.kill()
    else:
        assert coordinator.stop(getattr(signal, end)) == 0, coordinator.log.read_text()
    at_death = steps_written(workspace, "job")
    # The run does not notice: it goes on by several steps while nobody listens.
    programs.wait_for("steps without a coordinator",
                      lambda: steps_written(workspace, "job") >= min(at_death + 5, STEPS))
    successor = coordinators.start()
    assert successor.grpc != coordinator.grpc
    if at_death + 5 < STEPS - 5:
        successor.wait_for(job_id, "reports from the adopted gang", lambda job: job["progress"]["step"] > at_death + 5)
        still = programs.rank_pids(successor.data_dir)
        assert set(still.values()) <= set(ranks.values()), "ranks were started again"
    job = successor.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"], len(job["attempts"])) == (1, 0, 1), successor.story(job_id)
    assert_undisturbed(successor, workspace, job_id, "job")
    assert {point["attempt"] for point in successor.metrics(job_id)} == {1}
    assert_nothing_runs(successor)


def test_a_coordinator_that_can_open_no_files_starts_nothing_twice(workspace, coordinators, assert_undisturbed):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 3)
    coordinator.kill()
    successor = coordinators.start()  # the gang is no child of this one, which knows it by files only
    _, most = resource.prlimit(successor.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(successor.process.pid, resource.RLIMIT_NOFILE, (0, most))
    # It cannot take the ranks' connections either, and gRPC would take none ever after.
    programs.wait_for("its end", lambda: successor.process.poll() is not None)
    log = successor.log.read_text()
    assert successor.process.returncode == 1, log
    assert "cannot take connections any more and stops" in log
    third = coordinators.start()
    job = third.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"], len(job["attempts"])) == (1, 0, 1), third.story(job_id)
    assert_undisturbed(third, workspace, job_id, "job")
    assert_nothing_runs(third)


def test_a_run_that_ended_in_the_outage_is_found_with_every_step(workspace, coordinators):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 5, save_strategy="end", save_steps=None)
    coordinator.kill()
    programs.wait_for("the end of the run", lambda: (workspace.output("job") / "final" / "config.json").exists())
    successor = coordinators.start()
    job = successor.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"]) == (1, 0), successor.story(job_id)
    assert [point["step"] for point in successor.metrics(job_id)] == list(range(1, STEPS + 1))
    assert_nothing_runs(successor)


def test_queued_jobs_survive_a_crash_of_the_coordinator(workspace, coordinators):
    coordinator = coordinators.start()
    make_slow(workspace)
    running = coordinator.submit(fault_job(workspace, "running"))
    coordinator.wait_step(running, 1)
    queued = [coordinator.submit(fault_job(workspace, f"queued-{i}", max_steps=2)) for i in range(3)]
    coordinator.kill()
    successor = coordinators.start()
    listed = json.loads(successor.ctl("list", "-o", "json").expect(0).stdout)
    assert [job["id"] for job in listed] == [*reversed(queued), running]
    for job_id in (running, *queued):
        job = successor.wait_state(job_id, "SUCCEEDED")
        assert (job["attempt"], job["restarts"]) == (1, 0), successor.story(job_id)
    for i in range(3):
        assert steps_written(workspace, f"queued-{i}") == 2


def test_a_crash_right_after_the_answer_to_submit_starts_the_job_once(workspace, coordinators):
    workspace.make(rows=16)
    for i in range(4):
        coordinator = coordinators.start()
        job_id = coordinator.submit(workspace.job(f"job-{i}", max_steps=2))
        coordinator.kill()
        successor = coordinators.start()
        job = successor.wait_state(job_id, "SUCCEEDED")
        assert (job["attempt"], job["restarts"]) == (1, 0), successor.story(job_id)
        assert steps_written(workspace, f"job-{i}") == 2
        assert tiny_model.read_model(workspace.output(f"job-{i}") / "final")
        successor.kill()


def test_a_cancel_in_the_outage_of_a_crash_is_not_needed_twice(workspace, coordinators):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 2, max_steps=2000)
    coordinator.ctl("cancel", job_id, "--yes").expect(0)
    coordinator.kill()
    successor = coordinators.start()
    assert successor.ctl("wait", job_id).code == 103, successor.story(job_id)
    assert_nothing_runs(successor)


def test_a_rank_that_dies_in_the_outage_is_replaced(workspace, coordinators, assert_undisturbed):
    coordinator = coordinators.start()
    job_id = job_at_step(workspace, coordinator, 5)
    coordinator.kill()
    os.kill(programs.rank_pids(coordinator.data_dir)[1], signal.SIGKILL)
    programs.wait_for("the end of the gang", lambda: not programs.attempt_pids(coordinator.data_dir))
    successor = coordinators.start()
    job = successor.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"]) == (2, 1), successor.story(job_id)
    assert job["attempts"][1]["first_step"] >= 4, successor.story(job_id)
    assert_undisturbed(successor, workspace, job_id, "job")
    assert_nothing_runs(successor)
