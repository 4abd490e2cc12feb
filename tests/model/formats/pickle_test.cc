#include "model/formats/pickle.h"

#include "absl/strings/str_cat.h"
#include "tests/model/formats/torch_files.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::PickledDict;
using ::pyramid::testing::PickledGlobal;
using ::pyramid::testing::PickledInteger;
using ::pyramid::testing::PickledStorageId;
using ::pyramid::testing::PickledTensor;
using ::pyramid::testing::PickledText;
using ::pyramid::testing::PickledTuple;
using ::pyramid::testing::StatusIs;
using ::pyramid::testing::WholePickle;
using ::testing::_;
using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;
using std::string_literals::operator""s;

// A storage of 24 floats for every key.
absl::StatusOr<FoundStorage> Anywhere(const PickledStorage&) {
  return FoundStorage{{0, 96}, nullptr};
}

absl::StatusOr<WeightFile> ReadRaw(std::string pickle, int64_t memory = kMaxPickleMemory) {
  const auto source = MakeMemorySource(std::move(pickle));
  ASSIGN_OR_RETURN(const Pickle objects, ReadPickle(*source, 0, source->size(), memory));
  WeightFile file;
  RETURN_IF_ERROR(CollectTensors(objects, Anywhere, file));
  return file;
}

absl::StatusOr<WeightFile> Read(absl::string_view body) { return ReadRaw(WholePickle(body)); }

std::string Tensor(const std::vector<int64_t>& shape = {4, 6},
                   const std::vector<int64_t>& strides = {6, 1}) {
  return PickledTensor(PickledStorageId("FloatStorage", "0", 24), 0, shape, strides);
}

std::string Repeat(absl::string_view text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) absl::StrAppend(&all, text);
  return all;
}

std::vector<std::string> Paths(const WeightFile& file) {
  std::vector<std::string> paths;
  for (const StoredTensor& tensor : file.tensors) {
    paths.push_back(absl::StrCat(tensor.group, "|", tensor.name));
  }
  return paths;
}

TEST(PickleTest, NamesTensorsByTheirContainers) {
  const std::string optimizer = PickledDict(
      {{"state", absl::StrCat("}", PickledInteger(0), PickledDict({{"exp_avg", Tensor()}}), "s")}});
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Read(PickledDict({{"model", PickledDict({{"head.weight", Tensor()}})},
                                         {"list", absl::StrCat("](", Tensor(), "Ne")},
                                         {"optimizer", optimizer}})));
  EXPECT_THAT(Paths(file), ElementsAre("model|head.weight", "list|0", "optimizer.state.0|exp_avg"));
  EXPECT_THAT(file.notes, ElementsAre(Pair("list.1", "None")));
}

TEST(PickleTest, ATensorAloneHasNoName) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file, Read(Tensor()));
  EXPECT_THAT(Paths(file), ElementsAre("|"));
}

TEST(PickleTest, EverythingElseBecomesNotes) {
  ASSERT_OK_AND_ASSIGN(
      const WeightFile file,
      Read(PickledDict({{"none", "N"},
                        {"yes", "\x88"},
                        {"no", "\x89"},
                        {"small", "K\x07"},
                        {"two", std::string("M\x01\x02", 3)},
                        {"four", "J\xff\xff\xff\xff"},
                        {"long", PickledInteger(-5)},
                        {"short long", "\x8a\x02\x00\xff"s},
                        {"big", "\x8a\x09" + std::string(9, '\1')},
                        {"real", std::string("G\xbf\xf8\0\0\0\0\0\0", 9)},
                        {"bytes", std::string("U\x02hi")},
                        {"list", "](K\1K\2e"},
                        {"tuple", "K\1K\2\x86"},
                        {"empty", "]"},
                        {"dtype", PickledGlobal("torch", "float32")},
                        {"size", PickledGlobal("torch", "Size") + "K\1K\2\x86\x85R"},
                        {"set", PickledGlobal("__builtin__", "set") + "](K\3e\x85R"},
                        {"device", PickledGlobal("torch", "device") + PickledText("cpu") + "\x85R"},
                        {"old bytes", PickledGlobal("_codecs", "encode") + PickledText("aÿ") +
                                          PickledText("latin1") + "\x86R"}})));
  EXPECT_THAT(file.tensors, IsEmpty());
  EXPECT_THAT(
      file.notes,
      ElementsAre(Pair("none", "None"), Pair("yes", "True"), Pair("no", "False"),
                  Pair("small", "7"), Pair("two", "513"), Pair("four", "-1"), Pair("long", "-5"),
                  Pair("short long", "-256"), Pair("big", "a number of 9 bytes"),
                  Pair("real", "-1.5"), Pair("bytes", "hi"), Pair("list", "[1, 2]"),
                  Pair("tuple", "[1, 2]"), Pair("dtype", "torch.float32"), Pair("size", "[1, 2]"),
                  Pair("set", "[3]"), Pair("device", "cpu"), Pair("old bytes", "a\\xff")));
}

