"""The worker alone: the same run whatever the ranks and the files, and what it writes."""

import json
import math

import pytest

import preference_data
import tiny_model

# Differ from run to run by nature.
TIMES = {"step_seconds", "tokens_per_second", "mfu", "eval_seconds", "time"}


def values_of(line):
    return {key: value for key, value in line.items() if key not in TIMES}


def assert_close(lines, reference, tolerance=1e-5):
    """Every metric of every step within tolerance * max(1, |reference|)."""
    assert [line["step"] for line in lines] == [line["step"] for line in reference]
    for line, expected in zip(lines, reference):
        assert set(line) == set(expected)
        for key, value in values_of(expected).items():
            assert abs(line[key] - value) <= tolerance * max(1, abs(value)), (line["step"], key, line[key], value)


def assert_optimizer_bytes(sizes, ranks, per_parameter):
    """1/N of the whole on each rank, but for padding."""
    parameters = sum(math.prod(shape) for shape in tiny_model.weight_shapes(tiny_model.config()).values())
    share = per_parameter * parameters / ranks
    assert len(sizes) == ranks and all(share <= size <= 1.02 * share + 4096 for size in sizes), (share, sizes)


def manifest_of(workspace, name):
    return json.loads((workspace.output(name) / "run_manifest.json").read_text())


def test_ranks_give_the_same_trajectory(workspace):
    # 34 pairs in batches of 8: the last batch of an epoch has 2 pairs, fewer than 4 ranks.
    workspace.make(rows=34)
    optimizer_bytes, runs = {}, {}
    for ranks in (1, 2, 4):
        name = f"ranks{ranks}"
        job = workspace.job(name, num_train_epochs=2, label_smoothing=0.1, sft_weight=0.1, save_strategy="no")
        result = workspace.run_worker(job, ranks).expect(0)
        runs[ranks] = workspace.metrics(name)
        assert result.metrics() == runs[ranks], "standard output and metrics.jsonl differ"
        manifest = manifest_of(workspace, name)
        assert manifest["world_size"] == ranks
        optimizer_bytes[ranks] = [rank["optimizer_bytes"] for rank in manifest["ranks"]]
        assert manifest["steps_planned"] == 10
    assert [line["step"] for line in runs[1]] == list(range(1, 11))
    assert runs[1][0]["loss"] - runs[1][-2]["loss"] > 0.2, "the model did not learn"
    assert_close(runs[2], runs[1])
    assert_close(runs[4], runs[1])
    for ranks, sizes in optimizer_bytes.items():
        assert_optimizer_bytes(sizes, ranks, per_parameter=8)


def test_metrics_obey_their_definitions(workspace):
    workspace.make(rows=16)
    job = workspace.job(beta=2.5, gamma_beta_ratio=0.4, max_steps=4, warmup_steps=2, save_strategy="no")
    workspace.run_worker(job, 2).expect(0)
    lines = workspace.metrics()
    assert len(lines) == 4
    for line in lines:
        assert math.isclose(line["rewards/margins"], line["rewards/chosen"] - line["rewards/rejected"], rel_tol=1e-9)
        assert math.isclose(line["rewards/chosen"], 2.5 * line["logps/chosen"], rel_tol=1e-9)
        assert math.isclose(line["rewards/rejected"], 2.5 * line["logps/rejected"], rel_tol=1e-9)
        assert line["clip_coefficient"] == pytest.approx(min(1, 1 / (line["grad_norm"] + 1e-6)), rel=1e-9)
        assert 0 <= line["rewards/accuracies"] <= 1
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 5e-3, 1e-2, 5e-3], abs=1e-12)
    assert lines[0]["num_input_tokens_seen"] < lines[1]["num_input_tokens_seen"]
    # At rate 0 nothing moves: the second epoch's first batch is made of pairs that were seen unchanged.
    assert lines[3]["epoch"] == 2


def test_model_files_of_every_kind_are_the_same_model(workspace):
    workspace.make(rows=16)
    kinds = {"one-fp32": ("F32", 1), "sharded-fp32": ("F32", 3), "one-bf16": ("BF16", 1), "sharded-fp16": ("F16", 2)}
    runs = {}
    for name, (dtype, files) in kinds.items():
        model = workspace.folder / name
        tiny_model.write_model(model, dtype=dtype, files=files)
        job = workspace.job(name, model_name_or_path=str(model), max_steps=3, save_strategy="no")
        workspace.run_worker(job, 1).expect(0)
        runs[name] = [values_of(line) for line in workspace.metrics(name)]
    for name in kinds:
        assert runs[name] == runs["one-fp32"], name


