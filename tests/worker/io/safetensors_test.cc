#include "worker/model/safetensors.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/worker/io/test_files.h"

namespace simpo {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

// A file as the format's description says, made without our writer.
std::string FileOf(const std::string& header, const std::string& data) {
  const uint64_t size = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, 8);
  return bytes + header + data;
}

template <typename T>
std::string BytesOf(std::initializer_list<T> values) {
  return {reinterpret_cast<const char*>(values.begin()), values.size() * sizeof(T)};
}

absl::Status OpenStatus(const std::string& bytes) {
  const TempDir dir;
  WriteText(dir / "x.safetensors", bytes);
  return SafetensorsFile::Open(dir / "x.safetensors").status();
}

TEST(SafetensorsFile, ReadsAHandMadeFile) {
  const TempDir dir;
  const std::string header = R"({"__metadata__":{"format":"pt"},)"
                             R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
                             R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[16,20]},)"
                             R"("scalar":{"dtype":"I64","shape":[],"data_offsets":[20,28]},)"
                             R"("none":{"dtype":"F16","shape":[0,3],"data_offsets":[28,28]},)"
                             R"("flags":{"dtype":"BOOL","shape":[2],"data_offsets":[28,30]}}  )";
  WriteText(dir / "x.safetensors",
            FileOf(header, BytesOf<float>({1.5F, -2, 3, 4}) + BytesOf<uint16_t>({0x3F80, 0xC000}) +
                               BytesOf<int64_t>({-7}) + BytesOf<uint8_t>({1, 0})));
  const auto file = SafetensorsFile::Open(dir / "x.safetensors");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->metadata().at("format"), "pt");
  EXPECT_EQ((*file)->entries().size(), 5U);
  const auto view = [&](const char* name) { return (*file)->View(*(*file)->Find(name)); };
  EXPECT_TRUE(at::equal(view("a"), at::tensor({1.5, -2.0, 3.0, 4.0}, at::kFloat).view({2, 2})));
  EXPECT_TRUE(at::equal(view("b").to(at::kFloat), at::tensor({1.0, -2.0}, at::kFloat)));
  EXPECT_EQ(view("scalar").item<int64_t>(), -7);
  EXPECT_EQ(view("none").sizes(), at::IntArrayRef({0, 3}));
  EXPECT_TRUE(view("flags")[0].item<bool>());
  EXPECT_EQ((*file)->Find("missing"), nullptr);
}

TEST(SafetensorsFile, CopiesWhatTheFileDoesNotAlign) {
  const TempDir dir;
  const std::string header = R"({"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("f":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  WriteText(dir / "x.safetensors", FileOf(header, std::string(1, '\7') + BytesOf<float>({0.25F})));
  const auto file = SafetensorsFile::Open(dir / "x.safetensors");
  ASSERT_TRUE(file.ok()) << file.status();
  const at::Tensor tensor = (*file)->View(*(*file)->Find("f"));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 4, 0U);
  EXPECT_EQ(tensor.item<float>(), 0.25F);
}

TEST(WriteSafetensors, IsReadBackBitForBit) {
  const TempDir dir;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    tensors.emplace_back(c10::toString(dtype), at::randn({3, 5}).to(dtype));
  }
  for (at::ScalarType dtype : {at::kLong, at::kInt, at::kShort, at::kChar, at::kByte, at::kBool}) {
    tensors.emplace_back(c10::toString(dtype), at::randint(0, 2, {7}).to(dtype));
  }
  tensors.emplace_back("transposed", at::arange(6, at::kFloat).view({2, 3}).t());
  tensors.emplace_back("scalar", at::full({}, 3.0));
  const auto written = WriteSafetensors(dir / "x.safetensors", tensors, {{"k", "\xC3\xA9 \"q\""}});
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ(written->bytes, std::filesystem::file_size(dir / "x.safetensors"));
  EXPECT_EQ(written->sha256, *Sha256OfFile(dir / "x.safetensors"));
  const auto file = SafetensorsFile::Open(dir / "x.safetensors");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->metadata().at("k"), "\xC3\xA9 \"q\"");
  ASSERT_EQ((*file)->entries().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const SafetensorsEntry* entry = (*file)->Find(name);
    ASSERT_NE(entry, nullptr) << name;
    EXPECT_EQ(entry->dtype, tensor.scalar_type());
    EXPECT_TRUE(at::equal((*file)->View(*entry), tensor)) << name;
  }
}

