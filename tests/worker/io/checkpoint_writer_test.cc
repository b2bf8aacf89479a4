#include "worker/shard/checkpoint_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>

#include "common/file_system.h"
#include "tests/worker/io/saved_checkpoints.h"
#include "tests/worker/io/test_files.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

// A disk whose writes wait until they are let through.
class SlowDisk : public FileSystem {
 public:
  ssize_t Write(int fd, const void* data, size_t size) override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_; });
    return FileSystem::Write(fd, data, size);
  }
  void LetThrough() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

// Training goes on, and changes what was saved, while not a byte has been written.
TEST(CheckpointWriter, WritesTheSnapshotNotWhatCameAfter) {
  for (const Layout& layout :
       {Layout{2, 1}, Layout{2, 0}, Layout{3, 3, at::kBFloat16}, Layout{2, 2, at::kFloat, true}}) {
    SCOPED_TRACE(testing::Message() << layout.ranks << " ranks, stage " << layout.zero_stage);
    const TempDir dir;
    SlowDisk disk;
    const ScopedFileSystem scoped(disk);
    ThreadWorld::Run(layout.ranks, [&](Collectives& comm) {
      ShardedParams params(TinyConfig(), layout.Sharding(), comm);
      Fill(params, comm.rank(), 0.25);
      CheckpointWriter writer({.checkpoints_dir = dir.path()}, comm);
      ASSERT_TRUE(writer.Begin(params, SomeState(5, 0.25), /*in_background=*/true).ok());
      EXPECT_TRUE(writer.under_way());
      EXPECT_FALSE(writer.shard_done());
      Fill(params, comm.rank(), 0.5);
      comm.Barrier();
      EXPECT_FALSE(fs::exists(dir / "step-000005"));
      disk.LetThrough();
      const auto report = writer.Finish();
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_TRUE(report->in_background);
      EXPECT_GT(report->bytes, 0);
      EXPECT_EQ(report->path, dir / "step-000005");
      EXPECT_FALSE(writer.under_way());
      // The next one, by the same writer.
      ASSERT_TRUE(writer.Begin(params, SomeState(6, 0.5), /*in_background=*/true).ok());
      ASSERT_TRUE(writer.Finish().ok());
    });
    EXPECT_THAT(NamesIn(dir.path()), ElementsAre("step-000005", "step-000006"));
    ExpectLoads(dir / "step-000005", {}, 0.25);
    ExpectLoads(dir / "step-000006", {.ranks = 3, .zero_stage = 3}, 0.5);
  }
}

TEST(CheckpointWriter, WritesAtOnceWhereMemoryIsShort) {
  const TempDir dir;
  ThreadWorld::Run(2, [&](Collectives& comm) {
    ShardedParams params(TinyConfig(), {}, comm);
    Fill(params, comm.rank());
    int64_t available = 0;
    CheckpointWriter writer({.checkpoints_dir = dir.path(), .available_memory = [&] { return available; }}, comm);
    ASSERT_TRUE(writer.Begin(params, SomeState(1), true).ok());
    EXPECT_TRUE(writer.shard_done());
    const int64_t bytes = writer.Finish()->bytes;
    // Both ranks are on this host: room for one is not enough.
    for (const auto& [room, in_background] : {std::pair(bytes * 3 / 2, false), std::pair(bytes * 5 / 2, true)}) {
      available = room;
      ASSERT_TRUE(writer.Begin(params, SomeState(2), true).ok());
      EXPECT_EQ(writer.Finish()->in_background, in_background);
    }
  });
  ExpectLoads(dir / "step-000002", {});
  EXPECT_GT(AvailableMemory(), 1 << 20);
}

TEST(CheckpointWriter, ARunThatEndsGivesUpWhatIsUnderWay) {
  const TempDir dir;
  Save(dir.path(), 1, {.ranks = 2}, 0.25);
  SlowDisk disk;
  {
    const ScopedFileSystem scoped(disk);
    ThreadWorld::Run(2, [&](Collectives& comm) {
      ShardedParams params(TinyConfig(), {}, comm);
      CheckpointWriter writer({.checkpoints_dir = dir.path()}, comm);
      ASSERT_TRUE(writer.Begin(params, SomeState(2), true).ok());
      comm.Barrier();
      disk.LetThrough();
    });
  }
  EXPECT_EQ(**LatestCheckpoint(dir.path(), nullptr), dir / "step-000001");
  Save(dir.path(), 3, {});
  EXPECT_THAT(NamesIn(dir.path()), ElementsAre("step-000001", "step-000003"));
}

TEST(CheckpointWriter, AnErrorOfOneRanksThreadIsAnErrorOnAll) {
  const TempDir dir;
  std::vector<absl::Status> statuses(3);
  ThreadWorld::Run(3, [&](Collectives& comm) {
    ShardedParams params(TinyConfig(), {}, comm);
    // Rank 1 looks for the folder elsewhere, as if the file system were not shared.
    CheckpointWriter writer({.checkpoints_dir = comm.rank() == 1 ? dir / "elsewhere" : dir.path()}, comm);
    ASSERT_TRUE(writer.Begin(params, SomeState(2), true).ok());
    statuses[comm.rank()] = writer.Finish().status();
    EXPECT_FALSE(writer.under_way());
  });
  EXPECT_THAT(std::string(statuses[1].message()), HasSubstr("elsewhere/step-000002.partial/shard-00001-of-00003"));
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("failed on rank 1"));
  EXPECT_EQ(statuses[2].code(), statuses[1].code());
  EXPECT_TRUE(NamesIn(dir.path()).empty());
}

}  // namespace
}  // namespace simpo
