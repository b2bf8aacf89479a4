#include "tests/fuzz/fuzz_services.h"

#include <google/protobuf/descriptor.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/client_unary_call.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/text.h"
#include "coordinator/exposition.h"
#include "simpo/v1/error_details.pb.h"
#include "tests/common/job_mutation.h"
#include "tests/coordinator/cardboard_service.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace simpo {
namespace {

namespace pb = google::protobuf;
using Kind = FuzzMethod::Kind;
using Random = std::mt19937_64;

constexpr size_t kMaxCalls = 24;
constexpr size_t kMaxRequestBytes = 4096;
constexpr size_t kIdLength = 10;
constexpr int kInputsOfAServer = 400;
constexpr size_t kJobsOfAServer = 150;
constexpr size_t kMaxTrailerBytes = 8000;  // clients take 8 KiB, and there is a little more in it
constexpr std::chrono::seconds kLongestCall{60};

[[noreturn]] void Fail(const std::string& what) {
  fprintf(stderr, "fuzz: %s\n", what.c_str());
  abort();
}

size_t Below(Random& random, size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); }
template <typename Range>
const auto& Any(Random& random, const Range& range) {
  return range[Below(random, std::size(range))];
}

grpc::ByteBuffer ToBuffer(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}
std::string ToBytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string bytes;
  if (!buffer.Valid() || !buffer.Dump(&slices).ok()) return bytes;
  for (const grpc::Slice& slice : slices) bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return bytes;
}
bool Parses(const pb::Message& type, const std::string& bytes) {
  const std::unique_ptr<pb::Message> message(type.New());
  return message->ParseFromString(bytes);
}

// --- what must hold of answers

// Bytes of a message in the trailer, where all but plain ASCII takes three.
size_t EncodedBytes(const std::string& text) {
  size_t bytes = 0;
  for (const char c : text) bytes += c >= 0x20 && c <= 0x7e && c != '%' ? 1 : 3;
  return bytes;
}

void CheckError(const std::string& rpc, const grpc::Status& status, bool well_formed) {
  const std::string shown = absl::StrCat(rpc, ": code ", status.error_code(), ": ", status.error_message());
  size_t bad = 0;
  if (!IsValidUtf8(status.error_message(), &bad)) Fail(shown + ": the message is not UTF-8");
  if (!well_formed) return;  // what gRPC itself says of it
  if (status.error_message().empty()) Fail(shown + ": says nothing");
  if (status.error_code() == grpc::StatusCode::INTERNAL || status.error_code() == grpc::StatusCode::UNKNOWN) {
    Fail(shown + ": nobody can know what that means");
  }
  const size_t trailer = EncodedBytes(status.error_message()) + status.error_details().size() * 4 / 3;
  if (trailer > kMaxTrailerBytes) Fail(absl::StrCat(shown, ": ", trailer, " bytes, more than clients take"));
  v1::RpcStatus details;
  v1::ErrorInfo info;
  if (!details.ParseFromString(status.error_details()) || details.details().empty()) Fail(shown + ": has no details");
  bool has_reason = false;
  for (const pb::Any& any : details.details()) {
    v1::BadRequest bad_request;
    if (any.type_url() == "type.googleapis.com/google.rpc.BadRequest" &&
        (!bad_request.ParseFromString(any.value()) || bad_request.field_violations().empty())) {
      Fail(shown + ": its bad fields cannot be read");
    }
    if (any.type_url() != "type.googleapis.com/google.rpc.ErrorInfo") continue;
    has_reason = info.ParseFromString(any.value()) && !info.reason().empty();
  }
  if (!has_reason) Fail(shown + ": has no reason");
}

void CheckAnswer(const FuzzMethod& method, const std::string& request, const grpc::Status& status,
                 const std::string& response) {
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) Fail(absl::StrCat(method.rpc, " never ends"));
  if (!status.ok()) return CheckError(method.rpc, status, Parses(*method.request, request));
  if (!Parses(*method.response, response)) Fail(absl::StrCat(method.rpc, ": the answer cannot be read"));
}

