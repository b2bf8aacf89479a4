"""A job through the service: submitted, queued, trained, watched and found again, as a user does it."""

import csv
import io
import json
import re
import signal

import preference_data
import programs
import tiny_model
from test_worker_training import values_of

SUCCEEDED, FAILED, NOT_FINISHED, NOT_FOUND, CANCELLED = 0, 100, 101, 102, 103


def assert_nothing_runs(coordinator):
    """No process of any job, nothing of it in shared memory, and nothing that is only of use while it runs."""
    data_dir = coordinator.data_dir
    jobs = coordinator.ctl("list", "-o", "name").expect(0).stdout.split()
    assert jobs
    programs.wait_for("the end of every process of the job",
                      lambda: not programs.attempt_pids(data_dir) and not programs.supervisor_pids(data_dir))
    programs.wait_for("the end of shared memory", lambda: not programs.scratch_folders_of(jobs),
                      on_timeout=lambda: str(programs.scratch_folders_of(jobs)))
    assert (data_dir / "attempts").is_dir(), "attempts are kept elsewhere: this check sees nothing"
    programs.wait_for("the removal of its files", lambda: not list((data_dir / "attempts").iterdir()))


def assert_metrics_are_the_file(coordinator, workspace, job_id, name):
    """What the service answers is what the run wrote, to the last digit."""
    lines = workspace.metrics(name)
    points = coordinator.metrics(job_id)
    assert [{key: value for key, value in point.items() if key not in ("attempt", "time")} for point in points] == lines
    table = list(csv.DictReader(io.StringIO(coordinator.ctl("metrics", job_id, "-o", "csv").expect(0).stdout)))
    assert [int(row["step"]) for row in table] == [line["step"] for line in lines]
    for row, line in zip(table, lines):
        assert {key: float(row[key]) for key in line} == line
    evaluations = coordinator.metrics(job_id, "--eval")
    assert [values_of({k: v for k, v in e.items() if k != "attempt"}) for e in evaluations] == \
           [values_of(line) for line in workspace.eval_metrics(name)]


def test_from_submission_to_the_final_model(workspace, coordinators):
    coordinator = coordinators.start()
    tiny_model.write_model(workspace.model)
    data = workspace.folder / "data"
    preference_data.write_jsonl(data / "train.jsonl", preference_data.message_rows(24, seed=1))
    preference_data.write_jsonl(data / "test.jsonl", preference_data.message_rows(9, seed=2))
    job = workspace.job(dataset_mixer={"data": 1.0}, model_name_or_path="./model", name="first-steps",
                        eval_on_start=True)
    submitted = coordinator.ctl("submit", job).expect(0)
    job_id = re.match(r"Job (\S+) \(first-steps\) submitted", submitted.stdout).group(1)
    assert f"watch {job_id}" in submitted.stderr and "note: " in submitted.stderr
    waited = coordinator.ctl("wait", job_id)
    assert waited.code == SUCCEEDED, coordinator.story(job_id)

    found = coordinator.get(job_id)
    assert (found["state"], found["attempt"], found["restarts"], found["ranks"]) == ("SUCCEEDED", 1, 0, 2)
    assert found["progress"]["step"] == found["progress"]["steps_planned"] == 3
    assert found["progress"]["metrics"]["loss"] == workspace.metrics()[-1]["loss"]
    assert [attempt["exit_code"] for attempt in found["attempts"]] == [0]
    sequences = [event["sequence"] for event in found["events"]]
    assert sequences == sorted(set(sequences)) and found["events"][-1]["state"] == "SUCCEEDED"
    # By a beginning of the id, and by the name.
    for other_name in (job_id[:-2], "first-steps"):
        assert coordinator.get(other_name)["id"] == job_id
    listed = json.loads(coordinator.ctl("list", "-o", "json").expect(0).stdout)
    assert [item["id"] for item in listed] == [job_id]
    assert job_id in coordinator.ctl("list", "--state", "SUCCEEDED").expect(0).stdout
    assert job_id not in coordinator.ctl("list", "--state", "RUNNING").expect(0).stdout
    described = coordinator.ctl("describe", job_id).expect(0).stdout
    final = workspace.output() / "final"
    for word in ("SUCCEEDED", "first-steps", str(final), "Events", "Attempts", f"metrics {job_id}"):
        assert word in described, described

    assert_metrics_are_the_file(coordinator, workspace, job_id, "job")
    assert [line["step"] for line in workspace.eval_metrics()] == [0, 3]
    logs = coordinator.ctl("logs", job_id).expect(0).stdout
    assert [json.loads(line) for line in logs.splitlines() if line.startswith("{")] == workspace.metrics()
    assert coordinator.ctl("logs", job_id, "--tail", "1").expect(0).stdout.count("\n") == 1
    coordinator.ctl("logs", job_id, "--rank", "1").expect(0)
    coordinator.ctl("logs", job_id, "--rank", "-1").expect(0)
    assert "its ranks are 0 to 1" in coordinator.ctl("logs", job_id, "--rank", "2").stderr
    assert coordinator.ctl("watch", job_id).code == SUCCEEDED
    assert set(tiny_model.read_model(final)) == set(tiny_model.weight_shapes(tiny_model.config()))
    assert_nothing_runs(coordinator)

    values = coordinator.exposition(job_id)
    assert values["simpo_job_state", frozenset({("job", job_id), ("state", "SUCCEEDED")})] == 1
    assert values["simpo_job_step", frozenset({("job", job_id)})] == 3
    assert coordinator.page("/healthz")[0] == 200 and coordinator.page("/")[0] == 200
    assert coordinator.page("/nowhere")[0] == 404
    assert coordinator.stop() == 0