TEST(PickleTest, ReadsNamespacesAndAttributesOfDicts) {
  const std::string arguments =
      PickledGlobal("argparse", "Namespace") + ")\x81" + PickledDict({{"lr", "K\1"}}) + "b";
  // As state_dict() has it: an OrderedDict with an attribute _metadata.
  const std::string state = PickledGlobal("collections", "OrderedDict") + ")R(" + PickledText("w") +
                            Tensor() + "u" +
                            PickledDict({{"_metadata", PickledDict({{"version", "K\1"}})}}) + "b";
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Read(PickledDict({{"args", arguments}, {"model", state}})));
  EXPECT_THAT(Paths(file), ElementsAre("model|w"));
  EXPECT_THAT(file.notes, ElementsAre(Pair("args.lr", "1")));
}

TEST(PickleTest, ReadsProtocolFourAndFive) {
  const std::string text = absl::StrCat("\x8c\x01", "w");
  const std::string rebuild =
      absl::StrCat("\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94");
  const std::string id = absl::StrCat("(\x8c\x07storage\x8c\x05torch\x8c\x0c", "FloatStorage\x93",
                                      "\x8c\x01", "0\x8c\x03", "cpuK\x18tQ");
  std::string body = absl::StrCat("}\x94(", text, rebuild, "(", id);
  body += std::string("K\0K\4K\6\x86K\6K\1\x86\x89", 13) + "}tRu.";
  for (const char protocol : {'\4', '\5'}) {
    const std::string frame = absl::StrCat("\x95", testing::LittleEndian(body.size(), 8));
    ASSERT_OK_AND_ASSIGN(const WeightFile file,
                         ReadRaw(std::string("\x80") + protocol + frame + body));
    EXPECT_THAT(Paths(file), ElementsAre("|w"));
    EXPECT_THAT(file.tensors[0].shape, ElementsAre(4, 6));
  }
}

TEST(PickleTest, ReadsOlderAndNewerWaysToRebuildTensors) {
  const std::string id = PickledStorageId("FloatStorage", "0", 24);
  const std::string untyped = PickledStorageId("UntypedStorage", "0", 96);
  const std::string shape = PickledTuple({2}) + PickledTuple({1});
  ASSERT_OK_AND_ASSIGN(
      const WeightFile file,
      Read(PickledDict(
          {{"old",
            PickledGlobal("torch._utils", "_rebuild_tensor") + "(" + id + "K\1" + shape + "tR"},
           {"typed", PickledGlobal("torch._utils", "_rebuild_tensor_v3") + "(" + untyped + "K\1" +
                         shape + "\x89N" + PickledGlobal("torch", "uint16") + "tR"},
           {"parameter",
            PickledGlobal("torch._utils", "_rebuild_parameter") + "(" + Tensor() + "\x88NtR"}})));
  ASSERT_THAT(Paths(file), ElementsAre("|old", "|typed", "|parameter"));
  EXPECT_EQ(file.tensors[0].dtype, "F32");
  EXPECT_EQ(file.tensors[0].first, 1);
  EXPECT_EQ(file.tensors[1].dtype, "U16");
}

TEST(PickleTest, AKeySetAgainReplacesItsValue) {
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Read(PickledDict({{"w", "K\1"}, {"w", "K\2"}, {"v", "K\3"}})));
  EXPECT_THAT(file.notes, ElementsAre(Pair("w", "2"), Pair("v", "3")));
}

TEST(PickleTest, SharedContainersAreReadUnderEachName) {
  ASSERT_OK_AND_ASSIGN(
      const WeightFile file,
      Read(PickledDict({{"model", PickledDict({{"w", Tensor()}}) + "q\1"}, {"model_ema", "h\1"}})));
  EXPECT_THAT(Paths(file), ElementsAre("model|w", "model_ema|w"));
}

