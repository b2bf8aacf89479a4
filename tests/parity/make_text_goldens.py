#!/usr/bin/env python3
"""Makes tests/goldens/text/: a tokenizer, and what transformers and TRL make of texts with it.

    make_text_goldens.py [--check]                    run by the Python of `make parity`

golden.json holds the token ids of awkward texts, chat templates rendered by transformers, and rows of preference
data in every form with the token ids that TRL's CPOTrainer trains on; parquet/ holds the same rows in each of Parquet's
compressions, and in rows.jsonl what a reader must give of them. --check makes them again in a temporary folder
and compares every byte with the committed ones.
"""

import argparse
import filecmp
import json
import os
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pyarrow
import pyarrow.parquet
import transformers
import trl
from datasets import disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import text

GOLDENS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "goldens", "text")
MAX_LENGTH = 120

TEXTS = [
    "",
    " ",
    "a",
    "  two  blanks ",
    "\n",
    "line\n\nline\r\nend\n",
    "\t tab",
    "don't they'll I'M",
    "1234567 3.14 1,000",
    "naïve café Zoë",
    "日本語のテキスト",
    "Привет, мир",
    "\U0001f600\U0001f469\u200d\U0001f4bb",
    "a\u0301 combining",
    "\u00a0no-break\u2003wide",
    "<|begin_of_text|>",
    "x<|eot_id|>y",
    "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>",
    "<|unknown|>",
    "{{ not a template }}",
    "\\ \" ' ` $ % & / ( ) = ?",
    "a" * 40,
    "The river is well known, and it is easy to see why.",
    "\u200b zero width",
    "tab\there   ",
    "ﬁ ligature №",
]

user = lambda content: {"role": "user", "content": content}
assistant = lambda content: {"role": "assistant", "content": content}
system = lambda content: {"role": "system", "content": content}
CONVERSATIONS = [
    [user("Hello")],
    [user("  Hello \n"), assistant("Good day.")],
    [system("Be brief."), user("What is the moon?"), assistant("A rock.\nFar away."), user("How far?")],
    [user("/shout"), assistant("<think>hm</think>\n\nYes.")],
    [user('"quotes", <tags> & {braces} é \U0001f600')],
    [assistant("I begin."), user("So?")],
]


def row_forms():
    rows = text.conversations(11, 6)
    question, good, bad = next(text.words(12, 1))
    rows += [
        # The prompt inside both lists, over several turns.
        {
            "chosen": [system("Be kind."), user(question), assistant("Hm."), user("Go on."), assistant(good)],
            "rejected": [system("Be kind."), user(question), assistant("Hm."), user("Go on."), assistant(bad)],
        },
        # Plain texts, beside and inside; the border merges ("the" + "re").
        {"prompt": question, "chosen": " " + good, "rejected": " " + bad},
        {"prompt": "Say the", "chosen": "re is hope", "rejected": "y left"},
        {"chosen": question + " " + good, "rejected": question + " " + bad},
        # The texts bring BOS and EOS themselves: neither is doubled.
        {"prompt": "<|begin_of_text|>Q: 2 + 2?", "chosen": " 4<|eot_id|>", "rejected": " 5"},
        # White space at the ends, which this template trims; other scripts.
        {"prompt": [user(" spaces ")], "chosen": [assistant(" kept? \n")], "rejected": [assistant("no")]},
        {"prompt": [user("日本語で")], "chosen": [assistant("はい \U0001f600")], "rejected": [assistant("no")]},
        # Longer than max_length: the chosen one, both, and a prompt that leaves no room at all.
        {"prompt": [user(question)], "chosen": [assistant(good * 9)], "rejected": [assistant(bad)]},
        {"prompt": [user(question)], "chosen": [assistant(good * 9)], "rejected": [assistant((bad + " ") * 30)]},
        {"prompt": [user("word " * 200)], "chosen": [assistant(good)], "rejected": [assistant(bad)]},
    ]
    return rows


def trl_tokens(tokenizer, row):
    """The row through TRL's own trainer; None where it leaves a response without tokens."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    pair = text.trl_pairs(tokenizer, model, [row], MAX_LENGTH)[0]
    empty = any(pair[f"{which}_prompt_length"] == len(pair[which]) for which in ("chosen", "rejected"))
    return None if empty else pair


def render(tokenizer, template, messages, header):
    try:
        return {
            "text": tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=header
            )
        }
    except Exception as error:  # what the template raises, whatever Jinja makes of it
        return {"error": str(error)}


def princeton_rows(tokenizer):
    """Awkward rows by the rules of the paper's trainer, with each kind of template, cut at either end."""
    items = []
    # The template of instructions refuses an answer alone, as that trainer renders it.
    for template in ("headers", "chatml", "mistral"):
        source = template if template == "mistral" else text.TEMPLATES[template]
        render, knows_system = text.princeton_renderer(tokenizer, source)
        for keep in ("keep_end", "keep_start"):
            limits = dict(max_length=220, max_prompt_length=90)
            for row in text.awkward_conversations(31, 12):
                items.append(
                    {
                        "template": template,
                        "keep": keep,
                        "row": json.dumps(row, ensure_ascii=False),
                        "tokens": text.princeton_tokens(tokenizer, row, render, knows_system, keep=keep, **limits),
                    }
                )
    return items