def test_follow_shows_the_progress_and_the_end(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=40)
    job = workspace.job(num_train_epochs=2, dataset_mixer={"./tr*n.jsonl": 1.0})
    followed = coordinator.ctl("submit", job, "--follow").expect(SUCCEEDED)
    assert "\x1b" not in followed.stderr and "\r" not in followed.stderr, "control codes although it is no terminal"
    assert "SUCCEEDED" in followed.stdout + followed.stderr
    assert re.search(r"\b10\b.*\b10\b", followed.stdout + followed.stderr), followed


def test_without_an_output_dir_the_server_chooses_one(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=8)
    job_id = coordinator.submit(workspace.job(output_dir=None, max_steps=1), "--name", "somewhere")
    coordinator.wait_state(job_id, "SUCCEEDED")
    output = coordinator.get(job_id)["output_dir"]
    assert output == str(coordinator.data_dir / "outputs" / f"somewhere-{job_id}")
    lines = preference_data.read_jsonl(coordinator.data_dir / "outputs" / f"somewhere-{job_id}" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1]


def test_dry_run_stores_nothing(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=8)
    checked = coordinator.ctl("submit", workspace.job(), "--dry-run").expect(0)
    assert "a valid job" in checked.stdout and "gamma_beta_ratio 0.5" in checked.stderr
    config = coordinator.ctl("submit", workspace.job(), "--dry-run", "-o", "yaml", "--set", "beta=3").expect(0).stdout
    assert re.search(r"^beta: 3$", config, re.MULTILINE), config
    bad = coordinator.ctl("submit", workspace.job("bad", beta=-1, betta=2), "--dry-run").expect(2)
    assert re.search(r"bad\.yaml:\d+: beta: .*\n.*bad\.yaml:\d+: betta: .*beta", bad.stderr), bad
    too_large = workspace.job("large", resources={"ranks_per_node": 8, "threads_per_rank": 1})
    assert "8 slots" in coordinator.ctl("submit", too_large, "--dry-run").expect(2).stderr
    assert json.loads(coordinator.ctl("list", "-o", "json").expect(0).stdout) == []
    assert not workspace.output().exists()
    # Without a coordinator the file is checked all the same, and that is said.
    coordinator.stop()
    alone = coordinator.ctl("submit", workspace.job(), "--dry-run").expect(0)
    assert "no coordinator answered" in alone.stderr
    coordinator.ctl("submit", workspace.job("bad", beta=-1), "--dry-run").expect(2)


