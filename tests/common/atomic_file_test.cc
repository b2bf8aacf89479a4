#include "common/atomic_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <fstream>
#include <thread>
#include <vector>

#include "tests/temp_dir.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class AtomicFile : public ::testing::Test {
 protected:
  std::vector<std::string> Names() {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename());
    return names;
  }

  const TempDir temporary_;
  const fs::path folder_ = temporary_.path();
};

TEST_F(AtomicFile, WritesAndReplaces) {
  const fs::path path = folder_ / "file";
  ASSERT_TRUE(WriteFileAtomically(path, "first").ok());
  ASSERT_TRUE(WriteFileAtomically(path, std::string("se\0cond", 7)).ok());
  EXPECT_EQ(*ReadFile(path, 100), std::string("se\0cond", 7));
  EXPECT_THAT(Names(), ::testing::ElementsAre("file"));
}

TEST_F(AtomicFile, KeepsTheModeAsked) {
  const fs::path path = folder_ / "secret";
  ASSERT_TRUE(WriteFileAtomically(path, "x", 0600).ok());
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(AtomicFile, ErrorsNameThePathAndLeaveNothing) {
  EXPECT_EQ(ReadFile(folder_ / "none", 10).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(ReadFile(folder_ / "none", 10).status().message()), HasSubstr((folder_ / "none").string()));
  EXPECT_THAT(std::string(ReadFile(folder_, 10).status().message()), HasSubstr("is a folder"));
  EXPECT_EQ(WriteFileAtomically(folder_ / "no" / "file", "x").code(), absl::StatusCode::kNotFound);
  fs::create_directories(folder_ / "taken" / "inside");
  EXPECT_FALSE(WriteFileAtomically(folder_ / "taken", "x").ok());
  EXPECT_THAT(Names(), ::testing::ElementsAre("taken"));
}

TEST_F(AtomicFile, SizeLimit) {
  std::ofstream(folder_ / "ten") << "0123456789";
  EXPECT_EQ(*ReadFile(folder_ / "ten", 10), "0123456789");
  EXPECT_EQ(ReadFile(folder_ / "ten", 9).status().code(), absl::StatusCode::kOutOfRange);
}

TEST_F(AtomicFile, AReaderSeesOneWriteOrTheOther) {
  const fs::path path = folder_ / "file";
  const std::string a(100000, 'a');
  const std::string b(200000, 'b');
  ASSERT_TRUE(WriteFileAtomically(path, a).ok());
  std::atomic<bool> failed = false;
  std::vector<std::thread> writers;
  for (const std::string* content : {&a, &b}) {
    writers.emplace_back([&, content] {
      for (int i = 0; i < 10; ++i) failed = failed || !WriteFileAtomically(path, *content).ok();
    });
  }
  for (int i = 0; i < 100; ++i) {
    const absl::StatusOr<std::string> seen = ReadFile(path, 1 << 20);
    EXPECT_TRUE(seen.ok() && (*seen == a || *seen == b));
  }
  for (std::thread& writer : writers) writer.join();
  EXPECT_FALSE(failed);
  EXPECT_THAT(Names(), ::testing::ElementsAre("file"));
}

}  // namespace
}  // namespace simpo
