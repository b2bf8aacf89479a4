#include "common/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace simpo {
namespace {

using ::testing::MatchesRegex;

TEST(Log, OneCallIsOneLine) {
  ::testing::internal::CaptureStderr();
  LOG_INFO("first\nsecond");
  LOG_ERROR("third");
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              MatchesRegex("[-0-9]+T[:0-9]+\\.[0-9][0-9][0-9]Z I first\\\\nsecond\n"
                           "[-0-9]+T[:0-9]+\\.[0-9][0-9][0-9]Z E third\n"));
}

TEST(Log, LevelsBelowTheOneThatIsSetAreLeftOut) {
  ::testing::internal::CaptureStderr();
  LOG_DEBUG("hidden");
  SetLogLevel(LogLevel::kError);
  LOG_WARNING("hidden");
  LOG_ERROR("seen");
  SetLogLevel(LogLevel::kDebug);
  LOG_DEBUG("seen");
  SetLogLevel(LogLevel::kInfo);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), MatchesRegex("[^\n]* E seen\n[^\n]* D seen\n"));
}

}  // namespace
}  // namespace simpo
