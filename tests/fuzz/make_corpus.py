#!/usr/bin/env python3
"""Writes seeds for the fuzzers into FOLDER: one folder for each target, from the goldens of the tests and the job
files of configs. The services have none: their mutator begins with a good sequence of calls.

    make_corpus.py FOLDER
"""

import json
import os
import shutil
import sys

GOLDENS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "goldens", "text")


def write(folder, target, name, content):
    path = os.path.join(folder, target)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, name), "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def write_job_files(folder):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for folder_of_files in ("configs", "configs/paper", "tests/simpoctl/testdata"):
        for name in os.listdir(os.path.join(root, folder_of_files)):
            if name.endswith(".yaml"):
                with open(os.path.join(root, folder_of_files, name), "rb") as file:
                    write(folder, "job_yaml", name, file.read())
    required = "model_name_or_path: m\ndataset_mixer: {d: 1.0}\n"
    write(folder, "job_yaml", "set", required + "--set beta=3\n--set resources.ranks_per_node=2")
    write(folder, "job_yaml", "list", "model_name_or_path: m\ndatasets: [{id: o/d, weight: 0.5, split: train}]\n")
    write(folder, "job_yaml", "mixture", "model_name_or_path: m\ndataset_mixture: {datasets: [{path: d}], seed: 1}\n")
    write(folder, "job_yaml", "cpo", required + "loss_type: simpo\nbeta: 2\nsimpo_gamma: 1\ncpo_alpha: 0\nbf16: true\n")
    write(folder, "job_yaml", "princeton", required + "gamma: 1\nwarmup_steps: 0.1\neval_steps: 5\nlora_r: 8\n")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    write_job_files(folder)
    with open(os.path.join(GOLDENS, "golden.json"), encoding="utf-8") as file:
        golden = json.load(file)
    rows = [item["row"] for item in golden["rows"]]
    rows += [
        '{"instruction": "Q", "chosen_response": "a", "rejected_response": "b", "chosen_rating": 5.0}',
        '{"chosen": "\\n\\nHuman: Q\\n\\nAssistant: a", "rejected": "\\n\\nHuman: Q\\n\\nAssistant: b"}',
        '{"system": "S", "question": "Q", "chosen": "a", "rejected": "b", "chosen-rating": "4"}',
    ]
    for i, row in enumerate(rows):
        write(folder, "rows", str(i), row)
        write(folder, "json", f"line{i}", row)
    write(folder, "json", "array", "[" + ",\n".join(rows[:3]) + "]")
    write(folder, "json", "container", '{"version": [1, {}], "data": [' + ",".join(rows[:3]) + "]}")
    write(folder, "csv", "plain", "prompt,chosen,rejected\r\nQ,a,b\r\n\"Q, \"\"2\"\"\nx\",a,\n")
    write(folder, "csv", "lists", 'chosen,rejected\n"[{""role"": ""user"", ""content"": ""Q""}]","[]"\n')
    for name, source in golden["templates"].items():
        write(folder, "chat_template", name, source)
    write(folder, "chat_template", "macro", "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}")
    os.makedirs(os.path.join(folder, "tokenizer"), exist_ok=True)
    shutil.copy(os.path.join(GOLDENS, "tokenizer.json"), os.path.join(folder, "tokenizer", "bpe"))
    for model in (
        {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
        {"type": "WordPiece", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
    ):
        write(folder, "tokenizer", model["type"], json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    os.makedirs(os.path.join(folder, "parquet"), exist_ok=True)
    for name in os.listdir(os.path.join(GOLDENS, "parquet")):
        if name.endswith(".parquet"):
            shutil.copy(os.path.join(GOLDENS, "parquet", name), os.path.join(folder, "parquet", name))


if __name__ == "__main__":
    main()
