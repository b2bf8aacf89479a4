"""How a worker is started without mpirun, and on which device: what it takes from its environment."""

import programs

BAD_JOB = 2


def run(workspace, job, **environment):
    env = dict(environment, SIMPO_CACHE_DIR=str(workspace.cache))
    return programs.run_program([programs.program("simpo-worker"), "--job", job], env=env)


def one_rank(device="cpu"):
    return {"ranks_per_node": 1, "threads_per_rank": 1, "device": device}


def test_one_rank_of_one_needs_no_mpi(workspace):
    workspace.make()
    plain = run(workspace, workspace.job("plain", resources=one_rank()))
    assert plain.code == 0, plain.stderr
    alone = run(workspace, workspace.job("alone", resources=one_rank()), RANK="0", WORLD_SIZE="1")
    assert alone.code == 0, alone.stderr
    losses = [[step["loss"] for step in workspace.metrics(name)] for name in ("plain", "alone")]
    assert losses[0] == losses[1] and losses[0]


def test_a_gang_on_cpus_without_mpirun_is_refused(workspace):
    workspace.make()
    result = run(workspace, workspace.job(resources=one_rank()), RANK="0", WORLD_SIZE="2")
    assert result.code == BAD_JOB
    assert "a gang of 2 ranks without mpirun" in result.stderr and "start them with mpirun" in result.stderr
    assert not workspace.output().exists()


def test_a_pod_without_the_size_of_its_gang_does_not_train_alone(workspace):
    workspace.make()
    result = run(workspace, workspace.job(resources=one_rank()), JOB_COMPLETION_INDEX="0")
    assert result.code == BAD_JOB
    assert "WORLD_SIZE is not set" in result.stderr
    assert not workspace.output().exists()


def test_a_worker_for_cpus_says_that_it_has_no_cuda(workspace):
    workspace.make()
    job = workspace.job(resources=one_rank("cuda"))
    for command in ([], ["prepare"]):
        result = programs.run_program([programs.program("simpo-worker"), *command, "--job", job],
                                      env={"SIMPO_CACHE_DIR": str(workspace.cache)})
        assert result.code == BAD_JOB
        assert "built for the CPU" in result.stderr and "resources.device: cpu" in result.stderr
        assert not workspace.output().exists()
