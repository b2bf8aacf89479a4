#!/usr/bin/env python3
"""Trains the same rows with live TRL (CPOTrainer, loss_type simpo) and with simpo-worker, and compares.

    compare_trl.py --worker build/bin/simpo-worker --tokenizers FOLDER

Compared, with a tokenizer of our own: the token ids of every pair; loss, rewards, log-probabilities, gradient norm and
rate of each of 20 steps, on one rank and on two; what transformers makes of the exported model: its weights, its
metrics on held-out rows against the trainer's own evaluation, and its logits against those of the model that TRL
trained. An export of an untrained model must be the original. On real tokenizers (see compare_tokens.py), with small
models of their families and the rows of compare_princeton.py: the token ids, and the same figures of each of 20 steps.
The closing line gives the largest differences; any miss is an error.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import safetensors.torch
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.experimental.cpo import CPOConfig, CPOTrainer

import reference
import text

STEPS = reference.REAL_TRAINING.steps
TOLERANCE = 1e-4
# Keys that both read: the job file below is in TRL's own words. TRL takes the SFT term's mean within each micro-batch,
# so the run that has one accumulates nothing.
RUNS = {
    "simpo": dict(
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=2.0,
        simpo_gamma=1.0,
        label_smoothing=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
    ),
    "everything": dict(
        loss_type="simpo",
        cpo_alpha=0.2,
        beta=2.5,
        simpo_gamma=1.375,
        label_smoothing=0.1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        lr_scheduler_type="linear",
    ),
}
COMMON = dict(
    learning_rate=1e-3,
    max_grad_norm=1.0,
    max_length=160,
    max_steps=STEPS,
    weight_decay=0.0,
    warmup_steps=2,
    logging_steps=1,
    seed=0,
)
# On real tokenizers.
REAL_KEYS = dict(
    RUNS["everything"],
    per_device_train_batch_size=reference.REAL_TRAINING.global_batch,
    learning_rate=reference.REAL_TRAINING.learning_rate,
    max_length=reference.REAL_MAX_LENGTH,
)
METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

problems = []
figures = {}  # the largest differences of all runs, for the closing line
real_figures = {}  # the same by real tokenizer


def note(name, value):
    figures[name] = max(figures.get(name, 0.0), value)


def expect(condition, message):
    if not condition:
        problems.append(message)
        print(f"parity: {message}", file=sys.stderr)


def make_model(folder):
    text.make_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=text.VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=378,
        eos_token_id=382,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)


class InOrder(CPOTrainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def run_trl(folder, rows, keys, output):
    """The steps, the tokens of the pairs that were trained on, and the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = CPOConfig(
        output_dir=output,
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **{**COMMON, **keys},
    )
    trainer = InOrder(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    pairs = text.pairs_of_trl(trainer.train_dataset)
    # TRL would divide by the length of a response that max_length has left nothing of.
    kept = [i for i, pair in enumerate(pairs) if text.is_trainable(pair)]
    trainer.train_dataset = trainer.train_dataset.select(kept)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    return steps, [pairs[i] for i in kept], trainer.model


def run_worker(worker, ranks, folder, data, keys, output, **more):
    job = {
        "model_name_or_path": folder,
        "dataset_mixer": {data: 1.0},
        "shuffle": False,
        "torch_dtype": "float32",
        "output_dir": output,
        "recovery_minutes": 0,
        **COMMON,
        **keys,
        **more,
    }
    # The same global batch on more ranks.
    job["global_batch_size"] = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    job.pop("gradient_accumulation_steps")
    path = output + ".job.yaml"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(job, file)  # JSON is YAML
    command = [worker, "--job", path]
    if ranks > 1:
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)] + command
    else:
        command += ["--dump-tokens", output + ".tokens.jsonl"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "SIMPO_CACHE_DIR": os.path.join(os.path.dirname(output), "token-cache"),
    }
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    if result.returncode != 0:
        raise SystemExit(f"parity: {' '.join(command)} ended with {result.returncode}:\n{result.stdout[-4000:]}")
    return read_lines(os.path.join(output, "metrics.jsonl"))


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def last_evaluation(output):
    last = read_lines(os.path.join(output, "eval_metrics.jsonl"))[-1]
    return {key.removeprefix("eval_"): value for key, value in last.items()}


