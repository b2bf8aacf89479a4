#include "coordinator/data_dir.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "coordinator/tokens.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;

TEST(NetworkFileSystemTest, ByMagicAndForFuseByTheMountsType) {
  const std::pair<int64_t, const char*> network[] = {
      {0x6969, "nfs"},        {0xff534d42, "cifs"},   {0xfe534d42, "smb2"},     {0x517b, "smb"},
      {0x0bd00bd0, "lustre"}, {0x00c36400, "ceph"},   {0x47504653, "gpfs"},     {0x5346414f, "afs"},
      {0x73757245, "coda"},   {0x19830326, "beegfs"}, {0x20030528, "orangefs"},
  };
  for (const auto& [magic, name] : network) EXPECT_EQ(NetworkFileSystem(magic, ""), name);
  constexpr int64_t kFuse = 0x65735546;
  for (const char* type : {"fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.glusterfs", "fuse.ceph-fuse"}) {
    EXPECT_EQ(NetworkFileSystem(kFuse, type), type);
  }
  for (const char* type : {"fuseblk", "fuse.fuse-overlayfs", "fuse.ntfs-3g", ""}) {
    EXPECT_EQ(NetworkFileSystem(kFuse, type), "") << type;
  }
  // ext2/3/4, xfs, btrfs, tmpfs, overlayfs, zfs, f2fs
  for (int64_t magic : {0xef53LL, 0x58465342LL, 0x9123683eLL, 0x01021994LL, 0x794c7630LL, 0x2fc12fc1LL, 0xf2f52010LL}) {
    EXPECT_EQ(NetworkFileSystem(magic, "fuse.sshfs"), "") << magic;
  }
}

TEST(DataDirTest, ALocalFolderIsMade) {
  const TempDir dir;
  ASSERT_OK(MakeDataDir(dir / "a/b"));
  EXPECT_TRUE(std::filesystem::is_directory(dir / "a/b"));
}

TEST(DataDirTest, WhatIsInItIsItsAccountsAlone) {
  namespace fs = std::filesystem;
  const TempDir dir;
  const auto mode = [](const fs::path& path) { return static_cast<int>(fs::status(path).permissions()); };
  ASSERT_OK(MakeDataDir(dir / "new"));
  EXPECT_EQ(mode(dir / "new"), 0700);
  fs::create_directory(dir / "old");
  fs::permissions(dir / "old", static_cast<fs::perms>(0755));
  WriteText(dir / "old" / kMetricsFile, "");
  fs::permissions(dir / "old" / kMetricsFile, static_cast<fs::perms>(0644));
  ASSERT_OK(MakeDataDir(dir / "old"));
  EXPECT_EQ(mode(dir / "old"), 0755) << "it keeps its mode";
  const Stores stores = Stores::Open(dir / "old" / kJobsFile);
  int files = 0;
  for (const auto& entry : fs::directory_iterator(dir / "old")) {
    EXPECT_EQ(mode(entry.path()), 0600) << entry.path();
    ++files;
  }
  EXPECT_EQ(files, 6) << "both databases with -wal and -shm";
}

class BackupTest : public ::testing::Test {
 protected:
  BackupTest() {
    std::filesystem::create_directory(dir_ / "data");
    stores_ = Stores::Open(dir_ / "data" / kJobsFile);
  }
  void AddJob(int64_t sequence) {
    StoredJob stored{.sequence = sequence, .request_digest = "d"};
    stored.job.set_id(absl::StrCat("job", sequence));
    stored.job.set_request_id(stored.job.id());
    ASSERT_OK(stores_.jobs->InsertJob(stored));
    ASSERT_OK(stores_.database->Commit());
  }
  void AddPoint(int64_t job, int64_t step) {
    v1::StepReport report;
    report.mutable_point()->set_split("train");
    report.mutable_point()->set_step(step);
    stores_.metrics->Add(job, report);
  }
  TempDir dir_;
  Stores stores_;
};

// Every point is stored before the job that it belongs to is: so no copy may know a job without its point.
TEST_F(BackupTest, WhileOthersWriteTheTwoCopiesFitTogether) {
  std::atomic<bool> stop = false;
  std::atomic<int64_t> written = 0;
  std::thread writer([&] {
    for (int64_t job = 1; !stop; ++job) {
      AddPoint(job, 1);
      ASSERT_OK(stores_.metrics->Sync());
      AddJob(job);
      written = job;
    }
  });
  for (int i = 0; i < 5; ++i) {
    const int64_t before = written;
    EXPECT_TRUE(Eventually([&] { return written > before + 3; }));
    const int64_t known = written;
    ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / absl::StrCat("copy", i)));
    Stores copy = Stores::Open(dir_ / absl::StrCat("copy", i) / kJobsFile);
    const auto jobs = ValueOf(copy.jobs->LoadJobs());
    ASSERT_GE(static_cast<int64_t>(jobs.size()), known);
    ASSERT_OK(copy.metrics->Reconcile(jobs.back().sequence, 0));
    for (const StoredJob& job : jobs) {
      EXPECT_EQ(ValueOf(copy.metrics->ListPoints(job.sequence, "train", 0, 10)).size(), 1u) << job.sequence;
    }
  }
  stop = true;
  writer.join();
}

TEST_F(BackupTest, TokensAreCopiedForTheOwnerAlone) {
  AddJob(1);
  WriteText(dir_ / "data" / kTokensFile, "hashes");
  ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / "copy"));
  EXPECT_EQ(ReadText(dir_ / "copy" / kTokensFile), "hashes");
  EXPECT_EQ(std::filesystem::status(dir_ / "copy" / kTokensFile).permissions(),
            std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
}

// The door of a coordinator that is restored without tokens.json stays shut.
TEST_F(BackupTest, ThatTokensAreAskedForIsCopiedToo) {
  AddJob(1);
  ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / "open"));
  EXPECT_FALSE(TokenStore(dir_ / "open" / kTokensFile).Required());
  WriteText(dir_ / "data" / kTokensFile, "[]");
  ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / "asked"));
  std::filesystem::remove(dir_ / "asked" / kTokensFile);
  EXPECT_TRUE(TokenStore(dir_ / "asked" / kTokensFile).Required());
  // Also where the source has lost its file already.
  std::filesystem::rename(dir_ / "data" / kTokensFile, dir_ / "data" / "tokens.json.required");
  ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / "lost"));
  EXPECT_TRUE(TokenStore(dir_ / "lost" / kTokensFile).Required());
}

TEST_F(BackupTest, NothingIsOverwrittenAndAFailureLeavesNothing) {
  AddJob(1);
  WriteText(dir_ / "full" / "file", "mine");
  absl::Status status = BackUpDataDir(dir_ / "data", dir_ / "full");
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  status = BackUpDataDir(dir_ / "nowhere", dir_ / "copy");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("--data-dir"));
  stores_ = {};
  WriteText(dir_ / "data" / kMetricsFile, std::string(4096, 'x'));
  status = BackUpDataDir(dir_ / "data", dir_ / "copy");
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_FALSE(std::filesystem::exists(dir_ / "copy"));
  size_t entries = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) entries += !entry.path().empty();
  EXPECT_EQ(entries, 2u) << "data and full";
  std::filesystem::create_directory(dir_ / "empty");
  std::filesystem::remove(dir_ / "data" / kMetricsFile);
  ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / "empty/"));
  EXPECT_EQ(ValueOf(Stores::Open(dir_ / "empty" / kJobsFile).jobs->LoadJobs()).size(), 1u);
}

}  // namespace
}  // namespace simpo
