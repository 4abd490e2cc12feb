#include "model/device.h"

#include <dlfcn.h>

#include <array>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/device_plugin.h"
#include "proto/base/status.h"

namespace pyramid {

struct Devices::Functions {
  decltype(&pyramid_device_open) open = nullptr;
  // Null: the plug-in doesn't record.
  decltype(&pyramid_device_record) record = nullptr;
  decltype(&pyramid_device_replay) replay = nullptr;
  decltype(&pyramid_device_forget) forget = nullptr;
};

namespace {

constexpr std::array<absl::string_view, 2> kPluginKinds = {"cuda", "npu"};

int Cores() {
  const unsigned cores = std::thread::hardware_concurrency();
  return cores == 0 ? 1 : static_cast<int>(cores);
}

struct Plugin {
  DeviceKind kind;
  void* library = nullptr;  // null: unusable
};

template <typename Function>
Function Symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

// dlopen's own text names the file or the library it lacks.
std::string LoadError() {
  const char* text = dlerror();
  return text == nullptr ? "unknown error" : text;
}

// Loads and probes. The library stays loaded for the life of the process: LibTorch keeps pointers
// into it.
Plugin LoadPlugin(absl::string_view kind, const std::vector<std::filesystem::path>& folders) {
  const std::string file = absl::StrCat("libpyramid_", kind, ".so");
  Plugin plugin{.kind = {.kind = std::string(kind)}};
  std::filesystem::path path;
  for (const std::filesystem::path& folder : folders) {
    std::error_code ignored;
    if (std::filesystem::exists(folder / file, ignored)) {
      path = folder / file;
      break;
    }
  }
  if (path.empty()) {
    plugin.kind.unavailable = absl::StrCat(file, " isn't installed");
    return plugin;
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    plugin.kind.unavailable = absl::StrCat(file, ": ", LoadError());
    return plugin;
  }
  const auto version =
      Symbol<decltype(&pyramid_device_abi_version)>(library, "pyramid_device_abi_version");
  const auto probe = Symbol<decltype(&pyramid_device_probe)>(library, "pyramid_device_probe");
  const auto open = Symbol<decltype(&pyramid_device_open)>(library, "pyramid_device_open");
  if (version == nullptr) {
    plugin.kind.unavailable = absl::StrCat(file, " isn't a device plug-in: ", LoadError());
    return plugin;
  }
  if (version() != PYRAMID_DEVICE_ABI_VERSION || probe == nullptr || open == nullptr) {
    plugin.kind.unavailable =
        absl::StrCat(file, " has plug-in interface ", version(), ", this program needs ",
                     PYRAMID_DEVICE_ABI_VERSION, "; install the plug-in of this version");
    return plugin;
  }
  std::array<char, 1024> error{};
  if (probe(&plugin.kind.count, error.data(), static_cast<int>(error.size())) != 0) {
    plugin.kind.count = 0;
    plugin.kind.unavailable = absl::StrCat(file, ": ", error.data());
    return plugin;
  }
  if (plugin.kind.count == 0) plugin.kind.unavailable = absl::StrCat(file, " finds no device");
  plugin.library = library;
  return plugin;
}

class RecordedByPlugin : public RecordedWork {
 public:
  RecordedByPlugin(void* work, decltype(&pyramid_device_replay) replay,
                   decltype(&pyramid_device_forget) forget)
      : work_(work), replay_(replay), forget_(forget) {}
  ~RecordedByPlugin() override { forget_(work_); }
  absl::Status Replay() override {
    std::array<char, 1024> error{};
    if (replay_(work_, error.data(), static_cast<int>(error.size())) == 0) return absl::OkStatus();
    return absl::InternalError(error.data());
  }

