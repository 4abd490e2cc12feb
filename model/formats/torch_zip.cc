// PyTorch's zip: <name>/data.pkl, <name>/data/<key> for the storages, <name>/byteorder. Entries are
// stored, never compressed, and aligned by extra fields of their local headers; the central
// directory has their sizes and CRC-32s (0: torch.save was told to compute none).
//
// Source: APPNOTE.TXT 6.3 of PKWARE for zip and zip64; torch/serialization.py.
#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/formats/pickle.h"
#include "model/formats/weight_file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr int64_t kEndBytes = 22;      // end of central directory, without its comment
constexpr int64_t kLocatorBytes = 20;  // zip64's, just before it
constexpr int64_t kEnd64Bytes = 56;
constexpr int64_t kEntryBytes = 46;  // of the directory, without name, extra fields, comment
constexpr int64_t kLocalBytes = 30;
constexpr int64_t kMaxComment = 65535;
constexpr uint64_t kMaxEntries = 100'000;
constexpr int64_t kMaxRecord = 64 * 1024;  // byteorder, extra/…

absl::Status Damaged(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("PyTorch zip: ", what));
}

uint64_t Number(absl::string_view bytes, size_t at, int count) {
  uint64_t value = 0;
  for (int i = 0; i < count; ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[at + static_cast<size_t>(i)])} << (8 * i);
  }
  return value;
}

// So many bytes of fixed size, as text.
template <size_t bytes>
absl::Status ReadRecord(const ByteSource& source, uint64_t offset,
                        std::array<char, bytes>& record) {
  return source.Read(static_cast<int64_t>(offset), record);
}

template <size_t bytes>
absl::string_view View(const std::array<char, bytes>& record) {
  return absl::string_view(record.data(), record.size());
}

absl::StatusOr<std::string> ReadText(const ByteSource& source, int64_t offset, int64_t bytes) {
  std::string text(static_cast<size_t>(bytes), '\0');
  RETURN_IF_ERROR(source.Read(offset, std::span<char>(text)));
  return text;
}

struct Entry {
  uint64_t header = 0;  // of its local header
  uint64_t stored = 0;  // bytes in the file
  uint64_t plain = 0;   // bytes unpacked
  uint32_t crc = 0;
  uint32_t method = 0;
  bool encrypted = false;
  std::optional<FoundStorage> found;  // once its local header was read
};

struct Directory {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t entries = 0;
};

// The archive's end says where its directory is.
absl::StatusOr<Directory> FindDirectory(const ByteSource& source) {
  const int64_t tail_bytes = std::min(source.size(), kEndBytes + kMaxComment);
  const int64_t tail_begin = source.size() - tail_bytes;
  ASSIGN_OR_RETURN(const std::string tail, ReadText(source, tail_begin, tail_bytes));
  int64_t at = tail_bytes - kEndBytes;
  for (; at >= 0; --at) {
    const auto place = static_cast<size_t>(at);
    if (Number(tail, place, 1) == 'P' && Number(tail, place, 4) == 0x06054b50 &&
        static_cast<int64_t>(Number(tail, place + 20, 2)) == tail_bytes - kEndBytes - at) {
      break;
    }
  }
  if (at < 0) {
    return Damaged(absl::StrCat("no end of the archive in ", source.size(), " bytes: truncated"));
  }
  const auto end = static_cast<size_t>(at);
  const uint64_t end_offset = static_cast<uint64_t>(tail_begin + at);
  Directory directory = {.offset = Number(tail, end + 16, 4),
                         .bytes = Number(tail, end + 12, 4),
                         .entries = Number(tail, end + 10, 2)};
  uint64_t limit = end_offset;
  if (end_offset >= kLocatorBytes) {
    std::array<char, kLocatorBytes> locator = {};
    RETURN_IF_ERROR(ReadRecord(source, end_offset - kLocatorBytes, locator));
    if (Number(View(locator), 0, 4) == 0x07064b50) {
      const uint64_t end64_offset = Number(View(locator), 8, 8);
      if (end_offset < kLocatorBytes + kEnd64Bytes ||
          end64_offset > end_offset - kLocatorBytes - kEnd64Bytes) {
        return Damaged("its zip64 record isn't within the file");
      }
      std::array<char, kEnd64Bytes> end64 = {};
      RETURN_IF_ERROR(ReadRecord(source, end64_offset, end64));
      if (Number(View(end64), 0, 4) != 0x06064b50) return Damaged("its zip64 record isn't one");
      directory = {.offset = Number(View(end64), 48, 8),
                   .bytes = Number(View(end64), 40, 8),
                   .entries = Number(View(end64), 32, 8)};
      limit = end64_offset;
    }
  }
  if (directory.offset > limit || directory.bytes > limit - directory.offset) {
    return Damaged(absl::StrCat("its directory, ", directory.bytes, " bytes at ", directory.offset,
                                ", isn't within the ", limit, " bytes before its end"));
  }
  if (directory.entries > kMaxEntries ||
      directory.entries > directory.bytes / static_cast<uint64_t>(kEntryBytes)) {
    return Damaged(absl::StrCat("its directory claims ", directory.entries, " entries in ",
                                directory.bytes, " bytes"));
  }
  return directory;
}