// --- the coordinator

// Its gangs write a log, where they may.
class FuzzLauncher final : public Launcher {
 public:
  explicit FuzzLauncher(std::filesystem::path outputs) : outputs_(std::move(outputs)) {}
  absl::StatusOr<bool> Start(const GangRequest& request) override {
    const std::filesystem::path dir = request.log_dir.lexically_normal();
    const auto [in_outputs, in_dir] = std::mismatch(outputs_.begin(), outputs_.end(), dir.begin(), dir.end());
    if (in_outputs != outputs_.end()) Fail(absl::StrCat("a gang may write to ", dir.string()));
    std::error_code ignored;
    std::filesystem::create_directories(dir, ignored);
    std::ofstream(dir / "rank-0.log") << "one line\nsimpo-worker: a \xff word\nthe last";
    std::ofstream(dir / kLauncherLog) << "mpirun noticed that \xc3 it ends\n";
    return gangs.Start(request);
  }
  GangStatus Poll(const std::string& job_id, int attempt) override { return gangs.Poll(job_id, attempt); }
  absl::Status Terminate(const std::string& job_id, int attempt) override {
    gangs.End(job_id, attempt, 143);
    return absl::OkStatus();
  }
  absl::Status Kill(const std::string& job_id, int attempt) override {
    gangs.End(job_id, attempt, 137);
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> ReadSecret(const std::string& job_id, int attempt) override {
    return gangs.ReadSecret(job_id, attempt);
  }
  absl::Status PublishAddress(const std::string&, int) override { return absl::OkStatus(); }

  FakeLauncher gangs;

 private:
  const std::filesystem::path outputs_;
};

class FuzzServer {
 public:
  FuzzServer() {
    for (const auto& [role, user] :
         {std::pair(Role::kAdmin, "ada"), std::pair(Role::kSubmit, "sam"), std::pair(Role::kRead, "rita")}) {
      const NewToken made = *MakeToken(role, user, 1, time(nullptr));
      if (!AddToken(service_.dir / "tokens.json", made.token).ok()) Fail("no token");
      tokens_.push_back(made.text);
    }
    service_.controller->Start(launcher_);
  }
  ~FuzzServer() {
    service_.Stop();
    // What is stored can be loaded again.
    JobViews views;
    Stores stores = Stores::Open(service_.dir / "test.db");
    Dispatcher again({}, *stores.database, *stores.jobs, *stores.metrics, views);
    if (const absl::Status status = again.Load(Moment::Now()); !status.ok()) Fail("cannot load: " + status.ToString());
    if (views.All().size() != views_.All().size()) Fail("jobs were lost");
  }

  bool IsWorn() const { return ++inputs_ > kInputsOfAServer || views_.All().size() > kJobsOfAServer; }

  void Run(const std::vector<FuzzMethod>& methods, const std::vector<FuzzCall>& calls) {
    for (const FuzzCall& call : calls) Make(methods[call.method % methods.size()], call);
    for (std::unique_ptr<Stream>& stream : streams_) Close(stream, /*cancel=*/true);
    for (const std::unique_ptr<Registration>& call : registrations_) call->context.TryCancel();
    for (const std::unique_ptr<Registration>& call : registrations_) call->thread.join();
    registrations_.clear();
    CheckStillWell();
  }

 private:
  static CardboardService::Setup MakeSetup() {
    CardboardService::Setup setup;
    setup.dispatcher.slots_total = 4;
    setup.dispatcher.restart.first_pause = std::chrono::milliseconds(1);
    setup.dispatcher.restart.longest_pause = std::chrono::milliseconds(4);
    setup.dispatcher.stop_grace = setup.dispatcher.term_grace = std::chrono::milliseconds(300);
    setup.dispatcher.queue.user_quotas = {{"sam", 3}};
    setup.streams_per_user = 20;
    setup.starts = false;
    setup.on_failure = [](const absl::Status& status) { Fail(absl::StrCat("stores: ", status.ToString())); };
    return setup;
  }

