// What our API promises: its names follow the rules of buf's linter, everything in it is explained, and nothing that a
// client may rely on goes away. api_v1.txt is what has been promised; after an addition write it anew with
//   SIMPO_WRITE_API=1 build/bin/proto_test
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/atomic_file.h"
#include "tests/temp_dir.h"

namespace simpo {
namespace {

namespace pb = google::protobuf;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr const char* kFiles[] = {"simpo/v1/job.proto", "simpo/v1/training_service.proto",
                                  "simpo/v1/worker_service.proto", "simpo/v1/error_details.proto"};

// Files below `dir` as protoc reads them, with their comments.
class Parsed {
 public:
  explicit Parsed(const std::string& dir) {
    const TempDir scratch;
    const std::string out = scratch / "set";
    std::string command = absl::StrCat(SIMPO_PROTOC, " -I ", dir, " --include_imports --include_source_info ",
                                       "--descriptor_set_out=", out);
    for (const auto& entry : std::filesystem::recursive_directory_iterator(dir)) {
      if (entry.path().extension() == ".proto") absl::StrAppend(&command, " ", entry.path().string());
    }
    EXPECT_EQ(std::system(command.c_str()), 0) << command;
    const auto bytes = ReadFile(out, 1 << 24);
    EXPECT_TRUE(bytes.ok() && set_.ParseFromString(*bytes));
    for (const pb::FileDescriptorProto& file : set_.file()) EXPECT_NE(pool_.BuildFile(file), nullptr) << file.name();
  }
  const pb::FileDescriptor* File(const std::string& name) {
    const pb::FileDescriptor* file = pool_.FindFileByName(name);
    EXPECT_NE(file, nullptr) << name;
    return file;
  }

 private:
  pb::FileDescriptorSet set_;
  pb::DescriptorPool pool_;
};

// --- lint

bool IsPascal(absl::string_view name) {
  return !name.empty() && absl::ascii_isupper(static_cast<unsigned char>(name[0])) &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) { return absl::ascii_isalnum(c); });
}

bool IsSnake(absl::string_view name) {
  return !name.empty() && absl::ascii_islower(static_cast<unsigned char>(name[0])) &&
         std::all_of(name.begin(), name.end(),
                     [](unsigned char c) { return absl::ascii_islower(c) || absl::ascii_isdigit(c) || c == '_'; });
}

std::string UpperSnake(absl::string_view pascal) {
  std::string text;
  for (size_t i = 0; i < pascal.size(); ++i) {
    const auto c = static_cast<unsigned char>(pascal[i]);
    if (i > 0 && absl::ascii_isupper(c)) text += '_';
    text += static_cast<char>(absl::ascii_toupper(c));
  }
  return text;
}

class Lint {
 public:
  std::vector<std::string> Check(const pb::FileDescriptor& file) {
    const std::string folder = absl::StrJoin(absl::StrSplit(file.package(), '.'), "/") + "/";
    if (!absl::StartsWith(file.name(), folder)) Say(file.name(), "lies outside the folder of its package");
    for (int i = 0; i < file.enum_type_count(); ++i) Enum(*file.enum_type(i));
    for (int i = 0; i < file.message_type_count(); ++i) Message(*file.message_type(i));
    for (int i = 0; i < file.service_count(); ++i) Service(*file.service(i));
    return std::move(problems_);
  }

 private:
  void Say(const std::string& where, const std::string& what) { problems_.push_back(absl::StrCat(where, " ", what)); }

  template <typename Descriptor>
  void Explained(const Descriptor& item) {
    pb::SourceLocation place;
    const bool found = item.GetSourceLocation(&place);
    const bool says = found && (!absl::StripAsciiWhitespace(place.leading_comments).empty() ||
                                !absl::StripAsciiWhitespace(place.trailing_comments).empty());
    if (!says) Say(item.full_name(), "has no comment");
  }

  void Enum(const pb::EnumDescriptor& type) {
    if (!IsPascal(type.name())) Say(type.full_name(), "is not PascalCase");
    Explained(type);
    const std::string prefix = UpperSnake(type.name()) + "_";
    for (int i = 0; i < type.value_count(); ++i) {
      const pb::EnumValueDescriptor& value = *type.value(i);
      if (!absl::StartsWith(value.name(), prefix)) Say(value.full_name(), "must begin with " + prefix);
      if (value.number() == 0 && value.name() != prefix + "UNSPECIFIED") {
        Say(value.full_name(), "is the zero value: it must be " + prefix + "UNSPECIFIED");
      }
      if (value.number() != 0) Explained(value);
    }
  }

