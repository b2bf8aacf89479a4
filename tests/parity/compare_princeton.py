#!/usr/bin/env python3
"""Trains the same rows by the paper's rules, written anew over transformers, and with `compat: princeton`, and compares.

    compare_princeton.py --worker build/bin/simpo-worker --tokenizers FOLDER

Real tokenizers (see compare_tokens.py), models of our own making: 20 steps of the paper's loss over the paper's tokens
(text.py, reference.py: generation header scored, joint truncation, no clipping) against the worker's metrics, each step,
each metric within 1e-4. The closing line gives the figures; any miss is an error.
"""

import argparse
import json
import math
import os
import sys
import tempfile

import compare_tokens  # sets the environment of transformers

import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import reference
import text

STEPS, PAIRS, GLOBAL_BATCH = 20, 60, 4
MAX_LENGTH, MAX_PROMPT_LENGTH = 130, 60
TOLERANCE = 1e-4
LOSS = reference.Loss(beta=2.5, gamma_beta_ratio=0.55)
TRAINING = reference.Training(
    steps=STEPS, micro_batch=GLOBAL_BATCH, accumulation=1, learning_rate=2e-3, max_grad_norm=math.inf
)
# The paper's own Mistral template, a template with a system message, and a tokenizer without BOS.
FAMILIES = ("mistral_nemo", "llama3", "qwen2_5")


def make_model(packages, name, folder):
    compare_tokens.make_model(packages, name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def reference_steps(folder, tokenizer, rows, name):
    template = compare_tokens.FAMILIES[name]["princeton"] or tokenizer.chat_template
    render, knows_system = text.princeton_renderer(tokenizer, template)
    pairs = compare_tokens.trainable(
        [
            text.princeton_tokens(tokenizer, row, render, knows_system, MAX_LENGTH, MAX_PROMPT_LENGTH, "keep_end")
            for row in rows
        ]
    )
    return reference.train(reference.load_model(folder, torch.float32), pairs, LOSS, TRAINING)


def worker_steps(worker, folder, rows, name, work):
    data = os.path.join(work, f"{name}.jsonl")
    text.write_jsonl(data, rows)
    tokens, output = compare_tokens.run_worker(
        worker, folder, data, work, compat="princeton", max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH, max_steps=STEPS,
        warmup_steps=None, warmup_ratio=TRAINING.warmup_ratio, global_batch_size=GLOBAL_BATCH, beta=LOSS.beta,
        gamma_beta_ratio=LOSS.gamma_beta_ratio, learning_rate=TRAINING.learning_rate,
    )  # fmt: skip
    assert tokens is not None, output[-3000:]
    with open(os.path.join(work, "out", "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare_family(worker, packages, name, work):
    """The largest difference of any metric of any step."""
    folder = os.path.join(work, name)
    tokenizer = make_model(packages, name, folder)
    rows = text.awkward_conversations(43, PAIRS, True)
    theirs = reference_steps(folder, tokenizer, rows, name)
    ours = worker_steps(worker, folder, rows, name, work)
    assert len(ours) == len(theirs) == STEPS
    learned = theirs[0]["loss"] - min(step["loss"] for step in theirs)
    assert learned > 0.1, f"{name}: the loss fell by {learned} only; nothing is compared"
    largest = 0.0
    for mine, want in zip(ours, theirs):
        for key, value in want.items():
            if key == "smallest_margin":
                continue
            largest = max(largest, abs(mine[key] - value) / max(1.0, abs(value)))
    print(f"{name}: 20 steps within {largest:.1e} of the paper's rules, the loss fell by {learned:.2f}", flush=True)
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--tokenizers", required=True)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        worst = max(
            compare_family(os.path.abspath(arguments.worker), arguments.tokenizers, name, work) for name in FAMILIES
        )
    print(f"the paper's rules on {len(FAMILIES)} real tokenizers, 20 steps: largest difference of any metric {worst:.1e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
