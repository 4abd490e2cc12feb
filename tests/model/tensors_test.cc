#include "model/tensors.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/formats/safetensors.h"
#include "tests/testing/status_matchers.h"

namespace pyramid {
namespace {

using ::pyramid::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr auto kInvalidArgument = absl::StatusCode::kInvalidArgument;

TEST(TensorsTest, EveryDtypeSurvivesTheRoundTrip) {
  const torch::Tensor numbers = torch::arange(12, torch::kFloat64).reshape({3, 4}) - 4.5;
  NamedTensors tensors;
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kFloat16, torch::kBFloat16,
                           torch::kInt64, torch::kInt32, torch::kUInt8, torch::kBool}) {
    tensors.emplace_back(c10::toString(dtype), numbers.abs().to(dtype));
  }
  tensors.emplace_back("scalar", torch::tensor(3.5f));
  tensors.emplace_back("empty", torch::empty({0, 3}));
  ASSERT_OK_AND_ASSIGN(const std::string file, TensorsToSafetensors(tensors, {{"step", "7"}}));
  ASSERT_OK_AND_ASSIGN(const NamedTensors back, TensorsFromSafetensors(file));
  ASSERT_EQ(back.size(), tensors.size());
  std::map<std::string, torch::Tensor> by_name(back.begin(), back.end());
  for (const auto& [name, tensor] : tensors) {
    ASSERT_EQ(by_name.count(name), 1) << name;
    EXPECT_EQ(by_name.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(torch::equal(by_name.at(name), tensor)) << name;
  }
  ASSERT_OK_AND_ASSIGN(const SafetensorsView view, ParseSafetensors(file));
  EXPECT_EQ(view.metadata.at("step"), "7");
}

TEST(TensorsTest, WritesStridedTensorsRowByRow) {
  const torch::Tensor whole = torch::arange(24, torch::kFloat32).reshape({4, 6});
  ASSERT_OK_AND_ASSIGN(const std::string file,
                       TensorsToSafetensors({{"t", whole.t()}, {"part", whole.narrow(1, 2, 3)}}));
  ASSERT_OK_AND_ASSIGN(const NamedTensors back, TensorsFromSafetensors(file));
  EXPECT_TRUE(torch::equal(back.at(0).second, whole.t()));
  EXPECT_TRUE(torch::equal(back.at(1).second, whole.narrow(1, 2, 3)));
}

TEST(TensorsTest, WhatIsReadOutlivesTheFile) {
  NamedTensors back;
  {
    ASSERT_OK_AND_ASSIGN(std::string file, TensorsToSafetensors({{"x", torch::full({64}, 2.0f)}}));
    ASSERT_OK_AND_ASSIGN(back, TensorsFromSafetensors(file));
    file.assign(file.size(), '\xff');
  }
  EXPECT_TRUE(torch::equal(back.at(0).second, torch::full({64}, 2.0f)));
}

TEST(TensorsTest, RefusesToWriteATypeItCantName) {
  EXPECT_THAT(TensorsToSafetensors({{"z", torch::zeros({2}, torch::kComplexFloat)}}),
              StatusIs(kInvalidArgument, HasSubstr("tensor z is of type ComplexFloat")));
}

TEST(TensorsTest, DamagedBytesAreDataLoss) {
  EXPECT_THAT(TensorsFromSafetensors("nonsense"),
              StatusIs(absl::StatusCode::kDataLoss, ::testing::_));
  const std::string data(4, 'x');
  ASSERT_OK_AND_ASSIGN(const std::string odd, SerializeSafetensors({{"x", "I16", {2}, data}}));
  EXPECT_THAT(TensorsFromSafetensors(odd),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tensor x is of type I16")));
}

class LoadStateTest : public ::testing::Test {
 protected:
  torch::nn::Linear layer_{3, 2};
};

TEST_F(LoadStateTest, CopiesByName) {
  ASSERT_OK(LoadState(*layer_, {{"bias", torch::ones({2})}, {"weight", torch::full({2, 3}, 5.0)}}));
  EXPECT_TRUE(torch::equal(layer_->weight, torch::full({2, 3}, 5.0f)));  // f64 → f32
  EXPECT_TRUE(torch::equal(layer_->bias, torch::ones({2})));
  const NamedTensors state = StateOf(*layer_);
  ASSERT_EQ(state.size(), 2u);
  EXPECT_EQ(state[0].first, "weight");
}

TEST_F(LoadStateTest, ListsEverythingThatDoesntFitAndCopiesNothing) {
  const torch::Tensor before = layer_->weight.detach().clone();
  const absl::Status status =
      LoadState(*layer_, {{"weight", torch::ones({3, 2})}, {"gamma", torch::ones({1})}});
  EXPECT_THAT(status, StatusIs(kInvalidArgument,
                               AllOf(HasSubstr("1 missing (bias)"), HasSubstr("1 unused (gamma)"),
                                     HasSubstr("1 misshapen (weight is [3, 2], not [2, 3])"))));
  EXPECT_THAT(LoadState(*layer_, {{"weight", torch::ones({2, 3})}}),
              StatusIs(kInvalidArgument, HasSubstr("1 missing (bias)")));
  EXPECT_TRUE(torch::equal(layer_->weight, before));
}

TEST_F(LoadStateTest, RefusesANameThatComesTwice) {
  EXPECT_THAT(LoadState(*layer_, {{"weight", torch::ones({2, 3})},
                                  {"bias", torch::ones({2})},
                                  {"bias", torch::ones({2})}}),
              StatusIs(kInvalidArgument, HasSubstr("1 twice (bias)")));
}

TEST_F(LoadStateTest, ShortensLongLists) {
  NamedTensors many = StateOf(*layer_);
  for (int i = 0; i < 100; ++i) many.emplace_back(absl::StrCat("extra", i), torch::ones({1}));
  EXPECT_THAT(
      LoadState(*layer_, many),
      StatusIs(kInvalidArgument, AllOf(HasSubstr("100 unused (extra0, "),
                                       HasSubstr(" and 92 more)"), Not(HasSubstr("extra50")))));
}

}  // namespace
}  // namespace pyramid