  using Bytes = grpc::ByteBuffer;
  struct Stream {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReaderWriterInterface<Bytes, Bytes>> rpc;
    bool well_formed = true;  // all that was said
  };
  struct Registration {
    grpc::ClientContext context;
    std::thread thread;
  };

  // The n-th newest job, or nothing.
  JobViews::View NewestJob(size_t n) const {
    const std::vector<JobViews::View> all = views_.All();
    return n < all.size() ? all[all.size() - 1 - n] : nullptr;
  }
  void PutIds(std::string& bytes) const {
    const std::string tildes(kIdLength - 1, '~');
    for (size_t at = bytes.find(tildes); at != std::string::npos && at + kIdLength <= bytes.size();
         at = bytes.find(tildes, at + 1)) {
      const JobViews::View job = NewestJob(static_cast<size_t>(bytes[at + kIdLength - 1] - '0') & 7);
      if (job) bytes.replace(at, kIdLength, job->job.id());
    }
  }

  void Sign(grpc::ClientContext* context, uint8_t how) const {
    context->set_deadline(std::chrono::system_clock::now() + kLongestCall);
    switch (how % 16) {
      case 0:
        return;
      case 1:
        return context->AddMetadata("authorization", "Bearer nonsense");
      case 2:
        return context->AddMetadata("authorization", std::string(how, 'x'));
      case 3:
        return context->AddMetadata("authorization", "Bearer " + tokens_[2]);
      case 4:
      case 5:
        return context->AddMetadata("authorization", "Bearer " + tokens_[1]);
      default:
        return context->AddMetadata("authorization", "Bearer " + tokens_[0]);
    }
  }
  // `how`: whose secret.
  void SignAsRank(grpc::ClientContext* context, uint8_t how, const std::string& job_id) const {
    context->set_deadline(std::chrono::system_clock::now() + kLongestCall);
    JobViews::View job = how % 16 == 1 ? NewestJob(1) : views_.FindById(job_id);
    // A gang that is starting has its secret soon.
    for (int i = 0; i < 20 && job && job->secret.empty() && HoldsGang(job->job.state()); ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      job = views_.FindById(job->job.id());
    }
    std::string secret = job ? job->secret : "";
    if (how % 16 == 2) secret += "x";
    if (how % 16 == 3 && !secret.empty()) secret.pop_back();
    if (how % 16 == 4) secret = std::string(how, 's');
    if (how % 16 != 0 || !secret.empty()) context->AddMetadata("simpo-attempt-secret", secret);
  }

  void Make(const FuzzMethod& method, const FuzzCall& call) {
    std::string request = call.request;
    PutIds(request);
    switch (method.kind) {
      case Kind::kUnary: {
        grpc::ClientContext context;
        Sign(&context, call.how);
        Bytes response;
        const grpc::Status status = grpc::internal::BlockingUnaryCall(
            service_.channel.get(), Rpc(method, grpc::internal::RpcMethod::NORMAL_RPC), &context, ToBuffer(request),
            &response);
        return CheckAnswer(method, request, status, ToBytes(response));
      }
      case Kind::kServerStream:
        return Watch(method, call, request);
      case Kind::kOpen:
        return Open(method, call, request);
      case Kind::kSay: {
        const std::unique_ptr<Stream>& stream = streams_[call.how % streams_.size()];
        if (stream) Say(method, *stream, request);
        return;
      }
      case Kind::kClose:
        return Close(streams_[call.how % streams_.size()], call.how & 0x80);
      case Kind::kRegister:
        return Register(method, call, request);
      case Kind::kEndGang:
      case Kind::kLoseGang: {
        const JobViews::View job = NewestJob(call.how & 3);
        if (!job || job->job.attempt() == 0) return;
        static constexpr int kCodes[] = {0, 1, 2, 3, 75, 127, 137, 143, -1, 256};
        if (method.kind == Kind::kLoseGang) {
          return launcher_.gangs.Lose(job->job.id(), job->job.attempt(), "the machine is gone");
        }
        return launcher_.gangs.End(job->job.id(), job->job.attempt(), kCodes[(call.how >> 2) % std::size(kCodes)]);
      }
      case Kind::kRest:
        return std::this_thread::sleep_for(std::chrono::milliseconds(call.how % 4 == 0 ? call.how : 1));
    }
  }

