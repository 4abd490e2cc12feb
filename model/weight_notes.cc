#include "model/weight_notes.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/imagenet_labels.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr absl::string_view kOrigin = "pyramid.origin";
constexpr absl::string_view kNumerics = "pyramid.numerics";
constexpr absl::string_view kPreprocessing = "pyramid.preprocessing";
constexpr absl::string_view kLabels = "pyramid.labels.";  // and a number from 0

// WeightFile cuts longer notes.
constexpr size_t kMaxNote = 1000;

std::string Ascii(const nlohmann::json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

std::string MessageText(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string text;
  if (!google::protobuf::util::MessageToJsonString(message, &text, options).ok()) return "{}";
  return Ascii(nlohmann::json::parse(text, nullptr, false));
}

// Labels as JSON lists that fit a note each; empty if one label alone doesn't.
std::vector<std::string> LabelLists(const v1::Manifest& manifest) {
  std::vector<std::string> lists;
  std::string list;
  for (const std::string& label : manifest.labels()) {
    const std::string text = Ascii(label);
    if (text.size() + 2 > kMaxNote) return {};
    if (!list.empty() && list.size() + text.size() + 2 > kMaxNote) {
      lists.push_back(list + "]");
      list.clear();
    }
    absl::StrAppend(&list, list.empty() ? "[" : ",", text);
  }
  if (!list.empty()) lists.push_back(list + "]");
  return lists;
}

bool AreImageNets(const v1::Manifest& manifest) {
  const std::span<const std::string> imagenet = ImageNetLabels();
  return std::equal(imagenet.begin(), imagenet.end(), manifest.labels().begin(),
                    manifest.labels().end());
}

absl::Status Unreadable(absl::string_view name) {
  return absl::DataLossError(absl::StrCat("its ", name, " can't be read: was it changed by hand?"));
}

absl::Status ReadMessage(absl::string_view name, const std::string& text,
                         google::protobuf::Message& message) {
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;
  message.Clear();
  return google::protobuf::util::JsonStringToMessage(text, &message, options).ok()
             ? absl::OkStatus()
             : Unreadable(name);
}

}  // namespace

WeightNotes WeightNotesOf(const v1::Manifest& manifest) {
  WeightNotes notes = {{std::string(kOrigin), manifest.origin()},
                       {std::string(kNumerics), MessageText(manifest.network().numerics())}};
  if (manifest.has_preprocessing()) {
    notes.emplace_back(std::string(kPreprocessing), MessageText(manifest.preprocessing()));
  }
  if (!AreImageNets(manifest)) {
    const std::vector<std::string> lists = LabelLists(manifest);
    for (size_t i = 0; i < lists.size(); ++i) {
      notes.emplace_back(absl::StrCat(kLabels, i), lists[i]);
    }
  }
  return notes;
}

absl::Status ReadWeightNotes(std::span<const std::pair<std::string, std::string>> notes,
                             v1::Manifest& manifest) {
  const auto find = [&](const std::string& name) {
    const auto at = std::find_if(notes.begin(), notes.end(),
                                 [&](const auto& note) { return note.first == name; });
    return at == notes.end() ? nullptr : &at->second;
  };
  if (const std::string* text = find(std::string(kOrigin))) manifest.set_origin(*text);
  if (const std::string* text = find(std::string(kNumerics))) {
    RETURN_IF_ERROR(ReadMessage(kNumerics, *text, *manifest.mutable_network()->mutable_numerics()));
  }
  if (const std::string* text = find(std::string(kPreprocessing))) {
    RETURN_IF_ERROR(ReadMessage(kPreprocessing, *text, *manifest.mutable_preprocessing()));
  }
  for (int i = 0;; ++i) {
    const std::string name = absl::StrCat(kLabels, i);
    const std::string* text = find(name);
    if (text == nullptr) return absl::OkStatus();
    const nlohmann::json list = nlohmann::json::parse(*text, nullptr, false);
    if (!list.is_array()) return Unreadable(name);
    for (const nlohmann::json& label : list) {
      if (!label.is_string()) return Unreadable(name);
      manifest.add_labels(label.get<std::string>());
    }
  }
}

}  // namespace pyramid