// Numbers too large for 32 bits are all ones, and follow in the extra field 1, in this order.
absl::Status TakeZip64(absl::string_view extra, Entry& entry) {
  while (extra.size() >= 4) {
    const uint64_t id = Number(extra, 0, 2);
    const size_t bytes = Number(extra, 2, 2);
    if (bytes > extra.size() - 4) return absl::OkStatus();  // padding that isn't a field
    absl::string_view field = extra.substr(4, bytes);
    extra.remove_prefix(4 + bytes);
    if (id != 1) continue;
    for (uint64_t* number : {&entry.plain, &entry.stored, &entry.header}) {
      if (*number != 0xffffffff) continue;
      if (field.size() < 8) return Damaged("a zip64 field is too short");
      *number = Number(field, 0, 8);
      field.remove_prefix(8);
    }
    return absl::OkStatus();
  }
  return absl::OkStatus();
}

class Archive {
 public:
  static absl::StatusOr<std::unique_ptr<Archive>> Open(const ByteSource& source) {
    auto archive = std::unique_ptr<Archive>(new Archive(source));
    ASSIGN_OR_RETURN(archive->directory_, FindDirectory(source));
    RETURN_IF_ERROR(archive->ReadEntries());
    return archive;
  }

  const absl::flat_hash_map<std::string, Entry>& entries() const { return entries_; }

  // Where a stored entry's bytes lie. NotFound: no such entry.
  absl::StatusOr<FoundStorage> Find(absl::string_view name) {
    const auto place = entries_.find(name);
    if (place == entries_.end()) {
      return absl::NotFoundError(
          absl::StrCat("PyTorch zip: no entry \"", absl::CHexEscape(name), "\""));
    }
    Entry& entry = place->second;
    if (entry.found) return *entry.found;
    if (absl::Status located = Locate(name, entry); !located.ok()) {
      return Annotate(located, absl::StrCat("PyTorch zip: entry \"", absl::CHexEscape(name), "\""));
    }
    return *entry.found;
  }

  // A small entry's contents, its checksum verified.
  absl::StatusOr<std::string> Contents(absl::string_view name) {
    ASSIGN_OR_RETURN(const FoundStorage found, Find(name));
    if (found.extent.bytes > kMaxRecord) {
      return Damaged(absl::StrCat("entry \"", absl::CHexEscape(name), "\" has ", found.extent.bytes,
                                  " bytes; at most ", kMaxRecord));
    }
    RETURN_IF_ERROR(Verify(name, found));
    return ReadText(source_, found.extent.offset, found.extent.bytes);
  }

  absl::Status Verify(absl::string_view name, const FoundStorage& found) {
    if (found.checksum == nullptr) return absl::OkStatus();
    ASSIGN_OR_RETURN(const uint32_t crc, Crc32OfExtents(source_, {&found.extent, 1}));
    if (crc == found.checksum->crc32) return absl::OkStatus();
    return Damaged(absl::StrCat("entry \"", absl::CHexEscape(name),
                                "\": its CRC-32 doesn't match: the file is damaged"));
  }

 private:
  explicit Archive(const ByteSource& source) : source_(source) {}

