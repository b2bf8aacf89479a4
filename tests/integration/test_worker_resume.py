"""The worker alone: stop, checkpoint, resume, export."""

import json
import shutil
import signal
import sys

import numpy as np

import preference_data
import programs
import tiny_model
from test_worker_training import values_of

STOPPED = 143


def final_weights(workspace, name):
    return tiny_model.read_model(workspace.output(name) / "final")


def assert_same_run(workspace, name, reference):
    """Metrics but for times, evaluations and exported weights, bit for bit."""
    lines = [values_of(line) for line in workspace.metrics(name)]
    assert lines == [values_of(line) for line in workspace.metrics(reference)]
    assert [values_of(line) for line in workspace.eval_metrics(name)] == \
           [values_of(line) for line in workspace.eval_metrics(reference)]
    ours, theirs = final_weights(workspace, name), final_weights(workspace, reference)
    assert set(ours) == set(theirs)
    for tensor, values in theirs.items():
        assert np.array_equal(ours[tensor], values), tensor


def make_long_run(workspace):
    """Data and job changes of a run that takes some seconds, with evaluations."""
    workspace.make(hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    data = workspace.folder / "data"
    preference_data.write_jsonl(data / "train.jsonl", preference_data.text_rows(100, seed=3, words=8))
    preference_data.write_jsonl(data / "test.jsonl", preference_data.text_rows(10, seed=4, words=8))
    return {"dataset_mixer": {str(data): 1.0}, "global_batch_size": 16, "num_train_epochs": 6, "learning_rate": 1e-3,
            "eval_strategy": "steps", "eval_steps": 15}


def stop_after(workspace, run, name, step):
    """SIGUSR1 to mpirun once `step` is written; returns the run's result."""
    programs.wait_for(f"step {step} of {name}",
                      lambda: len(workspace.metrics(name)) >= step or run.process.poll() is not None)
    run.signal(signal.SIGUSR1)
    return run.finish()


def ranks_of(run):
    return [pid for pid in programs.children_of(run.process.pid) if programs.is_rank(pid)]


def test_stop_and_resume_is_bit_identical(workspace):
    changes = make_long_run(workspace)
    workspace.run_worker(workspace.job("whole", **changes), 2).expect(0)
    job = workspace.job("halved", **changes)
    # Twice: the second stop is of a run that was resumed itself.
    stops = []
    for resumed, step in ((False, 5), (True, 17)):
        args = ["--set", "resume_from_checkpoint=true"] if resumed else []
        result = stop_after(workspace, workspace.start_worker(job, 2, args), "halved", step)
        result.expect(STOPPED)
        stops.append(workspace.metrics("halved")[-1]["step"])
        checkpoints = [path.name for path in (workspace.output("halved") / "checkpoints").iterdir()]
        assert checkpoints == [f"step-{stops[-1]:06d}"], result
        assert f"stopped on request after step {stops[-1]}" in result.stderr
        assert not (workspace.output("halved") / "final").exists()
    assert stops[0] < stops[1] < 42
    result = workspace.run_worker(job, 2, ["--set", "resume_from_checkpoint=true"]).expect(0)
    assert [line["step"] for line in result.metrics()] == list(range(stops[1] + 1, 43))
    assert_same_run(workspace, "halved", "whole")
    # What was only there to go on from is gone.
    assert not list((workspace.output("halved") / "checkpoints").iterdir())


def test_saved_checkpoints_and_a_resume_from_one_of_them(workspace):
    workspace.make(rows=40)
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    workspace.run_worker(workspace.job("whole", save_total_limit=3, **changes), 2).expect(0)
    checkpoints = workspace.output("whole") / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000006", "step-000008", "step-000010"]
    assert json.loads((checkpoints / "step-000006" / "manifest.json").read_text())["step"] == 6
    # Into a folder of its own, from a checkpoint of another run: the same steps follow.
    job = workspace.job("branch", resume_from_checkpoint=str(checkpoints / "step-000006"), **changes)
    workspace.run_worker(job, 2).expect(0)
    whole = workspace.metrics("whole")
    assert [values_of(line) for line in workspace.metrics("branch")] == [values_of(line) for line in whole[6:]]
    # In place, from a step before the last: what came after it is made again.
    before = final_weights(workspace, "whole")
    args = ["--set", f"resume_from_checkpoint={checkpoints / 'step-000008'}"]
    workspace.run_worker(workspace.job("whole", save_total_limit=3, **changes), 2, args).expect(0)
    assert [values_of(line) for line in workspace.metrics("whole")] == [values_of(line) for line in whole]
    for weights in (final_weights(workspace, "branch"), final_weights(workspace, "whole")):
        assert all(np.array_equal(weights[name], values) for name, values in before.items())


def test_resume_on_another_number_of_ranks(workspace):
    workspace.make(rows=40)
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    workspace.run_worker(workspace.job("whole", **changes), 2).expect(0)
    checkpoint = workspace.output("whole") / "checkpoints" / "step-000004"
    workspace.run_worker(workspace.job("three", resume_from_checkpoint=str(checkpoint), **changes), 3).expect(0)
    for line, expected in zip(workspace.metrics("three"), workspace.metrics("whole")[4:], strict=True):
        for key, value in values_of(expected).items():
            assert abs(line[key] - value) <= 1e-5 * max(1, abs(value)), (line["step"], key)


def test_a_torn_checkpoint_is_passed_over(workspace):
    workspace.make(rows=40)
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    workspace.run_worker(workspace.job("whole", **changes), 2).expect(0)
    job = workspace.job("torn", **changes)
    workspace.run_worker(job, 2, ["--set", "max_steps=6"]).expect(0)
    checkpoints = workspace.output("torn") / "checkpoints"
    (checkpoints / "step-000006" / "manifest.json").unlink()
    (checkpoints / "step-000009.partial").mkdir()
    shutil.rmtree(workspace.output("torn") / "final")
    result = workspace.run_worker(job, 2, ["--set", "resume_from_checkpoint=true", "--set", "max_steps=10"]).expect(0)
    assert "step-000006" in result.stderr and "after step 4" in result.stderr, result
    # max_steps changes the schedule of the first six steps only in what was run with it.
    assert [line["step"] for line in workspace.metrics("torn")] == list(range(1, 11))
    assert not (checkpoints / "step-000009.partial").exists()


def test_the_final_model_is_whole_and_trains_again(workspace):
    before = workspace.make(rows=24, messages=True) and tiny_model.read_model(workspace.model)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}" \
               "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    workspace.run_worker(workspace.job("first", chat_template=template), 2).expect(0)
    final = workspace.output("first") / "final"
    assert sorted(path.name for path in final.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert (final / "chat_template.jinja").read_text() == template, "not the template that the model was trained with"
    assert (final / "tokenizer.json").read_bytes() == (workspace.model / "tokenizer.json").read_bytes()
    assert json.loads((final / "config.json").read_text()) == json.loads((workspace.model / "config.json").read_text())
    weights, dtypes = tiny_model.read_safetensors(final / "model.safetensors")
    assert dtypes == {"F32"}
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in before.items()}
    assert all(np.isfinite(w).all() and not np.array_equal(w, before[name]) for name, w in weights.items())
    # Nothing else is lost on the way: the next run begins where this one ended.
    result = workspace.run_worker(workspace.job("second", model_name_or_path=str(final)), 2).expect(0)
    assert "chat template: chat_template.jinja" in result.stderr
    first, second = workspace.metrics("first"), workspace.metrics("second")
    assert second[0]["rewards/margins"] > first[0]["rewards/margins"] + 0.1


