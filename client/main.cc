// `pyramid`, a person's hand: submit, watch, classify, validate.
#include <pwd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <system_error>

#include "client/program.h"
#include "client/worker_process.h"
#include "proto/base/log.h"

namespace {

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Who runs this, as the system knows it.
std::string User() {
  const passwd* entry = getpwuid(getuid());
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  const std::string name = entry != nullptr ? entry->pw_name : std::to_string(getuid());
  return host[0] == '\0' ? name : name + "@" + host;
}

int Columns() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

int main(int argc, char** argv) try {
  pyramid::log::Configure(pyramid::log::Level::kWarning);
  std::error_code error;
  pyramid::Environment environment;
  environment.out = &std::cout;
  environment.err = &std::cerr;
  environment.err_is_terminal = isatty(STDERR_FILENO) != 0;
  environment.columns = Columns();
  environment.folder = std::filesystem::current_path(error);
  environment.server_variable = Variable("PYRAMID_SERVER");
  environment.variables.key = Variable("PYRAMID_KEY");
  environment.variables.tls_ca = Variable("PYRAMID_TLS_CA");
  environment.variables.tls_cert = Variable("PYRAMID_TLS_CERT");
  environment.variables.tls_key = Variable("PYRAMID_TLS_KEY");
  environment.user = User();
#ifdef PYRAMID_WITH_TORCH
  environment.load_classifier = pyramid::LoadClassifier;
  environment.make_self_test = pyramid::MakeSelfTest;
#endif
  environment.worker = pyramid::FindWorker(
      std::filesystem::read_symlink("/proc/self/exe", error).parent_path(), Variable("PATH"));
  environment.become = pyramid::Become;
  return pyramid::RunProgram({argv + 1, argv + argc}, environment);
} catch (const std::exception& error) {
  std::cerr << "pyramid: " << error.what() << "\n";
  return 1;
}