  grpc::internal::RpcMethod Rpc(const FuzzMethod& method, grpc::internal::RpcMethod::RpcType type) const {
    return {method.rpc, type, service_.channel};
  }

  // Reads a little of a stream, as far as it is quick to come.
  void Watch(const FuzzMethod& method, const FuzzCall& call, const std::string& request) {
    grpc::ClientContext context;
    Sign(&context, call.how);
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(30));
    const std::unique_ptr<grpc::ClientReader<Bytes>> stream(grpc::internal::ClientReaderFactory<Bytes>::Create(
        service_.channel.get(), Rpc(method, grpc::internal::RpcMethod::SERVER_STREAMING), &context, ToBuffer(request)));
    Bytes response;
    int count = 0;
    while (stream->Read(&response)) {
      if (!Parses(*method.response, ToBytes(response))) Fail(absl::StrCat(method.rpc, ": what comes cannot be read"));
      if (++count >= 2 + call.how / 64) context.TryCancel();
    }
    const grpc::Status status = stream->Finish();
    const bool by_us = status.error_code() == grpc::StatusCode::CANCELLED ||
                       status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED;
    if (!by_us && !status.ok()) CheckError(method.rpc, status, Parses(*method.request, request));
  }

  // The first message of a stream says who it is, if it is what it should be.
  void Open(const FuzzMethod& method, const FuzzCall& call, const std::string& request) {
    std::unique_ptr<Stream>& stream = streams_[(call.how >> 4) % streams_.size()];
    Close(stream, /*cancel=*/false);
    stream = std::make_unique<Stream>();
    v1::AttachRequest hello;
    hello.ParsePartialFromString(request);
    SignAsRank(&stream->context, call.how, hello.hello().job_id());
    stream->rpc.reset(grpc::internal::ClientReaderWriterFactory<Bytes, Bytes>::Create(
        service_.channel.get(), Rpc(method, grpc::internal::RpcMethod::BIDI_STREAMING), &stream->context));
    Say(method, *stream, request);
  }
  static void Say(const FuzzMethod& method, Stream& stream, const std::string& request) {
    stream.well_formed = stream.well_formed && Parses(*method.request, request);
    stream.rpc->Write(ToBuffer(request));  // false where it has been ended
  }
  void Close(std::unique_ptr<Stream>& stream, bool cancel) {
    if (!stream) return;
    stream->rpc->WritesDone();
    if (cancel) stream->context.TryCancel();
    Bytes response;
    while (stream->rpc->Read(&response)) {
      if (!Parses(v1::AttachResponse::default_instance(), ToBytes(response))) Fail("what a rank hears cannot be read");
    }
    const grpc::Status status = stream->rpc->Finish();
    if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) Fail("a rank's stream never ends");
    const bool by_us = status.error_code() == grpc::StatusCode::CANCELLED;
    if (!status.ok() && !by_us) CheckError("Attach", status, stream->well_formed);
    stream.reset();
  }

  void Register(const FuzzMethod& method, const FuzzCall& call, const std::string& request) {
    auto registration = std::make_unique<Registration>();
    v1::RegisterRequest parsed;
    parsed.ParsePartialFromString(request);
    SignAsRank(&registration->context, call.how, parsed.hello().job_id());
    registration->thread = std::thread([this, method, request, context = &registration->context] {
      Bytes response;
      const grpc::Status status =
          grpc::internal::BlockingUnaryCall(service_.channel.get(), Rpc(method, grpc::internal::RpcMethod::NORMAL_RPC),
                                            context, ToBuffer(request), &response);
      if (status.error_code() != grpc::StatusCode::CANCELLED) CheckAnswer(method, request, status, ToBytes(response));
    });
    registrations_.push_back(std::move(registration));
  }

  // It answers a good call, and every job can be shown.
  void CheckStillWell() {
    static const FuzzMethod list = {.kind = Kind::kUnary,
                                    .rpc = "/simpo.v1.TrainingService/ListJobs",
                                    .request = &v1::ListJobsRequest::default_instance(),
                                    .response = &v1::ListJobsResponse::default_instance()};
    grpc::ClientContext context;
    Sign(&context, 15);
    Bytes response;
    v1::ListJobsRequest request;
    request.set_page_size(1000);
    const grpc::Status status =
        grpc::internal::BlockingUnaryCall(service_.channel.get(), Rpc(list, grpc::internal::RpcMethod::NORMAL_RPC),
                                          &context, ToBuffer(request.SerializeAsString()), &response);
    if (!status.ok()) Fail(absl::StrCat("a good call fails: ", status.error_message()));
    v1::ListJobsResponse jobs;
    if (!jobs.ParseFromString(ToBytes(response))) Fail("the list of jobs cannot be read");
    for (const v1::Job& job : jobs.jobs()) {
      const bool known = v1::JobState_IsValid(job.state()) && job.state() != v1::JOB_STATE_UNSPECIFIED;
      if (!known || job.id().size() != kIdLength || job.reason().empty())
        Fail("a job is damaged: " + job.DebugString());
    }
    if (inputs_ % 16 != 0) return;
    ExpositionSnapshot snapshot{
        .now_ms = Moment::Now().unix_ms, .jobs = views_.All(), .stats = service_.controller->stats()};
    snapshot.rpc_durations = service_.rpc_stats.Get();
    CoordinatorCollectable([&] { return snapshot; }).Collect();
  }

  CardboardService service_{MakeSetup()};
  JobViews& views_ = service_.views;
  FuzzLauncher launcher_{service_.dir / "outputs"};
  std::vector<std::string> tokens_;  // of an administrator, a submitter, a reader
  std::array<std::unique_ptr<Stream>, 4> streams_;
  std::vector<std::unique_ptr<Registration>> registrations_;
  mutable int inputs_ = 0;
};

