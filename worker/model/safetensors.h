#ifndef SIMPO_WORKER_MODEL_SAFETENSORS_H_
#define SIMPO_WORKER_MODEL_SAFETENSORS_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/file_system.h"
#include "common/sha256.h"

namespace simpo {

// One tensor of a safetensors file.
struct SafetensorsEntry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // bytes, from the start of the file
  uint64_t end = 0;
};

// A safetensors file, mapped read-only. Everything in the header is checked before it is used:
// sizes, overlaps, holes, dtype against shape, length of the file; hostile files give an error
// that names the file and the tensor, never a crash.
class SafetensorsFile {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::filesystem::path& path);
  ~SafetensorsFile();
  const std::filesystem::path& path() const { return path_; }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const SafetensorsEntry* Find(std::string_view name) const;
  // The tensor as a view of the mapped file (a copy where the file does not align it); valid while
  // this object lives; never write to it.
  at::Tensor View(const SafetensorsEntry& entry) const;
  // The memory of the tensor's pages may go; they are read again when they are touched.
  void Drop(const SafetensorsEntry& entry) const;

 private:
  SafetensorsFile() = default;
  std::filesystem::path path_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
  void* base_ = nullptr;
  size_t size_ = 0;
};

// The weights of an HF model folder: model.safetensors, or the files of
// model.safetensors.index.json. Pickle files are refused by name.
class ModelWeightsReader {
 public:
  static absl::StatusOr<std::unique_ptr<ModelWeightsReader>> Open(const std::filesystem::path& dir);
  bool Has(std::string_view name) const;
  std::vector<std::string> Names() const;
  // A view of the mapped file in the file's own dtype; NOT_FOUND and INVALID_ARGUMENT (another
  // shape than `shape`, or no floating-point weights) name the folder, file and tensor.
  absl::StatusOr<at::Tensor> Get(std::string_view name, at::IntArrayRef shape) const;
  // The memory of this weight's pages may go; see SafetensorsFile::Drop.
  void Drop(std::string_view name) const;

 private:
  ModelWeightsReader() = default;
  absl::Status OpenIndexed();

  std::filesystem::path dir_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, std::pair<const SafetensorsFile*, const SafetensorsEntry*>, std::less<>> by_name_;
};

// A new safetensors file written from front to end: the header from what is announced, then the data
// as it comes, so that no more than one tensor need be in memory.
class SafetensorsWriter {
 public:
  struct TensorSpec {
    std::string name;
    at::ScalarType dtype;
    std::vector<int64_t> shape;
  };
  struct Written {
    uint64_t bytes = 0;  // of the file
    std::string sha256;
  };
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(const std::filesystem::path& path,
                                                                   const std::vector<TensorSpec>& tensors,
                                                                   const std::map<std::string, std::string>& metadata);
  // The next tensor of those announced, in their order; any device, made contiguous.
  absl::Status Append(const at::Tensor& tensor);
  // After the last: the file is durable (synced) when this returns, but not renamed into place: callers
  // write into a temporary folder or use common/atomic_file.h.
  absl::StatusOr<Written> Finish();

 private:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorSpec> tensors)
      : path_(path), tensors_(std::move(tensors)), file_(path) {}
  void Write(const void* data, size_t size);

  const std::filesystem::path path_;
  const std::vector<TensorSpec> tensors_;
  OutputFile file_;
  Sha256Hasher hasher_;
  size_t next_ = 0;  // the tensor to come
  uint64_t size_ = 0;
};

// All of it at once.
absl::StatusOr<SafetensorsWriter::Written> WriteSafetensors(
    const std::filesystem::path& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
    const std::map<std::string, std::string>& metadata);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_SAFETENSORS_H_
