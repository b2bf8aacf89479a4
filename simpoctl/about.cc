#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/job_config.h"
#include "common/text.h"
#include "simpoctl/commands.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/terminal.h"

namespace simpo {
namespace {

std::vector<std::string> LongOptions(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
}

struct CommandNames {
  std::string name;
  std::string help;
  std::vector<std::string> options;
};

std::vector<CommandNames> Commands(const CLI::App& app) {
  std::vector<CommandNames> commands;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    std::vector<std::string> options = LongOptions(*command);
    for (const std::string& option : LongOptions(app)) {
      if (std::find(options.begin(), options.end(), option) == options.end()) options.push_back(option);
    }
    commands.push_back({command->get_name(), command->get_description(), std::move(options)});
  }
  return commands;
}

// What stands in a place of a command: job ids from the coordinator, files, or words.
constexpr char kBashHead[] =
    "# bash completion of simpoctl; load it with: source <(simpoctl completion bash)\n"
    "_simpoctl() {\n"
    "  local word=${COMP_WORDS[COMP_CWORD]} command= i\n"
    "  COMPREPLY=()\n"
    "  for ((i = 1; i < COMP_CWORD; i++)); do\n"
    "    case ${COMP_WORDS[i]} in\n"
    "      --address|--token-file|--ca|--cert|--key) ((i++)) ;;\n"
    "      -*) ;;\n"
    "      *) command=${COMP_WORDS[i]}; break ;;\n"
    "    esac\n"
    "  done\n";

constexpr char kBashTail[] =
    "  case $command in\n"
    "    submit) COMPREPLY=($(compgen -f -- \"$word\")) ;;\n"
    "    completion) COMPREPLY=($(compgen -W 'bash zsh' -- \"$word\")) ;;\n"
    "    help) COMPREPLY=($(compgen -W 'job-file exit-codes' -- \"$word\")) ;;\n"
    "    get|describe|watch|logs|metrics|cancel|wait|priority|checkpoint)\n"
    "      COMPREPLY=($(compgen -W \"$(simpoctl list --limit 200 -o name 2>/dev/null)\" -- \"$word\")) ;;\n"
    "  esac\n"
    "}\n"
    "complete -o filenames -F _simpoctl simpoctl\n";

std::string BashScript(const CLI::App& app) {
  std::string text = kBashHead;
  std::vector<std::string> names;
  std::string cases;
  for (const CommandNames& command : Commands(app)) {
    names.push_back(command.name);
    absl::StrAppend(&cases, "      ", command.name, ") COMPREPLY=($(compgen -W '", absl::StrJoin(command.options, " "),
                    "' -- \"$word\")) ;;\n");
  }
  absl::StrAppend(&text, "  if [[ -z $command ]]; then\n    COMPREPLY=($(compgen -W '", absl::StrJoin(names, " "), " ",
                  absl::StrJoin(LongOptions(app), " "), "' -- \"$word\"))\n    return\n  fi\n");
  absl::StrAppend(&text, "  if [[ $word == -* ]]; then\n    case $command in\n", cases, "    esac\n    return\n  fi\n",
                  kBashTail);
  return text;
}

// A description between the quotes and brackets of zsh's _describe.
std::string ZshText(const std::string& text) {
  std::string safe;
  for (const char c : text) {
    if (c == '\'')
      safe += "'\\''";
    else if (c == ':')
      safe += "\\:";
    else
      safe += c;
  }
  return safe;
}

std::string ZshScript(const CLI::App& app) {
  std::string commands;
  std::string cases;
  for (const CommandNames& command : Commands(app)) {
    absl::StrAppend(&commands, "    '", command.name, ":", ZshText(command.help), "'\n");
    absl::StrAppend(&cases, "      ", command.name, ") compadd -- ", absl::StrJoin(command.options, " "), " ;;\n");
  }
  return absl::StrCat(
      "#compdef simpoctl\n"
      "# zsh completion of simpoctl; load it with: source <(simpoctl completion zsh)\n"
      "_simpoctl() {\n"
      "  local -a commands\n"
      "  commands=(\n",
      commands,
      "  )\n"
      "  if (( CURRENT == 2 )); then\n"
      "    _describe 'command' commands\n"
      "    return\n"
      "  fi\n"
      "  if [[ ${words[CURRENT]} == -* ]]; then\n"
      "    case ${words[2]} in\n",
      cases,
      "    esac\n"
      "    return\n"
      "  fi\n"
      "  case ${words[2]} in\n"
      "    submit) _files ;;\n"
      "    completion) compadd bash zsh ;;\n"
      "    help) compadd job-file exit-codes ;;\n"
      "    get|describe|watch|logs|metrics|cancel|wait|priority|checkpoint)\n"
      "      compadd -- ${(f)\"$(simpoctl list --limit 200 -o name 2>/dev/null)\"} ;;\n"
      "  esac\n"
      "}\n"
      "compdef _simpoctl simpoctl\n");
}

absl::StatusOr<int> Help(const CLI::App& app, const std::string& topic) {
  if (topic.empty()) {
    PrintOut(app.help());
  } else if (topic == "job-file") {
    PrintOut(JobFileHelp());
  } else if (topic == "exit-codes") {
    PrintOut(ExitCodesHelp());
  } else {
    for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
      if (command->get_name() != topic) continue;
      PrintOut(command->help(app.get_name()));
      return kExitOk;
    }
    return absl::InvalidArgumentError(
        absl::StrCat("no help on '", OneLine(topic), "'; there is job-file, exit-codes, and every command"));
  }
  return kExitOk;
}

}  // namespace

std::string CompletionScript(const CLI::App& app, const std::string& shell) {
  return shell == "zsh" ? ZshScript(app) : BashScript(app);
}

void AddVersion(CLI::App& app, CommandLine& line) {
  CLI::App* command = app.add_subcommand("version", "Print the versions of simpoctl and of the coordinator");
  command->callback([&line] {
    line.run = [](Client& client) -> absl::StatusOr<int> {
      PrintOut("simpoctl " SIMPO_VERSION "\n");
      const absl::StatusOr<v1::GetServerInfoResponse> info = client.ServerInfo();
      if (info.ok()) {
        PrintOut(absl::StrCat("coordinator ", info->version(), " at ", client.address(), " on ", info->hostname(), ", ",
                              info->slots_free(), " of ", info->slots_total(), " slots free\n"));
      } else {
        PrintErr(absl::StrCat("no coordinator answered at ", client.address(), "\n"));
      }
      return kExitOk;
    };
  });
}

void AddCompletion(CLI::App& app, CommandLine& line) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("completion", "Print a completion script for a shell");
  command->add_option("shell", *shell, "bash or zsh")->required()->check(CLI::IsMember({"bash", "zsh"}));
  command->callback([&app, &line, shell] {
    line.run_offline = [&app, shell]() -> absl::StatusOr<int> {
      PrintOut(CompletionScript(app, *shell));
      return kExitOk;
    };
  });
}

void AddHelp(CLI::App& app, CommandLine& line) {
  auto topic = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("help", "Explain job-file, exit-codes, or a command");
  command->add_option("topic", *topic, "job-file, exit-codes, or a command's name");
  command->callback([&app, &line, topic] { line.run_offline = [&app, topic] { return Help(app, *topic); }; });
}

}  // namespace simpo
