#include "simpoctl/format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

namespace simpo {
namespace {

using ::testing::HasSubstr;

TEST(Format, ExactNumbersReadBackAsTheSameDouble) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t bits = random();
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isfinite(value)) continue;
    ASSERT_EQ(std::strtod(ExactNumber(value).c_str(), nullptr), value);
    ASSERT_EQ(nlohmann::json::parse(ExactJson(value).dump()).get<double>(), value);
  }
}

TEST(Format, ExactNumbersAreShort) {
  EXPECT_EQ(ExactNumber(0.1), "0.1");
  EXPECT_EQ(ExactNumber(1.0 / 3), "0.3333333333333333");
  EXPECT_EQ(ExactNumber(100000), "100000");
  EXPECT_EQ(ExactNumber(-3), "-3");
  EXPECT_EQ(ExactNumber(5e-7), "5e-07");
  EXPECT_TRUE(std::signbit(std::strtod(ExactNumber(-0.0).c_str(), nullptr)));
}

TEST(Format, NumbersThatJsonLacksAreWords) {
  const double inf = std::numeric_limits<double>::infinity();
  EXPECT_EQ(ExactJson(std::nan("")).dump(), "\"NaN\"");
  EXPECT_EQ(ExactJson(inf).dump(), "\"Infinity\"");
  EXPECT_EQ(ExactJson(-inf).dump(), "\"-Infinity\"");
  EXPECT_EQ(ExactNumber(-inf), "-Infinity");
}

TEST(Format, Durations) {
  EXPECT_EQ(FormatDuration(0.04), "0.0s");
  EXPECT_EQ(FormatDuration(1.25), "1.2s");
  EXPECT_EQ(FormatDuration(45), "45s");
  EXPECT_EQ(FormatDuration(59.6), "1m00s");
  EXPECT_EQ(FormatDuration(125), "2m05s");
  EXPECT_EQ(FormatDuration(3840), "1h04m");
  EXPECT_EQ(FormatDuration(183600), "2d03h");
  EXPECT_EQ(FormatDuration(-1), "-");
  EXPECT_EQ(FormatDuration(std::nan("")), "-");
  EXPECT_EQ(FormatDuration(1e300), FormatDuration(1e15));
}

TEST(Format, Times) {
  google::protobuf::Timestamp time;
  EXPECT_EQ(FormatTime(time), "");
  EXPECT_EQ(ShortTime(time), "-");
  time.set_seconds(1769860800);
  EXPECT_EQ(FormatTime(time), "2026-01-31T12:00:00Z");
  EXPECT_EQ(ShortTime(time), "2026-01-31 12:00:00Z");
  time.set_nanos(250'000'000);
  EXPECT_EQ(FormatTime(time), "2026-01-31T12:00:00.250Z");
}

TEST(Format, States) {
  EXPECT_EQ(StateName(v1::JOB_STATE_RUNNING), "RUNNING");
  EXPECT_EQ(StateName(static_cast<v1::JobState>(99)), "STATE_99");
  for (const char* name : {"running", "RUNNING", "JOB_STATE_RUNNING", "job_state_running"}) {
    EXPECT_EQ(ParseState(name), v1::JOB_STATE_RUNNING) << name;
  }
  EXPECT_EQ(ParseState("sleeping"), v1::JOB_STATE_UNSPECIFIED);
  EXPECT_EQ(ParseState(""), v1::JOB_STATE_UNSPECIFIED);
}

TEST(Format, Tables) {
  EXPECT_EQ(FormatTable({{"A", "BB", "C"}, {"long", "x", ""}, {"\xc3\xa9", "", "end"}}),
            "A     BB  C\n"
            "long  x\n"
            "\xc3\xa9         end\n");
}

TEST(Format, OthersCannotDriveTheTerminal) {
  const std::string table = FormatTable({{"a\x1b[2Jb\nc\x7f\xc2\x9b", "x"}});
  EXPECT_EQ(table, "a [2Jb c    x\n");
}

TEST(Format, ClipCountsCharactersNotBytes) {
  EXPECT_EQ(Clip("\xc3\xa9\xc3\xa9\xc3\xa9", 2), "\xc3\xa9\xc3\xa9");
  EXPECT_EQ(Clip("ab", 5), "ab");
  EXPECT_EQ(Clip("ab", 0), "");
  EXPECT_EQ(DisplayWidth("\xe2\x96\x88x"), 2);
}

TEST(Format, MetricSummaryTellsWhatIsThere) {
  google::protobuf::Map<std::string, double> metrics;
  EXPECT_EQ(MetricSummary(metrics, ""), "");
  metrics["loss"] = 0.51234;
  metrics["rewards/accuracies"] = 0.78125;
  metrics["eval_loss"] = 3;
  EXPECT_EQ(MetricSummary(metrics, ""), "loss 0.5123  accuracy 78.1 %");
  EXPECT_EQ(MetricSummary(metrics, "eval_"), "loss 3");
}

TEST(Format, YamlReadsBack) {
  const nlohmann::ordered_json json = {{"text", "no"},    {"lines", "a: 1\nb: \"2\"\n"},
                                       {"number", 0.1},   {"list", {1, "x"}},
                                       {"none", nullptr}, {"map", {{"k", true}}}};
  const YAML::Node node = YAML::Load(ToYaml(json));
  EXPECT_EQ(node["text"].as<std::string>(), "no");
  EXPECT_EQ(node["lines"].as<std::string>(), "a: 1\nb: \"2\"\n");
  EXPECT_EQ(node["number"].as<double>(), 0.1);
  EXPECT_EQ(node["list"][1].as<std::string>(), "x");
  EXPECT_TRUE(node["none"].IsNull());
  EXPECT_TRUE(node["map"]["k"].as<bool>());
}

}  // namespace
}  // namespace simpo