TEST(PickleTest, RefusesEveryOtherGlobalByItsFullName) {
  for (const auto& [module, name] :
       std::vector<std::pair<std::string, std::string>>{{"os", "system"},
                                                        {"posix", "system"},
                                                        {"builtins", "eval"},
                                                        {"__builtin__", "getattr"},
                                                        {"torch", "load"},
                                                        {"torch._utils", "_rebuild_sparse_tensor"},
                                                        {"torch", "ComplexFloatStorage"},
                                                        {"numpy.core.multiarray", "_reconstruct"},
                                                        {"collections", "OrderedDict.__init__"}}) {
    const std::string refused =
        absl::StrCat("the pickle wants to call ", module, ".", name, "; refused");
    EXPECT_THAT(Read(PickledGlobal(module, name) + ")R"),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(refused)));
    EXPECT_THAT(Read(PickledText(module) + PickledText(name) + "\x93"),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(refused)));
  }
}

TEST(PickleTest, RefusesOpcodesThatRunOrReachOutside) {
  for (const std::string opcode :
       {"ios\nsystem\n", "o", "P0\n", "\x82\1", "\x83\1\1", "\x84\1\1\1\1", "\x92", "\x97", "I1\n",
        "S'a'\n", "V\n", "F1\n", "g0\n", "p0\n", "L1L\n", "\x01"}) {
    EXPECT_THAT(Read(")" + opcode),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("doesn't write")))
        << opcode;
  }
  EXPECT_THAT(ReadRaw("\x80\x01N."),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("protocol 1")));
  EXPECT_THAT(ReadRaw("\x80\x06N."),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("protocol 6")));
}

TEST(PickleTest, NothingOnTheListIsCalledInAnotherWay) {
  const std::string ordered = PickledGlobal("collections", "OrderedDict");
  const std::vector<std::string> bodies = {
      ordered + "K\1\x85R",
      ordered + "](K\1e\x85R",
      ordered + "N\x81",
      ordered + "K\1\x85\x81",
      ordered + "NR",
      "N)R",
      PickledGlobal("torch", "float32") + ")R",
      PickledGlobal("torch", "float32") + ")\x81",
      PickledGlobal("torch", "FloatStorage") + ")R",
      PickledGlobal("torch", "Size") + "K\1\x85R",
      PickledGlobal("torch", "device") + ")R",
      PickledGlobal("_codecs", "encode") + ")R",
      PickledGlobal("argparse", "Namespace") + "N\x85R",
      PickledGlobal("collections", "defaultdict") + "NN\x86R",
      PickledGlobal("torch._utils", "_rebuild_tensor") + ")R",
      PickledGlobal("torch._utils", "_rebuild_tensor_v2") + "(NNNNNNtR",
      PickledGlobal("torch._utils", "_rebuild_tensor_v3") + "(NNNNNNNtR",
      PickledGlobal("torch._utils", "_rebuild_parameter") + "N\x85R",
      PickledGlobal("torch._utils", "_rebuild_tensor") + "(" +
          PickledStorageId("UntypedStorage", "0", 8) + "K\1))tR",
      PickledGlobal("torch._utils", "_rebuild_tensor") + "(" +
          PickledStorageId("FloatStorage", "0", 8) + "K\1K\1\x85)tR",
      PickledGlobal("torch._utils", "_rebuild_tensor") + "(" +
          PickledStorageId("FloatStorage", "0", 8) + "NNNtR",
      "NQ",
      ")Q",
      PickledStorageId("float32", "0", 8),
      PickledStorageId("FloatStorage", "0", -1),
      PickledStorageId("FloatStorage", "0", 8, "(NK\6K\3t"),
      PickledStorageId("FloatStorage", "0", 8, "K\1"),
      "N}b",
      "}Nb",
  };
  for (const std::string& body : bodies) {
    EXPECT_THAT(Read(body), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("pickle, byte")))
        << body;
  }
}

TEST(PickleTest, AnUnbalancedStackIsDataLoss) {
  for (const std::string body :
       {"",     "NN",   "(",   "N(",   "t",         "u",     "0",    "1",      "2",
        "a",    "]a",   "s",   "}s",   "}Ns",       "}(Nu",  "(Nd",  "e",      "](",
        "(N]e", "N(Ne", "NNa", "\x85", "N\x86",     "(\x85", "R",    "NR",     "b",
        "Q",    "\x81", "q\1", "h\1",  "j\1\1\1\1", "\x94",  "\x93", "NN\x93", "(N\x90"}) {
    EXPECT_THAT(Read(body), StatusIs(absl::StatusCode::kDataLoss, _)) << body;
  }
}

