// Small PyTorch files made by hand, for what torch.save writes rarely or never.
#ifndef PYRAMID_TESTS_MODEL_FORMATS_TORCH_FILES_H_
#define PYRAMID_TESTS_MODEL_FORMATS_TORCH_FILES_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid::testing {

std::string LittleEndian(uint64_t value, int bytes);

// Parts of a pickle: each leaves one object on the stack.
std::string PickledText(absl::string_view text);
std::string PickledInteger(int64_t number);
std::string PickledTuple(const std::vector<int64_t>& numbers);
std::string PickledDict(const std::vector<std::pair<std::string, std::string>>& items);  // by text
std::string PickledGlobal(absl::string_view module, absl::string_view name);
// `view`: a part of a pickle, in the legacy form.
std::string PickledStorageId(absl::string_view type, absl::string_view key, int64_t elements,
                             absl::string_view view = "");
std::string PickledTensor(absl::string_view storage_id, int64_t first,
                          const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);

std::string WholePickle(absl::string_view body);  // protocol 2

struct ZipEntry {
  std::string name;
  std::string contents;
  int method = 0;
  int flags = 0;
  bool wrong_crc = false;
  bool no_crc = false;
};

// Stored entries, each local header with `extra` bytes of padding.
std::string ZipFile(const std::vector<ZipEntry>& entries, bool zip64 = false, int extra = 0);

// torch.save's archive "a/": data.pkl of this body, then the other entries ("data/0" …).
std::string TorchZip(absl::string_view body, std::vector<ZipEntry> entries, bool zip64 = false);

// The legacy form: `object` is a pickle's body, each storage its key, count and bytes.
struct LegacyStorage {
  std::string key;
  int64_t count = 0;
  std::string bytes;
};
std::string TorchLegacy(absl::string_view object, const std::vector<LegacyStorage>& storages,
                        bool little_endian = true, int protocol = 1001);

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_MODEL_FORMATS_TORCH_FILES_H_
