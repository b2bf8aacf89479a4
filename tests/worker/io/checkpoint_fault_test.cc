// A disk that fails, or a machine that stops, at every call that a checkpoint or an export makes.
#include <errno.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "common/atomic_file.h"
#include "common/file_system.h"
#include "tests/fault_file_system.h"
#include "tests/worker/io/saved_checkpoints.h"
#include "tests/worker/io/test_files.h"
#include "worker/shard/checkpoint_writer.h"
#include "worker/shard/export_hf.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::AnyOf;
using testing::Eq;
using testing::HasSubstr;
using Survives = FaultFileSystem::Survives;

const HfFiles kHfFiles = {{"config.json", TinyConfigJson().dump()}, {"tokenizer.json", "{}"}};

// A save of one step, whose content `shift` names, on `ranks` ranks; rank 0's status.
struct SaveOf {
  int64_t step = 2;
  double shift = 0.5;
  int ranks = 1;
  bool in_background = false;
  int keep = 0;  // then prunes

  absl::Status operator()(const fs::path& dir) const {
    std::vector<absl::Status> statuses(ranks);
    ThreadWorld::Run(ranks, [&](Collectives& comm) {
      ShardedParams params(TinyConfig(), {}, comm);
      Fill(params, comm.rank(), shift);
      CheckpointWriter writer({.checkpoints_dir = dir, .hf_files = kHfFiles}, comm);
      absl::Status& status = statuses[comm.rank()];
      status = writer.Begin(params, SomeState(step, shift), in_background);
      if (status.ok()) status = writer.Finish().status();
    });
    for (const absl::Status& status : statuses) EXPECT_EQ(status.code(), statuses[0].code());
    if (statuses[0].ok() && keep > 0) return PruneCheckpoints(dir, keep, {});
    return statuses[0];
  }
};

using StepAndShift = std::pair<int64_t, double>;

// What the newest good checkpoint of `dir` holds, every element compared.
std::optional<StepAndShift> Latest(const fs::path& dir) {
  const auto path = LatestCheckpoint(dir, nullptr);
  EXPECT_TRUE(path.ok()) << path.status();
  if (!path.ok() || !path->has_value()) return std::nullopt;
  const TrainerState state = ReadManifest(**path)->state;
  ExpectLoads(**path, {}, state.extra.at("shift"));
  return StepAndShift{state.step, state.extra.at("shift")};
}

// What was there before a save that a fault hits, and what may be there after it.
struct Scene {
  std::vector<SaveOf> before;
  SaveOf save;
  std::optional<StepAndShift> Before() const {
    if (before.empty()) return std::nullopt;
    return StepAndShift{before.back().step, before.back().shift};
  }
  std::optional<StepAndShift> After() const { return StepAndShift{save.step, save.shift}; }
  fs::path Make(const fs::path& root) const {
    fs::create_directories(root);
    for (const SaveOf& earlier : before) EXPECT_TRUE(earlier(root / "checkpoints").ok());
    return root / "checkpoints";
  }
};

void ExpectTheNextSaveWorks(const fs::path& dir) {
  const SaveOf next{.step = 9, .shift = 0.75};
  FaultFileSystem no_faults(dir.parent_path());  // and no waiting for the real disk
  const ScopedFileSystem scoped(no_faults);
  const absl::Status status = next(dir);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(Latest(dir), StepAndShift(9, 0.75));
  for (const std::string& name : NamesIn(dir)) EXPECT_FALSE(name.ends_with(".partial")) << name;
}

// Returns how many calls the save makes.
int64_t CrashAtEveryCall(const Scene& scene) {
  const TempDir temp;
  scene.Make(temp / "start");
  unsigned seed = 0;
  for (int64_t n = 1;; ++n) {
    SCOPED_TRACE(testing::Message() << "crash at call " << n);
    const fs::path root = temp / "run";
    fs::remove_all(root);
    fs::copy(temp / "start", root, fs::copy_options::recursive);
    FaultFileSystem faults(root);
    faults.CrashAt(n);
    absl::Status status;
    {
      const ScopedFileSystem scoped(faults);
      status = scene.save(root / "checkpoints");
    }
    for (const Survives survives : {Survives::kNothing, Survives::kNames, Survives::kSome, Survives::kSome}) {
      const fs::path disk = temp / "disk";
      fs::remove_all(disk);
      faults.Recover(disk, survives, ++seed);
      if (status.ok()) {
        EXPECT_EQ(Latest(disk / "checkpoints"), scene.After());
      } else {
        EXPECT_THAT(Latest(disk / "checkpoints"), AnyOf(Eq(scene.Before()), Eq(scene.After()))) << status;
      }
      ExpectTheNextSaveWorks(disk / "checkpoints");
    }
    if (testing::Test::HasFailure()) return n;
    if (!faults.was_hit()) {
      EXPECT_TRUE(status.ok()) << status;
      return faults.calls();
    }
  }
}

