#ifndef SIMPO_WORKER_HF_FFI_HF_FFI_H_
#define SIMPO_WORKER_HF_FFI_HF_FFI_H_

// The C interface of the Rust crate beside this file: Hugging Face's tokenizers, a Jinja engine, a Parquet
// reader and the hub. worker/data wraps it; nothing else includes it. No call lets a panic out: a panic is an
// error like any other. Objects may be used by several threads at once unless said otherwise.

#include <cstddef>
#include <cstdint>

extern "C" {

struct SimpoTokenizer;
struct SimpoTemplate;
struct SimpoParquet;

// Bytes owned by Rust; give them back with simpo_bytes_free.
struct SimpoBytes {
  uint8_t* data;
  size_t size;
  size_t capacity;
};
// Token ids owned by Rust; give them back with simpo_ids_free.
struct SimpoIds {
  uint32_t* data;
  size_t size;
  size_t capacity;
};

void simpo_bytes_free(SimpoBytes bytes);
void simpo_ids_free(SimpoIds ids);

// The hub, with the settings of the environment (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE ...).
// Each call takes a JSON object {"kind": "model" | "dataset", "repo": "owner/name", "revision": "main",
// "cache_only": false} and returns 0 and a JSON object, or the number of an absl::StatusCode and a message.
//
// {"commit", "folder", "files"}: what the revision holds, and its folder in the cache. Where the cache has
// to answer, "why_cached" says why, "present" is what it has, and "files" is that too unless it knows more.
int simpo_hub_list(const uint8_t* request, size_t size, SimpoBytes* reply);
// With "commit" and "files" in the request: brings these files into the folder.
int simpo_hub_fetch(const uint8_t* request, size_t size, SimpoBytes* reply);
// {"revision": "refs/pr/N"}: the hub's own conversion of a model to safetensors. Without one {}, or
// {"closed": "refs/pr/N"} where the owners have closed it.
int simpo_hub_conversion(const uint8_t* request, size_t size, SimpoBytes* reply);

// From the text of a tokenizer.json. NULL: `error` says why.
SimpoTokenizer* simpo_tokenizer_new(const uint8_t* json, size_t size, SimpoBytes* error);
void simpo_tokenizer_free(SimpoTokenizer* tokenizer);
// Without the special tokens that a post-processor would add; special tokens in the text are recognised.
bool simpo_tokenizer_encode(const SimpoTokenizer* tokenizer, const uint8_t* text, size_t size, SimpoIds* ids,
                            SimpoBytes* error);
// -1: not in the vocabulary.
int64_t simpo_tokenizer_token_to_id(const SimpoTokenizer* tokenizer, const uint8_t* token, size_t size);
size_t simpo_tokenizer_vocab_size(const SimpoTokenizer* tokenizer);

// From a template's source. NULL: `error` says why.
SimpoTemplate* simpo_template_new(const uint8_t* source, size_t size, SimpoBytes* error);
void simpo_template_free(SimpoTemplate* chat_template);
// `context` is a JSON object with the template's variables.
bool simpo_template_render(const SimpoTemplate* chat_template, const uint8_t* context, size_t size, SimpoBytes* text,
                           SimpoBytes* error);

// A Parquet file, of which the columns named in `columns` (one a line) are read. NULL: `error` says why.
// One thread at a time.
SimpoParquet* simpo_parquet_open(const uint8_t* path, size_t path_size, const uint8_t* columns, size_t columns_size,
                                 SimpoBytes* error);
void simpo_parquet_free(SimpoParquet* rows);
int64_t simpo_parquet_num_rows(const SimpoParquet* rows);
// The next rows, each a line of JSON; columns that are not read are null. Empty at the end of the file.
bool simpo_parquet_next(SimpoParquet* rows, SimpoBytes* lines, SimpoBytes* error);
}

#endif  // SIMPO_WORKER_HF_FFI_HF_FFI_H_
