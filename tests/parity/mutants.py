#!/usr/bin/python3
"""`make mutants`: breaks a copy of the trainer in one place at a time and shows that golden_test notices each.

    tests/parity/mutants.py [--only NAME]... [--work-dir DIR]

A mutant whose place in the sources is gone is an error: move it. Not part of `make test` (about ten minutes).
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# name -> (file, what is there, what stands there instead)
MUTANTS = {
    "bias correction one update ahead": (
        "worker/adamw.cc",
        "static_cast<double>(update), grad.options()",
        "static_cast<double>(update + 1), grad.options()",
    ),
    "no clipping": ("worker/adamw.cc", "std::min(1.0, max_norm / (norm + 1e-6))", "1.0"),
    "weight decay on biases and norms": (
        "worker/adamw.cc",
        "range.decay ? options.weight_decay : 0.0",
        "options.weight_decay",
    ),
    "sums instead of means over a response": (
        "worker/score_responses.cc",
        "const double chosen = sum[0] / tokens[0];",
        "const double chosen = sum[0];",
    ),
    "no 1/n in the gradient": (
        "worker/score_responses.cc",
        "-pair_loss.d_chosen / global_.pairs / tokens[1]",
        "-pair_loss.d_chosen / global_.pairs",
    ),
    "SFT term averaged by pair": (
        "worker/score_responses.cc",
        "loss_.sft_weight / global_.chosen_tokens",
        "loss_.sft_weight / tokens[0] / global_.pairs",
    ),
    "shifted label": (
        "worker/pack.cc",
        "{head_row_of[row - begin], tokens[t], which}",
        "{head_row_of[row - begin], tokens[t - 1], which}",
    ),
    "one token of the future": ("worker/model/attention.cc", "band.triu(reach + 1)", "band.triu(reach + 2)"),
    "a window of one token more": ("worker/model/attention.cc", "band.tril(-1)", "band.tril(-2)"),
    "no slope of attention's softcap": (
        "worker/model/attention.cc",
        "gscores.mul_(1 - scores.clamp_min(-config.softcap).div_(config.softcap).pow_(2));",
        "",
    ),
    "no slope of the head's softcap at the label": (
        "worker/score_responses.cc",
        "coefficients_[entry] * (1 - tanh * tanh)",
        "coefficients_[entry] * (1 - 0 * tanh)",
    ),
    "unscaled gradient of scaled embeddings": (
        "worker/model/decoder.cc",
        "scale == 1 ? grad_TH : grad_TH * scale",
        "scale > 0 ? grad_TH : grad_TH * scale",
    ),
    "angles of the short length": ("worker/model/rope.cc", "length > rope.SharedAnglesUpTo()", "false"),
    "no attention factor": (
        "worker/model/rope.cc",
        "const double factor = config.rope.attention_factor;",
        "const double factor = 1;",
    ),
    "gradient of the padding row": ("worker/model/decoder.cc", "config_.pad_token_id.value_or(-1)", "-1"),
    "schedule one update ahead": ("worker/train.cc", "schedule_.Rate(step)", "schedule_.Rate(step + 1)"),
}


def run(command, deadline_s, **options):
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=deadline_s, **options
    )


def copy_sources(target):
    """The files that git knows or would take, into `target`. What is the same there stays, so that a file which the last
    mutant has left behind is newer than what was built of it."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    for name in names.stdout.decode().split("\0"):
        original, copy = ROOT / name, target / name
        if name and original.is_file() and not (copy.is_file() and copy.read_bytes() == original.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(original, copy)


def build(source, target_dir):
    """Whether golden_test builds; its output is shown when it does not."""
    if not (target_dir / "build.ninja").exists():
        # The crate's dependencies, if they have been built here, need not be built again.
        if (ROOT / "build/cargo").is_dir():
            shutil.copytree(ROOT / "build/cargo", target_dir / "cargo", symlinks=True)
        configured = run(
            [
                "cmake",
                "-S",
                source,
                "-B",
                target_dir,
                "-G",
                "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                "-DSIMPO_CONTROL_PLANE=OFF",
            ],
            300,
        )
        if configured.returncode != 0:
            print(configured.stdout[-4000:], file=sys.stderr)
            return False
    built = run(["ninja", "-C", target_dir, f"-j{os.cpu_count()}", "golden_test"], 3600)
    if built.returncode != 0:
        print(built.stdout[-4000:], file=sys.stderr)
    return built.returncode == 0


def golden_test(target_dir):
    """The golden tests that failed; None when the program did not come to its end."""
    result = run([target_dir / "bin/golden_test"], 600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "test suites ran." not in result.stdout:
        print(result.stdout[-4000:], file=sys.stderr)
        return None
    return sorted(
        {
            line.split("]")[1].split(",")[0].split(" (")[0].strip()
            for line in result.stdout.splitlines()
            if line.startswith("[  FAILED  ]") and "/" in line
        }
    )


def patched(text, name, old, new):
    if text.count(old) != 1:
        sys.exit(
            f"mutants: '{name}' fits {text.count(old)} places instead of one: {old}; adapt tests/parity/mutants.py"
        )
    return text.replace(old, new)


def try_mutant(name, source, target_dir):
    """Whether the golden tests notice."""
    file, old, new = MUTANTS[name]
    path = source / file
    original = path.read_text(encoding="utf-8")
    path.write_text(patched(original, name, old, new), encoding="utf-8")
    try:
        if not build(source, target_dir):
            print(f"{name}: does not build", file=sys.stderr)
            return False
        failed = golden_test(target_dir)
    finally:
        path.write_text(original, encoding="utf-8")
    if not failed:
        print(f"{name}: NOT NOTICED" if failed is not None else f"{name}: the tests crashed", file=sys.stderr)
        return False
    print(f"{name}: noticed by {len(failed)} of the golden tests ({failed[0]} ...)", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(MUTANTS), help="this mutant; may be repeated")
    parser.add_argument("--work-dir", help="keep the copy and its build there, for a quicker next time")
    arguments = parser.parse_args()
    names = arguments.only or list(MUTANTS)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(arguments.work_dir or temporary)
        source, target_dir = work / "source", work / "build"
        copy_sources(source)
        for name in names:  # before the long build
            file, old, new = MUTANTS[name]
            patched((source / file).read_text(encoding="utf-8"), name, old, new)
        print("building golden_test from a copy of the sources; some minutes", flush=True)
        if not build(source, target_dir):
            sys.exit("mutants: the sources as they are do not build (above)")
        if golden_test(target_dir) != []:
            sys.exit("mutants: golden_test fails on the sources as they are; mend that first")
        missed = [name for name in names if not try_mutant(name, source, target_dir)]
    if missed:
        sys.exit(f"mutants: {len(missed)} of {len(names)} not noticed: {', '.join(missed)}")
    print(f"mutants: all {len(names)} noticed, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