  absl::Status ReadEntries() {
    const auto begin = static_cast<int64_t>(directory_.offset);
    BufferedReader reader(source_, begin, begin + static_cast<int64_t>(directory_.bytes));
    for (uint64_t i = 0; i < directory_.entries; ++i) {
      std::array<char, kEntryBytes> record = {};
      RETURN_IF_ERROR(reader.Read(record));
      const absl::string_view header = View(record);
      if (Number(header, 0, 4) != 0x02014b50) {
        return Damaged(absl::StrCat("entry ", i, " of its directory isn't one"));
      }
      Entry entry;
      entry.encrypted = (Number(header, 8, 2) & 1) != 0;
      entry.method = static_cast<uint32_t>(Number(header, 10, 2));
      entry.crc = static_cast<uint32_t>(Number(header, 16, 4));
      entry.stored = Number(header, 20, 4);
      entry.plain = Number(header, 24, 4);
      entry.header = Number(header, 42, 4);
      ASSIGN_OR_RETURN(std::string name, reader.Text(static_cast<int64_t>(Number(header, 28, 2))));
      ASSIGN_OR_RETURN(const std::string extra,
                       reader.Text(static_cast<int64_t>(Number(header, 30, 2))));
      RETURN_IF_ERROR(reader.Skip(static_cast<int64_t>(Number(header, 32, 2))));
      RETURN_IF_ERROR(TakeZip64(extra, entry));
      const auto [place, fresh] = entries_.try_emplace(std::move(name), std::move(entry));
      if (!fresh) {
        return Damaged(
            absl::StrCat("entry \"", absl::CHexEscape(place->first), "\" is there twice"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Locate(absl::string_view name, Entry& entry) {
    if (entry.encrypted) return absl::InvalidArgumentError("encrypted");
    if (entry.method != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "compressed (method ", entry.method,
          "); torch.save stores without compression: unpack the archive and zip it again with -0"));
    }
    if (entry.stored != entry.plain) return absl::DataLossError("stored with two different sizes");
    // Everything lies before the directory.
    const uint64_t limit = directory_.offset;
    if (entry.header > limit || limit - entry.header < static_cast<uint64_t>(kLocalBytes)) {
      return absl::DataLossError(
          absl::StrCat("begins at byte ", entry.header, ", beyond the archive's files: truncated"));
    }
    std::array<char, kLocalBytes> local = {};
    RETURN_IF_ERROR(ReadRecord(source_, entry.header, local));
    if (Number(View(local), 0, 4) != 0x04034b50) {
      return absl::DataLossError(absl::StrCat("at byte ", entry.header, " there is no such entry"));
    }
    const uint64_t name_bytes = Number(View(local), 26, 2);
    const uint64_t data = entry.header + kLocalBytes + name_bytes + Number(View(local), 28, 2);
    if (name_bytes != name.size() || data > limit || entry.stored > limit - data) {
      return absl::DataLossError(absl::StrCat("its ", entry.stored, " bytes at ", data,
                                              " aren't within the archive: truncated"));
    }
    FoundStorage found;
    found.extent = {static_cast<int64_t>(data), static_cast<int64_t>(entry.stored)};
    if (entry.crc != 0) {
      found.checksum = std::make_shared<StorageChecksum>();
      found.checksum->crc32 = entry.crc;
    }
    entry.found = std::move(found);
    return absl::OkStatus();
  }

  const ByteSource& source_;
  Directory directory_;
  absl::flat_hash_map<std::string, Entry> entries_;
};

// "<name>/" of the entry <name>/data.pkl.
absl::StatusOr<std::string> FindPrefix(const Archive& archive) {
  std::optional<std::string> prefix;
  for (const auto& [name, entry] : archive.entries()) {
    if (name != "data.pkl" && !absl::EndsWith(name, "/data.pkl")) continue;
    if (prefix) return Damaged("more than one data.pkl");
    prefix = name.substr(0, name.size() - 8);
  }
  if (!prefix) {
    return absl::InvalidArgumentError(
        "a zip archive, but not one of torch.save: it has no data.pkl");
  }
  return *prefix;
}

}  // namespace

absl::StatusOr<WeightFile> IndexTorchZip(const ByteSource& source) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Archive> archive, Archive::Open(source));
  ASSIGN_OR_RETURN(const std::string prefix, FindPrefix(*archive));
  if (archive->entries().contains(prefix + "byteorder")) {
    ASSIGN_OR_RETURN(const std::string order, archive->Contents(prefix + "byteorder"));
    if (order != "little") {
      return absl::InvalidArgumentError(absl::StrCat("PyTorch zip: byteorder is \"",
                                                     absl::CHexEscape(order.substr(0, 20)),
                                                     "\"; only \"little\" is read"));
    }
  }

  WeightFile file;
  file.format = WeightFormat::kTorchZip;
  ASSIGN_OR_RETURN(const FoundStorage found, archive->Find(prefix + "data.pkl"));
  file.has_checksum = found.checksum != nullptr;
  RETURN_IF_ERROR(archive->Verify(prefix + "data.pkl", found));
  ASSIGN_OR_RETURN(const Pickle pickle,
                   ReadPickle(source, found.extent.offset, found.extent.offset + found.extent.bytes,
                              kMaxPickleMemory));
  const auto find = [&](const PickledStorage& storage) -> absl::StatusOr<FoundStorage> {
    absl::StatusOr<FoundStorage> data = archive->Find(prefix + "data/" + storage.key);
    if (absl::IsNotFound(data.status())) return absl::DataLossError(data.status().message());
    return data;
  };
  RETURN_IF_ERROR(CollectTensors(pickle, find, file));

  std::vector<std::string> extras;
  for (const auto& [name, entry] : archive->entries()) {
    if (absl::StartsWith(name, prefix + "extra/")) extras.push_back(name);
  }
  std::sort(extras.begin(), extras.end());
  for (const std::string& name : extras) {
    ASSIGN_OR_RETURN(const std::string contents, archive->Contents(name));
    AddNote(file, name.substr(prefix.size() + 6), contents);
  }
  return file;
}

}  // namespace pyramid