  void Message(const pb::Descriptor& type) {
    if (type.options().map_entry()) return;
    if (!IsPascal(type.name())) Say(type.full_name(), "is not PascalCase");
    // A request's and a response's meaning is its method's.
    if (!absl::EndsWith(type.name(), "Request") && !absl::EndsWith(type.name(), "Response")) Explained(type);
    for (int i = 0; i < type.field_count(); ++i) {
      const pb::FieldDescriptor& field = *type.field(i);
      if (!IsSnake(field.name())) Say(field.full_name(), "is not lower_snake_case");
      if (field.is_required()) Say(field.full_name(), "is required");
      Explained(field);
    }
    for (int i = 0; i < type.real_oneof_decl_count(); ++i) {
      if (!IsSnake(type.oneof_decl(i)->name())) Say(type.oneof_decl(i)->full_name(), "is not lower_snake_case");
    }
    for (int i = 0; i < type.enum_type_count(); ++i) Enum(*type.enum_type(i));
    for (int i = 0; i < type.nested_type_count(); ++i) Message(*type.nested_type(i));
  }

  void Service(const pb::ServiceDescriptor& service) {
    if (!IsPascal(service.name()) || !absl::EndsWith(service.name(), "Service")) {
      Say(service.full_name(), "must be PascalCase and end in Service");
    }
    Explained(service);
    for (int i = 0; i < service.method_count(); ++i) {
      const pb::MethodDescriptor& method = *service.method(i);
      if (!IsPascal(method.name())) Say(method.full_name(), "is not PascalCase");
      Explained(method);
      if (method.input_type()->name() != method.name() + "Request") {
        Say(method.full_name(), "must take " + method.name() + "Request");
      }
      if (method.output_type()->name() != method.name() + "Response") {
        Say(method.full_name(), "must return " + method.name() + "Response");
      }
    }
  }

  std::vector<std::string> problems_;
};

TEST(ProtoLint, OurFilesFollowTheRules) {
  Parsed parsed(SIMPO_PROTO_DIR);
  for (const char* name : kFiles) {
    EXPECT_THAT(Lint().Check(*parsed.File(name)), IsEmpty()) << name;
  }
}

TEST(ProtoLint, EveryBreachIsSeen) {
  const TempDir dir;
  std::filesystem::create_directories(dir / "other");
  std::ofstream(dir / "other/bad.proto") << R"(syntax = "proto3";
package simpo.v1;
// Said.
enum Colour { RED = 0; COLOUR_BLUE = 1; }
message thing {
  string someName = 1;  // Said.
  string other = 2;
}
message AskRequest {
  oneof Which {
    string a = 1;  // Said.
  }
}
service Asking {
  rpc Ask(AskRequest) returns (thing);
  // Said.
  rpc again(AskRequest) returns (AskRequest);
}
)";
  Parsed parsed(dir.path().string());
  EXPECT_THAT(
      Lint().Check(*parsed.File("other/bad.proto")),
      ::testing::UnorderedElementsAre(
          "other/bad.proto lies outside the folder of its package", "simpo.v1.RED must begin with COLOUR_",
          "simpo.v1.RED is the zero value: it must be COLOUR_UNSPECIFIED", "simpo.v1.COLOUR_BLUE has no comment",
          "simpo.v1.thing is not PascalCase", "simpo.v1.thing has no comment",
          "simpo.v1.thing.someName is not lower_snake_case", "simpo.v1.thing.other has no comment",
          "simpo.v1.AskRequest.Which is not lower_snake_case", "simpo.v1.Asking must be PascalCase and end in Service",
          "simpo.v1.Asking has no comment", "simpo.v1.Asking.Ask has no comment",
          "simpo.v1.Asking.Ask must return AskResponse", "simpo.v1.Asking.again is not PascalCase",
          "simpo.v1.Asking.again must take againRequest", "simpo.v1.Asking.again must return againResponse"));
}

// --- compatibility

std::string TypeOf(const pb::FieldDescriptor& field) {
  if (field.is_map()) {
    return absl::StrCat("map<", TypeOf(*field.message_type()->map_key()), ",",
                        TypeOf(*field.message_type()->map_value()), ">");
  }
  const std::string type = field.message_type() != nullptr ? field.message_type()->full_name()
                           : field.enum_type() != nullptr  ? field.enum_type()->full_name()
                                                           : field.type_name();
  return absl::StrCat(field.is_repeated()            ? "repeated "
                      : field.has_optional_keyword() ? "optional "
                                                     : "",
                      type,
                      field.real_containing_oneof() == nullptr ? "" : " of " + field.real_containing_oneof()->name());
}

void DescribeEnum(const pb::EnumDescriptor& type, std::vector<std::string>* lines) {
  for (int i = 0; i < type.value_count(); ++i) {
    lines->push_back(absl::StrCat("enum ", type.full_name(), " ", type.value(i)->number(), " ", type.value(i)->name()));
  }
}

void DescribeMessage(const pb::Descriptor& type, std::vector<std::string>* lines) {
  if (type.options().map_entry()) return;
  lines->push_back(absl::StrCat("message ", type.full_name()));
  for (int i = 0; i < type.field_count(); ++i) {
    const pb::FieldDescriptor& field = *type.field(i);
    lines->push_back(
        absl::StrCat("field ", type.full_name(), " ", field.number(), " ", field.name(), " ", TypeOf(field)));
  }
  for (int i = 0; i < type.enum_type_count(); ++i) DescribeEnum(*type.enum_type(i), lines);
  for (int i = 0; i < type.nested_type_count(); ++i) DescribeMessage(*type.nested_type(i), lines);
}

