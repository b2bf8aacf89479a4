#include "worker/model/safetensors.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/file_system.h"
#include "common/status_macros.h"
#include "worker/model/json_fields.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr uint64_t kLengthBytes = 8;             // the header's length stands first
constexpr uint64_t kMaxHeaderBytes = 100 << 20;  // as other readers of the format
constexpr uint64_t kMaxTensorBytes = uint64_t{1} << 62;
constexpr int64_t kMaxIndexBytes = 256 << 20;

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
constexpr DtypeName kDtypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
    {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool}};

std::optional<at::ScalarType> DtypeOf(const std::string& name) {
  for (const DtypeName& row : kDtypes) {
    if (name == row.name) return row.dtype;
  }
  return std::nullopt;
}

const char* NameOf(at::ScalarType dtype) {
  for (const DtypeName& row : kDtypes) {
    if (dtype == row.dtype) return row.name;
  }
  return nullptr;
}

// A name from an untrusted file, for a message.
std::string Shortened(const std::string& name) { return name.substr(0, 200); }

struct Mapping {
  void* base = nullptr;
  size_t size = 0;
};

// Maps a regular file that has at least the length field.
absl::StatusOr<Mapping> MapFile(const std::filesystem::path& path) {
  const int fd = FileSystem::Current().Open(path, O_RDONLY | O_NONBLOCK);
  if (fd < 0) return ErrnoStatus("read", path);
  struct stat info {};
  Mapping mapping;
  absl::Status status;
  if (fstat(fd, &info) != 0) {
    status = ErrnoStatus("read", path);
  } else if (!S_ISREG(info.st_mode)) {
    status = absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a regular file"));
  } else if (info.st_size < static_cast<int64_t>(kLengthBytes)) {
    status = absl::InvalidArgumentError(
        absl::StrCat(path.string(), ": too short to be a safetensors file (", info.st_size, " bytes)"));
  } else {
    mapping.size = static_cast<size_t>(info.st_size);
    mapping.base = mmap(nullptr, mapping.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapping.base == MAP_FAILED) status = ErrnoStatus("map", path);
  }
  close(fd);
  if (!status.ok()) return status;
  return mapping;
}

// The header as JSON: an object without repeated names, nested no deeper than the format is.
absl::StatusOr<Json> ParseHeader(std::string_view text, const std::string& where) {
  constexpr int kMaxDepth = 8;
  std::set<std::string> names;
  std::string problem;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) problem = "nests too deep";
    if (depth == 1 && event == Json::parse_event_t::key) {
      const auto name = parsed.get<std::string>();
      if (!names.insert(name).second) problem = "repeats the name " + Shortened(name);
    }
    return problem.empty();  // false: what follows is not kept
  };
  Json header = Json::parse(text, watch, /*allow_exceptions=*/false);
  if (problem.empty() && !header.is_object()) problem = "is not a JSON object";
  if (problem.empty()) return header;
  return absl::InvalidArgumentError(absl::StrCat(where, ": its header ", problem));
}

absl::StatusOr<std::map<std::string, std::string>> ParseMetadata(const Json& json, const std::string& where) {
  std::map<std::string, std::string> metadata;
  bool all_text = json.is_object();
  if (all_text) {
    for (const auto& [key, value] : json.items()) {
      all_text &= value.is_string();
      if (value.is_string()) metadata[key] = value.get<std::string>();
    }
  }
  if (all_text) return metadata;
  return absl::InvalidArgumentError(absl::StrCat(where, ": __metadata__ must map text to text"));
}

bool HasEntryFields(const Json& json) {
  if (!json.is_object() || !json.contains("dtype") || !json["dtype"].is_string()) return false;
  if (!json.contains("shape") || !json["shape"].is_array()) return false;
  if (!json.contains("data_offsets") || !json["data_offsets"].is_array()) return false;
  const Json& offsets = json["data_offsets"];
  return offsets.size() == 2 && offsets[0].is_number_unsigned() && offsets[1].is_number_unsigned();
}