// --- mutation

std::string AnyText(Random& random, const std::string& field) {
  static constexpr const char* kWords[] = {"",
                                           "train",
                                           "eval",
                                           "load",
                                           "checkpoint",
                                           "resumed",
                                           "exported",
                                           "advice",
                                           "data_report",
                                           "error",
                                           "finished",
                                           "1:0",
                                           "1:5",
                                           "2:0",
                                           "-1:-1",
                                           "1:9223372036854775807",
                                           "1",
                                           "0",
                                           "9223372036854775807",
                                           "local",
                                           "sam",
                                           "test",
                                           "loss",
                                           "eval_loss",
                                           "step_seconds",
                                           "/",
                                           "/tmp",
                                           "../..",
                                           "beta=3",
                                           "output_dir=/tmp/x",
                                           "resources.ranks_per_node=2",
                                           "\n",
                                           "\xe2\x82\xac",
                                           "\x01"};
  if (field == "job_yaml") {
    const std::string yaml = JobYaml(1 + static_cast<int>(Below(random, 3)), "priority: 0\nmax_restarts: 2\n");
    return Below(random, 3) != 0 ? yaml : ToUtf8(JobMutator(random()).Mutate(yaml).yaml);
  }
  if (field == "job_id" && Below(random, 5) != 0) return JobReference(static_cast<int>(Below(random, 3)));
  switch (Below(random, 12)) {
    case 0:
      return JobReference(static_cast<int>(Below(random, 3)));
    case 1:
      return std::string(Below(random, 3000), static_cast<char>('a' + Below(random, 26)));
    case 2: {
      std::string text;
      for (size_t i = 0, count = Below(random, 1500); i < count; ++i) text += "\xe2\x82\xac";
      return text;
    }
    default:
      return Any(random, kWords);
  }
}

