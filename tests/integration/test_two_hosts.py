"""A gang over two hosts, two ranks each, started by one mpirun: the same run as on one host, over TCP."""

import json
import math
import pathlib

import programs
import tiny_model

STEPS = 6
TIMES = {"step_seconds", "tokens_per_second", "mfu"}


def run_on_two_hosts(workspace, job, ranks_per_host=2):
    folder = workspace.folder / "hosts"
    script = pathlib.Path(__file__).with_name("two_hosts.sh")
    mpirun = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-H", f"simpo-a:{ranks_per_host},simpo-b:{ranks_per_host}",
              "--mca", "plm_rsh_agent", folder / "agent", "--mca", "btl_tcp_if_include", "cable",
              "--mca", "oob_tcp_if_include", "cable", "-x", "SIMPO_CACHE_DIR",
              programs.program("simpo-worker"), "--job", job]
    result = programs.run_program([script, folder, *mpirun], env={
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "SIMPO_CACHE_DIR": str(workspace.cache)})
    result.expect(0)
    return int((folder / "bytes").read_text())


def test_two_hosts_give_the_same_trajectory_over_tcp(workspace):
    workspace.make(rows=24)
    # In fp32 a parameter's gather and its gradient are 4 bytes each.
    parameters = sum(math.prod(shape) for shape in tiny_model.weight_shapes(tiny_model.config()).values())
    for stage in (1, 3):
        one, two = f"one-host-{stage}", f"two-hosts-{stage}"
        options = {"max_steps": STEPS, "zero_stage": stage, "save_strategy": "no",
                   "max_tokens_per_micro_batch": 4096}
        workspace.run_worker(workspace.job(one, **options), ranks=4).expect(0)
        sent = run_on_two_hosts(workspace, workspace.job(two, **options,
                                                         resources={"ranks_per_node": 4, "threads_per_rank": 1}))
        manifest = json.loads((workspace.output(two) / "run_manifest.json").read_text())
        assert [rank["host"] for rank in manifest["ranks"]] == ["simpo-a", "simpo-a", "simpo-b", "simpo-b"]
        got, want = workspace.metrics(two), workspace.metrics(one)
        assert len(got) == len(want) == STEPS
        worst = 0
        for line, expected in zip(got, want):
            assert set(line) == set(expected)
            for key, value in expected.items():
                if key not in TIMES:
                    worst = max(worst, abs(line[key] - value) / max(1, abs(value)))
        # Half of every vector has to cross the cable at least once in each direction.
        least = STEPS * parameters * 4
        print(f"stage {stage}: {sent} bytes sent by the first host (at least {least}), largest deviation {worst:.1e}")
        assert worst <= 1e-5
        assert sent >= least