// One line for everything that a client may rely on.
std::vector<std::string> Describe(const pb::FileDescriptor& file) {
  std::vector<std::string> lines;
  for (int i = 0; i < file.enum_type_count(); ++i) DescribeEnum(*file.enum_type(i), &lines);
  for (int i = 0; i < file.message_type_count(); ++i) DescribeMessage(*file.message_type(i), &lines);
  for (int i = 0; i < file.service_count(); ++i) {
    for (int m = 0; m < file.service(i)->method_count(); ++m) {
      const pb::MethodDescriptor& method = *file.service(i)->method(m);
      lines.push_back(absl::StrCat("rpc ", method.full_name(), " ", method.client_streaming() ? "stream " : "",
                                   method.input_type()->full_name(), " -> ", method.server_streaming() ? "stream " : "",
                                   method.output_type()->full_name()));
    }
  }
  return lines;
}

// What was promised and is no longer there.
std::vector<std::string> Broken(const std::vector<std::string>& promised, const std::vector<std::string>& now) {
  const std::set<std::string> there(now.begin(), now.end());
  std::vector<std::string> broken;
  for (const std::string& line : promised) {
    if (!there.contains(line)) broken.push_back(line);
  }
  return broken;
}

TEST(ProtoCompatibility, NothingThatWasPromisedHasGone) {
  Parsed parsed(SIMPO_PROTO_DIR);
  std::vector<std::string> now;
  for (const char* name : kFiles) {
    for (std::string& line : Describe(*parsed.File(name))) now.push_back(std::move(line));
  }
  if (std::getenv("SIMPO_WRITE_API") != nullptr) {
    ASSERT_TRUE(WriteFileAtomically(SIMPO_API_SNAPSHOT, absl::StrJoin(now, "\n") + "\n").ok());
  }
  const auto text = ReadFile(SIMPO_API_SNAPSHOT, 1 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  const std::vector<std::string> promised = absl::StrSplit(*text, '\n', absl::SkipEmpty());
  EXPECT_GT(promised.size(), 100u);
  EXPECT_THAT(Broken(promised, now), IsEmpty()) << "clients of v1 rely on these lines of tests/proto/api_v1.txt";
}

// job.proto, changed by `change`, against job.proto as it is.
std::vector<std::string> BrokenBy(const std::function<void(pb::DescriptorProto*)>& change) {
  Parsed parsed(SIMPO_PROTO_DIR);
  const pb::FileDescriptor* file = parsed.File("simpo/v1/job.proto");
  pb::FileDescriptorProto proto, timestamp;
  file->CopyTo(&proto);
  file->dependency(0)->CopyTo(&timestamp);
  change(proto.mutable_message_type(0));
  pb::DescriptorPool pool;
  EXPECT_NE(pool.BuildFile(timestamp), nullptr);
  const pb::FileDescriptor* changed = pool.BuildFile(proto);
  EXPECT_NE(changed, nullptr);
  return Broken(Describe(*file), Describe(*changed));
}

TEST(ProtoCompatibility, EveryIncompatibleChangeIsSeen) {
  EXPECT_THAT(BrokenBy([](pb::DescriptorProto*) {}), IsEmpty());
  EXPECT_THAT(BrokenBy([](pb::DescriptorProto* job) {
                pb::FieldDescriptorProto* field = job->add_field();
                field->set_name("more");
                field->set_number(1000);
                field->set_type(pb::FieldDescriptorProto::TYPE_STRING);
                field->set_label(pb::FieldDescriptorProto::LABEL_OPTIONAL);
              }),
              IsEmpty())
      << "an addition is none";
  const auto id_gone = ElementsAre("field simpo.v1.Job 1 id string");
  EXPECT_THAT(BrokenBy([](pb::DescriptorProto* job) { job->mutable_field()->DeleteSubrange(0, 1); }), id_gone);
  EXPECT_THAT(BrokenBy([](pb::DescriptorProto* job) { job->mutable_field(0)->set_number(1000); }), id_gone);
  EXPECT_THAT(BrokenBy([](pb::DescriptorProto* job) { job->mutable_field(0)->set_name("name_of_it"); }), id_gone);
  EXPECT_THAT(
      BrokenBy([](pb::DescriptorProto* job) { job->mutable_field(0)->set_type(pb::FieldDescriptorProto::TYPE_BYTES); }),
      id_gone);
  EXPECT_THAT(BrokenBy([](pb::DescriptorProto* job) {
                job->mutable_field(0)->set_label(pb::FieldDescriptorProto::LABEL_REPEATED);
              }),
              id_gone);
}

}  // namespace
}  // namespace simpo
