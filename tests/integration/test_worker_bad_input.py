"""Mistakes in the job, the data or the model: one clear message with place and remedy, and nothing left behind."""

import json
import re
import shutil

import pytest

import preference_data
import programs
import tiny_model

BAD_JOB, BAD_INPUT = 2, 3


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def replace_row(workspace, number, text):
    """Line `number` of the training data becomes `text` (bytes)."""
    lines = workspace.train.read_bytes().split(b"\n")
    lines[number - 1] = text
    workspace.train.write_bytes(b"\n".join(lines))


def cut_file(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


# Each case: what is done to a good workspace (returns changes of the job), the exit code, and what
# the message must say ({folder} is the workspace).
def mistyped_key(workspace):
    return {"learning_rte": 1e-6}


def wrong_type(workspace):
    return {"max_steps": "many"}


def out_of_range(workspace):
    return {"label_smoothing": 0.7}


def refused_feature(workspace):
    return {"use_peft": True}


def no_model(workspace):
    return {"model_name_or_path": None}


def missing_model(workspace):
    return {"model_name_or_path": str(workspace.folder / "nowhere")}


def missing_data(workspace):
    return {"dataset_mixer": {str(workspace.folder / "nowhere.jsonl"): 1.0}}


def data_of_another_form(workspace):
    path = workspace.folder / "train.xlsx"
    path.write_text("prompt,chosen,rejected\n")
    return {"dataset_mixer": {str(path): 1.0}}


def parquet_cut_off(workspace):
    path = workspace.folder / "train.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    return {"dataset_mixer": {str(path): 1.0}}


def csv_with_a_quote_left_open(workspace):
    path = workspace.folder / "train.csv"
    path.write_text('prompt,chosen,rejected\n"a,b,c\n')
    return {"dataset_mixer": {str(path): 1.0}}


def row_without_chosen(workspace):
    replace_row(workspace, 3, b'{"prompt": "a", "rejected": "b"}')


def row_of_broken_utf8(workspace):
    replace_row(workspace, 5, b'{"prompt": "a", "chosen": "\xff\xfe", "rejected": "b"}')


def row_of_broken_json(workspace):
    replace_row(workspace, 7, b'{"prompt": "a", "chosen": ')


def three_bad_rows(workspace):
    replace_row(workspace, 2, b"[]")
    replace_row(workspace, 4, b'{"prompt": "a", "chosen": 1, "rejected": "b"}')
    replace_row(workspace, 9, b"\xff")


def empty_data(workspace):
    workspace.train.write_text("")


def only_useless_rows(workspace):
    preference_data.write_jsonl(workspace.train, [{"prompt": "a", "chosen": " b", "rejected": " b"}] * 3)


def template_that_refuses(workspace):
    rows = preference_data.message_rows(4)
    rows[1]["chosen"][0]["role"] = rows[1]["rejected"][0]["role"] = "narrator"
    preference_data.write_jsonl(workspace.train, rows)
    return {"chat_template": "{% for message in messages %}{% if message.role == 'narrator' %}"
                             "{{ raise_exception('no narrator here') }}{% endif %}{{ message.content }}{% endfor %}"}


def template_of_broken_syntax(workspace):
    preference_data.write_jsonl(workspace.train, preference_data.message_rows(4))
    return {"chat_template": "{% for message in messages %}{{ message.content }}"}


def missing_tokenizer(workspace):
    (workspace.model / "tokenizer.json").unlink()


def broken_tokenizer(workspace):
    cut_file(workspace.model / "tokenizer.json", 200)


def tokenizer_larger_than_the_model(workspace):
    shutil.rmtree(workspace.model)
    tiny_model.write_model(workspace.model, vocab_size=100, eos_token_id=99)
    (workspace.model / "generation_config.json").unlink()


def unknown_family(workspace):
    edit_json(workspace.model / "config.json", model_type="mamba")


def broken_config(workspace):
    cut_file(workspace.model / "config.json", 50)


def truncated_weights(workspace):
    path = workspace.model / "model.safetensors"
    cut_file(path, path.stat().st_size - 1000)


def missing_weights(workspace):
    (workspace.model / "model.safetensors").unlink()


def weights_that_are_a_folder(workspace):
    (workspace.model / "model.safetensors").unlink()
    (workspace.model / "model.safetensors").mkdir()


def unreadable_data(workspace):
    link = workspace.folder / "loop.jsonl"
    link.symlink_to(link)
    return {"dataset_mixer": {str(link): 1.0}}


def pickled_weights(workspace):
    (workspace.model / "model.safetensors").rename(workspace.model / "pytorch_model.bin")


def missing_tensor(workspace):
    weights, _ = tiny_model.read_safetensors(workspace.model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    tiny_model.write_safetensors(workspace.model / "model.safetensors", weights)


def weights_of_another_shape(workspace):
    edit_json(workspace.model / "config.json", intermediate_size=48)


def missing_shard(workspace):
    shutil.rmtree(workspace.model)
    tiny_model.write_model(workspace.model, files=2)
    (workspace.model / "model-00002-of-00002.safetensors").unlink()


def missing_checkpoint(workspace):
    return {"resume_from_checkpoint": str(workspace.folder / "checkpoints/step-000010")}


CASES = [
    (mistyped_key, BAD_JOB, r"job\.yaml:\d+: learning_rte: unknown key; did you mean learning_rate\?"),
    (wrong_type, BAD_JOB, r"job\.yaml:\d+: max_steps: must be a whole number.*'many'"),
    (out_of_range, BAD_JOB, r"job\.yaml:\d+: label_smoothing: must be 0 to below 0\.5, not 0\.7"),
    (refused_feature, BAD_JOB, r"job\.yaml:\d+: use_peft: adapters are not supported"),
    (no_model, BAD_JOB, r"job\.yaml: model_name_or_path: required"),
    (missing_model, BAD_INPUT, r"model_name_or_path: '{folder}/nowhere' is not a folder on .*Give the path"),
    (missing_data, BAD_INPUT, r"'{folder}/nowhere\.jsonl' is neither a file nor a folder on .*Give the path"),
    (data_of_another_form, BAD_INPUT, r"{folder}/train\.xlsx: data files are .*\.parquet.*convert it"),
    (parquet_cut_off, BAD_INPUT, r"{folder}/train\.parquet: not a whole Parquet file"),
    (csv_with_a_quote_left_open, BAD_INPUT, r"{folder}/train\.csv:2: the file ends within quotes"),
    (row_without_chosen, BAD_INPUT, r"{folder}/train\.jsonl:3: the row has no chosen"),
    (row_of_broken_utf8, BAD_INPUT, r"{folder}/train\.jsonl:5: the text is not UTF-8"),
    (row_of_broken_json, BAD_INPUT, r"{folder}/train\.jsonl:7: not valid JSON"),
    (three_bad_rows, BAD_INPUT,
     r"train\.jsonl:2: .*\n.*train\.jsonl:4: chosen must be.*\n.*train\.jsonl:9: .*not UTF-8"),
    (empty_data, BAD_INPUT, r"{folder}/train\.jsonl: no pair is left of 0 rows \(the file is empty\)"),
    (only_useless_rows, BAD_INPUT, r"{folder}/train\.jsonl: no pair is left of 3 rows \(identical responses: 3\)"),
    (template_that_refuses, BAD_INPUT, r"{folder}/train\.jsonl:2: line 1 of the chat template: no narrator here"),
    (template_of_broken_syntax, BAD_INPUT, r"chat template of the job file: line 1 of the chat template: "),
    (missing_tokenizer, BAD_INPUT, r"{folder}/model has no tokenizer\.json; make one"),
    (broken_tokenizer, BAD_INPUT, r"{folder}/model/tokenizer\.json: not a tokenizer: "),
    (tokenizer_larger_than_the_model, BAD_INPUT,
     r"token 258, but vocab_size in {folder}/model/config\.json is 100.*tokenizer_name_or_path"),
    (unknown_family, BAD_INPUT, r"{folder}/model/config\.json: model_type: 'mamba' is not supported; .* llama"),
    (broken_config, BAD_INPUT, r"{folder}/model/config\.json"),
    (truncated_weights, BAD_INPUT, r"{folder}/model/model\.safetensors"),
    (missing_weights, BAD_INPUT, r"{folder}/model.*safetensors"),
    (weights_that_are_a_folder, BAD_INPUT, r"{folder}/model/model\.safetensors is not a regular file"),
    (unreadable_data, BAD_INPUT, r"{folder}/loop\.jsonl"),
    (pickled_weights, BAD_INPUT, r"{folder}/model.*safetensors"),
    (missing_tensor, BAD_INPUT, r"{folder}/model.*model\.layers\.1\.mlp\.up_proj\.weight"),
    (weights_of_another_shape, BAD_INPUT, r"{folder}/model/model\.safetensors.*gate_proj.*\[64, 32\].*\[48, 32\]"),
    (missing_shard, BAD_INPUT, r"{folder}/model/model-00002-of-00002\.safetensors"),
    (missing_checkpoint, BAD_INPUT, r"{folder}/checkpoints/step-000010"),
]


def assert_one_message(result, code, pattern, folder):
    """One message of ours, from one rank, that says what `pattern` says; nothing of a crash."""
    result.expect(code)
    assert result.stderr.count("simpo-worker: ") == 1, f"not one message\n{result}"
    assert re.search(pattern.replace("{folder}", re.escape(str(folder))), result.stderr), f"{pattern}\n{result}"
    for word in ("terminate called", "what():", "Segmentation", "Traceback", "c10::", "core dumped"):
        assert word not in result.stderr, str(result)


@pytest.mark.parametrize("spoil, code, pattern", CASES, ids=[case[0].__name__ for case in CASES])
def test_bad_input(workspace, spoil, code, pattern):
    workspace.make(rows=12)
    job = workspace.job(**{"max_steps": 1, **(spoil(workspace) or {})})
    assert_one_message(workspace.run_worker(job, 2), code, pattern, workspace.folder)
    assert not workspace.output().exists(), sorted(workspace.output().rglob("*"))
    assert not list(workspace.cache.rglob("*.partial")) and not list(workspace.cache.rglob("*.tmp*"))


def test_every_violation_at_once_with_its_line(workspace):
    workspace.make(rows=4)
    job = workspace.job()
    lines = ["model_name_or_path: ./model", "dataset_mixer: {train.jsonl: 1.0}", "beta: -1", "epochs_of_joy: 3",
             "learning_rate: fast", "warmup_ratio: 2", "loss_type: ipo"]
    job.write_text("\n".join(lines) + "\n")
    result = workspace.run_worker(job, 2)
    found = re.findall(r"job\.yaml:(\d): (\w+): ", result.stderr)
    assert sorted(found) == [("3", "beta"), ("4", "epochs_of_joy"), ("5", "learning_rate"), ("6", "warmup_ratio"),
                                 ("7", "loss_type")], str(result)
    assert_one_message(result, BAD_JOB, "simpo-worker: ", workspace.folder)


@pytest.mark.parametrize("job", ["nowhere.yaml", "."])
def test_a_job_file_that_cannot_be_read(workspace, job):
    path = workspace.folder / job
    assert_one_message(workspace.run_worker(path, 2), BAD_JOB, str(path), workspace.folder)


def test_a_checkpoint_of_another_shape(workspace):
    workspace.make(rows=12)
    workspace.run_worker(workspace.job("first", max_steps=1, save_strategy="steps", save_steps=1), 2).expect(0)
    checkpoint = workspace.output("first") / "checkpoints" / "step-000001"
    other = workspace.folder / "other"
    tiny_model.write_model(other, intermediate_size=48)
    job = workspace.job(model_name_or_path=str(other), resume_from_checkpoint=str(checkpoint))
    pattern = (r"checkpoint {folder}/out-first/checkpoints/step-000001 is of another model: "
               r".*gate_proj.*\[48, 32\].*\[64, 32\]")
    assert_one_message(workspace.run_worker(job, 2), BAD_INPUT, pattern, workspace.folder)
    assert not workspace.output().exists()


def test_a_damaged_checkpoint(workspace):
    workspace.make(rows=12)
    workspace.run_worker(workspace.job("first", max_steps=1, save_strategy="steps", save_steps=1), 2).expect(0)
    checkpoint = workspace.output("first") / "checkpoints" / "step-000001"
    shard = sorted(checkpoint.glob("shard-*"))[1]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    job = workspace.job(resume_from_checkpoint=str(checkpoint))
    result = workspace.run_worker(job, 2)
    assert_one_message(result, BAD_INPUT, r"shard-00001-of-00002\.safetensors is damaged", workspace.folder)


def test_an_output_folder_of_another_run_is_kept(workspace):
    workspace.make(rows=12)
    job = workspace.job(max_steps=2)
    workspace.run_worker(job, 2).expect(0)
    before = {path: path.read_bytes() for path in workspace.output().rglob("*") if path.is_file()}
    pattern = (r"output_dir {folder}/out-job holds an earlier run.*resume_from_checkpoint=true"
               r".*overwrite_output_dir=true")
    assert_one_message(workspace.run_worker(job, 2), BAD_JOB, pattern, workspace.folder)
    # Even where it may be written over, a run that cannot begin has not touched it.
    replace_row(workspace, 3, b"{}")
    result = workspace.run_worker(job, 2, ["--set", "overwrite_output_dir=true"])
    assert_one_message(result, BAD_INPUT, r"train\.jsonl:3: ", workspace.folder)
    assert {path: path.read_bytes() for path in workspace.output().rglob("*") if path.is_file()} == before


def test_divergence_names_the_step(workspace):
    workspace.make(rows=24)
    job = workspace.job(learning_rate=1e12, lr_scheduler_type="constant", max_grad_norm=0)
    result = workspace.run_worker(job, 2)
    pattern = r"step \d+: loss .*the run has diverged.*Lower learning_rate"
    assert_one_message(result, BAD_INPUT, pattern, workspace.folder)
    failed = int(re.search(r"step (\d+): loss", result.stderr).group(1))
    assert [line["step"] for line in workspace.metrics()] == list(range(1, failed))
    assert not (workspace.output() / "final").exists()


def test_prepare_says_the_same_without_starting(workspace):
    workspace.make(rows=12)
    job = workspace.job()
    command = [programs.program("simpo-worker"), "prepare", "--job", job]
    environment = {"SIMPO_CACHE_DIR": str(workspace.cache)}
    good = programs.run_program(command, env=environment).expect(0)
    assert "12 rows, 12 pairs" in good.stderr
    replace_row(workspace, 3, b'{"prompt": "a", "rejected": "b"}')
    result = programs.run_program(command, env=environment)
    assert_one_message(result, BAD_INPUT, r"{folder}/train\.jsonl:3: the row has no chosen", workspace.folder)
    workspace.make_data(rows=12)
    truncated_weights(workspace)
    result = programs.run_program(command, env=environment)
    assert_one_message(result, BAD_INPUT, r"{folder}/model/model\.safetensors", workspace.folder)
    assert not workspace.output().exists()