def test_exit_codes_and_messages(workspace, coordinators):
    coordinator = coordinators.start()
    for command in ("get", "describe", "watch", "wait", "logs", "metrics", "cancel"):
        result = coordinator.ctl(command, "no-such-job").expect(NOT_FOUND)
        assert "no-such-job" in result.stderr and result.stdout == "", result
    for bad in (["list", "--state", "SLEEPING"], ["frobnicate"], ["get"], ["submit", "nowhere.yaml"],
                ["metrics", "x", "-o", "xml"]):
        result = coordinator.ctl(*bad).expect(2)
        assert result.stderr.startswith("simpoctl: ") and result.stdout == "", result
    version = coordinator.ctl("version").expect(0).stdout
    assert programs.run_program([programs.program("simpo-worker"), "--version"]).stdout.split()[-1] in version
    assert "learning_rate" in coordinator.ctl("help", "job-file").expect(0).stdout
    assert "103" in coordinator.ctl("help", "exit-codes").expect(0).stdout
    for shell, checker in (("bash", ["bash", "-n"]), ("zsh", None)):
        script = coordinator.ctl("completion", shell).expect(0).stdout
        assert "submit" in script
        if checker:
            programs.run_program(checker, stdin=script).expect(0)
    coordinator.stop()
    result = coordinator.ctl("list").expect(1)
    assert f"cannot reach the coordinator at {coordinator.grpc}" in result.stderr
    assert "simpo-coordinator --data-dir" in result.stderr
    assert result.stderr.count("\n") == 1, result


def test_the_same_request_is_the_same_job(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=8)
    job = workspace.job(max_steps=1)
    first = coordinator.submit(job, "--request-id", "mine-1")
    assert coordinator.submit(job, "--request-id", "mine-1") == first
    again = coordinator.ctl("submit", job, "--request-id", "mine-1").expect(0)
    assert "was submitted before with this request id" in again.stdout
    other = coordinator.ctl("submit", job, "--request-id", "mine-1", "--set", "max_steps=2").expect(1)
    assert "mine-1" in other.stderr
    coordinator.wait_state(first, "SUCCEEDED")
    # Also after its end, and after a crash of the coordinator.
    coordinator.kill()
    coordinator = coordinators.start()
    assert coordinator.submit(job, "--request-id", "mine-1") == first
    assert len(json.loads(coordinator.ctl("list", "-o", "json").expect(0).stdout)) == 1


def slow_job(workspace, name, steps=40, ranks=1, **changes):
    """A job whose steps take some tenths of a second by their size; `ranks` slots."""
    return workspace.job(name, max_steps=steps, global_batch_size=24, learning_rate=1e-3, save_strategy="no",
                         resources={"ranks_per_node": ranks, "threads_per_rank": 1}, **changes)


def make_slow(workspace):
    workspace.make(rows=48, words=16, hidden_size=64, intermediate_size=160, num_hidden_layers=3)