PARQUET = ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]


def make_parquet(folder):
    """Columns that are read and such that are not, nulls, empty lists, several row groups, pages and encodings."""
    os.makedirs(folder, exist_ok=True)
    rows = []
    for i, (prompt, chosen, rejected) in enumerate(text.words(21, 90)):
        messages = lambda answer: [user(prompt)] * (i % 3) + [assistant(answer)]
        rows.append(
            {
                "source": f"set {i % 4}",
                "prompt": None if i % 7 == 0 else prompt,
                "chosen": [] if i % 11 == 0 else messages(chosen),
                "rejected": messages(rejected),
                "score_chosen": None if i % 5 == 0 else i / 4,
                "score_rejected": float(i % 2),
                "chosen_rating": i,
                "tags": [prompt] * (i % 2),
            }
        )
    message = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("source", pyarrow.string()),
            ("prompt", pyarrow.string()),
            ("chosen", pyarrow.list_(message)),
            ("rejected", pyarrow.list_(message)),
            ("score_chosen", pyarrow.float64()),
            pyarrow.field("score_rejected", pyarrow.float32(), nullable=False),
            ("chosen_rating", pyarrow.int64()),
            ("tags", pyarrow.list_(pyarrow.string())),
        ]
    )
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    for i, compression in enumerate(PARQUET):
        pyarrow.parquet.write_table(
            table,
            os.path.join(folder, f"{compression}.parquet"),
            compression=compression,
            row_group_size=37,
            data_page_size=400,
            use_dictionary=i % 2 == 0,
            data_page_version="2.0" if i % 3 == 1 else "1.0",
        )
    for row in rows:
        row.update(source=None, tags=None)
    text.write_jsonl(os.path.join(folder, "rows.jsonl"), rows)
    return [os.path.join("parquet", name) for name in ["rows.jsonl"] + [f"{c}.parquet" for c in PARQUET]]


def make(folder):
    text.make_tokenizer(folder)
    files = make_parquet(os.path.join(folder, "parquet"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    golden = {
        "what": "What transformers and TRL make of texts; made by tests/parity/make_text_goldens.py, never by hand.",
        "versions": {"transformers": transformers.__version__, "trl": trl.__version__},
        "max_length": MAX_LENGTH,
        "templates": text.TEMPLATES,
        "texts": [{"text": t, "ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in TEXTS],
        "renderings": [
            {
                "template": name,
                "messages": messages,
                "add_generation_prompt": header,
                **render(tokenizer, template, messages, header),
            }
            for name, template in text.TEMPLATES.items()
            for messages in CONVERSATIONS
            for header in (False, True)
        ],
        "rows": [
            {"row": json.dumps(row, ensure_ascii=False), "tokens": trl_tokens(tokenizer, row)} for row in row_forms()
        ],
        "princeton_rows": princeton_rows(tokenizer),
    }
    lists = {name: golden.pop(name) for name in ("texts", "renderings", "rows", "princeton_rows")}
    lines = lambda items: "[\n" + ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in items) + "]"
    body = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()] + [
        f" {json.dumps(k)}: {lines(v)}" for k, v in lists.items()
    ]
    with open(os.path.join(folder, "golden.json"), "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(body) + "\n}\n")
    print(
        f"text: {len(TEXTS)} texts, {len(lists['renderings'])} renderings, "
        f"{len(lists['rows'])} rows through TRL {trl.__version__}, "
        f"{sum(r['tokens'] is None for r in lists['rows'])} without a response, "
        f"{len(lists['princeton_rows'])} by the rules of the paper's trainer"
    )
    return files + ["tokenizer.json", "tokenizer_config.json", "golden.json"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed ones; write nothing")
    arguments = parser.parse_args()
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    if not arguments.check:
        make(GOLDENS)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = make(folder)
        _, different, missing = filecmp.cmpfiles(folder, GOLDENS, files, shallow=False)
    if different or missing:
        print(
            f"tests/goldens/text: {', '.join(different + missing)} not as committed; "
            "make_text_goldens.py makes them anew",
            file=sys.stderr,
        )
        return 1
    print(f"goldens: {len(files)} files of texts made again, all as committed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
