#!/usr/bin/env python3
"""Trains the same rows by the paper's rules, written anew over transformers, and with `compat: princeton`, and compares.

    compare_princeton.py --worker build/bin/simpo-worker --tokenizers FOLDER

Real tokenizers (see compare_tokens.py), small models of their families: 20 steps of the paper's loss over the paper's
tokens (text.py, reference.py: generation header scored, joint truncation, no clipping) against the worker's metrics,
each step, each metric within 1e-4. The closing line gives the figures; any miss is an error.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile

import compare_tokens  # sets the environment of transformers

import torch
import transformers

import reference
import text

MAX_PROMPT_LENGTH = 60
TOLERANCE = 1e-4
LOSS = reference.Loss(beta=2.5, gamma_beta_ratio=0.55)
TRAINING = dataclasses.replace(reference.REAL_TRAINING, max_grad_norm=math.inf)


def reference_steps(folder, tokenizer, rows, name):
    template = compare_tokens.FAMILIES[name]["princeton"] or tokenizer.chat_template
    render, knows_system = text.princeton_renderer(tokenizer, template)
    pairs = [
        text.princeton_tokens(
            tokenizer, row, render, knows_system, reference.REAL_MAX_LENGTH, MAX_PROMPT_LENGTH, "keep_end"
        )
        for row in rows
    ]
    pairs = [pair for pair in pairs if text.is_trainable(pair)]
    return reference.train(reference.load_model(folder, torch.float32), pairs, LOSS, TRAINING)


def worker_steps(worker, folder, rows, name, work):
    data = os.path.join(work, f"{name}.jsonl")
    text.write_jsonl(data, rows)
    tokens, output = compare_tokens.run_worker(
        worker, folder, data, work, compat="princeton", max_length=reference.REAL_MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH, max_steps=TRAINING.steps, warmup_steps=None,
        warmup_ratio=TRAINING.warmup_ratio, global_batch_size=TRAINING.global_batch, beta=LOSS.beta,
        gamma_beta_ratio=LOSS.gamma_beta_ratio, learning_rate=TRAINING.learning_rate,
    )  # fmt: skip
    assert tokens is not None, output[-3000:]
    with open(os.path.join(work, "out", "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare_family(worker, packages, name, work):
    """The largest difference of any metric of any step."""
    folder = os.path.join(work, name)
    tokenizer = reference.make_real_model(packages, name, folder)
    rows = reference.real_rows()
    theirs = reference_steps(folder, tokenizer, rows, name)
    ours = worker_steps(worker, folder, rows, name, work)
    assert len(ours) == len(theirs) == TRAINING.steps
    fall = reference.loss_fall(theirs)
    assert fall > 0.1, f"{name}: the loss fell by {fall} only; nothing is compared"
    keys = theirs[0].keys() - {"smallest_margin"}
    largest = max(reference.largest_differences(ours, theirs, keys).values())
    print(
        f"{name}: {TRAINING.steps} steps within {largest:.1e} of the paper's rules, the loss fell by {fall:.2f}",
        flush=True,
    )
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--tokenizers", required=True)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    worker = os.path.abspath(arguments.worker)
    with tempfile.TemporaryDirectory() as work:
        worst = {name: compare_family(worker, arguments.tokenizers, name, work) for name in reference.REAL_FAMILIES}
    print(
        f"the paper's rules on {len(worst)} real tokenizers, {TRAINING.steps} steps: largest difference of any metric "
        + ", ".join(f"{value:.1e} ({name})" for name, value in worst.items())
    )
    return 0 if max(worst.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
