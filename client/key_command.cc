#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "proto/base/key.h"

namespace pyramid {
namespace {

struct Options {
  std::string name;
  std::vector<std::string> scopes = {"infer"};
  double images_per_second = 0;  // 0: no limit
  std::string expires;
  bool json = false;
};

// As a keys file has it (docs/security.md).
std::string EntryOf(const Options& options, absl::string_view hash) {
  std::string entry = absl::StrCat("- {name: ", options.name, ", sha256: \"", hash, "\", scopes: [",
                                   absl::StrJoin(options.scopes, ", "), "]");
  if (options.images_per_second > 0) {
    absl::StrAppend(&entry, ", images_per_second: ", options.images_per_second);
  }
  if (!options.expires.empty()) absl::StrAppend(&entry, ", expires: ", options.expires);
  return entry + "}";
}

absl::Status Check(const Options& options) {
  for (const char c : options.name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-') {
      return UsageError(absl::StrCat("the name \"", OneLine(options.name),
                                     "\" has another character than letters, digits, '.', '_', "
                                     "'-'"));
    }
  }
  absl::Time day;
  std::string error;
  if (!options.expires.empty() && !absl::ParseTime("%Y-%m-%d", options.expires, &day, &error)) {
    return UsageError(
        absl::StrCat("--expires is ", options.expires, "; use a day like 2027-01-31"));
  }
  return absl::OkStatus();
}

// The key goes to stdout alone, so that it can be piped to where it is kept; what the server gets
// to stderr.
int NewKeyFor(Environment& environment, const Options& options) {
  if (const absl::Status status = Check(options); !status.ok()) return Fail(environment, status);
  const absl::StatusOr<std::string> key = NewKey();
  if (!key.ok()) return Fail(environment, key.status());
  const std::string entry = EntryOf(options, KeyHash(*key));
  if (options.json) {
    *environment.out << nlohmann::json({{"key", *key}, {"entry", entry}}).dump() << "\n";
    return kDone;
  }
  *environment.out << *key << "\n" << std::flush;
  *environment.err << "The key is shown once. Line for the keys file of pyramid-server:\n"
                   << entry << "\n";
  return kDone;
}

}  // namespace

void AddKeyCommand(CommandLine line) {
  auto options = std::make_shared<Options>();
  CLI::App* command = line.app.add_subcommand("key", "Make a key for a server that asks for one");
  command->require_subcommand(1);
  CLI::App* make = command->add_subcommand(
      "new", "Print a fresh key, and the line with its hash for the server's keys file");
  make->add_option("name", options->name, "Whose it is")
      ->type_name("NAME")
      ->required()
      ->check(CLI::Validator(
          [](const std::string& text) {
            return text.empty() || text.size() > 64 ? std::string("use 1..64 characters")
                                                    : std::string();
          },
          ""));
  make->add_option("--scopes", options->scopes,
                   "What it is good for: infer, submit, worker, admin (default: infer)")
      ->delimiter(',')
      ->check(CLI::IsMember({"infer", "submit", "worker", "admin"}))
      ->type_name("SCOPE,…");
  make->add_option("--images-per-second", options->images_per_second,
                   "Limit of pictures (default: none)")
      ->check(CLI::Range(0.001, 1e9))
      ->type_name("N");
  make->add_option("--expires", options->expires, "First day on which it no longer works")
      ->type_name("YYYY-MM-DD");
  make->add_flag("--json", options->json, "One JSON object with key and entry");
  make->callback([line, options] {
    line.action = [line, options] { return NewKeyFor(line.environment, *options); };
  });
}

}  // namespace pyramid
