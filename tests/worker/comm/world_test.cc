// How ranks find each other: the environment, and meeting over TCP in processes of their own.
#include "worker/comm/world.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <thread>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

using testing::AllOf;
using testing::Each;
using testing::HasSubstr;
using testing::StartsWith;
using Env = std::map<std::string, std::string>;
using StartedBy = RankInfo::StartedBy;

std::string g_program;  // this one

GetEnv From(const Env& env) {
  return [&env](const char* name) { return env.contains(name) ? env.at(name).c_str() : nullptr; };
}

void ExpectRank(const Env& env, StartedBy started_by, int rank, int world_size, int local_rank, int local_size) {
  const absl::StatusOr<RankInfo> info = RankFromEnvironment(From(env));
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->started_by, started_by);
  EXPECT_EQ(info->rank, rank);
  EXPECT_EQ(info->world_size, world_size);
  EXPECT_EQ(info->local_rank, local_rank);
  EXPECT_EQ(info->local_size, local_size);
}

std::string RankError(const Env& env) { return std::string(RankFromEnvironment(From(env)).status().message()); }

TEST(RankFromEnvironmentTest, KnowsWhoStartedIt) {
  ExpectRank({}, StartedBy::kNobody, 0, 1, 0, 1);
  const Env mpirun = {{"OMPI_COMM_WORLD_RANK", "5"},
                      {"OMPI_COMM_WORLD_SIZE", "8"},
                      {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                      {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
  ExpectRank(mpirun, StartedBy::kMpi, 5, 8, 1, 4);
  // In a pod or under torchrun mpirun has the last word.
  Env both = mpirun;
  both.insert({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"JOB_COMPLETION_INDEX", "7"}});
  ExpectRank(both, StartedBy::kMpi, 5, 8, 1, 4);
  ExpectRank({{"SLURM_PROCID", "3"}, {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "1"}, {"PMIX_RANK", "3"}},
             StartedBy::kMpi, 3, 4, 1, 2);
  // A shell within an allocation, without srun.
  ExpectRank({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}}, StartedBy::kNobody, 0, 1, 0, 1);
  ExpectRank({{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "2"}},
             StartedBy::kEnvironment, 3, 4, 1, 2);
  ExpectRank({{"JOB_COMPLETION_INDEX", "2"}, {"WORLD_SIZE", "4"}}, StartedBy::kEnvironment, 2, 4, 0, 1);
  ExpectRank({{"RANK", ""}, {"WORLD_SIZE", ""}}, StartedBy::kNobody, 0, 1, 0, 1);
}

TEST(RankFromEnvironmentTest, ErrorsNameTheVariable) {
  EXPECT_THAT(RankError({{"RANK", "4"}, {"WORLD_SIZE", "4"}}),
              HasSubstr("RANK is '4'; it must be a number from 0 to 3"));
  EXPECT_THAT(RankError({{"RANK", "one"}, {"WORLD_SIZE", "4"}}), HasSubstr("RANK is 'one'"));
  EXPECT_THAT(RankError({{"RANK", "0"}, {"WORLD_SIZE", "0"}}), HasSubstr("WORLD_SIZE is '0'"));
  EXPECT_THAT(RankError({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "-1"}}), HasSubstr("LOCAL_RANK is '-1'"));
  EXPECT_THAT(RankError({{"WORLD_SIZE", "2"}}), HasSubstr("RANK is not set"));
  // Else every pod would train the whole job alone.
  EXPECT_THAT(RankError({{"JOB_COMPLETION_INDEX", "2"}}), HasSubstr("WORLD_SIZE is not set"));
}

