#!/usr/bin/env python3
"""Every model family from end to end: train with simpo-worker, load what it exports in transformers, compare.

    check_families.py --worker build/bin/simpo-worker

The models are those of tests/goldens with a text vocabulary. Compared: loss and gradient norm of each step with the
same steps in transformers and torch (reference.py); the exported model's names, shapes and configuration with the
original's; its metrics on held-out rows with the trainer's own evaluation; its logits with those of the model that
torch trained. Any miss is an error.
"""

import argparse
import copy
import json
import os
import sys
import tempfile

import compare_trl  # first: it says what this process may use
from compare_trl import expect, load_exactly, note, problems, read_lines

import safetensors.torch
import torch
import transformers

import make_goldens
import reference
import text

STEPS = 3  # the first at rate 0
KEYS = dict(
    loss_type="simpo",
    cpo_alpha=0.1,
    beta=2.0,
    simpo_gamma=1.0,
    label_smoothing=0.0,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    lr_scheduler_type="cosine",
)
LOSS = reference.Loss(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.1)
TRAINING = reference.Training(steps=STEPS, micro_batch=2, accumulation=2, learning_rate=1e-3, warmup_ratio=1 / STEPS)


def make_model(folder, name):
    text.make_tokenizer(folder)
    config = copy.deepcopy(make_goldens.CONFIGS[name])
    config.vocab_size = text.VOCABULARY
    config.bos_token_id, config.eos_token_id = 378, 382
    make_goldens.make_weights(config, seed=7).save_pretrained(folder)


def compare_folders(name, original, exported):
    read = lambda folder: safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))
    before, after = read(original), read(exported)
    shapes = lambda tensors: {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    expect(shapes(before) == shapes(after), f"{name}: the export has other tensors than the original")
    for key in before.keys() & after.keys():
        expect(not torch.equal(before[key], after[key]), f"{name}: {key} was not trained")
    config = lambda folder: json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
    expect(config(original) == config(exported), f"{name}: the export has another config.json than the original")


def largest_logit_difference(ours, theirs, pairs):
    ids, real, _ = reference.collate(pairs)
    with torch.no_grad():
        difference = reference.logits_of(ours, ids, real) - reference.logits_of(theirs, ids, real)
    return (difference * real[:, :, None]).abs().max().item()


def check(worker, work, name):
    folder, output = os.path.join(work, name), os.path.join(work, f"{name}-out")
    make_model(folder, name)
    data, held_out = os.path.join(work, "train.jsonl"), os.path.join(work, "held-out.jsonl")
    ours = compare_trl.run_worker(
        worker,
        1,
        folder,
        data,
        KEYS,
        output,
        eval_dataset_mixer={held_out: 1.0},
        max_steps=STEPS,
        warmup_steps=1,
    )
    pairs = read_lines(output + ".tokens.jsonl")
    model = reference.load_model(folder, torch.float32)
    theirs = reference.train(model, pairs, LOSS, TRAINING)
    steps = max(reference.largest_differences(ours, theirs, ("loss", "grad_norm")).values())
    expect(steps <= 1e-5, f"{name}: the steps are {steps:.1e} from those of transformers")

    final = os.path.join(output, "final")
    compare_folders(name, folder, final)
    exported = load_exactly(final)
    held_out_pairs = compare_trl.held_out_pairs(transformers.AutoTokenizer.from_pretrained(final), held_out)
    want = reference.evaluate(exported, held_out_pairs, LOSS)
    got = compare_trl.last_evaluation(output)
    evaluation = max(reference.largest_differences([got], [want], want).values())
    expect(evaluation <= 1e-5, f"{name}: the trainer's evaluation is {evaluation:.1e} from that of its export")
    logits = largest_logit_difference(exported, model.eval(), held_out_pairs)
    expect(logits <= 1e-4, f"{name}: the export's logits are {logits:.1e} from those of the model that torch trained")
    longest = max(len(pair[which]) for pair in pairs for which in ("chosen", "rejected"))
    note("steps", steps)
    note("evaluation of the export", evaluation)
    note("its logits", logits)
    print(
        f"{name}: {STEPS} steps of up to {longest} tokens within {steps:.1e} of transformers, evaluation of the export "
        f"within {evaluation:.1e} of the trainer's own, its logits within {logits:.1e}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        text.write_jsonl(os.path.join(work, "train.jsonl"), text.conversations(31, STEPS * TRAINING.global_batch))
        text.write_jsonl(os.path.join(work, "held-out.jsonl"), text.conversations(32, 6))
        for name in make_goldens.CONFIGS:
            check(os.path.abspath(arguments.worker), work, name)
    print(
        f"{len(make_goldens.CONFIGS)} models of 8 families trained, exported and loaded by transformers "
        f"{transformers.__version__}, largest differences: "
        + ", ".join(f"{name} {value:.1e}" for name, value in compare_trl.figures.items())
        + f"; {len(problems)} out of bounds"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
