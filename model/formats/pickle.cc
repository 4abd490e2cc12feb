#include "model/formats/pickle.h"

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/formats/safetensors.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

using Kind = PickleValue::Kind;

constexpr int kMaxDepth = 64;                              // containers in containers
constexpr int64_t kMaxVisits = 4'000'000;                  // containers may be shared
constexpr int64_t kMaxCollectedBytes = int64_t{16} << 20;  // names and places of tensors
constexpr int64_t kMaxGlobalCharacters = 1000;             // module, or name
constexpr size_t kMaxNameBytes = 4096;                     // of a tensor, with its group
constexpr size_t kMaxListText = 256;                       // a list of numbers, as a note

// What a pickle may name. Nothing of it is looked up or called anywhere: each is built here.
enum class Callable : int64_t {
  kDict,              // collections.OrderedDict, Counter: () or (pairs or a dict)
  kDefaultDict,       // (factory)
  kNamespace,         // argparse.Namespace
  kSequence,          // torch.Size, set, frozenset: (sequence)
  kDevice,            // torch.device: (text)
  kEncode,            // _codecs.encode: (text, "latin1"), how protocol 2 keeps bytes
  kRebuildTensor,     // (storage, first, shape, strides)
  kRebuildTensorV2,   // (…, requires_grad, hooks[, metadata])
  kRebuildTensorV3,   // (…, requires_grad, hooks, dtype[, metadata])
  kRebuildParameter,  // (tensor, requires_grad, hooks)
  kStorage,           // the type in a persistent id
  kConstant,          // a dtype, or a type as a factory: never called
};

struct Global {
  absl::string_view name;
  Callable callable;
  absl::string_view dtype = "";  // of a storage's type or a dtype
};

constexpr std::array kGlobals = std::to_array<Global>({
    {"collections.OrderedDict", Callable::kDict},
    {"collections.Counter", Callable::kDict},
    {"collections.defaultdict", Callable::kDefaultDict},
    {"argparse.Namespace", Callable::kNamespace},
    {"torch.Size", Callable::kSequence},
    {"torch.device", Callable::kDevice},
    {"_codecs.encode", Callable::kEncode},
    {"torch._utils._rebuild_tensor", Callable::kRebuildTensor},
    {"torch._utils._rebuild_tensor_v2", Callable::kRebuildTensorV2},
    {"torch._utils._rebuild_tensor_v3", Callable::kRebuildTensorV3},
    {"torch._utils._rebuild_parameter", Callable::kRebuildParameter},
    {"builtins.set", Callable::kSequence},
    {"__builtin__.set", Callable::kSequence},
    {"builtins.frozenset", Callable::kSequence},
    {"__builtin__.frozenset", Callable::kSequence},
    {"builtins.dict", Callable::kConstant},
    {"__builtin__.dict", Callable::kConstant},
    {"builtins.list", Callable::kConstant},
    {"__builtin__.list", Callable::kConstant},
    {"builtins.int", Callable::kConstant},
    {"__builtin__.int", Callable::kConstant},
    {"builtins.float", Callable::kConstant},
    {"__builtin__.float", Callable::kConstant},
    {"torch.storage.UntypedStorage", Callable::kStorage, ""},
    {"torch.storage._UntypedStorage", Callable::kStorage, ""},
    {"torch.UntypedStorage", Callable::kStorage, ""},
    {"torch.FloatStorage", Callable::kStorage, "F32"},
    {"torch.DoubleStorage", Callable::kStorage, "F64"},
    {"torch.HalfStorage", Callable::kStorage, "F16"},
    {"torch.BFloat16Storage", Callable::kStorage, "BF16"},
    {"torch.LongStorage", Callable::kStorage, "I64"},
    {"torch.IntStorage", Callable::kStorage, "I32"},
    {"torch.ShortStorage", Callable::kStorage, "I16"},
    {"torch.CharStorage", Callable::kStorage, "I8"},
    {"torch.ByteStorage", Callable::kStorage, "U8"},
    {"torch.BoolStorage", Callable::kStorage, "BOOL"},
    {"torch.cuda.FloatStorage", Callable::kStorage, "F32"},
    {"torch.cuda.DoubleStorage", Callable::kStorage, "F64"},
    {"torch.cuda.HalfStorage", Callable::kStorage, "F16"},
    {"torch.cuda.BFloat16Storage", Callable::kStorage, "BF16"},
    {"torch.cuda.LongStorage", Callable::kStorage, "I64"},
    {"torch.cuda.IntStorage", Callable::kStorage, "I32"},
    {"torch.cuda.ShortStorage", Callable::kStorage, "I16"},
    {"torch.cuda.CharStorage", Callable::kStorage, "I8"},
    {"torch.cuda.ByteStorage", Callable::kStorage, "U8"},
    {"torch.cuda.BoolStorage", Callable::kStorage, "BOOL"},
    {"torch.float32", Callable::kConstant, "F32"},
    {"torch.float64", Callable::kConstant, "F64"},
    {"torch.float16", Callable::kConstant, "F16"},
    {"torch.bfloat16", Callable::kConstant, "BF16"},
    {"torch.int64", Callable::kConstant, "I64"},
    {"torch.int32", Callable::kConstant, "I32"},
    {"torch.int16", Callable::kConstant, "I16"},
    {"torch.int8", Callable::kConstant, "I8"},
    {"torch.uint64", Callable::kConstant, "U64"},
    {"torch.uint32", Callable::kConstant, "U32"},
    {"torch.uint16", Callable::kConstant, "U16"},
    {"torch.uint8", Callable::kConstant, "U8"},
    {"torch.bool", Callable::kConstant, "BOOL"},
});

