#!/usr/bin/env python3
"""Makes tests/goldens/: tiny models of every family, batches, and the numbers that training them must give.

    make_goldens.py [--check] [--output-dir DIR]      run by the Python of `make parity`

Per model: config.json and model.safetensors as transformers writes them; golden.json with the pairs,
static losses and metrics of several loss variants (fp64 and fp32), 20-step trajectories (fp64) and the
trajectories of deliberate mistakes, which the tests must tell from the right ones (the families that are
not Llama: one trajectory of 5 steps); tensors.safetensors
with the fp64 gradients ("gradient/VARIANT/TENSOR") and summed weight updates
("update/TRAJECTORY/TENSOR"), stored as fp32.

--check makes them again in a temporary folder and compares with the committed ones: weights and token
ids exactly, numbers within 1e-6 (another processor rounds in another order).
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors
import safetensors.torch
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import reference
from reference import Loss, Training

GOLDENS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "goldens")
VOCABULARY, BOS, EOS = 128, 1, 2

COMMON = dict(
    vocab_size=VOCABULARY,
    num_hidden_layers=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=BOS,
    eos_token_id=EOS,
    use_cache=False,
)
CONFIGS = {
    # Grouped queries; the padding row (here EOS, which prompts contain) has no gradient as an input.
    "untied": LlamaConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=EOS,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # One key-value head, heads wider than hidden / heads, biases, and Llama 3.1's frequencies.
    "tied": LlamaConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
}
# The other families. Windows and original lengths are shorter than most sequences.
SMALL = dict(COMMON, hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILY_CONFIGS = {
    "mistral": MistralConfig(
        **SMALL, head_dim=10, sliding_window=9, rope_parameters=dict(ROPE, rope_type="linear", factor=2.0)
    ),
    "qwen2": Qwen2Config(
        **dict(SMALL, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64),
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "qwen3": Qwen3Config(
        **SMALL,
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=ROPE,
    ),
    "gemma": GemmaConfig(
        **dict(SMALL, num_attention_heads=3, num_key_value_heads=1), head_dim=14, pad_token_id=EOS, rope_parameters=ROPE
    ),
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=10,
        pad_token_id=0,
        query_pre_attn_scalar=7,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
        rope_parameters=ROPE,
    ),
    "phi3": Phi3Config(
        **dict(SMALL, hidden_size=32),
        pad_token_id=0,
        sliding_window=11,
        original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.5, 2.5, 4.0],
        },
    ),
    "olmo2": Olmo2Config(**SMALL, pad_token_id=0, rope_parameters=ROPE),
    # Llama again, with angles that depend on the length of a sequence.
    "dynamic": LlamaConfig(
        **dict(SMALL, max_position_embeddings=24),
        tie_word_embeddings=True,
        rope_parameters=dict(ROPE, rope_type="dynamic", factor=4.0),
    ),
}
CONFIGS.update(FAMILY_CONFIGS)
VARIANTS = {
    "sigmoid": Loss(),
    "hinge": Loss(loss_type="hinge"),
    "smoothing": Loss(label_smoothing=0.1),
    "sft": Loss(sft_weight=0.1),
    "everything": Loss(beta=2.5, gamma_beta_ratio=0.55, label_smoothing=0.2, sft_weight=0.3),
    "hinge_sft": Loss(loss_type="hinge", sft_weight=0.2),
    "beta_10": Loss(beta=10.0, gamma_beta_ratio=0.3),
}
GRADIENTS = ("everything", "hinge_sft")
TRAJECTORIES = {
    "untied": {
        "sigmoid_cosine": (Loss(), Training()),
        # Slower: in bf16 a pair near the hinge's corner has either its whole gradient or none.
        "hinge_cosine": (Loss(loss_type="hinge"), Training(learning_rate=2e-4)),
    },
    "tied": {
        "smoothing_sft_decay_cosine": (Loss(beta=2.5, label_smoothing=0.1, sft_weight=0.2), Training(weight_decay=0.3)),
        "hinge_sft_linear": (
            Loss(loss_type="hinge", sft_weight=0.1),
            Training(learning_rate=2e-4, lr_scheduler_type="linear"),
        ),
    },
}
for _name in FAMILY_CONFIGS:
    TRAJECTORIES[_name] = {"five_steps": (Loss(sft_weight=0.1), Training(steps=5))}
MUTANTS = ("bias_correction", "no_clipping", "no_length_mean", "shifted_label", "schedule_one_ahead")


def make_weights(config, seed):
    """Loud weights that bf16 holds exactly: a wrong mask, norm, angle or bias moves every number far."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    center = 0 if config.model_type.startswith("gemma") else 1  # Gemma scales by 1 + weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            value = center + 0.1 * noise if "norm" in name else 0.2 * noise
            p.copy_(value.to(torch.bfloat16).float())
    return model


