"""kill -9 of the coordinator, round after round, over real training: `make chaos` runs it, `make test` does not.

SIMPO_CHAOS_ROUNDS (100) kills; SIMPO_CHAOS_SEED decides what is done. Now and then a rank, mpirun or a supervisor is
killed too. Every job must end as an undisturbed run does: the same metrics and the same weights, bit for bit; and what
nothing but the coordinator's death has befallen runs in one attempt.
"""

import os
import random
import signal
import time

import programs
import servers
from test_service_faults import STEPS, assert_undisturbed, fault_job  # assert_undisturbed: a fixture
from test_service_jobs import assert_nothing_runs, make_slow

ROUNDS = int(os.environ.get("SIMPO_CHAOS_ROUNDS", "100"))
SEED = int(os.environ.get("SIMPO_CHAOS_SEED", str(int(time.time()))))


def kill_something(coordinator, dice):
    """One process of the gang that runs: a rank, mpirun or the supervisor. Returns its job's id."""
    pids = programs.supervisor_pids(coordinator.data_dir) + programs.attempt_pids(coordinator.data_dir)
    if not pids:
        return None
    pid = dice.choice(pids)
    words = " ".join(programs.command_of(pid)) + b" ".join(programs.environment_of(pid)).decode(errors="replace")
    programs.kill_all([pid])
    return words.split(f"{coordinator.data_dir}/attempts/")[1].split("/")[0]


def test_training_outlives_every_coordinator(workspace, coordinators, assert_undisturbed):
    print(f"seed {SEED}")
    dice = random.Random(SEED)
    make_slow(workspace)
    names, disturbed, ended = {}, set(), set()
    for number in range(ROUNDS):
        coordinator = coordinators.launch()
        if dice.random() < 0.15:
            time.sleep(dice.uniform(0, 0.1))  # in the middle of its start
        else:
            coordinator.ready()
            jobs = {job_id: coordinator.get(job_id) for job_id in names if job_id not in ended}
            ended |= {job_id for job_id, job in jobs.items() if job["state"] in servers.FINAL}
            while len(names) - len(ended) < 2:
                name = f"job-{len(names)}"
                names[coordinator.submit(fault_job(workspace, name, max_restarts=1000))] = name
            if dice.random() < 0.25:
                # So that there are many jobs, however slow the machine is.
                coordinator.wait_state(next(job_id for job_id in names if job_id not in ended), *servers.FINAL)
            else:
                time.sleep(dice.uniform(0, 2.5))
            if dice.random() < 0.1:
                disturbed.add(kill_something(coordinator, dice))
        coordinator.process.send_signal(signal.SIGKILL)
        coordinator.process.wait()
        if dice.random() < 0.03:
            disturbed.add(kill_something(coordinator, dice))
        time.sleep(dice.choice([0, 0, dice.uniform(0, 1)]))
    coordinator = coordinators.start()
    for job_id, name in names.items():
        job = coordinator.wait_state(job_id, "SUCCEEDED")
        if job_id not in disturbed:
            assert (job["attempt"], job["restarts"]) == (1, 0), coordinator.story(job_id)
        assert_undisturbed(coordinator, workspace, job_id, name)
        assert [event["sequence"] for event in job["events"]] == list(range(1, len(job["events"]) + 1))
    assert_nothing_runs(coordinator)
    print(f"{ROUNDS} kills of the coordinator over {len(names)} jobs of {STEPS} steps, {len(disturbed - {None})} of them "
          f"disturbed by other kills too: all ended bit for bit as undisturbed")
