"""The quickstart's inputs.

Data: obeyed forms, separate topics, and nothing to read off the answers alone. Model: the steps of the conversion
from GGUF that a mistake would pass through unseen.
"""

import collections
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest

QUICKSTART = pathlib.Path(__file__).resolve().parents[2] / "deploy/quickstart"
GENERATOR = QUICKSTART / "make_preferences.py"
CHANCE_LIMIT = 0.65  # what may be reached without reading the prompt


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(folder):
    subprocess.run([sys.executable, str(GENERATOR), str(folder)], check=True, capture_output=True)
    return {split: (folder / f"{split}.jsonl").read_text() for split in ("train", "test")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rows(texts):
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


def prompt(row):
    assert [m["role"] for m in row["prompt"]] == ["user"]
    return row["prompt"][0]["content"]


def answers(row):
    for key in ("chosen", "rejected"):
        assert [m["role"] for m in row[key]] == ["assistant"]
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def is_json(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# Written apart from the generator: a word that only this form's instructions have, and how its answers look.
RECOGNISERS = {
    "capitals": (r"(?i)capital letters|upper case", lambda a: a.isupper() and a.endswith(".")),
    "json": (r"JSON", is_json),
    "list": (r"(?i)\blist\b", lambda a: re.match(r"1\. ", a) is not None),
    "unit": (r"brackets", lambda a: re.search(r" \((city|sound|number)\)$", a) is not None),
    "bold": (r"bold", lambda a: re.fullmatch(r"\*\*.+\*\*", a) is not None),
    "quoted": (r"(?i)quot", lambda a: re.fullmatch(r'".+"', a) is not None),
    "sentence": (r"(full|complete|whole) sentence", lambda a: a.endswith(".") and not a.isupper()),
    "short": (r"alone|bare|only the answer", lambda a: re.fullmatch(r"[A-Za-z ]+", a) is not None),
}


def asked_form(text):
    found = [form for form, (pattern, _) in RECOGNISERS.items() if re.search(pattern, text)]
    assert len(found) == 1, (text, found)
    return found[0]


def form_of(answer):
    found = [form for form, (_, has_form) in RECOGNISERS.items() if has_form(answer)]
    assert len(found) == 1, (answer, found)
    return found[0]


def test_same_files_every_time(texts, tmp_path):
    assert generate(tmp_path) == texts


def test_chosen_obeys_and_rejected_has_another_form(rows):
    for row in rows["train"] + rows["test"]:
        chosen, rejected = answers(row)
        wanted = asked_form(prompt(row))
        assert form_of(chosen) == wanted, row
        assert form_of(rejected) != wanted, row


def test_both_answers_say_the_same(rows):
    facts = load(GENERATOR)
    known = [fact for source in (facts.capital_facts, facts.sound_facts, facts.sum_facts) for fact in source()]
    short = {question: answer for question, answer, _, _ in known}
    for row in rows["train"] + rows["test"]:
        question = re.search(r"(What|Which) [^?]*\?", prompt(row)).group()
        for answer in answers(row):
            assert short[question].lower() in answer.lower(), row


def test_sizes_and_balance(rows):
    assert 900 <= len(rows["train"]) <= 1000 and len(rows["test"]) >= 200
    for split in rows.values():
        pairs = collections.Counter(tuple(map(form_of, answers(row))) for row in split)
        assert len(pairs) == len(RECOGNISERS) * (len(RECOGNISERS) - 1)
        assert len(set(pairs.values())) == 1, pairs


def test_topics_do_not_meet(rows):
    topic = {"capital of": "train", "Which sound": "test", " plus ": "test"}
    for split, split_rows in rows.items():
        for row in split_rows:
            assert {topic[key] for key in topic if key in prompt(row)} == {split}
    said = {split: {a for row in split_rows for a in answers(row)} for split, split_rows in rows.items()}
    assert not said["train"] & said["test"]


def tokens(text):
    """Words, each mark by itself, and the cases of words, which a bag of plain words would miss."""
    found = re.findall(r"\w+|[^\w\s]", text)
    cases = ["<upper>" if w.isupper() and len(w) > 1 else "<title>" if w.istitle() else "<lower>" for w in found]
    return [w.lower() for w in found] + cases


def bag_of_words(split_rows, vocabulary):
    """[rows, 2, words]: the counts of each row's chosen and rejected answer."""
    counts = np.zeros((len(split_rows), 2, len(vocabulary)))
    for i, row in enumerate(split_rows):
        for j, answer in enumerate(answers(row)):
            for token in tokens(answer):
                if token in vocabulary:
                    counts[i, j, vocabulary[token]] += 1
    return counts


def classifier_accuracy(learn, judge):
    """Logistic regression on single answers of `learn`; how often it scores `judge`'s chosen answers higher."""
    words = sorted({t for row in learn for a in answers(row) for t in tokens(a)})
    vocabulary = {word: i for i, word in enumerate(words)}
    x = bag_of_words(learn, vocabulary)
    features = x.reshape(-1, len(words))
    labels = np.tile([1.0, 0.0], len(learn))
    weights, bias = np.zeros(len(words)), 0.0
    for _ in range(400):
        error = 1 / (1 + np.exp(-(features @ weights + bias))) - labels
        weights -= 0.5 * (features.T @ error / len(labels) + 1e-4 * weights)
        bias -= 0.5 * error.mean()
    scores = bag_of_words(judge, vocabulary) @ weights
    return preferred(scores[:, 0] - scores[:, 1])


def preferred(differences):
    """Share of pairs whose chosen answer has the higher score; a tie is a coin's throw."""
    differences = np.where(np.abs(differences) < 1e-9, 0, differences)
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def length_accuracy(split_rows):
    longer = preferred(np.array([len(c) - len(r) for c, r in map(answers, split_rows)]))
    return max(longer, 1 - longer)


def test_length_does_not_tell(rows):
    for split in rows.values():
        assert length_accuracy(split) <= CHANCE_LIMIT


def test_bag_of_words_does_not_tell(rows):
    assert classifier_accuracy(rows["train"], rows["test"]) <= CHANCE_LIMIT
    # Nor when it may learn the held-out topics' own words.
    even, odd = rows["test"][::2], rows["test"][1::2]
    assert classifier_accuracy(even, odd) <= CHANCE_LIMIT
    assert classifier_accuracy(odd, even) <= CHANCE_LIMIT


def test_the_classifier_finds_what_answers_do_tell(rows):
    """The two rules above are able to see a bias when there is one."""
    biased = {s: [r for r in split if form_of(answers(r)[0]) in ("json", "bold", "quoted", "list")
                  and form_of(answers(r)[1]) in ("sentence", "capitals", "short", "unit")] for s, split in rows.items()}
    assert len(biased["test"]) >= 30
    assert classifier_accuracy(biased["train"], biased["test"]) >= 0.9
    longest = [r for r in rows["test"] if len(answers(r)[0]) > len(answers(r)[1])]
    assert length_accuracy(longest) == 1.0


@pytest.fixture(scope="module")
def conversion():
    return load(QUICKSTART / "gguf_to_hf.py")


def permute_as_llama_cpp(rows, heads):
    """What its converter did to q and k on the way to GGUF."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def test_q_and_k_rows_are_put_back(conversion):
    rows = np.arange(3 * 8 * 5, dtype=np.float32).reshape(24, 5)
    permuted = permute_as_llama_cpp(rows, heads=3)
    assert not np.array_equal(permuted, rows)
    np.testing.assert_array_equal(conversion.unpermute(permuted, 3), rows)


def test_bfloat16_rounds_to_nearest_even(conversion):
    # 1 + 2^-8 lies between 1 and 1 + 2^-7: to even; the others to the nearest.
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5, 0.0], dtype=np.float32)
    widened = (conversion.to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(widened, [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -2.5, 0.0])


def test_weights_reach_the_safetensors_file(conversion, tmp_path):
    """q and k of a layer un-permuted, the others as they are, each under its name in transformers."""
    heads, kv_heads, head_dim, hidden = 4, 2, 4, 16
    rng = np.random.default_rng(7)
    shapes = {"token_embd": (11, hidden), "blk.0.attn_q": (heads * head_dim, hidden), "blk.0.ffn_down": (hidden, 24),
              "blk.0.attn_k": (kv_heads * head_dim, hidden), "output_norm": (hidden,)}
    # Integers are exact in bfloat16.
    stored = {name: rng.integers(-100, 100, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = [types.SimpleNamespace(name=f"{name}.weight", data=values, tensor_type=0, shape=np.array(values.shape[::-1]))
               for name, values in stored.items()]
    reader = types.SimpleNamespace(tensors=tensors)
    weights = conversion.read_weights(reader, lambda data, _: data.ravel(), heads, kv_heads)
    conversion.write_safetensors(tmp_path / "model.safetensors", weights)

    raw = (tmp_path / "model.safetensors").read_bytes()
    body = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:body])

    def read(name):
        entry = header[name]
        begin, end = entry["data_offsets"]
        bits = np.frombuffer(raw[body + begin:body + end], dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(entry["shape"])

    np.testing.assert_array_equal(read("model.embed_tokens.weight"), stored["token_embd"])
    np.testing.assert_array_equal(read("model.layers.0.mlp.down_proj.weight"), stored["blk.0.ffn_down"])
    np.testing.assert_array_equal(read("model.norm.weight"), stored["output_norm"])
    for part, count in (("q", heads), ("k", kv_heads)):
        rows = read(f"model.layers.0.self_attn.{part}_proj.weight")
        np.testing.assert_array_equal(permute_as_llama_cpp(rows, count), stored[f"blk.0.attn_{part}"])
    assert len(header) == 1 + len(shapes)
