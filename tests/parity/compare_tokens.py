#!/usr/bin/env python3
"""Compares the token ids of awkward conversations with TRL's and with the paper's trainer's, on real tokenizers.

    compare_tokens.py --worker build/bin/simpo-worker --tokenizers FOLDER

FOLDER is where `npm ci` put the packages of tests/parity/tokenizers. Each family: some 500 pairs (system messages, many
turns, scripts, emoji, empty content, too long at either end) through live TRL's CPOTrainer against compat: trl, and
through the rules of the paper's trainer, as text.py writes them anew, against compat: princeton with both truncation
modes. Every id and every border between prompt and response must be equal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
import trl
from datasets import disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import text

PAIRS = 520
MAX_LENGTH, MAX_PROMPT_LENGTH = 260, 120

# Turns of a user and a model; the first form refuses what Gemma's own refuses, the second renders an answer alone, as
# the paper's trainer needs it.
GEMMA_TURNS = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + GEMMA_TURNS
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# package; the job's template for each compat, where the tokenizer's own is not used; whether there may be system messages.
# A folder with mistral in its name gets the paper's Mistral template.
FAMILIES = {
    "llama3": dict(trl=None, princeton=None, system=True),
    "llama2": dict(trl=LLAMA2, princeton=LLAMA2, system=True),
    "mistral_nemo": dict(trl=None, princeton="mistral", system=True),
    "qwen2_5": dict(trl=None, princeton=None, system=True),
    "gemma2": dict(trl=GEMMA, princeton=GEMMA_TURNS, system=False),
}

problems = []


def make_model(packages, name, folder):
    """The real tokenizer beside a model that is as small as its vocabulary allows."""
    text.copy_tokenizer(packages, name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return tokenizer, model


def run_worker(worker, folder, data, work, **keys):
    job = {
        "model_name_or_path": folder,
        "dataset_mixer": {data: 1.0},
        "shuffle": False,
        "max_length": MAX_LENGTH,
        "max_steps": 1,
        "warmup_steps": 0,
        "global_batch_size": 1,
        "torch_dtype": "float32",
        "save_strategy": "no",
        "do_eval": False,
        "output_dir": os.path.join(work, "out"),
        "overwrite_output_dir": True,
        "recovery_minutes": 0,
        **{key: value for key, value in keys.items() if value is not None},
    }
    path, dump = os.path.join(work, "job.yaml"), os.path.join(work, "tokens.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(job, file)  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SIMPO_CACHE_DIR": os.path.join(work, "cache")}
    result = subprocess.run(
        [worker, "--job", path, "--dump-tokens", dump],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    if result.returncode != 0:
        return None, result.stdout
    with open(dump, encoding="utf-8") as file:
        return [json.loads(line) for line in file], result.stdout


def trl_tokens(tokenizer, model, rows, template):
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return text.trl_pairs(tokenizer, model, rows, MAX_LENGTH)


def compare(what, ours, output, theirs):
    """The number of equal pairs."""
    if ours is None:
        problems.append(f"{what}: the worker failed:\n{output[-2000:]}")
        return 0
    theirs = [pair for pair in theirs if text.is_trainable(pair)]
    different = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    if len(ours) != len(theirs) or different:
        problems.append(f"{what}: {len(ours)} pairs against {len(theirs)}, {len(different)} differ: {different[:5]}")
        for i in different[:1]:
            problems.append(f"  ours   {ours[i]}\n  theirs {theirs[i]}")
    cut = sum(max(len(pair["chosen"]), len(pair["rejected"])) >= MAX_LENGTH for pair in theirs)
    if len(theirs) < 450 or cut < 10:
        problems.append(f"{what}: only {len(theirs)} pairs, {cut} of them at max_length; too little is compared")
    return len(theirs) - len(different)


def compare_family(worker, packages, name, family, work):
    # The paper's trainer looks for mistral in the whole path, so no other one may have it.
    folder = os.path.join(work, name)
    tokenizer, model = make_model(packages, name, folder)
    rows = text.awkward_conversations(41, PAIRS, family["system"])
    data = os.path.join(work, f"{name}.jsonl")
    text.write_jsonl(data, rows)

    # That trainer's rules first: TRL's template is set on the tokenizer for good.
    counts = []
    template = None if family["princeton"] == "mistral" else family["princeton"]
    render, knows_system = text.princeton_renderer(tokenizer, family["princeton"] or tokenizer.chat_template)
    limits = dict(max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH)
    for keep in ("keep_end", "keep_start"):
        ours, output = run_worker(
            worker, folder, data, work, compat="princeton", chat_template=template, truncation_mode=keep,
            max_prompt_length=MAX_PROMPT_LENGTH,
        )  # fmt: skip
        theirs = [text.princeton_tokens(tokenizer, row, render, knows_system, keep=keep, **limits) for row in rows]
        counts.append(compare(f"{name}, princeton, {keep}", ours, output, theirs))

    ours, output = run_worker(worker, folder, data, work, chat_template=family["trl"])
    counts.append(compare(f"{name}, TRL", ours, output, trl_tokens(tokenizer, model, rows, family["trl"])))
    bos = tokenizer.bos_token_id
    for pair in ours or []:
        for which in ("chosen", "rejected"):
            if bos is not None and (pair[which][0] != bos or pair[which][1] == bos):
                problems.append(f"{name}: BOS is not there exactly once: {pair[which][:4]}")
    if not family["system"]:
        check_refused_system(worker, folder, family, tokenizer, work)
    print(f"{name}: {counts[2]} pairs as TRL {trl.__version__}, {counts[0]} and {counts[1]} as the paper's trainer", flush=True)
    return counts


def check_refused_system(worker, folder, family, tokenizer, work):
    row = next(row for row in text.awkward_conversations(41, 1, True) if "prompt" in row)
    data = os.path.join(work, "system.jsonl")
    text.write_jsonl(data, [row])
    ours, output = run_worker(worker, folder, data, work, chat_template=family["trl"])
    if ours is not None or "system.jsonl:1: " not in output or "System role not supported" not in output:
        problems.append(f"{folder}: a refused system message gave {output[-500:]}")
    try:
        tokenizer.apply_chat_template(row["prompt"], chat_template=family["trl"], tokenize=False)
        problems.append("transformers rendered a system message that the template refuses")
    except Exception as error:
        assert "System role not supported" in str(error), error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--tokenizers", required=True)
    parser.add_argument("--only", choices=FAMILIES, action="append")
    arguments = parser.parse_args()
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts = []
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.only or FAMILIES:
            counts += compare_family(os.path.abspath(arguments.worker), arguments.tokenizers, name, FAMILIES[name], work)
    for problem in problems:
        print(f"parity: {problem}", file=sys.stderr)
    print(
        f"tokens of {len(counts) // 3} real tokenizers: {sum(counts[2::3])} pairs as TRL {trl.__version__}, "
        f"{sum(counts[0::3] + counts[1::3])} as the paper's trainer; {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
