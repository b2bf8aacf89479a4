"""A real Prometheus server scrapes a real run: each scrape is one step, to the last digit."""

import math

import pytest

import programs
import servers
from test_service_jobs import make_slow

# PromQL selector beside {job="..."}, and the key of metrics.jsonl.
SERIES = {
    'simpo_job_reward_margin{%s,split="train"}': "rewards/margins",
    'simpo_job_logps{%s,split="train",response="chosen"}': "logps/chosen",
    'simpo_job_logps{%s,split="train",response="rejected"}': "logps/rejected",
    'simpo_job_reward{%s,split="train",response="chosen"}': "rewards/chosen",
    'simpo_job_reward{%s,split="train",response="rejected"}': "rewards/rejected",
    'simpo_job_reward_accuracy_ratio{%s,split="train"}': "rewards/accuracies",
    "simpo_job_loss{%s}": "loss",
    "simpo_job_grad_norm{%s}": "grad_norm",
    "simpo_job_learning_rate{%s}": "learning_rate",
    "simpo_job_epoch{%s}": "epoch",
    "simpo_job_tokens_total{%s}": "num_input_tokens_seen",
    "simpo_job_tokens_per_second{%s}": "tokens_per_second",
}


@pytest.fixture
def prometheus(coordinators, tmp_path):
    coordinator = coordinators.start()
    server = servers.Prometheus(tmp_path / "prometheus", coordinator.http)
    yield coordinator, server.ready()
    server.stop()


def samples(server, selector):
    """{scrape time: value} of the one series that the selector finds."""
    result = server.query(f"{selector}[1h]")
    assert len(result) == 1, (selector, result)
    return {time: float(value) for time, value in result[0]["values"]}


def test_what_prometheus_stores_is_the_run(workspace, prometheus):
    coordinator, server = prometheus
    programs.wait_for("the first scrape", lambda: server.query("up == 1"))
    make_slow(workspace)
    job = workspace.job(max_steps=30, global_batch_size=48, learning_rate=1e-3, name="scraped", save_strategy="no")
    job_id = coordinator.submit(job)
    coordinator.wait_state(job_id, "SUCCEEDED")
    own = f'job="{job_id}"'
    programs.wait_for("a scrape after the end",
                      lambda: server.query(f'simpo_job_state{{{own},state="SUCCEEDED"}} == 1'))

    lines = {line["step"]: line for line in workspace.metrics()}
    steps = {time: int(step) for time, step in samples(server, f"simpo_job_step{{{own}}}").items()}
    seen = sorted({step for step in steps.values() if step > 0})
    assert len(seen) >= 10, f"only {len(seen)} distinct steps were scraped: {seen}"
    compared = 0
    for selector, key in SERIES.items():
        values = samples(server, selector % own)
        missing = [step for time, step in steps.items() if step > 0 and time not in values]
        assert not missing, f"{selector} is absent from scrapes that show the steps {missing}"
        for time, step in steps.items():
            if step == 0:
                continue
            expected = lines[step][key]
            assert math.isclose(values[time], expected, rel_tol=1e-12), (selector, step, values[time], expected)
            compared += 1
    assert compared >= 10 * len(SERIES)

    # Answered to PromQL that calculates, at the time of each scrape.
    for time, step in list(steps.items())[-15:]:
        if step == 0:
            continue
        query = (f'simpo_job_reward{{{own},response="chosen",split="train"}} @ {time} - ignoring(response) '
                 f'simpo_job_reward{{{own},response="rejected",split="train"}} @ {time}')
        answer = server.query(query)
        assert math.isclose(float(answer[0]["value"][1]), lines[step]["rewards/margins"], rel_tol=1e-9)
    info = server.query(f"simpo_job_info{{{own}}}")
    assert info and info[0]["metric"]["name"] == "scraped"
    planned = samples(server, f"simpo_job_steps_planned{{{own}}}")
    assert max(planned.values()) == 30
    durations = server.query(f"simpo_job_step_duration_seconds_count{{{own}}}")
    assert float(durations[0]["value"][1]) == 30
    assert server.query("simpo_coordinator_build_info == 1") and server.query('simpo_coordinator_slots')


def test_the_exposition_is_what_prometheus_calls_well_formed(workspace, coordinators):
    coordinator = coordinators.start()
    workspace.make(rows=8)
    job_id = coordinator.submit(workspace.job(max_steps=2, name='quo"ted \\ name'))
    coordinator.wait_state(job_id, "SUCCEEDED")
    status, text = coordinator.page("/metrics")
    assert status == 200
    checked = programs.run_program(["promtool", "check", "metrics"], stdin=text)
    assert checked.code == 0, f"{checked}\n{text}"
    names = {name for name, _ in coordinator.exposition(job_id)}
    assert {"simpo_job_loss", "simpo_job_reward_margin", "simpo_job_step", "simpo_job_info"} <= names
