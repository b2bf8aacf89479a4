"""A tiny Llama in Hugging Face form, made of seeded numbers: config.json, safetensors, byte tokenizer."""

import json
import struct

import numpy as np

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def config(**changes):
    """config.json of the tiny model: grouped queries, untied head."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 258,
        "torch_dtype": "float32",
    }
    values.update(changes)
    return values


def weight_shapes(values):
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    head_dim = hidden // values["num_attention_heads"]
    keys = values["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (values["vocab_size"], hidden)}
    for i in range(values["num_hidden_layers"]):
        shapes.update({
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{i}.self_attn.k_proj.weight": (keys, hidden),
            f"model.layers.{i}.self_attn.v_proj.weight": (keys, hidden),
            f"model.layers.{i}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
            f"model.layers.{i}.mlp.gate_proj.weight": (inner, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": (inner, hidden),
            f"model.layers.{i}.mlp.down_proj.weight": (hidden, inner),
        })
    shapes["model.norm.weight"] = (hidden,)
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (values["vocab_size"], hidden)
    return shapes


def make_weights(values, seed=1):
    """fp32 weights, each a number that fp16 and bf16 hold too: every dtype is the same model."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(values).items():
        if name.endswith("norm.weight"):
            weights[name] = np.ones(shape, np.float32)
        else:
            weights[name] = (np.round(random.normal(0, 0.08, shape) * 1024).clip(-255, 255) / 1024).astype(np.float32)
    return weights


def _encode(array, dtype):
    if dtype == "F32":
        return array.astype("<f4").tobytes()
    if dtype == "F16":
        return array.astype("<f2").tobytes()
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()


def _decode(data, dtype, shape):
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32).reshape(shape)


def write_safetensors(path, tensors, dtype="F32"):
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        blob = _encode(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_safetensors(path):
    """{name: fp32 array}, and the set of dtypes in the file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    tensors, dtypes = {}, set()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = _decode(data[8 + size + begin:8 + size + end], entry["dtype"], entry["shape"])
        dtypes.add(entry["dtype"])
    return tensors, dtypes


def read_model(folder):
    """Every weight of a model folder, from one file or from the files of the index."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights = {}
    for name in names:
        weights.update(read_safetensors(folder / name)[0])
    return weights


def _byte_letters():
    """The printable letter that byte-level tokenizers write for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, extra = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + extra)
            extra += 1
    return letters


def write_tokenizer(folder, chat_template=CHATML):
    letters = _byte_letters()
    added = [
        {"id": 256 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "model_max_length": 1024}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder, dtype="F32", files=1, seed=1, chat_template=CHATML, **changes):
    """A whole model folder; returns its weights."""
    folder.mkdir(parents=True)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    values = config(torch_dtype=names[dtype], **changes)
    weights = make_weights(values, seed)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    write_tokenizer(folder, chat_template)
    if files == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return weights
    weight_map = {}
    for part in range(files):
        name = f"model-{part + 1:05d}-of-{files:05d}.safetensors"
        tensors = dict(list(weights.items())[part::files])
        write_safetensors(folder / name, tensors, dtype)
        weight_map.update({tensor: name for tensor in tensors})
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights
