// Devices behind one name: "cpu", "cuda:N", "npu:N". CUDA and NPU come as run-time plug-ins; a
// program never links their libraries.
#ifndef PYRAMID_MODEL_DEVICE_H_
#define PYRAMID_MODEL_DEVICE_H_

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pyramid {

struct DeviceName {
  std::string kind;  // "cpu" | "cuda" | "npu"
  int index = 0;
};

// "cpu", "cuda", "cuda:1", "npu:0". InvalidArgument otherwise.
absl::StatusOr<DeviceName> ParseDevice(absl::string_view text);

struct DeviceKind {
  std::string kind;
  int count = 0;            // usable devices
  std::string unavailable;  // why there is none, if there is none: "libpyramid_cuda.so: …"
};

// Every kind this build knows, probed once per process. Plug-ins are looked for in the program's
// folder and in lib/ beside it.
const std::vector<DeviceKind>& ProbeDevices();

// Loads the plug-in if one is needed and makes the device current.
//   Unavailable  "cuda:0 isn't there (…); usable: cpu"
absl::StatusOr<DeviceName> OpenDevice(absl::string_view text);

// Work recorded on a device, to be queued again at once instead of operation by operation. One
// thread at a time.
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  // Queues it on the calling thread's current stream.
  virtual absl::Status Replay() = 0;
};

// Calls `forward` a few times, then once more while recording what it queues on `device`, which is
// open. `forward` works on tensors that stay where they are, and waits for nothing.
//   Unimplemented  the device can't (cpu; an older plug-in)
//   Internal       recording failed, with the library's reason
absl::StatusOr<std::unique_ptr<RecordedWork>> RecordWork(const DeviceName& device,
                                                         const std::function<void()>& forward);

// "cpu (2 cores), cuda: none (libpyramid_cuda.so isn't installed), npu: …"
std::string DescribeDevices();

// The devices of a process, with its plug-ins in `folders`; the functions above use the one of this
// program. Thread-safe.
class Devices {
 public:
  explicit Devices(const std::vector<std::filesystem::path>& folders);
  const std::vector<DeviceKind>& kinds() const { return kinds_; }
  absl::StatusOr<DeviceName> Open(absl::string_view text) const;
  absl::StatusOr<std::unique_ptr<RecordedWork>> Record(const DeviceName& device,
                                                       const std::function<void()>& forward) const;
  std::string Describe() const;

 private:
  struct Functions;                                          // of a plug-in
  std::vector<DeviceKind> kinds_;                            // "cpu" first
  std::vector<std::shared_ptr<const Functions>> functions_;  // of each kind; null: no plug-in
};

}  // namespace pyramid

#endif  // PYRAMID_MODEL_DEVICE_H_