def test_bf16_compute_follows_fp32(workspace):
    workspace.make(rows=32)
    for dtype in ("float32", "bfloat16"):
        job = workspace.job(dtype, torch_dtype=dtype, num_train_epochs=3, save_strategy="no")
        workspace.run_worker(job, 2).expect(0)
        # Two moments in fp32, and the fp32 master where the weights are bf16.
        sizes = [rank["optimizer_bytes"] for rank in manifest_of(workspace, dtype)["ranks"]]
        assert_optimizer_bytes(sizes, 2, per_parameter=8 if dtype == "float32" else 12)
    full, half = workspace.metrics("float32"), workspace.metrics("bfloat16")
    assert full[0]["loss"] - full[-1]["loss"] > 0.2 and half[0]["loss"] - half[-1]["loss"] > 0.2
    assert full != half, "bfloat16 had no effect"
    for a, b in zip(half, full):
        assert abs(a["loss"] - b["loss"]) < 0.1 * max(1, abs(b["loss"])), a["step"]


def test_messages_and_evaluation(workspace):
    workspace.make(rows=16, messages=True)
    data = workspace.folder / "data"
    preference_data.write_jsonl(data / "train.jsonl", preference_data.message_rows(24, seed=1))
    preference_data.write_jsonl(data / "test.jsonl", preference_data.message_rows(9, seed=2))
    runs = {}
    for ranks in (1, 2):
        name = f"eval{ranks}"
        job = workspace.job(name, dataset_mixer={str(data): 1.0}, num_train_epochs=2, eval_on_start=True,
                            eval_strategy="steps", eval_steps=2, save_strategy="no")
        result = workspace.run_worker(job, ranks).expect(0)
        assert "chat template: tokenizer_config.json" in result.stderr
        runs[ranks] = workspace.eval_metrics(name)
    assert [line["step"] for line in runs[1]] == [0, 2, 4, 6]
    assert_close(runs[2], runs[1])
    first, last = runs[1][0], runs[1][-1]
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"] + 0.2
    assert last["eval_loss"] < first["eval_loss"]


def test_a_relative_path_starts_at_the_job_file(workspace):
    workspace.make(rows=8)
    job = workspace.job(model_name_or_path="./model", dataset_mixer={"train.jsonl": 1.0}, max_steps=1,
                        save_strategy="no")
    workspace.run_worker(job, 1).expect(0)
    assert len(workspace.metrics()) == 1


def test_set_wins_over_the_file(workspace):
    workspace.make(rows=8)
    job = workspace.job(max_steps=5, save_strategy="no")
    workspace.run_worker(job, 1, ["--set", "max_steps=2", "--set", "beta=3"]).expect(0)
    lines = workspace.metrics()
    assert len(lines) == 2
    assert math.isclose(lines[0]["rewards/chosen"], 3 * lines[0]["logps/chosen"], rel_tol=1e-9)


def test_how_a_batch_is_cut_does_not_change_the_result(workspace):
    workspace.make(rows=24)
    cuts = {
        "whole": {},
        "few-tokens": {"max_tokens_per_micro_batch": 100},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "global_batch_size": None},
        "recomputed": {"gradient_checkpointing": True},
        "unsharded": {"zero_stage": 0},
    }
    for name, changes in cuts.items():
        workspace.run_worker(workspace.job(name, num_train_epochs=2, save_strategy="no", **changes), 2).expect(0)
        assert_close(workspace.metrics(name), workspace.metrics("whole"))


def test_evaluation_and_checkpoints_by_epoch_and_fewer_lines(workspace):
    workspace.make(rows=8)
    data = workspace.folder / "data"
    preference_data.write_jsonl(data / "train.jsonl", preference_data.text_rows(20, seed=1))
    preference_data.write_jsonl(data / "test.jsonl", preference_data.text_rows(5, seed=2))
    job = workspace.job(dataset_mixer={str(data): 1.0}, num_train_epochs=3, eval_strategy="epoch",
                        save_strategy="epoch", save_total_limit=2, logging_steps=2)
    result = workspace.run_worker(job, 2).expect(0)
    assert [line["step"] for line in workspace.eval_metrics()] == [3, 6, 9]
    checkpoints = workspace.output() / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000006", "step-000009"]
    assert [line["step"] for line in workspace.metrics()] == list(range(1, 10))
    assert result.metrics() == workspace.metrics()[1::2]
