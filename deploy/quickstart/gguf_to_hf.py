"""Turns a Llama-family GGUF file into a Hugging Face folder: weights in bfloat16, tokenizer, chat template.

    gguf_to_hf.py MODEL.gguf FOLDER

Needs the packages of converter-requirements.txt; make_model.py installs them and calls this.
"""

import json
import pathlib
import sys

import numpy as np

# GGUF's tensor names and those of transformers.
TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The values of the GGUF key tokenizer.ggml.pre whose pre-tokenizer is written below.
DIGITS_THEN_BYTES = ("smollm", "starcoder", "refact")
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type


def fail(message):
    sys.exit(f"gguf_to_hf: {message}")


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader, path):
        self.reader, self.path = reader, path

    def get(self, key, fallback=None):
        field = self.reader.get_field(key)
        if field is not None:
            return field.contents()
        if fallback is None:
            fail(f"{self.path} has no key {key}; it is not a GGUF file of a Llama with its tokenizer")
        return fallback


def hf_name(name):
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    block, layer, part, kind = (name.split(".") + [""] * 4)[:4]
    if block != "blk" or part not in IN_LAYER or kind != "weight":
        fail(f"tensor {name} is not one of a Llama")
    return f"model.layers.{layer}.{IN_LAYER[part]}.weight"


def unpermute(rows, heads):
    """GGUF interleaves the two halves of each head's rotary pairs in q and k; transformers keeps them apart."""
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def to_bfloat16(values):
    """Rounds float32 to nearest, ties to even; the upper halves as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def read_weights(reader, dequantize, heads, kv_heads):
    weights = {}
    for i, tensor in enumerate(reader.tensors):
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        name = hf_name(tensor.name)
        if "q_proj" in name:
            values = unpermute(values, heads)
        elif "k_proj" in name:
            values = unpermute(values, kv_heads)
        weights[name] = to_bfloat16(values)
        if (i + 1) % 68 == 0 or i + 1 == len(reader.tensors):
            print(f"[model] {i + 1} of {len(reader.tensors)} tensors dequantised", file=sys.stderr)
    return weights


def write_safetensors(path, weights):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, values in weights.items():
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in weights.values():
            file.write(values.tobytes())


def model_config(meta, tied):
    if meta.get("general.architecture") != "llama":
        fail(f"{meta.path} holds a {meta.get('general.architecture')}; only llama is converted")
    heads, hidden = meta.get("llama.attention.head_count"), meta.get("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta.get("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": meta.get("llama.feed_forward_length"),
        "num_hidden_layers": meta.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv"),
        "head_dim": meta.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": meta.get("llama.context_length"),
        # Stored as float32: 9.99999974e-06 is meant to be 1e-05.
        "rms_norm_eps": float(f"{meta.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def added_tokens(meta):
    kinds = meta.get("tokenizer.ggml.token_type")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return [
        {"id": i, "content": token, **flags}
        for i, token in enumerate(meta.get("tokenizer.ggml.tokens"))
        if kinds[i] == CONTROL_TOKEN
    ]


def tokenizer_json(meta):
    if meta.get("tokenizer.ggml.model") != "gpt2" or meta.get("tokenizer.ggml.pre") not in DIGITS_THEN_BYTES:
        fail(f"{meta.path}: tokenizer {meta.get('tokenizer.ggml.model')}/{meta.get('tokenizer.ggml.pre')} is not known")
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(meta),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(meta.get("tokenizer.ggml.tokens"))},
            "merges": meta.get("tokenizer.ggml.merges"),
        },
    }


def special_tokens(meta):
    tokens = meta.get("tokenizer.ggml.tokens")
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {f"{short}_token": tokens[meta.get(f"tokenizer.ggml.{name}_token_id")] for short, name in ids.items()}


def tokenizer_config(meta):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get("llama.context_length"),
        **special_tokens(meta),
        "chat_template": meta.get("tokenizer.chat_template"),
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    import gguf  # here, so that the tests of the functions above do not need it

    source, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    reader = gguf.GGUFReader(source)
    meta = Metadata(reader, source)
    config = model_config(meta, tied=all(t.name != "output.weight" for t in reader.tensors))
    weights = read_weights(reader, gguf.dequantize, config["num_attention_heads"], config["num_key_value_heads"])
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", tokens)
    write_json(folder / "tokenizer.json", tokenizer_json(meta))
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))
    write_json(folder / "special_tokens_map.json", special_tokens(meta))


if __name__ == "__main__":
    main()
