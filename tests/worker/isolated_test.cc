#include "worker/data/isolated.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "worker/data/chat_template.h"

namespace simpo {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string ErrorOf(const absl::StatusOr<std::string>& result) { return std::string(result.status().message()); }

TEST(RunIsolated, GivesBackResultsAndErrors) {
  const std::string large(1 << 20, '\xfe');
  EXPECT_TRUE(RunIsolated({}, [&](BusyWith&) { return absl::StatusOr<std::string>(large); }).value() == large);
  const auto error =
      RunIsolated({}, [](BusyWith&) { return absl::StatusOr<std::string>(absl::NotFoundError("not here")); });
  EXPECT_EQ(error.status(), absl::NotFoundError("not here"));
  int changed = 0;
  EXPECT_TRUE(RunIsolated({}, [&](BusyWith&) { return std::to_string(++changed); }).ok());
  EXPECT_EQ(changed, 0);
}

TEST(RunIsolated, ACrashNamesThePlace) {
  const auto crash = RunIsolated({}, [](BusyWith& busy) -> absl::StatusOr<std::string> {
    busy.Set("train.jsonl:6");
    busy.Set("train.jsonl:7");
    raise(SIGSEGV);
    return std::string();
  });
  EXPECT_EQ(crash.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ErrorOf(crash), AllOf(HasSubstr("train.jsonl:7: "), HasSubstr("crashed")));
  const auto silent = RunIsolated({}, [](BusyWith&) -> absl::StatusOr<std::string> { _exit(3); });
  EXPECT_THAT(ErrorOf(silent), HasSubstr("exit status 3"));
}

TEST(RunIsolated, StandingStillIsAnError) {
  const auto stalled = RunIsolated({.stall_seconds = 1}, [](BusyWith& busy) -> absl::StatusOr<std::string> {
    busy.Set("train.jsonl:9");
    while (true) pause();
  });
  EXPECT_THAT(ErrorOf(stalled), AllOf(HasSubstr("train.jsonl:9: "), HasSubstr("no progress in 1 seconds")));
}

// A namespace that holds itself has no end: to print it overflows the stack.
TEST(RunIsolated, ATemplateThatPrintsItselfForEverCrashesAlone) {
  const auto result = RunIsolated({}, [](BusyWith& busy) -> absl::StatusOr<std::string> {
    busy.Set("train.jsonl:1");
    const auto endless = ChatTemplate::Parse("{% set ns = namespace() %}{% set ns.self = ns %}{{ ns }}");
    return (*endless)->Render(std::vector<Message>{{"user", "hi"}}, false, "", "");
  });
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ErrorOf(result), AllOf(HasSubstr("train.jsonl:1: "), HasSubstr("crashed"), HasSubstr("chat template")));
}

#ifndef __SANITIZE_ADDRESS__
// A template's instructions are counted, but one of them may double a text.
TEST(RunIsolated, ATemplateThatDoublesATextRunsOutOfItsMemory) {
  const auto result = RunIsolated({.memory_bytes = 256 << 20}, [](BusyWith& busy) -> absl::StatusOr<std::string> {
    busy.Set("train.jsonl:1");
    const auto doubling = ChatTemplate::Parse(
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}");
    const std::vector<Message> messages = {{"user", "hi"}};
    return (*doubling)->Render(messages, false, "", "");
  });
  EXPECT_THAT(ErrorOf(result),
              AllOf(HasSubstr("train.jsonl:1: "), HasSubstr("ran out of memory"), HasSubstr("256 MiB")));
}
#endif

}  // namespace
}  // namespace simpo
