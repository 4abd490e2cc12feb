// Reads the pickles that torch.save writes, protocols 2 to 5, and runs nothing: what a pickle may
// call is a fixed list (tensors, storages, containers, numbers, texts), each built here as plain
// data. Any other global is refused by its full name.
//
// Bounded: a pickle's objects take at most the memory given, nested containers at most 64 levels,
// and time grows with the pickle's length.
#ifndef PYRAMID_MODEL_FORMATS_PICKLE_H_
#define PYRAMID_MODEL_FORMATS_PICKLE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/formats/byte_source.h"
#include "model/formats/weight_file.h"

namespace pyramid {

// A persistent id ('storage', type, key, location, elements[, view]).
struct PickledStorage {
  std::string key;            // "0"; in the legacy form an address, as text
  absl::string_view dtype;    // safetensors' spelling; "": untyped bytes
  int64_t elements = 0;       // of dtype, or bytes
  int64_t view_first = 0;     // old files: a view of the storage, [view_first,
  int64_t view_elements = 0;  // view_first + view_elements); else all of it
};

struct PickledTensor {
  uint32_t storage = 0;     // in Pickle::storages
  absl::string_view dtype;  // safetensors' spelling
  int64_t first = 0;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

struct PickleValue {
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInteger,
    kBigInteger,  // text: its bytes, little-endian two's complement, more than 8
    kReal,
    kText,
    kBytes,
    kTuple,      // items
    kList,       // items; sets too
    kDict,       // items: key, value, key, value …
    kNamespace,  // argparse's; items as a dict's
    kGlobal,     // text: its full name; integer: which, for pickle.cc
    kStorage,    // integer: in Pickle::storages
    kTensor,     // integer: in Pickle::tensors
  };
  Kind kind = Kind::kNone;
  union {
    int64_t integer = 0;
    double real;
  };
  std::string text;
  std::vector<uint32_t> items;  // in Pickle::values; containers may hold one another, or themselves
};

struct Pickle {
  std::deque<PickleValue> values;
  std::deque<PickledStorage> storages;
  std::deque<PickledTensor> tensors;
  uint32_t root = 0;
  int64_t end = 0;  // of its last byte + 1, in the source

  const PickleValue& at(uint32_t value) const { return values[value]; }
};

// The pickle at [begin, end) of the source; it may end earlier.
//   InvalidArgument  a global that isn't on the list (its name), an opcode or protocol that
//                    torch.save doesn't write, more than max_memory bytes of objects
//   DataLoss         truncated, or not a pickle
absl::StatusOr<Pickle> ReadPickle(const ByteSource& source, int64_t begin, int64_t end,
                                  int64_t max_memory);

inline constexpr int64_t kMaxPickleMemory = int64_t{24} << 20;  // b5 with its optimizer: 5 MB

// Where a storage's bytes are.
struct FoundStorage {
  Extent extent;
  std::shared_ptr<StorageChecksum> checksum;
};
using FindStorage = absl::FunctionRef<absl::StatusOr<FoundStorage>(const PickledStorage&)>;

// Appends the tensors within the root's containers to file.tensors, everything else to file.notes.
//   InvalidArgument  nested too deeply, or too many tensors
//   DataLoss         a tensor that doesn't fit its storage
//   and find's errors
absl::Status CollectTensors(const Pickle& pickle, FindStorage find, WeightFile& file);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_FORMATS_PICKLE_H_