# A process's peak memory counts that of the process which started it: a small one stands between.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def export(*args):
    """simpo-worker export, alone; its result and the most memory that it held, in bytes."""
    result = programs.run_program([sys.executable, "-c", MEASURE, programs.program("simpo-worker"), "export", *args])
    result.stderr, memory = result.stderr.rstrip().rpartition("\n")[::2]
    return result, int(memory)


def same_files(folder, other):
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    return all(path.read_bytes() == (other / path.name).read_bytes() for path in folder.iterdir())


def test_any_checkpoint_becomes_a_model_folder(workspace):
    workspace.make(rows=24)
    job = workspace.job(save_strategy="steps", save_steps=1, max_steps=3, torch_dtype="bfloat16")
    workspace.run_worker(job, 3).expect(0)
    last, first = (workspace.output() / "checkpoints" / name for name in ("step-000003", "step-000001"))
    shutil.move(workspace.model, workspace.folder / "moved")  # the checkpoint carries what an export needs
    result, _ = export("--checkpoint", last)
    assert result.expect(0).stdout == f"model: {last}-hf\n"
    assert same_files(last.with_name("step-000003-hf"), workspace.output() / "final")
    export("--checkpoint", f"{first}/", "--to", workspace.folder / "first")[0].expect(0)
    assert not same_files(workspace.folder / "first", workspace.output() / "final")
    # It trains on.
    again = workspace.job("again", model_name_or_path=str(workspace.folder / "first"), max_steps=1)
    workspace.run_worker(again, 1).expect(0)
    for args, code, message in [(["--checkpoint", last], 2, f"{last}-hf is there already"),
                                (["--checkpoint", workspace.folder / "none"], 3, "none/manifest.json"),
                                ([], 2, "--checkpoint is required")]:
        result, _ = export(*args)
        assert message in result.expect(code).stderr, result
    with open(last / "shard-00001-of-00003.safetensors", "r+b") as shard:
        shard.seek(5000)
        shard.write(bytes([shard.read(1)[0] ^ 1]))
    result, _ = export("--checkpoint", last, "--to", workspace.folder / "damaged")
    assert "shard-00001-of-00003.safetensors is damaged" in result.expect(3).stderr
    assert not (workspace.folder / "damaged").exists()


