// What the fuzzers of the two services share: a coordinator's parts in this process with gangs of cardboard, an input
// that is a sequence of calls, the mutator that knows their messages, and what must hold of every answer.
//
// An input is a list of calls, each as: a byte for the method, a byte for how it is made (whose token or secret, which
// stream), two bytes for the length, the request's bytes. Within a request ten times '~' but for a last digit n stand
// for the id of the n-th newest job, which is as long.
#ifndef SIMPO_TESTS_FUZZ_FUZZ_SERVICES_H_
#define SIMPO_TESTS_FUZZ_FUZZ_SERVICES_H_

#include <google/protobuf/message.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simpo {

struct FuzzCall {
  uint8_t method = 0;
  uint8_t how = 0;
  std::string request;
};
std::vector<FuzzCall> ParseCalls(const uint8_t* data, size_t size);
std::string FormatCalls(const std::vector<FuzzCall>& calls);

// The n-th newest job, in a request.
std::string JobReference(int n);

// What a fuzzer's `method` byte stands for, modulo their number.
struct FuzzMethod {
  enum class Kind {
    kUnary,
    kServerStream,
    kOpen,      // a rank's stream
    kSay,       // on an open one
    kClose,     // likewise
    kRegister,  // waits for the others
    kEndGang,   // of the newest jobs
    kLoseGang,
    kRest,  // a moment passes
  };
  Kind kind;
  const char* rpc = "";                                 // "/simpo.v1.TrainingService/GetJob"
  const google::protobuf::Message* request = nullptr;   // the type
  const google::protobuf::Message* response = nullptr;  // likewise
};

// Of the fuzzer: each has its own.
const std::vector<FuzzMethod>& FuzzMethods();

// Makes the calls of an input, one after the other, against a coordinator that lives for many inputs. Aborts, with a
// word on standard error, where an answer is not what it must be.
void RunCalls(const std::vector<FuzzMethod>& methods, const uint8_t* data, size_t size);
// Changes one thing or a few: of a message by its fields, or bytes, or the order of the calls.
size_t MutateCalls(const std::vector<FuzzMethod>& methods, uint8_t* data, size_t size, size_t max_size, unsigned seed);

}  // namespace simpo

#endif  // SIMPO_TESTS_FUZZ_FUZZ_SERVICES_H_