template <typename Number>
Number AnyNumber(Random& random) {
  switch (Below(random, 6)) {
    case 0:
      return static_cast<Number>(Below(random, 5));
    case 1:
      return static_cast<Number>(1 + Below(random, 200));
    case 2:
      return static_cast<Number>(-1);
    case 3:
      return std::numeric_limits<Number>::max();
    case 4:
      return std::numeric_limits<Number>::lowest();
    default:
      return static_cast<Number>(random());
  }
}
double AnyDouble(Random& random) {
  static constexpr double kNumbers[] = {0, -0.0, 1, -1, 0.5, 1e308, -1e308, 5e-324, NAN, INFINITY, -INFINITY, 1e18};
  return Any(random, kNumbers);
}

void MutateMessage(pb::Message& message, Random& random, int depth);

void SetAny(pb::Message& message, const pb::FieldDescriptor& field, Random& random, int depth) {
  const pb::Reflection& reflection = *message.GetReflection();
  const bool add = field.is_repeated();
  using Type = pb::FieldDescriptor::CppType;
  switch (static_cast<int>(field.cpp_type())) {
#define SIMPO_SET(type, Name, value)                  \
  case Type::type: {                                  \
    auto set_to = (value);                            \
    if (add) {                                        \
      reflection.Add##Name(&message, &field, set_to); \
    } else {                                          \
      reflection.Set##Name(&message, &field, set_to); \
    }                                                 \
    return;                                           \
  }
    SIMPO_SET(CPPTYPE_INT32, Int32, AnyNumber<int32_t>(random))
    SIMPO_SET(CPPTYPE_INT64, Int64, AnyNumber<int64_t>(random))
    SIMPO_SET(CPPTYPE_UINT32, UInt32, AnyNumber<uint32_t>(random))
    SIMPO_SET(CPPTYPE_UINT64, UInt64, AnyNumber<uint64_t>(random))
    SIMPO_SET(CPPTYPE_DOUBLE, Double, AnyDouble(random))
    SIMPO_SET(CPPTYPE_FLOAT, Float, static_cast<float>(AnyDouble(random)))
    SIMPO_SET(CPPTYPE_BOOL, Bool, Below(random, 2) == 1)
    SIMPO_SET(CPPTYPE_ENUM, EnumValue, static_cast<int>(Below(random, 12)) - 1)
    SIMPO_SET(CPPTYPE_STRING, String, AnyText(random, field.name()))
#undef SIMPO_SET
    default: {
      pb::Message* part = add ? reflection.AddMessage(&message, &field) : reflection.MutableMessage(&message, &field);
      if (depth < 4) MutateMessage(*part, random, depth + 1);
    }
  }
}

void MutateMessage(pb::Message& message, Random& random, int depth) {
  const pb::Descriptor& type = *message.GetDescriptor();
  if (type.field_count() == 0) return;
  const pb::Reflection& reflection = *message.GetReflection();
  for (size_t i = 0, changes = 1 + Below(random, 3); i < changes; ++i) {
    const pb::FieldDescriptor& field = *type.field(static_cast<int>(Below(random, type.field_count())));
    const int size = field.is_repeated() ? reflection.FieldSize(message, &field) : 0;
    if (Below(random, 8) == 0) {
      reflection.ClearField(&message, &field);
    } else if (size > 0 && Below(random, 3) == 0) {
      reflection.RemoveLast(&message, &field);
    } else if (field.cpp_type() == pb::FieldDescriptor::CPPTYPE_STRING && !field.is_repeated() &&
               Below(random, 3) == 0) {
      std::string text = reflection.GetString(message, &field);
      const size_t length = text.size();
      text.resize(length + 16);
      text.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text.data()), length, text.size()));
      reflection.SetString(&message, &field, Below(random, 8) == 0 ? text : ToUtf8(text));
    } else {
      SetAny(message, field, random, depth);
      // Many of them, now and then.
      if (field.is_repeated() && Below(random, 20) == 0) {
        for (size_t more = Below(random, 300); more > 0; --more) SetAny(message, field, random, depth);
      }
    }
  }
}

