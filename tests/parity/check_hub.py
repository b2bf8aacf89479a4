"""The hub's cache is shared with Python: what the worker fetched, huggingface_hub and transformers read without a network,
and what huggingface_hub fetched, the worker takes. Against a server on this machine."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "integration"))

import preference_data  # noqa: E402
import tiny_model  # noqa: E402
from hub_server import Hub  # noqa: E402

MODEL, DATA = "org/tiny", "org/pairs"

# Runs in a process of its own: huggingface_hub reads the environment when it is imported.
READ = """
import json, sys
import huggingface_hub
folder = huggingface_hub.snapshot_download(sys.argv[1], local_files_only=True)
data = huggingface_hub.hf_hub_download(sys.argv[2], "train.jsonl", repo_type="dataset", local_files_only=True)
weights = huggingface_hub.try_to_load_from_cache(sys.argv[1], "model.safetensors")
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
scan = huggingface_hub.scan_cache_dir()
print(json.dumps({"folder": folder, "weights": weights, "rows": len(open(data).readlines()),
                  "parameters": model.num_parameters(), "repositories": sorted(repo.repo_id for repo in scan.repos),
                  "files": sum(repo.nb_files for repo in scan.repos), "warnings": [str(w) for w in scan.warnings]}))
"""
FETCH = """
import sys
import huggingface_hub
huggingface_hub.snapshot_download(sys.argv[1], allow_patterns=["*.json", "*.safetensors"])
huggingface_hub.snapshot_download(sys.argv[2], repo_type="dataset")
"""


def run(command, env):
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"check_hub: {' '.join(command[:3])} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True)
    worker = os.path.abspath(parser.parse_args().worker)
    with tempfile.TemporaryDirectory() as name, Hub() as hub:
        folder = pathlib.Path(name)
        weights = tiny_model.write_model(folder / "origin")
        files = {path.name: path.read_bytes() for path in (folder / "origin").iterdir()}
        commit = hub.add("model", MODEL, files)
        rows = preference_data.text_rows(10)
        hub.add("dataset", DATA, {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
        job = folder / "job.yaml"
        job.write_text(f"model_name_or_path: {MODEL}\ndataset_mixer: {{{DATA}: 1.0}}\noutput_dir: {folder}/out\n")

        def environment(cache, **more):
            inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
            return dict(inherited, HF_HOME=str(folder / cache), HF_ENDPOINT=hub.url(), NO_PROXY="127.0.0.1",
                        no_proxy="127.0.0.1", SIMPO_CACHE_DIR=str(folder / "tokens"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", **more)

        prepare = [worker, "prepare", "--job", str(job)]
        run(prepare, environment("ours"))
        read = json.loads(run([sys.executable, "-W", "ignore", "-c", READ, MODEL, DATA],
                              environment("ours", HF_HUB_OFFLINE="1")).splitlines()[-1])
        assert read["folder"].endswith(f"models--org--tiny/snapshots/{commit}"), read
        assert read["weights"] == f"{read['folder']}/model.safetensors", read
        assert read["rows"] == len(rows) and read["repositories"] == [DATA, MODEL], read
        assert read["parameters"] == sum(array.size for array in weights.values()), read
        assert read["warnings"] == [] and read["files"] == len(files) + 1, read

        run([sys.executable, "-W", "ignore", "-c", FETCH, MODEL, DATA], environment("theirs"))
        hub.exchanges.clear()
        run(prepare, environment("theirs", HF_HUB_OFFLINE="1"))
        assert hub.exchanges == []
        run(prepare, environment("theirs"))
        fetched = [path for path in hub.requested() if not path.startswith("api/")]
        assert fetched == [], f"fetched again: {fetched}"
    print("hub: huggingface_hub reads our cache, and we read its: same layout, nothing fetched twice")


if __name__ == "__main__":
    main()