def make_pairs(seed, count):
    """Token ids. Chosen responses lean to other tokens than rejected ones, so there is something to learn."""
    r = random.Random(seed)
    words = lambda low, high, n: [r.randrange(low, high) for _ in range(n)]
    pairs = []
    for i in range(count):
        prompt = [BOS] + words(3, VOCABULARY, r.randrange(2, 24))
        if i % 3 == 0:
            prompt[len(prompt) // 2] = EOS  # the end of an earlier turn
        shared = words(3, VOCABULARY, r.choice([0, 0, 1, 4]))  # responses that begin alike
        chosen = shared + words(3, 90, r.randrange(1, 20)) + [EOS]
        rejected = shared + words(40, VOCABULARY, r.randrange(1, 20)) + [EOS]
        lengths = [len(prompt), len(prompt)]
        if i == 1:
            rejected = chosen[:-1]  # one response begins the other (cut by a length limit)
        if i == 2:
            prompt, lengths = [BOS], [1, 1]
        if i == 3:
            chosen, rejected = [41], [97]  # a single scored token each
        if i == 4:
            lengths[1] -= 1  # a merge at the border: one scored token more
        pairs.append(
            {
                "chosen": prompt + chosen,
                "rejected": prompt + rejected,
                "chosen_prompt_length": lengths[0],
                "rejected_prompt_length": lengths[1],
            }
        )
    return pairs


def gradients(model):
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def static_numbers(path, pairs, dtype, tensors):
    model = reference.load_model(path, dtype)
    result = {}
    for name, loss in VARIANTS.items():
        model.zero_grad()
        sums = reference.Sums()
        reference.forward_backward(model, pairs, loss, len(pairs), reference.chosen_tokens(pairs), sums)
        grads = gradients(model)
        norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
        result[name] = {
            "loss": dataclasses.asdict(loss),
            "metrics": {**sums.metrics(loss), "grad_norm": norm},
            "smallest_margin": sums.smallest_margin,
        }
        if tensors is not None and name in GRADIENTS:
            tensors.update({f"gradient/{name}/{n}": g for n, g in grads.items()})
    return result


def trajectory(path, pairs, loss, training, dtype, mutant=""):
    model = reference.load_model(path, dtype)
    before = reference.evaluate(model, pairs, loss)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    log = reference.train(model, pairs, loss, training, mutant)
    after = reference.evaluate(model, pairs, loss)
    return log, before, after, {n: p.detach() - start[n] for n, p in model.named_parameters()}


def largest_difference(a, b, keys):
    return max(abs(x[k] - y[k]) / max(1.0, abs(y[k])) for x, y in zip(a, b) for k in keys)


def trajectory_numbers(path, name, pairs, loss, training, tensors):
    with reference.without_casts(torch.float64):
        log, before, after, update = trajectory(path, pairs, loss, training, torch.float64)
        plain = trajectory(path, pairs, loss, training, torch.float64, mutant="none")[0]
        mutants = {}
        for mutant in () if training.steps < 20 else MUTANTS + (("decay_on_norms",) if training.weight_decay else ()):
            steps = trajectory(path, pairs, loss, training, torch.float64, mutant)[0]
            mutants[mutant] = {k: [s[k] for s in steps] for k in ("loss", "grad_norm")}
    fp32 = trajectory(path, pairs, loss, training, torch.float32)[0]
    fall = before["loss"] - after["loss"]
    clipped = sum(step["grad_norm"] > training.max_grad_norm for step in log)
    assert largest_difference(plain, log, ("loss",)) < 1e-12, "the plain optimizer is not torch's"
    if training.steps >= 20:
        assert fall >= 0.2, f"{name}: the loss falls only from {before['loss']} to {after['loss']}"
        assert clipped > training.steps // 2, f"{name}: only {clipped} steps are clipped"
    tensors.update({f"update/{name}/{n}": u for n, u in update.items()})
    distances = {m: largest_difference([{"loss": x} for x in v["loss"]], log, ("loss",)) for m, v in mutants.items()}
    print(
        f"  {name}: loss {before['loss']:.4f} -> {after['loss']:.4f}, {clipped} steps clipped, fp32 - fp64 "
        f"{largest_difference(fp32, log, ('loss',)):.1e}; mutants {({m: f'{d:.1e}' for m, d in distances.items()})}",
        flush=True,
    )
    return {
        "loss": dataclasses.asdict(loss),
        "training": dataclasses.asdict(training),
        "steps": log,
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "fp32_steps": [{"loss": s["loss"], "grad_norm": s["grad_norm"]} for s in fp32],
        "mutants": mutants,
    }


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def make_model(folder, name, seed):
    print(name, flush=True)
    os.makedirs(folder, exist_ok=True)
    make_weights(CONFIGS[name], seed).save_pretrained(folder)
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        os.remove(os.path.join(folder, "generation_config.json"))
    pairs = make_pairs(seed, 22)  # 8 + 8 + 6: the last batch of an epoch is partial
    tensors = {}
    with reference.without_casts(torch.float64):
        static_fp64 = static_numbers(folder, pairs[:8], torch.float64, tensors)
    golden = {
        "what": "Numbers that training this model must give; made by tests/parity/make_goldens.py, never by hand.",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "sha256": {
            "model.safetensors": sha256(os.path.join(folder, "model.safetensors")),
            "reference.py": sha256(reference.__file__),
            "make_goldens.py": sha256(os.path.abspath(__file__)),
        },
        "seed": seed,
        "pairs": pairs,
        "static_pairs": 8,
        "static_fp64": static_fp64,
        "static_fp32": static_numbers(folder, pairs[:8], torch.float32, None),
        "trajectories": {
            n: trajectory_numbers(folder, n, pairs, loss, training, tensors)
            for n, (loss, training) in TRAJECTORIES[name].items()
        },
    }
    path = os.path.join(folder, "tensors.safetensors")
    safetensors.torch.save_file({n: t.float().contiguous() for n, t in tensors.items()}, path)
    for file in os.listdir(folder):
        os.chmod(os.path.join(folder, file), 0o644)
    golden["sha256"]["tensors.safetensors"] = sha256(path)
    with open(os.path.join(folder, "golden.json"), "w", encoding="utf-8") as file:
        file.write(to_text(golden))


def to_text(golden):
    """One line per pair, step and set of metrics, so that a change can be read in a diff."""

    def nested(value):
        items = value.values() if isinstance(value, dict) else value
        return any(isinstance(item, dict) for item in items)

    def lines(value, pad):
        if not isinstance(value, (dict, list)) or not nested(value):
            return json.dumps(value)
        if isinstance(value, list):
            return "[\n" + ",\n".join(pad + lines(v, pad + " ") for v in value) + "]"
        return "{\n" + ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, pad + ' ')}" for k, v in value.items()) + "}"

    return lines(golden, " ") + "\n"