// As a well-behaved client asks.
std::string GoodRequest(const FuzzMethod& method, Random& random) {
  if (method.request == nullptr) return "";
  const std::unique_ptr<pb::Message> message(method.request->New());
  const pb::Descriptor& type = *message->GetDescriptor();
  const std::string job = JobReference(static_cast<int>(Below(random, 2)));
  const auto hello = [&](v1::Hello* who) {
    who->set_job_id(job);
    who->set_attempt(1);
    who->set_rank(static_cast<int>(Below(random, 2)));
    who->set_world_size(1 + static_cast<int>(Below(random, 2)));
    who->set_pid(7);
  };
  if (auto* submit = dynamic_cast<v1::SubmitJobRequest*>(message.get())) {
    *submit = SubmitRequest(JobYaml(1 + static_cast<int>(Below(random, 2))));
  } else if (auto* call = dynamic_cast<v1::RegisterRequest*>(message.get())) {
    hello(call->mutable_hello());
    call->set_nccl_id("id");
    call->set_timeout_ms(static_cast<int>(Below(random, 20)));
  } else if (auto* attach = dynamic_cast<v1::AttachRequest*>(message.get())) {
    const int64_t step = static_cast<int64_t>(Below(random, 20));
    static constexpr const char* kEvents[] = {"checkpoint", "resumed", "advice", "error", "finished"};
    if (method.kind == Kind::kOpen) {
      hello(attach->mutable_hello());
    } else if (Below(random, 2) == 0) {
      *attach = StepMessage(step, 0.5, Below(random, 4) == 0 ? "eval" : "train");
    } else if (Below(random, 2) == 0) {
      *attach = EventMessage(Any(random, kEvents), "a word", step);
    } else {
      *attach = HeartbeatMessage("train");
    }
  } else if (const pb::FieldDescriptor* field = type.FindFieldByName("job_id")) {
    message->GetReflection()->SetString(message.get(), field, job);
  }
  return message->SerializeAsString();
}

FuzzCall AnyCall(const std::vector<FuzzMethod>& methods, Random& random) {
  FuzzCall call{.method = static_cast<uint8_t>(Below(random, methods.size())),
                .how = static_cast<uint8_t>(Below(random, 4) == 0 ? random() : 6 + 16 * Below(random, 4))};
  call.request = GoodRequest(methods[call.method], random);
  return call;
}

// A job, and what follows when it runs.
std::vector<FuzzCall> Seed(const std::vector<FuzzMethod>& methods, Random& random) {
  std::vector<FuzzCall> calls;
  for (size_t i = 0; i < methods.size(); ++i) {
    if (methods[i].request == &v1::SubmitJobRequest::default_instance()) {
      calls.push_back({static_cast<uint8_t>(i), 6, GoodRequest(methods[i], random)});
    }
  }
  for (size_t i = 0; i < methods.size(); ++i) {
    if (methods[i].kind == Kind::kOpen) calls.push_back({static_cast<uint8_t>(i), 6, GoodRequest(methods[i], random)});
  }
  for (size_t i = 0, count = 2 + Below(random, 6); i < count; ++i) calls.push_back(AnyCall(methods, random));
  return calls;
}