TEST(WriteSafetensors, ReportsAFullDiskAndAMissingFolder) {
  const std::vector<std::pair<std::string, at::Tensor>> tensors = {{"a", at::zeros({1000})}};
  const absl::Status full = WriteSafetensors("/dev/full", tensors, {}).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  EXPECT_THAT(std::string(full.message()), HasSubstr("/dev/full"));
  const TempDir dir;
  EXPECT_EQ(WriteSafetensors(dir / "no/x", tensors, {}).status().code(), absl::StatusCode::kNotFound);
}

struct Hostile {
  const char* label;
  std::string bytes;
  const char* problem;
};

std::vector<Hostile> HostileFiles() {
  const std::string eight(8, '\0');
  const auto one = [&](const std::string& entry, const std::string& data) {
    return FileOf("{\"t\":" + entry + "}", data);
  };
  std::string huge = FileOf("{}", "");
  huge[6] = 1;
  return {
      {"empty", "", "too short"},
      {"seven_bytes", "1234567", "too short"},
      {"huge_header", huge, "its header claims"},
      {"all_ones", std::string(64, '\xFF'), "its header claims"},
      {"not_json", FileOf("{\"t\":", ""), "JSON object"},
      {"list", FileOf("[]", ""), "JSON object"},
      {"bad_utf8", FileOf("{\"\xFF\":1}", ""), "JSON object"},
      {"nested", FileOf("{\"t\":" + std::string(50000, '['), ""), "nests too deep"},
      {"repeated",
       FileOf(R"({"t":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
              R"("t":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}})",
              eight),
       "repeats the name t"},
      {"no_dtype", one(R"({"shape":[1],"data_offsets":[0,8]})", eight), "needs dtype"},
      {"entry_is_number", one("7", eight), "needs dtype"},
      {"three_offsets", one(R"({"dtype":"F64","shape":[1],"data_offsets":[0,8,9]})", eight), "needs dtype"},
      {"negative_offset", one(R"({"dtype":"F64","shape":[1],"data_offsets":[-8,8]})", eight), "needs dtype"},
      {"unknown_dtype", one(R"({"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]})", eight),
       "dtype F8_E4M3 is not supported"},
      {"negative_size", one(R"({"dtype":"F64","shape":[-1],"data_offsets":[0,8]})", eight), "whole numbers"},
      {"float_size", one(R"({"dtype":"F64","shape":[1.0],"data_offsets":[0,8]})", eight), "whole numbers"},
      {"product_wraps_to_8", one(R"({"dtype":"U8","shape":[4294967296,4294967296,8],"data_offsets":[0,8]})", eight),
       "larger than any file"},
      {"strides_wrap_at_zero", one(R"({"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]})", ""),
       "larger than any file"},
      {"size_wraps_negative", one(R"({"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]})", ""),
       "larger than any file"},
      {"reversed", one(R"({"dtype":"F64","shape":[1],"data_offsets":[8,0]})", eight), "ends before it begins"},
      {"truncated", one(R"({"dtype":"F64","shape":[2],"data_offsets":[0,16]})", eight), "truncated"},
      {"offset_wraps",
       one(R"({"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]})", eight),
       "truncated"},
      {"wrong_size", one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})", eight),
       "has 8 bytes where its shape needs 4"},
      {"hole", one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", eight), "hole"},
      {"tail", one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", eight),
       "4 bytes at its end belong to no tensor"},
      {"overlap",
       FileOf(R"({"s":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
              R"("t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
              eight),
       "overlaps"},
      {"metadata_of_numbers", FileOf(R"({"__metadata__":{"a":1}})", ""), "__metadata__"},
      {"metadata_is_text", FileOf(R"({"__metadata__":"a"})", ""), "__metadata__"},
  };
}