// Reads one tensor's header entry; its offsets become offsets into the file.
absl::StatusOr<SafetensorsEntry> ParseEntry(const std::string& name, const Json& json, uint64_t data_begin,
                                            uint64_t file_size, const std::string& where) {
  auto bad = [&](const std::string& problem) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": tensor ", Shortened(name), ": ", problem));
  };
  if (!HasEntryFields(json)) return bad("needs dtype, shape and two data_offsets");
  const auto dtype_name = json["dtype"].get<std::string>();
  const std::optional<at::ScalarType> dtype = DtypeOf(dtype_name);
  if (!dtype) return bad(absl::StrCat("dtype ", Shortened(dtype_name), " is not supported"));
  SafetensorsEntry entry{.name = name, .dtype = *dtype};
  // Sizes of zero count as one here, so that no stride of an empty tensor can overflow either.
  uint64_t extent = c10::elementSize(*dtype);
  bool empty = false;
  for (const Json& size : json["shape"]) {
    if (!size.is_number_unsigned()) return bad("the shape must be whole numbers");
    const auto value = size.get<uint64_t>();
    if (value > kMaxTensorBytes / extent) return bad("the shape is larger than any file");
    extent *= std::max<uint64_t>(value, 1);
    empty |= value == 0;
    entry.shape.push_back(static_cast<int64_t>(value));
  }
  const uint64_t bytes = empty ? 0 : extent;
  const auto begin = json["data_offsets"][0].get<uint64_t>();
  const auto end = json["data_offsets"][1].get<uint64_t>();
  if (begin > end) return bad("its data ends before it begins");
  if (end > file_size - data_begin) {
    return bad(absl::StrCat("its data ends at byte ", end, " of ", file_size - data_begin, ": the file is truncated"));
  }
  if (end - begin != bytes) {
    return bad(absl::StrCat("has ", end - begin, " bytes where its shape needs ", bytes));
  }
  entry.begin = data_begin + begin;
  entry.end = data_begin + end;
  return entry;
}

// Tensors must fill the data without overlap or holes.
absl::Status CheckCoverage(std::vector<SafetensorsEntry> entries, uint64_t data_begin, uint64_t file_size,
                           const std::string& where) {
  std::sort(entries.begin(), entries.end(),
            [](const auto& a, const auto& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  uint64_t next = data_begin;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin != next) {
      const char* problem = entry.begin < next ? " overlaps the one before it" : " leaves a hole before it";
      return absl::InvalidArgumentError(absl::StrCat(where, ": tensor ", Shortened(entry.name), problem));
    }
    next = entry.end;
  }
  if (next == file_size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(where, ": ", file_size - next, " bytes at its end belong to no tensor"));
}

}  // namespace

SafetensorsFile::~SafetensorsFile() {
  if (base_ != nullptr) munmap(base_, size_);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::filesystem::path& path) {
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->path_ = path;
  SIMPO_ASSIGN_OR_RETURN(const Mapping mapping, MapFile(path));
  file->base_ = mapping.base;
  file->size_ = mapping.size;

  uint64_t header_size = 0;
  std::memcpy(&header_size, mapping.base, kLengthBytes);
  if (header_size > kMaxHeaderBytes || header_size > mapping.size - kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), ": its header claims ", header_size,
                                                   " bytes; the file is truncated or not safetensors"));
  }
  const std::string_view text(static_cast<const char*>(mapping.base) + kLengthBytes, header_size);
  SIMPO_ASSIGN_OR_RETURN(const Json header, ParseHeader(text, path.string()));
  const uint64_t data_begin = kLengthBytes + header_size;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      SIMPO_ASSIGN_OR_RETURN(file->metadata_, ParseMetadata(value, path.string()));
      continue;
    }
    SIMPO_ASSIGN_OR_RETURN(SafetensorsEntry entry, ParseEntry(name, value, data_begin, mapping.size, path.string()));
    file->entries_.push_back(std::move(entry));
  }
  SIMPO_RETURN_IF_ERROR(CheckCoverage(file->entries_, data_begin, mapping.size, path.string()));
  return file;
}