void MutateRequest(const FuzzMethod& method, FuzzCall& call, Random& random) {
  std::string& bytes = call.request;
  if (method.request == nullptr || Below(random, 8) == 0) {
    const size_t length = bytes.size();
    bytes.resize(std::min(kMaxRequestBytes, length + 32));
    bytes.resize(
        LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(bytes.data()), std::min(length, bytes.size()), bytes.size()));
    return;
  }
  const std::unique_ptr<pb::Message> message(method.request->New());
  if (!message->ParseFromString(bytes)) message->Clear();
  // A rank's message has one kind of content, which stays as often as not.
  auto* attach = dynamic_cast<v1::AttachRequest*>(message.get());
  if (attach != nullptr && Below(random, 2) == 0 && attach->message_case() != v1::AttachRequest::MESSAGE_NOT_SET) {
    if (attach->has_hello()) MutateMessage(*attach->mutable_hello(), random, 1);
    if (attach->has_heartbeat()) MutateMessage(*attach->mutable_heartbeat(), random, 1);
    if (attach->has_step()) MutateMessage(*attach->mutable_step(), random, 1);
    if (attach->has_event()) MutateMessage(*attach->mutable_event(), random, 1);
  } else {
    MutateMessage(*message, random, 0);
  }
  bytes = message->SerializeAsString();
}

}  // namespace

std::string JobReference(int n) { return std::string(kIdLength - 1, '~') + static_cast<char>('0' + n); }

std::vector<FuzzCall> ParseCalls(const uint8_t* data, size_t size) {
  std::vector<FuzzCall> calls;
  while (size >= 4 && calls.size() < kMaxCalls) {
    const size_t length = std::min<size_t>(size - 4, data[2] | data[3] << 8);
    calls.push_back({data[0], data[1], std::string(reinterpret_cast<const char*>(data + 4), length)});
    data += 4 + length;
    size -= 4 + length;
  }
  return calls;
}

std::string FormatCalls(const std::vector<FuzzCall>& calls) {
  std::string bytes;
  for (const FuzzCall& call : calls) {
    const size_t length = std::min<size_t>(call.request.size(), 0xffff);
    bytes += static_cast<char>(call.method);
    bytes += static_cast<char>(call.how);
    bytes += static_cast<char>(length & 0xff);
    bytes += static_cast<char>(length >> 8);
    bytes.append(call.request, 0, length);
  }
  return bytes;
}

void RunCalls(const std::vector<FuzzMethod>& methods, const uint8_t* data, size_t size) {
  static std::unique_ptr<FuzzServer> server;
  if (!server) {
    SetLogLevel(static_cast<LogLevel>(9));  // nothing
    pb::SetLogHandler(nullptr);
    atexit([] { server.reset(); });
  }
  if (!server || server->IsWorn()) {
    server.reset();
    server = std::make_unique<FuzzServer>();
  }
  server->Run(methods, ParseCalls(data, size));
}

size_t MutateCalls(const std::vector<FuzzMethod>& methods, uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  Random random(seed);
  std::vector<FuzzCall> calls = ParseCalls(data, size);
  if (calls.empty() || Below(random, 200) == 0) calls = Seed(methods, random);
  for (size_t i = 0, changes = 1 + Below(random, 3); i < changes; ++i) {
    const size_t at = Below(random, calls.size());
    switch (Below(random, 8)) {
      case 0:
        if (calls.size() < kMaxCalls)
          calls.insert(calls.begin() + static_cast<std::ptrdiff_t>(Below(random, calls.size() + 1)),
                       FuzzCall(calls[at]));
        break;
      case 1:
        if (calls.size() > 1) calls.erase(calls.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      case 2:
        std::swap(calls[at], calls[Below(random, calls.size())]);
        break;
      case 3:
        if (calls.size() < kMaxCalls)
          calls.insert(calls.begin() + static_cast<std::ptrdiff_t>(Below(random, calls.size() + 1)),
                       AnyCall(methods, random));
        break;
      case 4:
        calls[at].how = static_cast<uint8_t>(random());
        break;
      default:
        MutateRequest(methods[calls[at].method % methods.size()], calls[at], random);
    }
  }
  std::string bytes = FormatCalls(calls);
  while (bytes.size() > max_size && !calls.empty()) {
    calls.pop_back();
    bytes = FormatCalls(calls);
  }
  std::copy(bytes.begin(), bytes.end(), data);
  return bytes.size();
}

}  // namespace simpo

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  simpo::RunCalls(simpo::FuzzMethods(), data, size);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  return simpo::MutateCalls(simpo::FuzzMethods(), data, size, max_size, seed);
}
