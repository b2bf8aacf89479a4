#include "simpoctl/metrics_text.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace simpo {
namespace {

std::vector<v1::MetricPoint> Points() {
  std::vector<v1::MetricPoint> points(2);
  points[0].set_step(1);
  points[0].set_attempt(1);
  points[0].mutable_time()->set_seconds(1769860800);
  points[0].set_split("train");
  (*points[0].mutable_values())["loss"] = 1.0 / 3;
  (*points[0].mutable_values())["learning_rate"] = 5e-7;
  points[1].set_step(2);
  points[1].set_attempt(2);
  (*points[1].mutable_values())["loss"] = std::nan("");
  (*points[1].mutable_values())["step"] = 2;  // said already
  (*points[1].mutable_values())["odd,\"name\""] = 7;
  return points;
}

TEST(MetricsText, Csv) {
  EXPECT_EQ(MetricsCsv(Points()),
            "step,attempt,time,learning_rate,loss,\"odd,\"\"name\"\"\"\n"
            "1,1,2026-01-31T12:00:00Z,5e-07,0.3333333333333333,\n"
            "2,2,,,NaN,7\n");
  EXPECT_EQ(MetricsCsv({}), "step,attempt,time\n");
}

TEST(MetricsText, JsonIsAnArrayOfOneObjectPerLine) {
  const std::string text = MetricsJson(Points());
  EXPECT_EQ(text,
            "[\n"
            "{\"step\":1,\"attempt\":1,\"time\":\"2026-01-31T12:00:00Z\",\"learning_rate\":5e-07,"
            "\"loss\":0.3333333333333333},\n"
            "{\"step\":2,\"attempt\":2,\"time\":\"\",\"loss\":\"NaN\",\"odd,\\\"name\\\"\":7}\n"
            "]\n");
  EXPECT_EQ(nlohmann::json::parse(text)[0]["loss"].get<double>(), 1.0 / 3);
  EXPECT_EQ(nlohmann::json::parse(MetricsJson({})), nlohmann::json::array());
}

TEST(ThinnedNoteTest, SaysWhatIsLeftAndSinceWhen) {
  v1::ListMetricsResponse response;
  response.set_kept_every(4);
  response.mutable_thinned_time()->set_seconds(1'700'000'000);
  EXPECT_EQ(
      ThinnedNote(response),
      "The job ended long ago: since 2023-11-14 22:13:20Z one of every 4 steps is kept, and the first and the last "
      "(metrics_full_days).\n");
}

}  // namespace
}  // namespace simpo
