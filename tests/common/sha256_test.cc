#include "common/sha256.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/temp_dir.h"

namespace simpo {
namespace {

// The vectors of FIPS 180-4.
constexpr char kOfNothing[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
constexpr char kOfAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
constexpr char kOfAMillionA[] = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";

TEST(Sha256, OfText) {
  EXPECT_EQ(Sha256(""), kOfNothing);
  EXPECT_EQ(Sha256("abc"), kOfAbc);
  EXPECT_EQ(Sha256(std::string(1000000, 'a')), kOfAMillionA);
}

TEST(Sha256, OfFiles) {
  const TempDir folder;
  const std::filesystem::path path = folder / "file";
  std::ofstream(path) << std::string(1000000, 'a');
  EXPECT_EQ(*Sha256OfFile(path), kOfAMillionA);
  std::filesystem::remove(path);
  EXPECT_EQ(Sha256OfFile(path).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace simpo
