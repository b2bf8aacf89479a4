#ifndef SIMPO_TESTS_SIMPOCTL_RUN_SIMPOCTL_H_
#define SIMPO_TESTS_SIMPOCTL_RUN_SIMPOCTL_H_

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"

namespace simpo {

struct Outcome {
  int code = -1;
  std::string out;
  std::string err;
};

// Runs `simpoctl <arguments>` against a coordinator at `address`. `arguments` are of the shell. The build passes the
// program as SIMPOCTL_PROGRAM.
inline Outcome RunSimpoctl(const std::string& address, const std::string& arguments) {
  const std::string err_path = absl::StrCat(::testing::TempDir(), "/simpoctl_stderr_", getpid());
  const std::string command = absl::StrCat("NO_COLOR=1 SIMPO_ADDRESS=", address, " ", SIMPOCTL_PROGRAM, " ", arguments,
                                           " 2>", err_path, " </dev/null");
  Outcome outcome;
  FILE* pipe = popen(command.c_str(), "r");
  char buffer[4096];
  for (size_t got; (got = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) outcome.out.append(buffer, got);
  const int status = pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  std::ifstream err(err_path);
  outcome.err.assign(std::istreambuf_iterator<char>(err), {});
  std::remove(err_path.c_str());
  return outcome;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_SIMPOCTL_RUN_SIMPOCTL_H_