def differences(made, committed, where=""):
    """Places where two goldens differ by more than rounding."""
    if isinstance(made, dict) and isinstance(committed, dict) and made.keys() == committed.keys():
        return [d for k in made for d in differences(made[k], committed[k], f"{where}/{k}")]
    if isinstance(made, list) and isinstance(committed, list) and len(made) == len(committed):
        return [d for i, (a, b) in enumerate(zip(made, committed)) for d in differences(a, b, f"{where}[{i}]")]
    if isinstance(made, float) and isinstance(committed, (int, float)):
        # fp32 runs differ between processors by rounding; fp64 ones by far less.
        tolerance = 1e-4 if "fp32" in where else 1e-6
        same = abs(made - committed) <= tolerance * max(1.0, abs(committed))
        return [] if same else [f"{where}: {made} is not the committed {committed}"]
    return [] if made == committed else [f"{where}: not as committed"]


def check(made_dir):
    """Compares freshly made goldens with the committed ones; returns the number of differences."""
    problems, worst = [], 0.0
    for name in CONFIGS:
        made, committed = os.path.join(made_dir, name), os.path.join(GOLDENS, name)
        read = lambda folder: json.load(open(os.path.join(folder, "golden.json"), encoding="utf-8"))
        a, b = read(made), read(committed)
        for golden in (a, b):
            golden["sha256"].pop("tensors.safetensors")  # rounding; compared below
            golden["versions"].pop("python")
        problems += differences(a, b, name)
        for file in ("config.json", "model.safetensors"):
            if sha256(os.path.join(made, file)) != sha256(os.path.join(committed, file)):
                problems.append(f"{name}/{file}: not as committed")
        x = safetensors.torch.load_file(os.path.join(made, "tensors.safetensors"))
        y = safetensors.torch.load_file(os.path.join(committed, "tensors.safetensors"))
        if x.keys() != y.keys():
            problems.append(f"{name}/tensors.safetensors: other tensors than committed")
            continue
        for key in y:
            distance = ((x[key] - y[key]).norm() / y[key].norm().clamp_min(1e-12)).item()
            worst = max(worst, distance)
            if distance > 1e-5:
                problems.append(f"{name}/{key}: differs from the committed by {distance:.1e} of its norm")
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    print(
        f"goldens: {len(CONFIGS)} models made again, {len(problems)} differences from the committed ones, "
        f"tensors within {worst:.1e} of their norm"
    )
    return len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed ones; write nothing")
    parser.add_argument("--output-dir", default=GOLDENS)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of sums does not depend on the machine's cores
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as temporary:
        output = temporary if arguments.check else arguments.output_dir
        for index, name in enumerate(CONFIGS):
            make_model(os.path.join(output, name), name, seed=1000 + index)
        return 1 if arguments.check and check(output) else 0


if __name__ == "__main__":
    sys.exit(main())
