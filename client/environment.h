// What a command sees of the world: where it writes, what paths are relative to, how it reaches a
// server, a network, a worker program. main.cc fills it in from the process; tests fill it in by
// hand.
#ifndef PYRAMID_CLIENT_ENVIRONMENT_H_
#define PYRAMID_CLIENT_ENVIRONMENT_H_

#include <filesystem>
#include <ostream>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "model/classifier.h"

namespace pyramid {

struct Environment {
  std::ostream* out = nullptr;  // results; must outlive the command
  std::ostream* err = nullptr;  // logs, progress, errors
  bool err_is_terminal = false;
  int columns = 80;              // of that terminal
  std::filesystem::path folder;  // relative paths start here
  std::string server_flag;       // --server; empty: not given
  std::string server_variable;   // PYRAMID_SERVER; empty: not set

  // What is shown to the server and what is trusted: flags, else variables. Empty: not given.
  struct Security {
    std::string key;  // the key itself, or "@FILE"
    bool tls = false;
    std::string tls_ca;
    std::string tls_cert;
    std::string tls_key;
    std::string tls_name;
  };
  Security flags;      // --key, --tls, --tls-ca, --tls-cert, --tls-key, --tls-name
  Security variables;  // PYRAMID_KEY, PYRAMID_TLS_CA, PYRAMID_TLS_CERT, PYRAMID_TLS_KEY
  std::string user;    // "name@machine", for the record of what is changed; may be empty

  // Both null: this build has no LibTorch.
  ClassifierLoader load_classifier;
  absl::AnyInvocable<absl::StatusOr<std::string>(Classifier& classifier, int pictures) const>
      make_self_test;

  // Empty: neither beside this program nor on PATH.
  std::filesystem::path worker;
  // Becomes another program; returns only if that fails.
  absl::AnyInvocable<absl::Status(const std::filesystem::path& program,
                                  const std::vector<std::string>& arguments)>
      become;
};

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_ENVIRONMENT_H_
