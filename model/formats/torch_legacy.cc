// PyTorch's form before 1.6: five pickles (magic number, protocol 1001, facts of the machine, the
// object, the storages' keys in order), then each storage: its element count in 8 bytes, its bytes.
//
// Source: torch/serialization.py, _legacy_save and _legacy_load.
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/formats/pickle.h"
#include "model/formats/safetensors.h"
#include "model/formats/weight_file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

using Kind = PickleValue::Kind;

constexpr int64_t kSmallPickle = int64_t{1} << 20;
constexpr int64_t kKeysMemory = int64_t{8} << 20;
constexpr int64_t kProtocol = 1001;
constexpr absl::string_view kMagic("\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 10);

absl::Status Damaged(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("PyTorch legacy pickle: ", what));
}

// Magic number, protocol and facts; the object's pickle begins where they end.
absl::StatusOr<int64_t> ReadPreamble(const ByteSource& source) {
  ASSIGN_OR_RETURN(const Pickle magic, ReadPickle(source, 0, source.size(), kSmallPickle));
  if (magic.at(magic.root).kind != Kind::kBigInteger || magic.at(magic.root).text != kMagic) {
    return Damaged("the magic number is another");
  }
  ASSIGN_OR_RETURN(const Pickle protocol,
                   ReadPickle(source, magic.end, source.size(), kSmallPickle));
  const PickleValue& number = protocol.at(protocol.root);
  if (number.kind != Kind::kInteger || number.integer != kProtocol) {
    return absl::InvalidArgumentError(absl::StrCat(
        "PyTorch legacy pickle: protocol ", number.integer, "; only ", kProtocol, " is read"));
  }
  ASSIGN_OR_RETURN(const Pickle facts,
                   ReadPickle(source, protocol.end, source.size(), kSmallPickle));
  const PickleValue& dict = facts.at(facts.root);
  if (dict.kind != Kind::kDict) return Damaged("the machine's facts aren't a dict");
  for (size_t i = 0; i + 1 < dict.items.size(); i += 2) {
    const PickleValue& value = facts.at(dict.items[i + 1]);
    if (facts.at(dict.items[i]).text == "little_endian" &&
        (value.kind != Kind::kBool || value.integer == 0)) {
      return absl::InvalidArgumentError(
          "PyTorch legacy pickle: written on a big-endian machine; only little_endian is read");
    }
  }
  return facts.end;
}

using Storages = absl::flat_hash_map<std::string, FoundStorage>;

// Walks over the storages, whose types the object's pickle knows.
absl::StatusOr<Storages> LocateStorages(const ByteSource& source, const Pickle& object) {
  absl::flat_hash_map<std::string, const PickledStorage*> known;
  for (const PickledStorage& storage : object.storages) {
    const auto [place, fresh] = known.try_emplace(storage.key, &storage);
    if (!fresh &&
        (place->second->dtype != storage.dtype || place->second->elements != storage.elements)) {
      return Damaged(
          absl::StrCat("storage \"", absl::CHexEscape(storage.key), "\" has two types or sizes"));
    }
  }
  ASSIGN_OR_RETURN(const Pickle keys, ReadPickle(source, object.end, source.size(), kKeysMemory));
  const PickleValue& list = keys.at(keys.root);
  if (list.kind != Kind::kList) return Damaged("the storages' keys aren't a list");

  Storages storages;
  BufferedReader reader(source, keys.end, source.size());
  for (const uint32_t item : list.items) {
    const std::string& key = keys.at(item).text;
    const auto place = known.find(key);
    if (place == known.end()) {
      return Damaged(absl::StrCat("storage \"", absl::CHexEscape(key), "\" belongs to no tensor"));
    }
    const PickledStorage& storage = *place->second;
    const int64_t size = storage.dtype.empty() ? 1 : SafetensorsElementSize(storage.dtype);
    ASSIGN_OR_RETURN(const uint64_t elements, reader.LittleEndian(8));
    int64_t bytes = 0;
    if (elements != static_cast<uint64_t>(storage.elements) ||
        __builtin_mul_overflow(storage.elements, size, &bytes) || bytes > reader.remaining()) {
      return Damaged(absl::StrCat("storage \"", absl::CHexEscape(key), "\" of ", storage.elements,
                                  " elements: at byte ", reader.offset(), " its count is ",
                                  elements, " and ", reader.remaining(),
                                  " bytes are left: truncated or damaged"));
    }
    if (!storages.try_emplace(key, FoundStorage{{reader.offset(), bytes}, nullptr}).second) {
      return Damaged(absl::StrCat("storage \"", absl::CHexEscape(key), "\" is there twice"));
    }
    RETURN_IF_ERROR(reader.Skip(bytes));
  }
  return storages;
}

}  // namespace

absl::StatusOr<WeightFile> IndexTorchLegacy(const ByteSource& source) {
  ASSIGN_OR_RETURN(const int64_t begin, ReadPreamble(source));
  ASSIGN_OR_RETURN(const Pickle object, ReadPickle(source, begin, source.size(), kMaxPickleMemory));
  ASSIGN_OR_RETURN(const Storages storages, LocateStorages(source, object));
  WeightFile file;
  file.format = WeightFormat::kTorchLegacy;
  const auto find = [&](const PickledStorage& storage) -> absl::StatusOr<FoundStorage> {
    const auto place = storages.find(storage.key);
    if (place == storages.end()) {
      return Damaged(absl::StrCat("storage \"", absl::CHexEscape(storage.key), "\" isn't there"));
    }
    return place->second;
  };
  RETURN_IF_ERROR(CollectTensors(object, find, file));
  return file;
}

}  // namespace pyramid