const Global* FindGlobal(absl::string_view name) {
  for (const Global& global : kGlobals) {
    if (global.name == name) return &global;
  }
  return nullptr;
}

bool IsText(const PickleValue& value) {  // Python 2's texts are bytes
  return value.kind == Kind::kText || value.kind == Kind::kBytes;
}
bool IsSequence(const PickleValue& value) {
  return value.kind == Kind::kTuple || value.kind == Kind::kList;
}
bool IsMap(const PickleValue& value) {
  return value.kind == Kind::kDict || value.kind == Kind::kNamespace;
}

// Opcodes, as in Python's Lib/pickletools.py. Those that torch.save never writes aren't here.
enum Opcode : uint8_t {
  kMark = '(',
  kStop = '.',
  kPop = '0',
  kPopMark = '1',
  kDup = '2',
  kBinFloat = 'G',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kPushNone = 'N',
  kBinPersId = 'Q',
  kReduce = 'R',
  kBinString = 'T',
  kShortBinString = 'U',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobalOp = 'c',
  kDictOp = 'd',
  kAppends = 'e',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kListOp = 'l',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTupleOp = 't',
  kSetItems = 'u',
  kEmptyTuple = ')',
  kEmptyList = ']',
  kEmptyDict = '}',
  kBinBytes = 'B',
  kShortBinBytes = 'C',
  kProto = 0x80,
  kNewObj = 0x81,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
  kLong4 = 0x8b,
  kShortBinUnicode = 0x8c,
  kBinUnicode8 = 0x8d,
  kBinBytes8 = 0x8e,
  kEmptySet = 0x8f,
  kAddItems = 0x90,
  kFrozenSet = 0x91,
  kStackGlobal = 0x93,
  kMemoize = 0x94,
  kFrame = 0x95,
  kByteArray8 = 0x96,
};

// The stack machine. Values are numbers of Pickle::values; every one that is made, and every place
// that grows, is paid for in bytes before.
class Machine {
 public:
  Machine(const ByteSource& source, int64_t begin, int64_t end, int64_t max_memory)
      : reader_(source, begin, end), left_(max_memory), max_memory_(max_memory) {}

  absl::StatusOr<Pickle> Run() {
    while (true) {
      const int64_t at = reader_.offset();
      ASSIGN_OR_RETURN(const uint8_t opcode, reader_.Byte());
      if (opcode == kStop) break;
      if (absl::Status status = Step(static_cast<Opcode>(opcode)); !status.ok()) {
        return Annotate(status, absl::StrCat("pickle, byte ", at));
      }
    }
    if (stack_.size() != 1 || !marks_.empty()) {
      return absl::DataLossError(
          absl::StrCat("pickle: it ends with ", stack_.size(), " objects where 1 is expected"));
    }
    pickle_.root = stack_.back();
    pickle_.end = reader_.offset();
    return std::move(pickle_);
  }

 private:
  static absl::Status Corrupt(absl::string_view what) { return absl::DataLossError(what); }

  absl::Status Pay(int64_t bytes) {
    if (bytes > left_) {
      return absl::InvalidArgumentError(
          absl::StrCat("its objects need more than ", max_memory_,
                       " bytes of memory, far more than a model's parameters have"));
    }
    left_ -= bytes;
    return absl::OkStatus();
  }

  PickleValue& Value(uint32_t value) { return pickle_.values[value]; }
  size_t Fence() const { return marks_.empty() ? 0 : marks_.back(); }

  // Stack.

  absl::Status PushValue(uint32_t value) {
    RETURN_IF_ERROR(Pay(stack_.size() < stack_paid_ ? 0 : 2 * int64_t{sizeof(uint32_t)}));
    stack_.push_back(value);
    stack_paid_ = std::max(stack_paid_, stack_.size());
    return absl::OkStatus();
  }

  absl::Status Push(PickleValue value) {
    ASSIGN_OR_RETURN(const uint32_t made, Make(std::move(value)));
    return PushValue(made);
  }

  absl::StatusOr<uint32_t> Make(PickleValue value) {
    RETURN_IF_ERROR(Pay(static_cast<int64_t>(
        sizeof(PickleValue) + (value.text.size() < 16 ? 0 : value.text.size() + 32) +
        (value.items.empty() ? 0 : value.items.size() * sizeof(uint32_t) + 16))));
    pickle_.values.push_back(std::move(value));
    return static_cast<uint32_t>(pickle_.values.size() - 1);
  }

