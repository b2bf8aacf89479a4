// collectives_nccl.cc over the real libnccl, as far as it goes without a GPU: what a stand-in cannot show, that
// the library takes our calls and how it refuses. CUDA's side is the stand-in's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nccl.h>

#include <string>

#include "worker/comm/collectives.h"

namespace simpo {
namespace {

TEST(NcclLibrary, IsTheVersionOfItsHeader) {
  int version = 0;
  ASSERT_EQ(ncclGetVersion(&version), ncclSuccess);
  EXPECT_EQ(version, NCCL_VERSION_CODE);
  std::printf("NCCL %d.%d.%d\n", NCCL_MAJOR, NCCL_MINOR, NCCL_PATCH);
}

TEST(NcclLibrary, MakesAnIdThatIsShared) {
  ncclUniqueId first, second;
  ASSERT_EQ(ncclGetUniqueId(&first), ncclSuccess);
  ASSERT_EQ(ncclGetUniqueId(&second), ncclSuccess);
  EXPECT_NE(std::string(first.internal, sizeof(first.internal)), std::string(second.internal, sizeof(second.internal)));
}

// Without a GPU the communicator is refused, with a message that says where to look, and at once.
TEST(NcclLibrary, JoinsOrSaysWhyNot) {
  std::string shared, error;
  try {
    MakeNcclCollectives(0, 1,
                        [&](const std::string& id) {
                          shared = id;
                          return id;
                        },
                        {.connect_timeout = std::chrono::seconds(60)});
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  EXPECT_EQ(shared.size(), sizeof(ncclUniqueId));
  std::printf("%s\n", error.empty() ? "joined" : error.c_str());
  if (error.empty()) return;  // there is a GPU
  EXPECT_THAT(error, testing::HasSubstr("rank 0 of 1, joining the communicator of 1 ranks"));
  EXPECT_THAT(error, testing::HasSubstr("NCCL_DEBUG=INFO"));
  EXPECT_THAT(error, testing::Not(testing::HasSubstr("not done after")));
}

}  // namespace
}  // namespace simpo
