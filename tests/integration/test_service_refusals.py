"""What the coordinator refuses: one clear message each, a non-zero exit code, nothing started, nothing lost."""

import json
import re
import socket

import pytest

import preference_data
import programs
from test_worker_bad_input import replace_row, truncated_weights


def assert_refused(coordinator, *patterns):
    """A coordinator that does not start says why, once, and leaves."""
    code = coordinator.process.wait(timeout=programs.DEADLINE_S)
    text = coordinator.log.read_text()
    assert code not in (0, -6, -11), f"exit code {code}\n{text}"
    assert "ready:" not in text and len(text.strip().splitlines()) <= 3, text
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern}\n{text}"


@pytest.mark.parametrize("flag", ["listen", "http"])
def test_a_port_in_use(coordinators, flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert_refused(coordinators.launch(**{flag: address}), re.escape(address), r"in use|another", flag)


def test_two_coordinators_on_one_address(coordinators):
    first = coordinators.start("one")
    assert_refused(coordinators.launch("two", listen=first.grpc), re.escape(first.grpc))
    first.ctl("list").expect(0)


def test_two_coordinators_on_one_data_dir(coordinators):
    first = coordinators.start()
    assert_refused(coordinators.launch(), re.escape(str(first.data_dir)), r"another|already")
    first.ctl("list").expect(0)
    assert first.stop() == 0
    coordinators.start().ctl("list").expect(0)


@pytest.mark.parametrize("flag, address", [("listen", "0.0.0.0:0"), ("http", "0.0.0.0:0"), ("listen", "[::]:0")])
def test_an_open_address_needs_to_be_said(coordinators, flag, address):
    assert_refused(coordinators.launch(**{flag: address}), re.escape(address), "--insecure")
    assert not (coordinators.data_dir() / "simpo.db").exists()


def test_bad_flags_and_places(coordinators, tmp_path):
    assert_refused(coordinators.launch(slots="many"), "slots")
    assert_refused(coordinators.launch(listen="nonsense"), "nonsense")
    assert_refused(coordinators.launch(worker=tmp_path / "nowhere"), "nowhere")
    (tmp_path / "a-file").write_text("")
    assert_refused(coordinators.launch("a-file"), "a-file")


def test_every_violation_at_once_and_nothing_stored(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=8)
    job = workspace.job(beta=-1, epochs_of_joy=3, learning_rate="fast")
    result = coordinator.ctl("submit", job).expect(2)
    for key in ("beta", "epochs_of_joy", "learning_rate"):
        assert len(re.findall(rf"job\.yaml:\d+: {key}: ", result.stderr)) == 1, result
    # What only the server can see comes back in the same way.
    job = workspace.job(model_name_or_path=str(workspace.folder / "nowhere"),
                        dataset_mixer={str(workspace.folder / "neither.jsonl"): 1.0},
                        resources={"ranks_per_node": 16, "threads_per_rank": 1})
    result = coordinator.ctl("submit", job).expect(2)
    for words in (r"model_name_or_path: .*nowhere' does not exist on",
                  r"dataset_mixer: .*neither\.jsonl' does not exist on",
                  r"resources: 16 ranks .* need 16 slots"):
        assert re.search(words, result.stderr), result
    assert json.loads(coordinator.ctl("list", "-o", "json").expect(0).stdout) == []
    assert not workspace.output().exists()


def test_an_output_dir_of_another_job(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=8)
    job = workspace.job(max_steps=1)
    coordinator.wait_state(coordinator.submit(job), "SUCCEEDED")
    before = (workspace.output() / "metrics.jsonl").read_bytes()
    refused = coordinator.ctl("submit", job).expect(2)
    assert str(workspace.output()) in refused.stderr and "overwrite_output_dir" in refused.stderr
    assert (workspace.output() / "metrics.jsonl").read_bytes() == before
    again = coordinator.submit(job, "--set", "overwrite_output_dir=true", "--set", "beta=3")
    coordinator.wait_state(again, "SUCCEEDED")
    assert (workspace.output() / "metrics.jsonl").read_bytes() != before


def two_bad_rows(workspace):
    replace_row(workspace, 3, b'{"prompt": "a", "rejected": "b"}')
    replace_row(workspace, 5, b"\xff")


@pytest.mark.parametrize("spoil, words", [
    (two_bad_rows, [r"train\.jsonl:3: the row has no chosen", r"train\.jsonl:5: the text is not UTF-8"]),
    (truncated_weights, [r"model/model\.safetensors"]),
], ids=["bad rows", "truncated weights"])
def test_what_preparing_finds_fails_the_job_at_once(workspace, coordinators, spoil, words):
    coordinator = coordinators.start()
    workspace.make(rows=12)
    spoil(workspace)
    job_id = coordinator.submit(workspace.job())
    result = coordinator.ctl("wait", job_id)
    assert result.code == 100, coordinator.story(job_id)
    job = coordinator.get(job_id)
    assert (job["attempt"], job["restarts"]) == (1, 0) and job["attempts"][0]["exit_code"] == 3
    for pattern in words:
        assert re.search(pattern, job["reason"]), job["reason"]
    described = coordinator.ctl("describe", job_id).expect(0).stdout
    assert re.search(words[0], described), described
    assert not (workspace.output() / "metrics.jsonl").exists()


def test_divergence_fails_the_job_and_names_the_step(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=24)
    job_id = coordinator.submit(workspace.job(learning_rate=1e12, lr_scheduler_type="constant", max_grad_norm=0))
    assert coordinator.ctl("wait", job_id).code == 100, coordinator.story(job_id)
    job = coordinator.get(job_id)
    assert job["restarts"] == 0 and re.search(r"step \d+: loss .*diverged.*learning_rate", job["reason"]), job["reason"]


def test_a_follow_of_a_failing_job_says_why(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=4)
    preference_data.write_jsonl(workspace.train, [{"prompt": "a", "chosen": " b", "rejected": " b"}] * 3)
    result = coordinator.ctl("submit", workspace.job(), "--follow").expect(100)
    assert "no pair is left of 3 rows" in result.stdout + result.stderr, result