  static PickleValue Of(Kind kind) {
    PickleValue value;
    value.kind = kind;
    return value;
  }
  static PickleValue Integer(int64_t number) {
    PickleValue value = Of(Kind::kInteger);
    value.integer = number;
    return value;
  }

  // One value for all uses of what is never changed: None, booleans, (), numbers below 256.
  absl::Status PushShared(std::optional<uint32_t>& shared, PickleValue value) {
    if (!shared) {
      ASSIGN_OR_RETURN(shared, Make(std::move(value)));
    }
    return PushValue(*shared);
  }

  absl::Status PushBool(bool value) {
    PickleValue boolean = Of(Kind::kBool);
    boolean.integer = value ? 1 : 0;
    return PushShared(value ? true_ : false_, std::move(boolean));
  }

  absl::StatusOr<uint32_t> Pop() {
    if (stack_.size() <= Fence()) return Corrupt("an object is expected, and none is there");
    const uint32_t value = stack_.back();
    stack_.pop_back();
    return value;
  }

  absl::StatusOr<uint32_t> Top() {
    if (stack_.size() <= Fence()) return Corrupt("an object is expected, and none is there");
    return stack_.back();
  }

  // The objects above the last mark, which is dropped.
  absl::StatusOr<std::vector<uint32_t>> PopMark() {
    if (marks_.empty()) return Corrupt("a mark is expected, and none is there");
    const auto first = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<uint32_t> items(first, stack_.end());
    stack_.erase(first, stack_.end());
    marks_.pop_back();
    return items;
  }

  absl::Status PushContainer(Kind kind, std::vector<uint32_t> items) {
    PickleValue value = Of(kind);
    value.items = std::move(items);
    return Push(std::move(value));
  }

  absl::Status PushTuple(int count) {
    std::vector<uint32_t> items(static_cast<size_t>(count));
    for (size_t i = items.size(); i-- > 0;) {
      ASSIGN_OR_RETURN(items[i], Pop());
    }
    return PushContainer(Kind::kTuple, std::move(items));
  }

  absl::Status PushText(Kind kind, int length_bytes) {
    ASSIGN_OR_RETURN(const uint64_t length, reader_.LittleEndian(length_bytes));
    if (length > static_cast<uint64_t>(reader_.remaining())) {
      return Corrupt(absl::StrCat("truncated: a text of ", length, " bytes where ",
                                  reader_.remaining(), " are left"));
    }
    if (static_cast<int64_t>(length) > left_) return Pay(static_cast<int64_t>(length));
    PickleValue value = Of(kind);
    ASSIGN_OR_RETURN(value.text, reader_.Text(static_cast<int64_t>(length)));
    return Push(std::move(value));
  }

  absl::Status PushLong(int length_bytes) {
    ASSIGN_OR_RETURN(const uint64_t length, reader_.LittleEndian(length_bytes));
    if (length > 1024) {
      return absl::InvalidArgumentError(absl::StrCat("a number of ", length, " bytes"));
    }
    ASSIGN_OR_RETURN(std::string bytes, reader_.Text(static_cast<int64_t>(length)));
    if (length > 8) {
      PickleValue value = Of(Kind::kBigInteger);
      value.text = std::move(bytes);
      return Push(std::move(value));
    }
    uint64_t number = 0;
    for (size_t i = 0; i < bytes.size(); ++i) {
      number |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
    }
    const bool negative = !bytes.empty() && (bytes.back() & 0x80) != 0;
    if (negative && length < 8) number |= ~uint64_t{0} << (8 * length);
    return Push(Integer(static_cast<int64_t>(number)));
  }

  absl::Status PushReal() {
    std::array<char, 8> bytes = {};
    RETURN_IF_ERROR(reader_.Read(bytes));
    std::reverse(bytes.begin(), bytes.end());  // big-endian in pickles
    PickleValue value = Of(Kind::kReal);
    value.real = std::bit_cast<double>(bytes);
    return Push(std::move(value));
  }

  // Memo.

  absl::Status Put(uint64_t index) {
    ASSIGN_OR_RETURN(const uint32_t value, Top());
    RETURN_IF_ERROR(Pay(32));
    memo_[static_cast<uint32_t>(index)] = value;
    return absl::OkStatus();
  }

  absl::Status Get(uint64_t index) {
    const auto found = memo_.find(static_cast<uint32_t>(index));
    if (found == memo_.end()) return Corrupt(absl::StrCat("memo ", index, " isn't there"));
    return PushValue(found->second);
  }

  // Containers.

  absl::Status AddItems(uint32_t target, Kind kind, const std::vector<uint32_t>& items) {
    PickleValue& container = Value(target);
    const bool fits = kind == Kind::kDict ? IsMap(container) && items.size() % 2 == 0
                                          : container.kind == Kind::kList;
    if (!fits) return Corrupt("items for something that isn't their container");
    // A vector's memory doubles.
    RETURN_IF_ERROR(Pay(static_cast<int64_t>(2 * sizeof(uint32_t) * items.size() + 8)));
    container.items.insert(container.items.end(), items.begin(), items.end());
    return absl::OkStatus();
  }

