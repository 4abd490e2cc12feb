#include "tests/model/formats/torch_files.h"

#include <zlib.h>

#include "absl/strings/str_cat.h"

namespace pyramid::testing {

std::string LittleEndian(uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>((value >> (8 * i)) & 0xff);
  return text;
}

std::string PickledText(absl::string_view text) {
  return absl::StrCat("X", LittleEndian(text.size(), 4), text);
}

std::string PickledInteger(int64_t number) {
  return absl::StrCat("\x8a", "\x08", LittleEndian(static_cast<uint64_t>(number), 8));
}

std::string PickledTuple(const std::vector<int64_t>& numbers) {
  std::string text = "(";
  for (const int64_t number : numbers) text += PickledInteger(number);
  return text + "t";
}

std::string PickledDict(const std::vector<std::pair<std::string, std::string>>& items) {
  std::string text = "}(";
  for (const auto& [key, value] : items) text += PickledText(key) + value;
  return text + "u";
}

std::string PickledGlobal(absl::string_view module, absl::string_view name) {
  return absl::StrCat("c", module, "\n", name, "\n");
}

std::string PickledStorageId(absl::string_view type, absl::string_view key, int64_t elements,
                             absl::string_view view) {
  return absl::StrCat("(", PickledText("storage"), PickledGlobal("torch", type), PickledText(key),
                      PickledText("cpu"), PickledInteger(elements), view, "tQ");
}

std::string PickledTensor(absl::string_view storage_id, int64_t first,
                          const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  return absl::StrCat(PickledGlobal("torch._utils", "_rebuild_tensor_v2"), "(", storage_id,
                      PickledInteger(first), PickledTuple(shape), PickledTuple(strides), "\x89",
                      PickledGlobal("collections", "OrderedDict"), ")RtR");
}

std::string WholePickle(absl::string_view body) { return absl::StrCat("\x80\x02", body, "."); }

std::string ZipFile(const std::vector<ZipEntry>& entries, bool zip64, int extra) {
  std::string file;
  std::string directory;
  for (const ZipEntry& entry : entries) {
    const size_t offset = file.size();
    const size_t size = entry.contents.size();
    uint64_t crc =
        crc32(0, reinterpret_cast<const Bytef*>(entry.contents.data()), static_cast<uInt>(size));
    if (entry.wrong_crc) crc ^= 1;
    if (entry.no_crc) crc = 0;
    const std::string common = absl::StrCat(
        LittleEndian(20, 2), LittleEndian(entry.flags, 2), LittleEndian(entry.method, 2),
        LittleEndian(0, 4), LittleEndian(crc, 4), LittleEndian(zip64 ? 0xffffffff : size, 4),
        LittleEndian(zip64 ? 0xffffffff : size, 4), LittleEndian(entry.name.size(), 2));
    file += absl::StrCat("PK\x03\x04", common, LittleEndian(extra, 2), entry.name,
                         std::string(static_cast<size_t>(extra), 'Z'), entry.contents);
    const std::string wide =
        zip64 ? absl::StrCat(LittleEndian(0x4246, 2), LittleEndian(2, 2), "ZZ", LittleEndian(1, 2),
                             LittleEndian(24, 2), LittleEndian(size, 8), LittleEndian(size, 8),
                             LittleEndian(offset, 8))
              : "";
    directory += absl::StrCat("PK\x01\x02", LittleEndian(20, 2), common,
                              LittleEndian(wide.size(), 2), LittleEndian(0, 2), LittleEndian(0, 8),
                              LittleEndian(zip64 ? 0xffffffff : offset, 4), entry.name, wide);
  }
  const size_t at = file.size();
  const size_t count = entries.size();
  file += directory;
  if (zip64) {
    const size_t end64 = file.size();
    file +=
        absl::StrCat("PK\x06\x06", LittleEndian(44, 8), LittleEndian(45, 2), LittleEndian(45, 2),
                     LittleEndian(0, 8), LittleEndian(count, 8), LittleEndian(count, 8),
                     LittleEndian(directory.size(), 8), LittleEndian(at, 8));
    file +=
        absl::StrCat("PK\x06\x07", LittleEndian(0, 4), LittleEndian(end64, 8), LittleEndian(1, 4));
  }
  file += absl::StrCat("PK\x05\x06", LittleEndian(0, 4), LittleEndian(zip64 ? 0xffff : count, 2),
                       LittleEndian(zip64 ? 0xffff : count, 2),
                       LittleEndian(zip64 ? 0xffffffff : directory.size(), 4),
                       LittleEndian(zip64 ? 0xffffffff : at, 4), LittleEndian(0, 2));
  return file;
}

std::string TorchZip(absl::string_view body, std::vector<ZipEntry> entries, bool zip64) {
  for (ZipEntry& entry : entries) entry.name = absl::StrCat("a/", entry.name);
  entries.insert(entries.begin(), {"a/data.pkl", WholePickle(body)});
  return ZipFile(entries, zip64, 7);
}

std::string TorchLegacy(absl::string_view object, const std::vector<LegacyStorage>& storages,
                        bool little_endian, int protocol) {
  std::string keys = "](";
  std::string data;
  for (const LegacyStorage& storage : storages) {
    keys += PickledText(storage.key);
    data += LittleEndian(static_cast<uint64_t>(storage.count), 8) + storage.bytes;
  }
  return absl::StrCat(
      WholePickle(absl::string_view("\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 12)),
      WholePickle(PickledInteger(protocol)),
      WholePickle(PickledDict({{"protocol_version", PickledInteger(protocol)},
                               {"little_endian", little_endian ? "\x88" : "\x89"}})),
      WholePickle(object), WholePickle(keys + "e"), data);
}

}  // namespace pyramid::testing