 private:
  void* work_;
  decltype(&pyramid_device_replay) replay_;
  decltype(&pyramid_device_forget) forget_;
};

const Devices& OfThisProgram() {
  static const Devices* devices = [] {
    std::error_code error;
    const std::filesystem::path program =
        std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
    return new Devices({program, program.parent_path() / "lib"});
  }();
  return *devices;
}

}  // namespace

absl::StatusOr<DeviceName> ParseDevice(absl::string_view text) {
  if (text == "cpu") return DeviceName{"cpu", 0};
  for (absl::string_view kind : kPluginKinds) {
    if (text == kind) return DeviceName{std::string(kind), 0};
    if (text.substr(0, kind.size()) != kind || text.substr(kind.size(), 1) != ":") continue;
    const absl::string_view digits = text.substr(kind.size() + 1);
    int index = 0;
    if (digits.find_first_not_of("0123456789") == absl::string_view::npos &&
        absl::SimpleAtoi(digits, &index)) {
      return DeviceName{std::string(kind), index};
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("device is \"", text, "\"; use cpu, cuda, cuda:N, npu or npu:N"));
}

Devices::Devices(const std::vector<std::filesystem::path>& folders) {
  kinds_.push_back({.kind = "cpu", .count = 1});
  functions_.push_back(nullptr);
  for (absl::string_view kind : kPluginKinds) {
    Plugin plugin = LoadPlugin(kind, folders);
    kinds_.push_back(std::move(plugin.kind));
    functions_.push_back(nullptr);
    if (void* library = plugin.library) {
      functions_.back() = std::make_shared<const Functions>(Functions{
          .open = Symbol<decltype(&pyramid_device_open)>(library, "pyramid_device_open"),
          .record = Symbol<decltype(&pyramid_device_record)>(library, "pyramid_device_record"),
          .replay = Symbol<decltype(&pyramid_device_replay)>(library, "pyramid_device_replay"),
          .forget = Symbol<decltype(&pyramid_device_forget)>(library, "pyramid_device_forget")});
    }
  }
}

absl::StatusOr<DeviceName> Devices::Open(absl::string_view text) const {
  ASSIGN_OR_RETURN(const DeviceName name, ParseDevice(text));
  if (name.kind == "cpu") return name;

  std::string reason;
  std::vector<std::string> usable;
  for (size_t i = 0; i < kinds_.size(); ++i) {
    const DeviceKind& kind = kinds_[i];
    if (kind.kind == "cpu") usable.push_back("cpu");
    for (int n = 0; n < kind.count && kind.kind != "cpu"; ++n) {
      usable.push_back(absl::StrCat(kind.kind, ":", n));
    }
    if (kind.kind != name.kind) continue;
    if (name.index >= kind.count) {
      reason = kind.count == 0 ? kind.unavailable
                               : absl::StrCat("this machine has ", kind.count, " of them");
      continue;
    }
    std::array<char, 1024> error{};
    if (functions_[i]->open(name.index, error.data(), static_cast<int>(error.size())) == 0) {
      return name;
    }
    reason = error.data();
    usable.erase(usable.end() - kind.count + name.index);
  }
  return absl::UnavailableError(absl::StrCat(name.kind, ":", name.index, " isn't there (", reason,
                                             "); usable: ", absl::StrJoin(usable, ", ")));
}

absl::StatusOr<std::unique_ptr<RecordedWork>> Devices::Record(
    const DeviceName& device, const std::function<void()>& forward) const {
  for (size_t i = 0; i < kinds_.size(); ++i) {
    const Functions* plugin = functions_[i].get();
    if (kinds_[i].kind != device.kind || plugin == nullptr || plugin->record == nullptr ||
        plugin->replay == nullptr || plugin->forget == nullptr) {
      continue;
    }
    void* work = nullptr;
    std::array<char, 1024> error{};
    const auto call = [](void* context) {
      (*static_cast<const std::function<void()>*>(context))();
    };
    if (plugin->record(call, const_cast<std::function<void()>*>(&forward), &work, error.data(),
                       static_cast<int>(error.size())) != 0) {
      return absl::InternalError(error.data());
    }
    return std::make_unique<RecordedByPlugin>(work, plugin->replay, plugin->forget);
  }
  return absl::UnimplementedError(absl::StrCat(device.kind, " records no work"));
}

std::string Devices::Describe() const {
  std::vector<std::string> parts;
  for (const DeviceKind& kind : kinds_) {
    if (kind.kind == "cpu") {
      parts.push_back(absl::StrCat("cpu (", Cores(), Cores() == 1 ? " core)" : " cores)"));
    } else if (kind.count == 0) {
      parts.push_back(absl::StrCat(kind.kind, ": none (", kind.unavailable, ")"));
    } else {
      parts.push_back(absl::StrCat(kind.kind, ": ", kind.count));
    }
  }
  return absl::StrJoin(parts, ", ");
}

const std::vector<DeviceKind>& ProbeDevices() { return OfThisProgram().kinds(); }

absl::StatusOr<DeviceName> OpenDevice(absl::string_view text) {
  // The CPU needs no plug-in: don't load any.
  ASSIGN_OR_RETURN(const DeviceName name, ParseDevice(text));
  if (name.kind == "cpu") return name;
  return OfThisProgram().Open(text);
}

absl::StatusOr<std::unique_ptr<RecordedWork>> RecordWork(const DeviceName& device,
                                                         const std::function<void()>& forward) {
  return OfThisProgram().Record(device, forward);
}

std::string DescribeDevices() { return OfThisProgram().Describe(); }

}  // namespace pyramid