  absl::Status Append() {
    ASSIGN_OR_RETURN(const uint32_t item, Pop());
    ASSIGN_OR_RETURN(const uint32_t list, Top());
    return AddItems(list, Kind::kList, {item});
  }

  absl::Status SetItem() {
    ASSIGN_OR_RETURN(const uint32_t value, Pop());
    ASSIGN_OR_RETURN(const uint32_t key, Pop());
    ASSIGN_OR_RETURN(const uint32_t dict, Top());
    return AddItems(dict, Kind::kDict, {key, value});
  }

  absl::Status AddMarked(Kind kind) {
    ASSIGN_OR_RETURN(const std::vector<uint32_t> items, PopMark());
    ASSIGN_OR_RETURN(const uint32_t target, Top());
    return AddItems(target, kind, items);
  }

  absl::Status PushMarked(Kind kind) {
    ASSIGN_OR_RETURN(std::vector<uint32_t> items, PopMark());
    if (kind == Kind::kDict && items.size() % 2 != 0) return Corrupt("a dict with half an item");
    return PushContainer(kind, std::move(items));
  }

  // Globals.

  absl::Status PushGlobal(absl::string_view module, absl::string_view name) {
    const std::string full = absl::StrCat(module, ".", name);
    const Global* global = FindGlobal(full);
    if (global == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("the pickle wants to call ", absl::CHexEscape(full),
                       "; refused: only tensors, containers, numbers and texts are taken from a "
                       "pickle, and nothing is run. Save the model's state_dict() alone"));
    }
    PickleValue value = Of(Kind::kGlobal);
    value.integer = global - kGlobals.data();
    value.text = full;
    return Push(std::move(value));
  }

  absl::Status ReadGlobal() {
    ASSIGN_OR_RETURN(const std::string module, reader_.Line(kMaxGlobalCharacters));
    ASSIGN_OR_RETURN(const std::string name, reader_.Line(kMaxGlobalCharacters));
    return PushGlobal(module, name);
  }

  absl::Status StackGlobal() {
    ASSIGN_OR_RETURN(const uint32_t name, Pop());
    ASSIGN_OR_RETURN(const uint32_t module, Pop());
    if (!IsText(Value(name)) || !IsText(Value(module)) ||
        Value(name).text.size() + Value(module).text.size() > 2 * kMaxGlobalCharacters) {
      return Corrupt("a global's name isn't a short text");
    }
    return PushGlobal(Value(module).text, Value(name).text);
  }

  absl::StatusOr<const Global*> AsGlobal(uint32_t value) {
    if (Value(value).kind != Kind::kGlobal)
      return Corrupt("something that isn't a global is called");
    return &kGlobals[static_cast<size_t>(Value(value).integer)];
  }

  // A call of a global on the list.
  absl::Status Call() {
    ASSIGN_OR_RETURN(const uint32_t arguments, Pop());
    ASSIGN_OR_RETURN(const uint32_t callee, Pop());
    ASSIGN_OR_RETURN(const Global* global, AsGlobal(callee));
    if (Value(arguments).kind != Kind::kTuple) return Corrupt("a call's arguments aren't a tuple");
    const std::vector<uint32_t>& given = Value(arguments).items;
    const auto unfit = [&] {
      return Corrupt(absl::StrCat(global->name, " with arguments that it doesn't take"));
    };
    switch (global->callable) {
      case Callable::kDict:
        if (given.empty()) return Push(Of(Kind::kDict));
        if (given.size() == 1 && IsMap(Value(given[0]))) return PushValue(given[0]);
        if (given.size() == 1 && Value(given[0]).kind == Kind::kList) return DictOfPairs(given[0]);
        return unfit();
      case Callable::kDefaultDict:
        return given.size() <= 1 ? Push(Of(Kind::kDict)) : unfit();
      case Callable::kNamespace:
        return given.empty() ? Push(Of(Kind::kNamespace)) : unfit();
      case Callable::kSequence:
        if (given.size() != 1 || !IsSequence(Value(given[0]))) return unfit();
        return PushValue(given[0]);
      case Callable::kDevice:
        if (given.empty() || !IsText(Value(given[0]))) return unfit();
        return PushValue(given[0]);
      case Callable::kEncode: {
        if (given.empty() || !IsText(Value(given[0]))) return unfit();
        RETURN_IF_ERROR(Pay(static_cast<int64_t>(Value(given[0]).text.size())));
        PickleValue bytes = Of(Kind::kBytes);
        bytes.text = Latin1(Value(given[0]).text);
        return Push(std::move(bytes));
      }
      case Callable::kRebuildTensor:
        return given.size() == 4 ? RebuildTensor(given, "") : unfit();
      case Callable::kRebuildTensorV2:
        return given.size() == 6 || given.size() == 7 ? RebuildTensor(given, "") : unfit();
      case Callable::kRebuildTensorV3: {
        if (given.size() < 7 || given.size() > 8) return unfit();
        if (Value(given[6]).kind != Kind::kGlobal) return unfit();
        const Global& dtype = kGlobals[static_cast<size_t>(Value(given[6]).integer)];
        if (dtype.callable != Callable::kConstant || dtype.dtype.empty()) return unfit();
        return RebuildTensor(given, dtype.dtype);
      }
      case Callable::kRebuildParameter:
        if (given.empty() || Value(given[0]).kind != Kind::kTensor) return unfit();
        return PushValue(given[0]);
      case Callable::kStorage:
      case Callable::kConstant:
        return unfit();
    }
    return unfit();
  }

  absl::Status DictOfPairs(uint32_t list) {
    std::vector<uint32_t> items;
    RETURN_IF_ERROR(Pay(static_cast<int64_t>(4 * sizeof(uint32_t) * Value(list).items.size() + 8)));
    for (const uint32_t pair : Value(list).items) {
      if (!IsSequence(Value(pair)) || Value(pair).items.size() != 2) {
        return Corrupt("a dict's item isn't a pair");
      }
      items.push_back(Value(pair).items[0]);
      items.push_back(Value(pair).items[1]);
    }
    return PushContainer(Kind::kDict, std::move(items));
  }

  // The bytes of a UTF-8 text whose characters are all below 256; others stay as they are.
  static std::string Latin1(absl::string_view text) {
    std::string bytes;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto lead = static_cast<unsigned char>(text[i]);
      if ((lead == 0xc2 || lead == 0xc3) && i + 1 < text.size()) {
        bytes += static_cast<char>(((lead & 3) << 6) | (text[++i] & 0x3f));
      } else {
        bytes += static_cast<char>(lead);
      }
    }
    return bytes;
  }

  absl::Status NewObject() {
    ASSIGN_OR_RETURN(const uint32_t arguments, Top());
    if (stack_.size() < Fence() + 2) return Corrupt("an object without a class");
    ASSIGN_OR_RETURN(const Global* global, AsGlobal(stack_[stack_.size() - 2]));
    if (global->callable != Callable::kNamespace && global->callable != Callable::kDict) {
      return Corrupt(absl::StrCat(global->name, " isn't a class to make objects of"));
    }
    if (Value(arguments).kind != Kind::kTuple || !Value(arguments).items.empty()) {
      return Corrupt(absl::StrCat("an object of ", global->name, " with arguments"));
    }
    return Call();
  }

  // An object's attributes: a Namespace's are its items, a dict's (state_dict's _metadata) are
  // dropped.
  absl::Status Build() {
    ASSIGN_OR_RETURN(const uint32_t state, Pop());
    ASSIGN_OR_RETURN(const uint32_t object, Top());
    if (!IsMap(Value(state)) || !IsMap(Value(object))) {
      return Corrupt("attributes for something that has none");
    }
    if (Value(object).kind == Kind::kDict || state == object) return absl::OkStatus();
    const std::vector<uint32_t>& items = Value(state).items;
    RETURN_IF_ERROR(Pay(static_cast<int64_t>(sizeof(uint32_t) * items.size())));
    return AddItems(object, Kind::kDict, std::vector<uint32_t>(items));
  }

  absl::StatusOr<int64_t> AsInteger(uint32_t value) {
    if (Value(value).kind != Kind::kInteger) return Corrupt("a number is expected");
    return Value(value).integer;
  }

  absl::StatusOr<std::vector<int64_t>> AsIntegers(uint32_t value) {
    if (!IsSequence(Value(value))) return Corrupt("a list of numbers is expected");
    if (Value(value).items.size() > kMaxTensorRank) {
      return absl::InvalidArgumentError(
          absl::StrCat("a tensor of more than ", kMaxTensorRank, " dimensions"));
    }
    RETURN_IF_ERROR(Pay(static_cast<int64_t>(sizeof(int64_t) * Value(value).items.size() + 16)));
    std::vector<int64_t> numbers;
    numbers.reserve(Value(value).items.size());
    for (const uint32_t item : Value(value).items) {
      ASSIGN_OR_RETURN(const int64_t number, AsInteger(item));
      numbers.push_back(number);
    }
    return numbers;
  }

  absl::Status PersistentId() {
    ASSIGN_OR_RETURN(const uint32_t id, Pop());
    const PickleValue& tuple = Value(id);
    if (tuple.kind != Kind::kTuple || tuple.items.size() < 5 || tuple.items.size() > 6 ||
        !IsText(Value(tuple.items[0])) || Value(tuple.items[0]).text != "storage") {
      return Corrupt("a persistent id that isn't a storage's");
    }
    ASSIGN_OR_RETURN(const Global* type, AsGlobal(tuple.items[1]));
    if (type->callable != Callable::kStorage) {
      return Corrupt(absl::StrCat(type->name, " isn't a storage's type"));
    }
    if (!IsText(Value(tuple.items[2]))) return Corrupt("a storage's key isn't a text");
    PickledStorage storage;
    storage.key = Value(tuple.items[2]).text;
    storage.dtype = type->dtype;
    ASSIGN_OR_RETURN(storage.elements, AsInteger(tuple.items[4]));
    storage.view_elements = storage.elements;
    if (tuple.items.size() == 6 && Value(tuple.items[5]).kind != Kind::kNone) {
      const PickleValue& view = Value(tuple.items[5]);  // (key, first, elements)
      if (view.kind != Kind::kTuple || view.items.size() != 3) return Corrupt("a storage's view");
      ASSIGN_OR_RETURN(storage.view_first, AsInteger(view.items[1]));
      ASSIGN_OR_RETURN(storage.view_elements, AsInteger(view.items[2]));
    }
    if (storage.elements < 0 || storage.view_first < 0 || storage.view_elements < 0 ||
        storage.view_first > storage.elements ||
        storage.view_elements > storage.elements - storage.view_first) {
      return Corrupt(absl::StrCat("storage \"", absl::CHexEscape(storage.key),
                                  "\": its size or view is impossible"));
    }
    RETURN_IF_ERROR(Pay(static_cast<int64_t>(sizeof(PickledStorage) + storage.key.size() + 32)));
    PickleValue value = Of(Kind::kStorage);
    value.integer = static_cast<int64_t>(pickle_.storages.size());
    pickle_.storages.push_back(std::move(storage));
    return Push(std::move(value));
  }

  absl::Status RebuildTensor(const std::vector<uint32_t>& given, absl::string_view dtype) {
    if (Value(given[0]).kind != Kind::kStorage) return Corrupt("a tensor without a storage");
    PickledTensor tensor;
    tensor.storage = static_cast<uint32_t>(Value(given[0]).integer);
    const absl::string_view stored = pickle_.storages[tensor.storage].dtype;
    tensor.dtype = dtype.empty() ? stored : dtype;
    if (tensor.dtype.empty() || (!stored.empty() && stored != tensor.dtype)) {
      return Corrupt("a tensor's type and its storage's contradict each other");
    }
    ASSIGN_OR_RETURN(tensor.first, AsInteger(given[1]));
    ASSIGN_OR_RETURN(tensor.shape, AsIntegers(given[2]));
    ASSIGN_OR_RETURN(tensor.strides, AsIntegers(given[3]));
    if (tensor.shape.size() != tensor.strides.size()) {
      return Corrupt(absl::StrCat("a tensor of ", tensor.shape.size(), " dimensions with ",
                                  tensor.strides.size(), " strides"));
    }
    RETURN_IF_ERROR(Pay(sizeof(PickledTensor)));
    PickleValue value = Of(Kind::kTensor);
    value.integer = static_cast<int64_t>(pickle_.tensors.size());
    pickle_.tensors.push_back(std::move(tensor));
    return Push(std::move(value));
  }

  absl::Status Step(Opcode opcode) {
    switch (opcode) {
      case kProto: {
        ASSIGN_OR_RETURN(const uint8_t protocol, reader_.Byte());
        if (protocol >= 2 && protocol <= 5) return absl::OkStatus();
        return absl::InvalidArgumentError(
            absl::StrCat("pickle protocol ", protocol, "; 2 to 5 are read"));
      }
      case kFrame:
        return reader_.Skip(8);
      case kMark:
        RETURN_IF_ERROR(Pay(marks_.size() < marks_paid_ ? 0 : 2 * int64_t{sizeof(size_t)}));
        marks_.push_back(stack_.size());
        marks_paid_ = std::max(marks_paid_, marks_.size());
        return absl::OkStatus();
      case kPop:
        if (stack_.size() == Fence() && !marks_.empty()) {
          marks_.pop_back();
          return absl::OkStatus();
        }
        return Pop().status();
      case kPopMark:
        return PopMark().status();
      case kDup: {
        ASSIGN_OR_RETURN(const uint32_t top, Top());
        return PushValue(top);
      }
      case kPushNone:
        return PushShared(none_, Of(Kind::kNone));
      case kNewTrue:
        return PushBool(true);
      case kNewFalse:
        return PushBool(false);
      case kBinInt1: {
        ASSIGN_OR_RETURN(const uint8_t number, reader_.Byte());
        return PushShared(small_[number], Integer(number));
      }
      case kBinInt2: {
        ASSIGN_OR_RETURN(const uint64_t number, reader_.LittleEndian(2));
        return Push(Integer(static_cast<int64_t>(number)));
      }
      case kBinInt: {
        ASSIGN_OR_RETURN(const uint64_t number, reader_.LittleEndian(4));
        return Push(Integer(static_cast<int32_t>(static_cast<uint32_t>(number))));
      }
      case kLong1:
        return PushLong(1);
      case kLong4:
        return PushLong(4);
      case kBinFloat:
        return PushReal();
      case kShortBinUnicode:
        return PushText(Kind::kText, 1);
      case kBinUnicode:
        return PushText(Kind::kText, 4);
      case kBinUnicode8:
        return PushText(Kind::kText, 8);
      case kShortBinString:
      case kShortBinBytes:
        return PushText(Kind::kBytes, 1);
      case kBinString:
      case kBinBytes:
        return PushText(Kind::kBytes, 4);
      case kBinBytes8:
      case kByteArray8:
        return PushText(Kind::kBytes, 8);
      case kEmptyTuple:
        return PushShared(empty_tuple_, Of(Kind::kTuple));
      case kTuple1:
        return PushTuple(1);
      case kTuple2:
        return PushTuple(2);
      case kTuple3:
        return PushTuple(3);
      case kTupleOp:
        return PushMarked(Kind::kTuple);
      case kEmptyList:
      case kEmptySet:
        return Push(Of(Kind::kList));
      case kListOp:
      case kFrozenSet:
        return PushMarked(Kind::kList);
      case kAppend:
        return Append();
      case kAppends:
      case kAddItems:
        return AddMarked(Kind::kList);
      case kEmptyDict:
        return Push(Of(Kind::kDict));
      case kDictOp:
        return PushMarked(Kind::kDict);
      case kSetItem:
        return SetItem();
      case kSetItems:
        return AddMarked(Kind::kDict);
      case kBinPut: {
        ASSIGN_OR_RETURN(const uint8_t index, reader_.Byte());
        return Put(index);
      }
      case kLongBinPut: {
        ASSIGN_OR_RETURN(const uint64_t index, reader_.LittleEndian(4));
        return Put(index);
      }
      case kMemoize:
        return Put(memo_.size());
      case kBinGet: {
        ASSIGN_OR_RETURN(const uint8_t index, reader_.Byte());
        return Get(index);
      }
      case kLongBinGet: {
        ASSIGN_OR_RETURN(const uint64_t index, reader_.LittleEndian(4));
        return Get(index);
      }
      case kGlobalOp:
        return ReadGlobal();
      case kStackGlobal:
        return StackGlobal();
      case kReduce:
        return Call();
      case kNewObj:
        return NewObject();
      case kBuild:
        return Build();
      case kBinPersId:
        return PersistentId();
      default:
        return absl::InvalidArgumentError(
            absl::StrFormat("opcode 0x%02x, which torch.save doesn't write", opcode));
    }
  }

  BufferedReader reader_;
  Pickle pickle_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;  // heights of the stack
  absl::flat_hash_map<uint32_t, uint32_t> memo_;
  int64_t left_;
  const int64_t max_memory_;
  size_t stack_paid_ = 0;
  size_t marks_paid_ = 0;
  std::optional<uint32_t> none_;
  std::optional<uint32_t> true_;
  std::optional<uint32_t> false_;
  std::optional<uint32_t> empty_tuple_;
  std::array<std::optional<uint32_t>, 256> small_;
};