const SafetensorsEntry* SafetensorsFile::Find(std::string_view name) const {
  for (const SafetensorsEntry& entry : entries_) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

void SafetensorsFile::Drop(const SafetensorsEntry& entry) const {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t begin = entry.begin / page * page;
  madvise(static_cast<char*>(base_) + begin, entry.end - begin, MADV_DONTNEED);
}

at::Tensor SafetensorsFile::View(const SafetensorsEntry& entry) const {
  char* data = static_cast<char*>(base_) + entry.begin;
  const auto options = at::TensorOptions().dtype(entry.dtype);
  if (entry.begin % c10::elementSize(entry.dtype) == 0) {
    return at::from_blob(data, entry.shape, options);
  }
  // The format does not promise alignment; tensors do.
  at::Tensor aligned = at::empty(entry.shape, options);
  std::memcpy(aligned.data_ptr(), data, entry.end - entry.begin);
  return aligned;
}

absl::StatusOr<std::unique_ptr<ModelWeightsReader>> ModelWeightsReader::Open(const std::filesystem::path& dir) {
  std::unique_ptr<ModelWeightsReader> reader(new ModelWeightsReader());
  reader->dir_ = dir;
  // The single file wins where both forms are present, as in transformers.
  if (std::filesystem::exists(dir / "model.safetensors")) {
    SIMPO_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(dir / "model.safetensors"));
    for (const SafetensorsEntry& entry : file->entries()) {
      reader->by_name_[entry.name] = {file.get(), &entry};
    }
    reader->files_.push_back(std::move(file));
    return reader;
  }
  if (std::filesystem::exists(dir / kIndexName)) {
    SIMPO_RETURN_IF_ERROR(reader->OpenIndexed());
    return reader;
  }
  const bool pickle = std::filesystem::exists(dir / "pytorch_model.bin") ||
                      std::filesystem::exists(dir / "pytorch_model.bin.index.json");
  return absl::NotFoundError(
      absl::StrCat(dir.string(), " has neither model.safetensors nor ", kIndexName,
                   pickle ? "; its pytorch_model.bin is a pickle, which can run code when it is read: convert "
                            "it to safetensors with save_pretrained(..., safe_serialization=True) where you "
                            "trust it"
                          : ""));
}

absl::Status ModelWeightsReader::OpenIndexed() {
  const std::filesystem::path index_path = dir_ / kIndexName;
  SIMPO_ASSIGN_OR_RETURN(const Json index, ReadJsonObject(index_path, kMaxIndexBytes));
  JsonFields fields(index, index_path.string());
  std::map<std::string, const SafetensorsFile*> opened;
  for (const auto& [name, file] : fields.Object("weight_map").items()) {
    const std::string file_name = file.is_string() ? file.get<std::string>() : "";
    if (file_name.empty() || file_name.find('/') != std::string::npos) {
      fields.Fail(Shortened(name), "must be the name of a file in this folder");
      break;
    }
    const SafetensorsFile*& shard = opened[file_name];
    if (shard == nullptr) {
      absl::StatusOr<std::unique_ptr<SafetensorsFile>> next = SafetensorsFile::Open(dir_ / file_name);
      if (!next.ok()) {
        return absl::Status(next.status().code(),
                            absl::StrCat(next.status().message(), " (named in ", kIndexName, ")"));
      }
      shard = next->get();
      files_.push_back(*std::move(next));
    }
    const SafetensorsEntry* entry = shard->Find(name);
    if (entry == nullptr) {
      fields.Fail(Shortened(name), absl::StrCat("is not in ", file_name, ", where the index puts it"));
      break;
    }
    by_name_[name] = {shard, entry};
  }
  return fields.status();
}

