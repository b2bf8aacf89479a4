#!/usr/bin/env python3
"""check_versions.py REQUIREMENTS: every pinned package is installed in exactly this version."""

import importlib.metadata
import sys

wrong = []
with open(sys.argv[1], encoding="utf-8") as file:
    pins = [line.strip().split("==") for line in file if "==" in line]
for name, version in pins:
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = "not installed"
    if installed != version:
        wrong.append(f"{name} is {installed}, not {version}")
if wrong:
    sys.exit("parity: " + "; ".join(wrong) + "; deploy/install-deps.sh --with parity installs the pinned ones")
print("versions: " + ", ".join(f"{n} {v}" for n, v in pins if n in ("torch", "transformers", "tokenizers", "trl")))