// Walks the containers and takes the tensors out.
class Collector {
 public:
  Collector(const Pickle& pickle, FindStorage find, WeightFile& file)
      : pickle_(pickle), find_(find), file_(file) {}

  absl::Status Visit(uint32_t at, const std::string& group, const std::string& name, int depth) {
    const PickleValue& value = pickle_.at(at);
    if (value.kind == Kind::kTensor) {
      return AddTensor(pickle_.tensors[static_cast<size_t>(value.integer)], group, name);
    }
    if (!IsMap(value) && !IsSequence(value)) {
      AddNote(file_, Joined(group, name), Text(value));
      return absl::OkStatus();
    }
    visits_ += 1 + static_cast<int64_t>(value.items.size());
    if (depth >= kMaxDepth || visits_ > kMaxVisits) {
      return absl::InvalidArgumentError(
          absl::StrCat("pickle: containers within containers, more than ", kMaxDepth, " deep or ",
                       kMaxVisits, " in all; is \"",
                       absl::CHexEscape(Joined(group, name).substr(0, 100)), "\" within itself?"));
    }
    const std::string inner = Joined(group, name);
    if (inner.size() > kMaxNameBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("pickle: a name of ", inner.size(), " bytes; at most ", kMaxNameBytes));
    }
    return IsMap(value) ? VisitMap(value, inner, depth) : VisitSequence(value, inner, depth);
  }

 private:
  static std::string Joined(const std::string& group, const std::string& name) {
    return group.empty() ? name : name.empty() ? group : absl::StrCat(group, ".", name);
  }

  absl::Status VisitMap(const PickleValue& map, const std::string& group, int depth) {
    // A key set again replaces its value, as in Python. The keys are let go before going deeper.
    std::vector<bool> replaced(map.items.size() / 2, false);
    {
      absl::flat_hash_map<std::string, size_t> last;
      for (size_t i = 0; i < replaced.size(); ++i) {
        ASSIGN_OR_RETURN(std::string key, Key(map.items[2 * i]));
        const auto [place, fresh] = last.try_emplace(std::move(key), i);
        if (!fresh) replaced[std::exchange(place->second, i)] = true;
      }
    }
    for (size_t i = 0; i < replaced.size(); ++i) {
      if (replaced[i]) continue;
      ASSIGN_OR_RETURN(const std::string key, Key(map.items[2 * i]));
      RETURN_IF_ERROR(Visit(map.items[2 * i + 1], group, key, depth + 1));
    }
    return absl::OkStatus();
  }

  absl::Status VisitSequence(const PickleValue& list, const std::string& group, int depth) {
    const bool flat = std::none_of(list.items.begin(), list.items.end(), [this](uint32_t item) {
      const PickleValue& value = pickle_.at(item);
      return IsMap(value) || IsSequence(value) || value.kind == Kind::kTensor;
    });
    if (flat) {
      if (!list.items.empty()) AddNote(file_, group, ListText(list));
      return absl::OkStatus();
    }
    for (size_t i = 0; i < list.items.size(); ++i) {
      RETURN_IF_ERROR(Visit(list.items[i], group, absl::StrCat(i), depth + 1));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Key(uint32_t at) const {
    const PickleValue& value = pickle_.at(at);
    if (IsMap(value) || IsSequence(value)) return std::string("(a tuple)");
    if (value.text.size() > kMaxNameBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("pickle: a name of ", value.text.size(), " bytes; at most ", kMaxNameBytes));
    }
    return Text(value);
  }

  std::string Text(const PickleValue& value) const {
    switch (value.kind) {
      case Kind::kNone:
        return "None";
      case Kind::kBool:
        return value.integer != 0 ? "True" : "False";
      case Kind::kInteger:
        return absl::StrCat(value.integer);
      case Kind::kBigInteger:
        return absl::StrCat("a number of ", value.text.size(), " bytes");
      case Kind::kReal:
        return absl::StrFormat("%.9g", value.real);
      case Kind::kText:
      case Kind::kBytes:
      case Kind::kGlobal:
        return PrintableText(absl::string_view(value.text).substr(0, kMaxNameBytes));
      case Kind::kStorage:
        return "a storage";
      default:
        return "";
    }
  }

  std::string ListText(const PickleValue& list) const {
    std::string text = "[";
    for (const uint32_t item : list.items) {
      if (text.size() > 1) text += ", ";
      if (text.size() >= kMaxListText) {
        text += "…";
        break;
      }
      text += Text(pickle_.at(item));
    }
    return text + "]";
  }

  absl::Status AddTensor(const PickledTensor& pickled, const std::string& group,
                         const std::string& name) {
    const PickledStorage& storage = pickle_.storages[pickled.storage];
    StoredTensor tensor;
    tensor.group = group;
    tensor.name = name;
    tensor.dtype = std::string(pickled.dtype);
    tensor.shape = pickled.shape;
    tensor.strides = pickled.strides;
    tensor.first = pickled.first;
    collected_ += static_cast<int64_t>(sizeof(StoredTensor) * 2 + group.size() + name.size() +
                                       16 * tensor.shape.size() + sizeof(Extent) + 64);
    if (file_.tensors.size() >= kMaxStoredTensors || collected_ > kMaxCollectedBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("pickle: more tensors than a model has, ", file_.tensors.size()));
    }
    ASSIGN_OR_RETURN(const FoundStorage found, find_(storage));
    // Within its view first; CheckStoredTensor sees to the storage and the file later.
    const int64_t size = storage.dtype.empty() ? 1 : SafetensorsElementSize(storage.dtype);
    int64_t view_bytes = 0;
    if (__builtin_mul_overflow(storage.view_elements, size, &view_bytes) ||
        view_bytes > found.extent.bytes) {
      return absl::DataLossError(absl::StrCat("pickle: storage \"", absl::CHexEscape(storage.key),
                                              "\" of ", storage.view_elements,
                                              " elements has only ", found.extent.bytes, " bytes"));
    }
    tensor.storage = {{0, view_bytes}};
    RETURN_IF_ERROR(CheckStoredTensor(tensor, view_bytes));
    tensor.storage = {found.extent};
    tensor.checksum = found.checksum;
    tensor.first += storage.view_first;
    SimplifyStrides(tensor);
    file_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // Row-major without gaps: no strides.
  static void SimplifyStrides(StoredTensor& tensor) {
    if (tensor.elements() > 0) {
      int64_t expected = 1;
      for (size_t axis = tensor.shape.size(); axis-- > 0;) {
        if (tensor.shape[axis] != 1 && tensor.strides[axis] != expected) return;
        expected *= tensor.shape[axis];
      }
    }
    tensor.strides.clear();
  }

  const Pickle& pickle_;
  FindStorage find_;
  WeightFile& file_;
  int64_t visits_ = 0;
  int64_t collected_ = 0;
};

}  // namespace

absl::StatusOr<Pickle> ReadPickle(const ByteSource& source, int64_t begin, int64_t end,
                                  int64_t max_memory) {
  return Machine(source, begin, end, max_memory).Run();
}

absl::Status CollectTensors(const Pickle& pickle, FindStorage find, WeightFile& file) {
  return Collector(pickle, find, file).Visit(pickle.root, "", "", 0);
}

}  // namespace pyramid