def test_an_export_needs_memory_for_one_bucket_only(workspace):
    sizes = {"small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
             "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}}
    memory = {}
    for name, size in sizes.items():
        workspace.model = workspace.folder / name
        workspace.make(rows=8, **size)
        job = workspace.job(name, max_steps=1, save_strategy="steps", save_steps=1, recovery_minutes=0)
        workspace.run_worker(job, 2).expect(0)
        result, memory[name] = export("--checkpoint", workspace.output(name) / "checkpoints" / "step-000001",
                                      "--to", workspace.folder / f"{name}-hf")
        result.expect(0)
    manifest = json.loads((workspace.output("large") / "checkpoints/step-000001/manifest.json").read_text())
    buckets = [4 * 2 * bucket["shard_numel"] for bucket in manifest["buckets"]]
    more = memory["large"] - memory["small"]
    print(f"export: {more / 1e6:.1f} MB more for a model of {sum(buckets) / 1e6:.1f} MB, "
          f"largest bucket {max(buckets) / 1e6:.1f} MB")
    assert sum(buckets) > 3.5 * max(buckets) and more < 1.2 * max(buckets)


def test_the_best_checkpoint_is_exported(workspace):
    changes = make_long_run(workspace)
    changes.update(num_train_epochs=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                   load_best_model_at_end=True, metric_for_best_model="rewards/margins", greater_is_better=False,
                   save_total_limit=2)
    result = workspace.run_worker(workspace.job("best", **changes), 2).expect(0)
    lines = workspace.eval_metrics("best")
    best = min(lines, key=lambda line: line["eval_rewards/margins"])["step"]
    checkpoints = workspace.output("best") / "checkpoints"
    assert best < 14 and sorted(path.name for path in checkpoints.iterdir()) == [f"step-{best:06d}", "step-000014"]
    assert f"the best checkpoint, after step {best}, eval_rewards/margins" in result.stderr, result
    export("--checkpoint", checkpoints / f"step-{best:06d}", "--to", workspace.folder / "hf")[0].expect(0)
    assert same_files(workspace.folder / "hf", workspace.output("best") / "final")


def test_bf16_export(workspace):
    workspace.make(rows=16)
    workspace.run_worker(workspace.job(torch_dtype="bfloat16", max_steps=2), 2).expect(0)
    final = workspace.output() / "final"
    _, dtypes = tiny_model.read_safetensors(final / "model.safetensors")
    assert dtypes == {"BF16"} and json.loads((final / "config.json").read_text())["torch_dtype"] == "bfloat16"
    workspace.run_worker(workspace.job("again", model_name_or_path=str(final), max_steps=1), 1).expect(0)


def test_a_stop_before_the_first_step_is_kept(workspace):
    changes = make_long_run(workspace)
    run = workspace.start_worker(workspace.job("early", **changes), 2)

    def both_listen():
        return sum(programs.catches(pid, signal.SIGUSR1) for pid in ranks_of(run)) == 2
    programs.wait_for("both ranks", lambda: both_listen() or run.process.poll() is not None)
    run.signal(signal.SIGUSR1)
    result = run.finish().expect(STOPPED)
    step = workspace.metrics("early")[-1]["step"]
    assert (workspace.output("early") / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists(), result
    assert step < 42


def test_a_killed_rank_ends_the_others(workspace):
    changes = make_long_run(workspace)
    run = workspace.start_worker(workspace.job("killed", **changes), 3)
    programs.wait_for("three steps", lambda: len(workspace.metrics("killed")) >= 3 or run.process.poll() is not None)
    started = programs.children_of(run.process.pid)
    programs.kill_all(ranks_of(run)[:1])
    result = run.finish(60)
    assert result.code not in (0, 2, 3, STOPPED), "a lost rank must not look like an end or a mistake of the user's"
    programs.wait_for("the end of all ranks", lambda: not [pid for pid in started if programs.is_running(pid)])
    assert not (workspace.output("killed") / "final").exists()