class HostileSafetensors : public testing::TestWithParam<Hostile> {};

TEST_P(HostileSafetensors, IsRefusedWithItsName) {
  const absl::Status status = OpenStatus(GetParam().bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("x.safetensors"), HasSubstr(GetParam().problem)));
}

INSTANTIATE_TEST_SUITE_P(Files, HostileSafetensors, testing::ValuesIn(HostileFiles()),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(SafetensorsFile, RefusesWhatIsNoFile) {
  const TempDir dir;
  EXPECT_EQ(SafetensorsFile::Open(dir / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(SafetensorsFile::Open(dir.path()).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(mkfifo((dir / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(SafetensorsFile::Open(dir / "pipe").status().code(), absl::StatusCode::kInvalidArgument);
}

// Bytes changed at random, and cut: every answer is an error, or tensors within the file.
TEST(SafetensorsFile, SurvivesDamagedBytes) {
  const TempDir dir;
  const auto path = dir / "x.safetensors";
  ASSERT_TRUE(
      WriteSafetensors(path, {{"a", at::ones({2, 3})}, {"b", at::ones({4}, at::kLong)}}, {{"format", "pt"}}).ok());
  const std::string good = ReadText(path);
  std::mt19937 random(7);
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = good;
    const size_t header_end = bytes.size() - 56;
    for (int i = 0; i < 2; ++i) bytes[random() % header_end] = static_cast<char>(random());
    if (round % 3 == 0) bytes.resize(random() % bytes.size());
    WriteText(path, bytes);
    const auto file = SafetensorsFile::Open(path);
    if (!file.ok()) continue;
    ++accepted;
    for (const SafetensorsEntry& entry : (*file)->entries()) {
      ASSERT_LE(entry.end, bytes.size());
      (*file)->View(entry).to(at::kDouble).sum();  // reads every byte
    }
  }
  EXPECT_LT(accepted, 3000);
  EXPECT_GT(accepted, 0);  // names and metadata may change
}

class ShardedModel : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteSafetensors(dir_ / "model-00001-of-00002.safetensors", {{"a", at::full({2}, 1.0F)}}, {}).ok());
    ASSERT_TRUE(WriteSafetensors(dir_ / "model-00002-of-00002.safetensors",
                                 {{"b", at::full({3}, 2.0F)}, {"ids", at::zeros({3}, at::kLong)}}, {})
                    .ok());
    WriteIndex(R"({"a": "model-00001-of-00002.safetensors",
                   "b": "model-00002-of-00002.safetensors",
                   "ids": "model-00002-of-00002.safetensors"})");
  }
  void WriteIndex(const std::string& weight_map) {
    WriteText(dir_ / "model.safetensors.index.json",
              R"({"metadata": {"total_size": 20}, "weight_map": )" + weight_map + "}");
  }
  std::string Problem() { return std::string(ModelWeightsReader::Open(dir_.path()).status().message()); }
  TempDir dir_;
};

TEST_F(ShardedModel, IsReadThroughItsIndex) {
  const auto reader = ModelWeightsReader::Open(dir_.path());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_THAT((*reader)->Names(), ElementsAre("a", "b", "ids"));
  EXPECT_TRUE((*reader)->Has("a"));
  EXPECT_FALSE((*reader)->Has("c"));
  const auto b = (*reader)->Get("b", {3});
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_TRUE(at::equal(*b, at::full({3}, 2.0F)));

  const absl::Status missing = (*reader)->Get("c", {3}).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("no tensor c"));
  const absl::Status shape = (*reader)->Get("b", {3, 1}).status();
  EXPECT_EQ(shape.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(shape.message()),
              AllOf(HasSubstr("model-00002-of-00002"), HasSubstr("[3]"), HasSubstr("[3, 1]")));
  EXPECT_THAT(std::string((*reader)->Get("ids", {3}).status().message()), HasSubstr("dtype I64"));
}

TEST_F(ShardedModel, NamesAMissingShard) {
  std::filesystem::remove(dir_ / "model-00002-of-00002.safetensors");
  EXPECT_THAT(Problem(),
              AllOf(HasSubstr("model-00002-of-00002.safetensors"), HasSubstr("named in model.safetensors.index.json")));
}

TEST_F(ShardedModel, NamesATensorThatIsNotWhereTheIndexSays) {
  WriteIndex(R"({"b": "model-00001-of-00002.safetensors"})");
  EXPECT_THAT(Problem(), AllOf(HasSubstr("index.json: b: is not in model-00001-of-00002.safetensors")));
}

TEST_F(ShardedModel, RefusesPathsInTheIndex) {
  for (const char* name : {"../secret.safetensors", "/etc/passwd", "", ".."}) {
    WriteIndex(json({{"a", name}}).dump());
    EXPECT_FALSE(ModelWeightsReader::Open(dir_.path()).ok()) << name;
  }
  WriteIndex(R"({"a": 5})");
  EXPECT_THAT(Problem(), HasSubstr("index.json: a: must be the name of a file"));
  WriteIndex("[]");
  EXPECT_THAT(Problem(), HasSubstr("weight_map"));
}

TEST_F(ShardedModel, SingleFileWinsAsInTransformers) {
  ASSERT_TRUE(WriteSafetensors(dir_ / "model.safetensors", {{"z", at::ones({1})}}, {}).ok());
  const auto reader = ModelWeightsReader::Open(dir_.path());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_THAT((*reader)->Names(), ElementsAre("z"));
}

// What has been read and dropped takes no memory, so that loading streams.
TEST(ModelWeightsReader, DropsWhatWasRead) {
  const TempDir dir;
  const auto mapped_bytes = [] {
    std::ifstream file("/proc/self/status");
    for (std::string word; file >> word;) {
      int64_t kilobytes = 0;
      if (word == "RssFile:" && file >> kilobytes) return kilobytes * 1024;
    }
    return int64_t{-1};
  };
  const int64_t megabyte = 1 << 20;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (int i = 0; i < 16; ++i) tensors.emplace_back(std::to_string(i), at::full({megabyte}, i, at::kFloat));
  ASSERT_TRUE(WriteSafetensors(dir / "model.safetensors", tensors, {}).ok());
  for (const bool drop : {false, true}) {
    const auto reader = ModelWeightsReader::Open(dir.path());
    ASSERT_TRUE(reader.ok()) << reader.status();
    const int64_t before = mapped_bytes();
    ASSERT_GE(before, 0);
    for (const auto& [name, tensor] : tensors) {
      EXPECT_TRUE(at::equal(*(*reader)->Get(name, {megabyte}), tensor));
      if (drop) (*reader)->Drop(name);
    }
    const int64_t held = mapped_bytes() - before;
    EXPECT_TRUE(drop ? held < 8 * megabyte : held >= 60 * megabyte) << held;
  }
}

TEST(ModelWeightsReader, RefusesPickleByName) {
  const TempDir dir;
  const auto problem = [&] { return std::string(ModelWeightsReader::Open(dir.path()).status().message()); };
  EXPECT_THAT(problem(), AllOf(HasSubstr("neither model.safetensors nor"), testing::Not(HasSubstr("pickle"))));
  WriteText(dir / "pytorch_model.bin", "\x80\x02");
  EXPECT_THAT(problem(), AllOf(HasSubstr("pytorch_model.bin is a pickle"), HasSubstr("safe_serialization=True")));
}

}  // namespace
}  // namespace simpo