TEST(CheckpointFaults, ACrashAtAnyCallLeavesTheLastGoodOne) {
  const SaveOf first{.step = 1, .shift = 0.25};
  const std::map<std::string, Scene> scenes = {
      {"the first of a run", {{}, {}}},
      {"beside another", {{first}, {}}},
      {"by two ranks in the background", {{first}, {.ranks = 2, .in_background = true}}},
      {"in place of one of the same step", {{first, {.step = 2, .shift = 0.25}}, {}}},
      {"with two older ones pruned", {{first, {.step = 2, .shift = 0.25}}, {.step = 3, .keep = 1}}},
  };
  for (const auto& [name, scene] : scenes) {
    SCOPED_TRACE(name);
    const int64_t calls = CrashAtEveryCall(scene);
    EXPECT_GE(calls, 30);
    std::printf("checkpoint %s: %ld calls, a crash at each\n", name.c_str(), static_cast<long>(calls));
  }
}

TEST(CheckpointFaults, AnErrorOfAnyCallIsSaidAndLeavesTheLastGoodOne) {
  for (const int error : {ENOSPC, EIO}) {
    for (const int ranks : {1, 2}) {
      const Scene scene{{{.step = 1, .shift = 0.25, .ranks = 2}}, {.ranks = ranks, .in_background = ranks == 2}};
      const TempDir temp;
      scene.Make(temp / "start");
      for (int64_t n = 1;; ++n) {
        SCOPED_TRACE(testing::Message() << strerror(error) << " at call " << n << " on " << ranks << " ranks");
        const fs::path dir = temp / "run/checkpoints";
        fs::remove_all(temp / "run");
        fs::copy(temp / "start", temp / "run", fs::copy_options::recursive);
        FaultFileSystem faults(temp / "run");
        faults.FailAt(n, error);
        absl::Status status;
        {
          const ScopedFileSystem scoped(faults);
          status = scene.save(dir);
        }
        if (!faults.was_hit()) {
          EXPECT_TRUE(status.ok()) << status;
          EXPECT_GE(n, 30);
          break;
        }
        ASSERT_FALSE(status.ok());
        const auto code = error == ENOSPC ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kUnavailable;
        EXPECT_EQ(status.code(), code) << status;
        EXPECT_THAT(std::string(status.message()), HasSubstr((temp / "run").string()));
        EXPECT_THAT(Latest(dir), AnyOf(Eq(scene.Before()), Eq(scene.After()))) << status;
        for (const std::string& name : NamesIn(dir)) EXPECT_FALSE(name.ends_with(".partial")) << name << status;
        ExpectTheNextSaveWorks(dir);
        if (HasFailure()) return;
      }
    }
  }
}