TEST(PickleTest, TruncatedTextsAndNumbersAreDataLoss) {
  for (const std::string body :
       {"X\xff\xff\xff\xff", "\x8c\x05", "\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "U\x05",
        "\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "\x96\xff\xff\xff\xff\xff\xff\xff\x7f", "J\1",
        "\x8a\x05", "G\1\1", "\x95\1\1", "cos", "K", "\x80"}) {
    EXPECT_THAT(ReadRaw("\x80\x02" + body), StatusIs(absl::StatusCode::kDataLoss, _)) << body;
  }
  EXPECT_THAT(Read(absl::StrCat("c", std::string(2000, 'x'), "\nx\n")),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("more than 1000 characters")));
}

TEST(PickleTest, ObjectsAreBoundedInMemory) {
  const int64_t memory = int64_t{1} << 20;
  const std::string text = PickledText(std::string(1000, 'x'));
  for (const std::string& body :
       {Repeat(")", 1 << 19), Repeat("(", 1 << 18), Repeat("]", 1 << 16), Repeat(text, 2000),
        absl::StrCat("N", Repeat("q\1", 1 << 17)), absl::StrCat("](", Repeat("N", 1 << 19), "e"),
        // One list's items into many: as a dict of pairs, by an attribute, as a set.
        absl::StrCat(
            "](", Repeat("NN\x86", 4000), "eq\1",
            Repeat(absl::StrCat("0", PickledGlobal("collections", "OrderedDict"), "h\1\x85R"),
                   1000))}) {
    EXPECT_THAT(ReadRaw(WholePickle(body), memory),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bytes of memory")));
  }
}

TEST(PickleTest, DeepOrEndlessContainersAreRefused) {
  EXPECT_THAT(Read(Repeat("]", 10'000) + Repeat("a", 9'999)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("within containers")));
  EXPECT_THAT(Read("]q\1h\1a"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("within containers")));
  EXPECT_THAT(Read("}q\1" + PickledText("self") + "h\1s"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("within itself?")));
  // 2^40 paths: each list holds the one before twice.
  std::string laughs = absl::StrCat("](", Tensor(), "e");
  for (int i = 0; i < 40; ++i) absl::StrAppend(&laughs, "q\1", "0](h\1h\1e");
  EXPECT_THAT(Read(laughs), StatusIs(absl::StatusCode::kInvalidArgument,
                                     AnyOf(HasSubstr("within containers"),
                                           HasSubstr("more tensors than a model has"))));
}

TEST(PickleTest, TensorsThatDoNotFitTheirStorageAreDataLoss) {
  const std::string id = PickledStorageId("FloatStorage", "0", 24);
  const int64_t large = int64_t{1} << 62;
  for (const std::string& body :
       {PickledTensor(id, 0, {5, 5}, {5, 1}), PickledTensor(id, 1, {4, 6}, {6, 1}),
        PickledTensor(id, -1, {1}, {1}), PickledTensor(id, 0, {2}, {-1}),
        PickledTensor(id, 0, {large, large}, {0, 0}), PickledTensor(id, 0, {2}, {large}),
        PickledTensor(id, large, {1}, {1}), PickledTensor(id, 0, {1 << 30}, {0}),
        PickledTensor(PickledStorageId("FloatStorage", "0", 25), 0, {1}, {1}),
        PickledTensor(PickledStorageId("FloatStorage", "0", large), 0, {1}, {1})}) {
    EXPECT_THAT(Read(body), StatusIs(absl::StatusCode::kDataLoss, _));
  }
  EXPECT_THAT(Read(PickledTensor(id, 0, std::vector<int64_t>(17, 1), std::vector<int64_t>(17, 1))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("16 dimensions")));
}

TEST(PickleTest, EmptyAndExpandedTensorsFit) {
  const std::string id = PickledStorageId("FloatStorage", "0", 24);
  ASSERT_OK_AND_ASSIGN(const WeightFile file,
                       Read(PickledDict({{"empty", PickledTensor(id, 0, {0, 3}, {3, 1})},
                                         {"expanded", PickledTensor(id, 3, {1000, 2}, {0, 1})}})));
  EXPECT_THAT(file.tensors[0].shape, ElementsAre(0, 3));
  EXPECT_EQ(file.tensors[0].elements(), 0);
  EXPECT_THAT(file.tensors[1].strides, ElementsAre(0, 1));
}

TEST(PickleTest, LongNamesAreRefused) {
  EXPECT_THAT(Read(PickledDict({{std::string(5000, 'x'), Tensor()}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a name of 5000 bytes")));
}

}  // namespace
}  // namespace pyramid
