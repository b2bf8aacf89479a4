#include "worker/metrics_log.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/worker/io/test_files.h"

namespace simpo {
namespace {

TEST(MetricsLine, NumbersReadBackAsTheSameDouble) {
  const std::map<std::string, double> values = {
      {"a", 0.1 + 0.2}, {"b", 1.0 / 3}, {"c", std::numeric_limits<double>::denorm_min()}, {"d", -5e300}, {"e", 7}};
  const std::string line = MetricsLine(12, values);
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["step"], 12);
  for (const auto& [name, value] : values) EXPECT_EQ(json[name].get<double>(), value) << name;
  EXPECT_NE(line.find("\"e\":7"), std::string::npos) << line;
  EXPECT_EQ(line.find('\n'), std::string::npos);
}

TEST(MetricsLine, NumbersThatJsonLacksAreStrings) {
  const auto json = nlohmann::json::parse(MetricsLine(1, {{"a", NAN}, {"b", INFINITY}, {"c", -INFINITY}}));
  EXPECT_EQ(json["a"], "NaN");
  EXPECT_EQ(json["b"], "Infinity");
  EXPECT_EQ(json["c"], "-Infinity");
}

TEST(MetricsLog, AResumedRunGoesOnAfterItsCheckpoint) {
  const TempDir dir;
  const auto path = dir / "metrics.jsonl";
  {
    auto log = MetricsLog::Open(path, -1);
    ASSERT_TRUE(log.ok());
    for (int64_t step = 1; step <= 5; ++step) ASSERT_TRUE(log->Write(step, {{"loss", static_cast<double>(step)}}).ok());
  }
  WriteText(path, ReadText(path) + "{\"step\":6,\"lo");  // a line that a crash tore
  auto log = MetricsLog::Open(path, 3);
  ASSERT_TRUE(log.ok());
  ASSERT_TRUE(log->Write(4, {{"loss", 40}}).ok());
  EXPECT_EQ(ReadText(path),
            "{\"step\":1,\"loss\":1}\n{\"step\":2,\"loss\":2}\n{\"step\":3,\"loss\":3}\n{\"step\":4,\"loss\":40}\n");
}

TEST(MetricsLog, ANewRunBeginsAnEmptyFile) {
  const TempDir dir;
  WriteText(dir / "metrics.jsonl", "{\"step\":1}\n");
  ASSERT_TRUE(MetricsLog::Open(dir / "metrics.jsonl", -1).ok());
  EXPECT_EQ(ReadText(dir / "metrics.jsonl"), "");
}

TEST(MetricsLog, NamesAFileThatItCannotWrite) {
  const TempDir dir;
  const auto log = MetricsLog::Open(dir / "missing" / "metrics.jsonl", -1);
  ASSERT_FALSE(log.ok());
  EXPECT_NE(log.status().message().find("missing/metrics.jsonl"), absl::string_view::npos);
}

}  // namespace
}  // namespace simpo