def test_the_queue_goes_by_priority_then_age_over_the_slots(workspace, coordinators):
    coordinator = coordinators.start(slots=2)
    make_slow(workspace)
    # Two jobs of one slot each run side by side.
    first, second = (coordinator.submit(slow_job(workspace, f"side-{i}", steps=400)) for i in (1, 2))
    for job_id in (first, second):
        coordinator.wait_step(job_id, 1)
    assert coordinator.get(first)["state"] == coordinator.get(second)["state"] == "RUNNING"
    older = coordinator.submit(slow_job(workspace, "older", steps=2))
    younger = coordinator.submit(slow_job(workspace, "younger", steps=2))
    wide = coordinator.submit(slow_job(workspace, "wide", steps=2, ranks=2, priority=5))
    waiting = coordinator.wait_for(wide, "its place", lambda job: "0 of 2 slots free" in job["reason"])
    assert waiting["state"] == "QUEUED" and "needs 2" in waiting["reason"]
    coordinator.wait_for(older, "its place", lambda job: f"2nd of 3 in the queue, behind {wide}" in job["reason"])
    coordinator.wait_for(younger, "its place", lambda job: f"3rd of 3 in the queue, behind {wide} and 1 more" in job["reason"])
    values = coordinator.exposition()
    assert values["simpo_coordinator_jobs", frozenset({("state", "RUNNING")})] == 2
    assert values["simpo_coordinator_jobs", frozenset({("state", "QUEUED")})] == 3
    coordinator.ctl("cancel", first, "--yes").expect(0)
    coordinator.wait_state(first, "CANCELLED")
    # One slot is free, but what comes next needs two: nobody passes it.
    coordinator.wait_for(wide, "one free slot", lambda job: "1 of 2 slots free" in job["reason"])
    assert coordinator.get(older)["state"] == "QUEUED"
    coordinator.ctl("cancel", second, "--yes").expect(0)
    ended = [coordinator.wait_state(job_id, "SUCCEEDED") for job_id in (wide, older, younger)]
    starts = [job["start_time"] for job in ended]
    assert starts == sorted(starts), [(job["name"], job["start_time"]) for job in ended]
    assert ended[1]["start_time"] >= ended[0]["end_time"]


def test_cancel_leaves_no_process(workspace, coordinators):
    coordinator = coordinators.start(slots=2)
    make_slow(workspace)
    running = coordinator.submit(slow_job(workspace, "running", steps=1000, ranks=2))
    queued = coordinator.submit(slow_job(workspace, "queued", steps=1000, ranks=2))
    watch = coordinator.start_ctl("watch", running)
    coordinator.wait_step(running, 2)
    assert coordinator.ctl("wait", running, "--timeout", "0").code == NOT_FINISHED
    assert sorted(programs.rank_pids(coordinator.data_dir)) == [0, 1]
    cancelled = coordinator.ctl("cancel", queued, "--yes").expect(0)
    assert "CANCELLED" in cancelled.stdout
    assert coordinator.ctl("cancel", running, "--yes").expect(0)
    assert coordinator.ctl("wait", running).code == CANCELLED, coordinator.story(running)
    assert_nothing_runs(coordinator)
    out, err = watch.communicate(timeout=programs.DEADLINE_S)
    assert watch.returncode == CANCELLED, (out, err)
    # It was asked, not killed: the ranks wrote a checkpoint that a new run can go on from.
    job = coordinator.get(running)
    assert job["attempts"][-1]["exit_code"] == 143 and job["restarts"] == 0, coordinator.story(running)
    assert list((workspace.output("running") / "checkpoints").glob("step-*/manifest.json"))
    # Harmless on a job that has ended.
    assert "CANCELLED" in coordinator.ctl("cancel", running, "--yes").expect(0).stdout
    assert coordinator.ctl("wait", queued).code == CANCELLED and not workspace.output("queued").exists()


def test_logs_follow_until_the_end_and_ctrl_c_only_detaches(workspace, coordinators):
    coordinator = coordinators.start(slots=2)
    make_slow(workspace)
    job_id = coordinator.submit(slow_job(workspace, "job", steps=30, ranks=2))
    coordinator.wait_state(job_id, "RUNNING", "SUCCEEDED")
    logs = coordinator.start_ctl("logs", job_id, "--follow")
    watch = coordinator.start_ctl("watch", job_id)
    coordinator.wait_step(job_id, 3)
    watch.send_signal(signal.SIGINT)
    out, err = watch.communicate(timeout=programs.DEADLINE_S)
    assert watch.returncode == NOT_FINISHED and f"job {job_id} goes on" in err, (out, err)
    out, err = logs.communicate(timeout=programs.DEADLINE_S)
    assert logs.returncode == 0, err
    assert [json.loads(line)["step"] for line in out.splitlines() if line.startswith("{")] == list(range(1, 31))
    assert coordinator.ctl("wait", job_id).code == SUCCEEDED