TEST(MeetingPlaceTest, ComesFromTheEnvironment) {
  EXPECT_THAT(MeetingPlaceFromEnvironment(From({})).status().message(), HasSubstr("MASTER_ADDR is not set"));
  const Env plain = {{"MASTER_ADDR", "node-0"}, {"MASTER_PORT", "1234"}};
  absl::StatusOr<MeetingPlace> place = MeetingPlaceFromEnvironment(From(plain));
  ASSERT_TRUE(place.ok());
  EXPECT_EQ(place->host, "node-0");
  EXPECT_EQ(place->port, 1234);
  EXPECT_TRUE(place->served_by_rank_0);
  Env torchrun = plain;
  torchrun.insert({{"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "3"}});
  place = MeetingPlaceFromEnvironment(From(torchrun));
  ASSERT_TRUE(place.ok());
  EXPECT_FALSE(place->served_by_rank_0);
  EXPECT_EQ(place->round, "3");
  const Env bad = {{"MASTER_ADDR", "node-0"}, {"MASTER_PORT", "70000"}};
  EXPECT_THAT(MeetingPlaceFromEnvironment(From(bad)).status().message(), HasSubstr("MASTER_PORT is '70000'"));
}

TEST(NameRanksTest, IsShort) {
  EXPECT_EQ(NameRanks({3}, 4), "rank 3 of 4");
  EXPECT_EQ(NameRanks({0, 1}, 4), "ranks 0, 1 of 4");
  EXPECT_EQ(NameRanks({1, 4, 5, 6, 9}, 12), "ranks 1, 4-6, 9 of 12");
}

int FreePort() {
  const int file = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  EXPECT_EQ(bind(file, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  socklen_t size = sizeof(address);
  getsockname(file, reinterpret_cast<sockaddr*>(&address), &size);
  close(file);
  return ntohs(address.sin_port);
}

// Processes of this program, each one rank; see main().
class MeetOverTcpTest : public testing::Test {
 protected:
  void Start(const std::string& rank, int world_size, int timeout_ms = 60'000) {
    const std::string command =
        absl::StrCat("exec env RANK=", rank, " WORLD_SIZE=", world_size, " MASTER_ADDR=127.0.0.1 MASTER_PORT=", port_,
                     " OMP_NUM_THREADS=1 '", g_program, "' --meet ", timeout_ms, " 2>/dev/null");
    ranks_.push_back(popen(command.c_str(), "r"));
    ASSERT_NE(ranks_.back(), nullptr);
  }
  // What the processes have printed, in the order in which they were started.
  std::vector<std::string> Results() {
    std::vector<std::string> results;
    for (FILE* rank : ranks_) {
      std::string text;
      for (int c = 0; (c = std::fgetc(rank)) != EOF;) text.push_back(static_cast<char>(c));
      pclose(rank);
      results.push_back(text);
    }
    return results;
  }

  const int port_ = FreePort();
  std::vector<FILE*> ranks_;
};

TEST_F(MeetOverTcpTest, EveryRankGetsTheBytesOfRank0) {
  for (const char* rank : {"2", "1", "3", "0"}) Start(rank, 4);  // the others are there before rank 0
  EXPECT_THAT(Results(), Each("met: bytes of rank 0\n"));
}

TEST_F(MeetOverTcpTest, LateRanksAreWaitedFor) {
  Start("0", 2);
  // Late: rank 0 serves already.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  bool serves = false;
  while (!serves && std::chrono::steady_clock::now() < deadline) {
    const int file = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(static_cast<uint16_t>(port_)), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    serves = connect(file, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
    close(file);
    std::this_thread::yield();
  }
  ASSERT_TRUE(serves);
  Start("1", 2);
  EXPECT_THAT(Results(), Each("met: bytes of rank 0\n"));
}

TEST_F(MeetOverTcpTest, MissingRanksAreNamed) {
  for (const char* rank : {"0", "2"}) Start(rank, 5, 6000);
  const std::vector<std::string> results = Results();
  EXPECT_THAT(results[0], AllOf(StartsWith("UNAVAILABLE"), HasSubstr("ranks 1, 3, 4 of 5 did not come"),
                                HasSubstr(absl::StrCat("127.0.0.1:", port_))));
  // Rank 0 may leave first, and its store with it.
  EXPECT_THAT(results[1], AllOf(StartsWith("UNAVAILABLE"), testing::AnyOf(HasSubstr("ranks 1, 3, 4 of 5 did not come"),
                                                                          HasSubstr("lost the meeting"))));
}

TEST_F(MeetOverTcpTest, WithoutRank0TheOthersSayWhereTheyLooked) {
  Start("1", 2, 2000);
  EXPECT_THAT(Results()[0], AllOf(StartsWith("UNAVAILABLE"), HasSubstr("rank 1 cannot reach rank 0 at 127.0.0.1:"),
                                  HasSubstr("MASTER_ADDR")));
}

TEST_F(MeetOverTcpTest, AWrongWorldSizeIsAnErrorEverywhere) {
  Start("0", 3);
  Start("1", 3);
  Start("2", 4);
  EXPECT_THAT(Results(), Each(AllOf(HasSubstr("disagree on the size of the gang"), HasSubstr("3 ranks says"),
                                    HasSubstr("4 ranks says"))));
}

TEST_F(MeetOverTcpTest, TwoRanksWithOneNumberAreAnErrorEverywhere) {
  Start("0", 3);
  Start("1", 3);
  Start("1", 3);
  EXPECT_THAT(Results(),
              Each(AllOf(HasSubstr("two processes have one number: rank 1 on "), HasSubstr(" and rank 1 on "))));
}

TEST_F(MeetOverTcpTest, TwoRanks0CannotServeOnePlace) {
  Start("0", 2, 6000);
  Start("0", 2, 6000);
  const std::vector<std::string> results = Results();
  EXPECT_THAT(results,
              testing::Contains(AllOf(HasSubstr("rank 0 cannot serve the meeting place"), HasSubstr("only RANK 0"))));
}

int MeetAsRank(const char* timeout_ms) {
  const absl::StatusOr<RankInfo> me = RankFromEnvironment(&std::getenv);
  absl::StatusOr<MeetingPlace> place = MeetingPlaceFromEnvironment(&std::getenv);
  if (!me.ok() || !place.ok()) return 1;
  place->timeout = std::chrono::milliseconds(std::atoi(timeout_ms));
  const absl::StatusOr<std::string> bytes = MeetOverTcp(*me, *place, absl::StrCat("bytes of rank ", me->rank));
  std::printf("%s\n", bytes.ok() ? absl::StrCat("met: ", *bytes).c_str() : bytes.status().ToString().c_str());
  return 0;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--meet") return simpo::MeetAsRank(argv[2]);
  simpo::g_program = argv[0];
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
