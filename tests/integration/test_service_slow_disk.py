"""Every sync of the coordinator's databases takes seconds: calls are answered, many by one sync, and no rank is blamed."""

import concurrent.futures
import time

import conftest
import fault_shim
import programs
from test_service_faults import assert_undisturbed, fault_job  # noqa: F401 (a fixture)
from test_service_jobs import assert_nothing_runs, make_slow

HEARTBEAT_S = 4
SUBMITS = 24


def test_a_slow_disk_delays_and_breaks_nothing(workspace, coordinators, tmp_path, assert_undisturbed):  # noqa: F811
    faults = fault_shim.Faults(tmp_path)
    coordinator = coordinators.start(env=faults.env, **{"heartbeat-timeout-s": HEARTBEAT_S})
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job"))
    coordinator.wait_step(job_id, 2)
    waiting = workspace.job("waiting", max_steps=1)
    for sync_s in (0.5, 2):
        faults.set(sync_s=sync_s)
        # Many at once share a sync: one after the other would take far longer.
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(SUBMITS) as pool:
            ids = list(pool.map(lambda i: coordinator.submit(waiting, "--set", f"output_dir={tmp_path}/none-{sync_s}-{i}"),
                                range(SUBMITS)))
        took = time.monotonic() - begin
        print(f"{SUBMITS} submits at once with {sync_s} s a sync: {took:.1f} s")
        assert len(set(ids)) == SUBMITS
        assert took < SUBMITS * sync_s / 2 + 5, "they did not share a sync"
        # One client's calls take effect in their order.
        coordinator.ctl("priority", ids[0], "3").expect(0)
        assert coordinator.get(ids[0])["priority"] == 3
        for queued in ids:
            faults.set(sync_s=0)
            coordinator.ctl("cancel", queued, "--yes").expect(0)
        faults.set(sync_s=sync_s)
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    faults.set()
    assert (job["attempt"], job["restarts"]) == (1, 0), coordinator.story(job_id)
    assert not [event for event in job["events"] if event["type"] == "rank_lost"]
    assert_undisturbed(coordinator, workspace, job_id, "job")
    assert_nothing_runs(coordinator)


@conftest.long
def test_a_disk_that_hangs_for_longer_than_ranks_may_be_silent(workspace, coordinators, tmp_path):
    faults = fault_shim.Faults(tmp_path)
    coordinator = coordinators.start(env=faults.env, **{"heartbeat-timeout-s": HEARTBEAT_S})
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job", max_steps=100000, save_strategy="no", save_steps=None))
    coordinator.wait_step(job_id, 3)
    ranks = programs.rank_pids(coordinator.data_dir)
    faults.set(sync_s=3 * HEARTBEAT_S)
    other = coordinator.submit(workspace.job("other", max_steps=1))  # is answered when the disk is
    faults.set()
    before = coordinator.get(job_id)["progress"]["step"]
    coordinator.wait_step(job_id, before + 5)
    job = coordinator.get(job_id)
    assert (job["state"], job["attempt"], job["restarts"]) == ("RUNNING", 1, 0), coordinator.story(job_id)
    assert programs.rank_pids(coordinator.data_dir) == ranks
    steps = [point["step"] for point in coordinator.metrics(job_id)]
    assert steps == list(range(1, len(steps) + 1))
    for end in (other, job_id):
        coordinator.ctl("cancel", end, "--yes").expect(0)
        coordinator.ctl("wait", end)
    assert_nothing_runs(coordinator)