// final/ is the old one or the new one, whole; between two renames the old one stands beside it.
TEST(CheckpointFaults, ACrashAtAnyCallLeavesAWholeExport) {
  const TempDir temp;
  fs::create_directories(temp / "start/model");
  WriteText(temp / "start/model/config.json", TinyConfigJson().dump());
  const auto export_to = [](const fs::path& root, double shift) {
    const std::unique_ptr<Collectives> comm = MakeSingleRankCollectives();
    ShardedParams params(TinyConfig(), {}, *comm);
    Fill(params, 0, shift);
    return ExportHf(root / "final", params, TinyConfig(), root / "model", root / "model", "template", *comm,
                    /*max_file_bytes=*/4000);
  };
  const auto content_of = [](const fs::path& folder) {
    std::map<std::string, std::string> content;
    for (const std::string& name : NamesIn(folder)) content[name] = ReadText(folder / name);
    return content;
  };
  fs::copy(temp / "start", temp / "new", fs::copy_options::recursive);
  ASSERT_TRUE(export_to(temp / "start", 0.25).ok());
  ASSERT_TRUE(export_to(temp / "new", 0.5).ok());
  const auto old_content = content_of(temp / "start/final"), new_content = content_of(temp / "new/final");
  ASSERT_NE(old_content, new_content);
  for (int64_t n = 1;; ++n) {
    SCOPED_TRACE(testing::Message() << "crash at call " << n);
    const fs::path root = temp / "run", disk = temp / "disk";
    fs::remove_all(root);
    fs::copy(temp / "start", root, fs::copy_options::recursive);
    FaultFileSystem faults(root);
    faults.CrashAt(n);
    absl::Status status;
    {
      const ScopedFileSystem scoped(faults);
      status = export_to(root, 0.5);
    }
    for (const Survives survives : {Survives::kNothing, Survives::kNames, Survives::kSome}) {
      fs::remove_all(disk);
      faults.Recover(disk, survives, static_cast<unsigned>(n));
      const fs::path found = fs::exists(disk / "final") ? disk / "final" : disk / "final.old";
      EXPECT_THAT(content_of(found), AnyOf(Eq(old_content), Eq(new_content)));
      if (status.ok()) {
        EXPECT_EQ(content_of(disk / "final"), new_content);
      }
      EXPECT_TRUE(export_to(disk, 0.5).ok());
      EXPECT_EQ(content_of(disk / "final"), new_content);
    }
    if (HasFailure()) return;
    if (!faults.was_hit()) {
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_GE(n, 60);
      return;
    }
  }
}

TEST(CheckpointFaults, ACrashAtAnyCallLeavesOneContentOfAFile) {
  const TempDir temp;
  for (int64_t n = 1;; ++n) {
    fs::remove_all(temp / "run");
    fs::create_directory(temp / "run");
    WriteText(temp / "run/file", "old");
    FaultFileSystem faults(temp / "run");
    faults.CrashAt(n);
    absl::Status status;
    {
      const ScopedFileSystem scoped(faults);
      status = WriteFileAtomically(temp / "run/file", "new content");
    }
    for (const Survives survives : {Survives::kNothing, Survives::kNames, Survives::kSome}) {
      fs::remove_all(temp / "disk");
      faults.Recover(temp / "disk", survives, static_cast<unsigned>(n));
      EXPECT_THAT(ReadText(temp / "disk/file"), AnyOf("old", "new content"));
      if (status.ok()) {
        EXPECT_EQ(ReadText(temp / "disk/file"), "new content");
      }
    }
    if (!faults.was_hit()) {
      EXPECT_GE(n, 6);
      return;
    }
  }
}

// Every file, and bits all over it.
TEST(CheckpointFaults, AFlippedBitAnywhereIsFound) {
  const TempDir temp;
  const fs::path dir = temp / "checkpoints";
  ASSERT_TRUE((SaveOf{.step = 1, .shift = 0.25}(dir).ok()));
  ASSERT_TRUE((SaveOf{.step = 2, .ranks = 2}(dir).ok()));
  int64_t flips = 0;
  for (const auto& item : fs::recursive_directory_iterator(dir / "step-000002")) {
    if (!item.is_regular_file()) continue;
    const std::string good = ReadText(item.path());
    for (size_t i = 0; i < 100; ++i) {
      const size_t byte = i * (good.size() - 1) / 99;
      std::string bad = good;
      bad[byte] = static_cast<char>(bad[byte] ^ (1 << i % 8));
      WriteText(item.path(), bad);
      std::vector<std::string> skipped;
      const auto latest = LatestCheckpoint(dir, &skipped);
      ASSERT_TRUE(latest.ok() && latest->has_value());
      EXPECT_EQ(**latest, dir / "step-000001") << item.path() << " byte " << byte;
      EXPECT_THAT(skipped, testing::ElementsAre(HasSubstr(item.path().string())));
      ++flips;
    }
    WriteText(item.path(), good);
  }
  EXPECT_EQ(flips, 500);
  EXPECT_EQ(Latest(dir), StepAndShift(2, 0.5));
}

}  // namespace
}  // namespace simpo