def compare_steps(name, ours, theirs):
    """Largest difference of any metric of any step, in units of max(1, |theirs|)."""
    expect(len(ours) == len(theirs) == STEPS, f"{name}: {len(ours)} steps against {len(theirs)}")
    for a, b in zip(ours, theirs):
        for key, difference in reference.largest_differences([a], [b], METRICS).items():
            expect(difference <= TOLERANCE, f"{name}, step {a['step']}: {key} is {a[key]}, TRL's {b[key]}")
    return reference.largest_differences(ours, theirs, METRICS)


def compare_runs(worker, folder, work, name, keys):
    rows = text.conversations(21, STEPS * keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"])
    data = os.path.join(work, f"{name}.jsonl")
    held_out = os.path.join(work, f"{name}.held-out.jsonl")
    text.write_jsonl(data, rows)
    text.write_jsonl(held_out, text.conversations(22, 12))
    theirs, tokens, model = run_trl(folder, rows, keys, os.path.join(work, "trl"))
    for ranks in (1, 2):
        output = os.path.join(work, f"{name}-{ranks}")
        ours = run_worker(worker, ranks, folder, data, keys, output, eval_dataset_mixer={held_out: 1.0})
        worst = compare_steps(f"{name} on {ranks} ranks", ours, theirs)
        note("loss", worst["loss"])
        note("any metric", max(worst.values()))
        fall = ours[0]["loss"] - ours[-1]["loss"]
        expect(fall >= 0.2, f"{name}: the loss falls by {fall} only; nothing is compared that was learned")
        print(
            f"{name}, {ranks} rank{'s' * (ranks > 1)}: loss {ours[0]['loss']:.4f} -> {ours[-1]['loss']:.4f}, "
            f"within {worst['loss']:.1e} of TRL "
            f"{trl.__version__} at each of {STEPS} steps (worst of all metrics {max(worst.values()):.1e})",
            flush=True,
        )
        if ranks == 1:
            mine = read_lines(output + ".tokens.jsonl")
            expect(mine == tokens, f"{name}: the token ids are not those that TRL trains on")
            print(f"{name}: token ids of {len(tokens)} pairs are TRL's")
            check_export(name, output, folder, held_out, keys, model)


def compare_logits(ours, theirs, tokenizer, path):
    worst = 0.0
    for row in read_lines(path):
        for which in ("chosen", "rejected"):
            # As text: the way a user of the exported folder gets there.
            content = tokenizer.apply_chat_template(row["prompt"] + row[which], tokenize=False)
            ids = tokenizer(content, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                worst = max(worst, (ours(ids).logits - theirs(ids).logits).abs().max().item())
    return worst


def held_out_pairs(tokenizer, path):
    pairs = []
    for row in read_lines(path):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        pair = {}
        for which in ("chosen", "rejected"):
            full = tokenizer.apply_chat_template(row["prompt"] + row[which], tokenize=False)
            pair[which] = tokenizer(full, add_special_tokens=False).input_ids
            pair[f"{which}_prompt_length"] = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        pairs.append(pair)
    return pairs


def load_exactly(folder):
    """The model as transformers loads it; every tensor of the files is used and none is made up."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    expect(
        not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"],
        f"{folder}: {report}",
    )
    stored = safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))
    loaded = model.state_dict()
    for name, tensor in stored.items():
        expect(torch.equal(loaded[name], tensor), f"{folder}: transformers changed {name}")
    return model


def check_export(name, output, folder, held_out, keys, trl_model):
    final = os.path.join(output, "final")
    model = load_exactly(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    expect(
        tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template,
        f"{final}: another chat template",
    )
    loss = reference.Loss(
        beta=keys["beta"],
        gamma_beta_ratio=keys["simpo_gamma"] / keys["beta"],
        label_smoothing=keys["label_smoothing"],
        sft_weight=keys["cpo_alpha"],
    )
    want = reference.evaluate(model, held_out_pairs(tokenizer, held_out), loss)
    worst = max(reference.largest_differences([last_evaluation(output)], [want], want).values())
    expect(worst <= 1e-5, f"{name}: the trainer's evaluation is {worst:.1e} from transformers' on the exported model")
    logits = compare_logits(model, trl_model.eval(), tokenizer, held_out)
    expect(logits <= TOLERANCE, f"{name}: logits of the exported model are {logits:.1e} from those of TRL's model")
    note("evaluation of the export", worst)
    note("its logits", logits)
    print(
        f"{name}: exported model in transformers {transformers.__version__}: "
        f"evaluation within {worst:.1e} of the trainer's own, "
        f"logits within {logits:.1e} of TRL's model"
    )


def compare_real(worker, packages, work, name):
    folder = os.path.join(work, name)
    reference.make_real_model(packages, name, folder)
    rows = reference.real_rows()
    data, output = os.path.join(work, f"{name}.jsonl"), os.path.join(work, f"{name}-out")
    text.write_jsonl(data, rows)
    theirs, tokens, _ = run_trl(folder, rows, REAL_KEYS, os.path.join(work, "trl"))
    ours = run_worker(worker, 1, folder, data, REAL_KEYS, output)
    expect(read_lines(output + ".tokens.jsonl") == tokens, f"{name}: the token ids are not those that TRL trains on")
    largest = max(compare_steps(name, ours, theirs).values())
    fall = reference.loss_fall(theirs)
    expect(fall > 0.1, f"{name}: the loss fell by {fall} only; nothing is compared that was learned")
    expect(50 <= len(tokens) < len(rows), f"{name}: {len(tokens)} of {len(rows)} pairs are left")
    real_figures[name] = largest
    print(
        f"{name}: {STEPS} steps within {largest:.1e} of TRL {trl.__version__}, "
        f"token ids of {len(tokens)} pairs are TRL's, the loss fell by {fall:.2f}",
        flush=True,
    )


def check_untrained(worker, folder, work):
    """One step at rate 0 (the first of a warm-up) changes nothing, so the export is the original."""
    data = os.path.join(work, "simpo.jsonl")
    for dtype in ("float32", "bfloat16"):
        output = os.path.join(work, f"untrained-{dtype}")
        run_worker(worker, 1, folder, data, RUNS["simpo"], output, max_steps=1, warmup_steps=1, torch_dtype=dtype)
        load_exactly(os.path.join(output, "final"))
        original = safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))
        exported = safetensors.torch.load_file(os.path.join(output, "final", "model.safetensors"))
        expect(exported.keys() == original.keys(), f"untrained {dtype}: other tensors than the original")
        same = all(torch.equal(exported[n], t.to(getattr(torch, dtype))) for n, t in original.items())
        expect(same, f"untrained {dtype}: the export is not the original model")
    print("untrained model: exported as it was, fp32 and bf16")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--tokenizers", required=True)
    arguments = parser.parse_args()
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    worker = os.path.abspath(arguments.worker)
    with tempfile.TemporaryDirectory() as work:
        folder = os.path.join(work, "model")
        make_model(folder)
        for name, keys in RUNS.items():
            compare_runs(worker, folder, work, name, keys)
        check_untrained(worker, folder, work)
        for name in reference.REAL_FAMILIES:
            compare_real(worker, arguments.tokenizers, work, name)
    print(
        f"TRL {trl.__version__} and transformers {transformers.__version__}, {STEPS} steps: "
        f"{len(RUNS)} jobs on 1 and 2 ranks, largest differences: "
        + ", ".join(f"{name} {value:.1e}" for name, value in figures.items())
        + f"; {len(real_figures)} real tokenizers, of any metric: "
        + ", ".join(f"{value:.1e} ({name})" for name, value in real_figures.items())
        + f"; {len(problems)} out of bounds"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
