"""Disks that are full: what was acknowledged is kept, what cannot be kept is refused, and all goes on when there is room."""

import json
import os
import re
import subprocess

import pytest

import conftest
import programs
from test_service_faults import STEPS, assert_undisturbed, fault_job  # noqa: F401 (a fixture)
from test_service_jobs import assert_nothing_runs, make_slow


class SmallDisk:
    """A file system of its own that can be filled to its last byte and freed again."""

    def __init__(self, folder, megabytes):
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", folder],
                              capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this user cannot mount a small file system: {done.stderr.strip()}")

    def fill(self):
        """Leaves no byte."""
        with (self.folder / "filler").open("ab", buffering=0) as filler:
            for size in (1 << 20, 1 << 12, 1):
                while True:
                    try:
                        filler.write(b"\0" * size)
                    except OSError:
                        break

    def free(self):
        (self.folder / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes one. They go when everything that the test started has ended."""
    disks = []

    def make(name, megabytes):
        disks.append(SmallDisk(tmp_path / name, megabytes))
        return disks[-1]
    yield make
    for disk in disks:
        subprocess.run(["umount", "--lazy", disk.folder], check=True)


def submit_until_refused(coordinator, workspace, disk):
    """(ids of the acknowledged ones, what the refused one was told); the disk is filled after the third"""
    acknowledged = []
    for i in range(2000):
        if i == 3:
            disk.fill()
        job = workspace.job(f"queued-{i}", max_steps=2, global_batch_size=16)
        result = coordinator.ctl("submit", job, "-o", "name", "--request-id", f"request-{i}")
        if result.code != 0:
            return acknowledged, result
        acknowledged.append(result.stdout.strip())
    raise AssertionError("every submit was taken: the disk is not full")


def test_a_full_data_folder_refuses_and_loses_nothing(small_disk, workspace, coordinators,
                                                      assert_undisturbed):  # noqa: F811
    disk = small_disk("service", 16)
    coordinator = coordinators.start()
    make_slow(workspace)
    job_id = coordinator.submit(fault_job(workspace, "job"))
    coordinator.wait_step(job_id, 3)
    ranks = programs.rank_pids(coordinator.data_dir)
    acknowledged, refused = submit_until_refused(coordinator, workspace, disk)
    print(f"{len(acknowledged)} taken, then: {refused.stderr}")
    assert refused.code == 1
    assert coordinator.process.wait(timeout=30) == 1, "it cannot know what is on disk, and stops"
    # The points of the running job may have met the full disk first: then the submit finds nobody.
    gone = "Connection refused" in refused.stderr
    told = coordinator.log.read_text() if gone else refused.stderr
    assert re.search("cannot write (its|the) database", told) and "free some disk space" in told, refused
    assert "running gangs go on" in coordinator.log.read_text()
    assert set(programs.rank_pids(coordinator.data_dir).values()) <= set(ranks.values())
    # Nothing begins while there is no room, and it is said why.
    early = coordinators.launch()
    try:
        code = early.process.wait(timeout=10)
        print(early.log.read_text())
        assert code == 1
        assert re.search("disk space|No space left", early.log.read_text()), early.log.read_text()
    except subprocess.TimeoutExpired:
        early.kill()  # it found room that the last one had left in its log
    disk.free()
    successor = coordinators.start()
    listed = [job["id"] for job in json.loads(successor.ctl("list", "-o", "json", "--limit", "5000").expect(0).stdout)]
    assert set(acknowledged) | {job_id} <= set(listed), "an acknowledged job was lost"
    # The one that was refused may have been stored; asked again, it is there once.
    last = workspace.job(f"queued-{len(acknowledged)}", max_steps=2, global_batch_size=16)
    again = successor.submit(last, "--request-id", f"request-{len(acknowledged)}")
    for queued in [*acknowledged[3:], *(other for other in listed if other not in [*acknowledged, job_id])]:
        successor.ctl("cancel", queued, "--yes").expect(0)
    for queued in acknowledged[:3]:
        assert successor.wait_state(queued, "SUCCEEDED")["restarts"] == 0, successor.story(queued)
    job = successor.wait_state(job_id, "SUCCEEDED")
    assert (job["attempt"], job["restarts"]) == (1, 0), successor.story(job_id)
    assert_undisturbed(successor, workspace, job_id, "job")
    successor.ctl("cancel", again, "--yes")
    successor.ctl("wait", again)
    assert_nothing_runs(successor)


def checkpoints(workspace, name):
    return sorted((workspace.output(name) / "checkpoints").glob("step-*"))


@conftest.long
def test_a_full_output_folder_costs_the_steps_since_the_checkpoint(small_disk, workspace, coordinators,
                                                                   assert_undisturbed):  # noqa: F811
    disk = small_disk("results", 64)
    coordinator = coordinators.start(**{"restart-pause-s": 2, "max-machine-faults": 2})
    make_slow(workspace)
    output = disk.folder / "out"
    job_id = coordinator.submit(fault_job(workspace, "job", output_dir=str(output)))
    coordinator.wait_step(job_id, 5)
    disk.fill()
    job = coordinator.wait_for(job_id, "an attempt that found no room", lambda job: job["restarts"] >= 1)
    # What meets the full disk first, the line of a step or the checkpoint: a file's last page may have had room.
    assert re.search(r"is the disk full\?|the checkpoint after step 8 failed: .*No space left on device",
                     job["attempts"][0]["reason"]), coordinator.story(job_id)
    print(job["attempts"][0]["reason"])
    for folder in (output / "checkpoints").glob("step-*"):
        assert (folder / "manifest.json").exists(), f"{folder} is a part of a checkpoint"
    disk.free()
    job = coordinator.wait_state(job_id, "SUCCEEDED")
    assert job["attempts"][-1]["first_step"] >= 4, coordinator.story(job_id)
    os.symlink(output, workspace.output("job"))
    assert_undisturbed(coordinator, workspace, job_id, "job")
    # Without any room it cannot be started, which is no fault of the job; it is given up in the end, with the reason.
    disk.fill()
    hopeless = coordinator.submit(fault_job(workspace, "hopeless", output_dir=str(disk.folder / "hopeless")))
    job = coordinator.wait_state(hopeless, "FAILED")
    print(job["reason"])
    assert re.search("max_machine_faults.*No space left on device|No space left on device.*max_machine_faults",
                     job["reason"]), coordinator.story(hopeless)
    assert job["restarts"] == 0, coordinator.story(hopeless)
    assert STEPS not in [point["step"] for point in coordinator.metrics(hopeless)]
    disk.free()
    assert_nothing_runs(coordinator)