bool ModelWeightsReader::Has(std::string_view name) const { return by_name_.find(name) != by_name_.end(); }

std::vector<std::string> ModelWeightsReader::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : by_name_) names.push_back(name);
  return names;
}

void ModelWeightsReader::Drop(std::string_view name) const {
  const auto it = by_name_.find(name);
  if (it != by_name_.end()) it->second.first->Drop(*it->second.second);
}

absl::StatusOr<at::Tensor> ModelWeightsReader::Get(std::string_view name, at::IntArrayRef shape) const {
  const auto it = by_name_.find(name);
  if (it == by_name_.end()) {
    return absl::NotFoundError(absl::StrCat(dir_.string(), ": the weights have no tensor ", std::string(name),
                                            ", which config.json calls for"));
  }
  const auto& [file, entry] = it->second;
  const std::string where = absl::StrCat(file->path().string(), ": tensor ", std::string(name));
  if (at::IntArrayRef(entry->shape) != shape) {
    return absl::InvalidArgumentError(absl::StrCat(where, " has shape [", absl::StrJoin(entry->shape, ", "),
                                                   "] where config.json calls for [", absl::StrJoin(shape.vec(), ", "),
                                                   "]"));
  }
  if (!at::isFloatingType(entry->dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, " has dtype ", NameOf(entry->dtype), "; weights must be F64, F32, F16 or BF16"));
  }
  return file->View(*entry);
}

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::filesystem::path& path, const std::vector<TensorSpec>& tensors,
    const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [name, dtype, shape] : tensors) {
    const char* dtype_name = NameOf(dtype);
    if (dtype_name == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(path.string(), ": tensor ", name, ": safetensors has no name for its dtype"));
    }
    uint64_t bytes = c10::elementSize(dtype);
    for (int64_t size : shape) bytes *= static_cast<uint64_t>(size);
    header[name] = {{"dtype", dtype_name}, {"shape", shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data begins at a multiple of 8
  const uint64_t header_size = text.size();
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter(path, tensors));
  writer->Write(&header_size, kLengthBytes);
  writer->Write(text.data(), text.size());
  SIMPO_RETURN_IF_ERROR(writer->file_.status());
  return writer;
}

void SafetensorsWriter::Write(const void* data, size_t size) {
  size_ += size;
  hasher_.Add(data, size);
  file_.Write(data, size).IgnoreError();  // the file keeps it
}

absl::Status SafetensorsWriter::Append(const at::Tensor& tensor) {
  TORCH_CHECK(next_ < tensors_.size(), path_.string(), ": more tensors than were announced");
  const TensorSpec& spec = tensors_[next_++];
  TORCH_CHECK(tensor.sizes() == at::IntArrayRef(spec.shape) && tensor.scalar_type() == spec.dtype, path_.string(),
              ": tensor ", spec.name, " is not what was announced");
  const at::Tensor host = tensor.detach().cpu().contiguous();
  Write(host.data_ptr(), host.nbytes());
  return file_.status();
}

absl::StatusOr<SafetensorsWriter::Written> SafetensorsWriter::Finish() {
  TORCH_CHECK(next_ == tensors_.size(), path_.string(), ": fewer tensors than were announced");
  SIMPO_RETURN_IF_ERROR(file_.Sync());
  return Written{.bytes = size_, .sha256 = hasher_.Finish()};
}

absl::StatusOr<SafetensorsWriter::Written> WriteSafetensors(
    const std::filesystem::path& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
    const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter::TensorSpec> specs;
  specs.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) specs.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  SIMPO_ASSIGN_OR_RETURN(const auto writer, SafetensorsWriter::Create(path, specs, metadata));
  for (const auto& [name, tensor] : tensors) SIMPO_RETURN_IF_ERROR(writer->Append(tensor));
  return writer->Finish();
}

}  // namespace simpo
