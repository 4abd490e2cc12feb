#include "proto/base/read_request.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/gzip_stream.h>
#include <google/protobuf/wire_format_lite.h>

#include <algorithm>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace pyramid {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr int64_t kLeastBound = int64_t{8} << 20;
constexpr int64_t kMostBound = int64_t{64} << 20;
constexpr int kMostDepth = 100;  // protobuf's own

// Also tells whether the message is compressed.
class Reader final : public grpc::ProtoBufferReader {
 public:
  using ProtoBufferReader::ProtoBufferReader;
  bool compressed() { return reader()->buffer_in->data.raw.compression != GRPC_COMPRESS_NONE; }
};

bool IsOfFixedSize(const FieldDescriptor& field) {
  switch (
      WireFormatLite::WireTypeForFieldType(static_cast<WireFormatLite::FieldType>(field.type()))) {
    case WireFormatLite::WIRETYPE_FIXED32:
    case WireFormatLite::WIRETYPE_FIXED64:
      return true;
    default:
      return false;
  }
}

// Walks a message without keeping anything of it.
class EntryCounter {
 public:
  explicit EntryCounter(CodedInputStream& in) : in_(in) {}

  // False: too many, or no message. Null: nothing is known of its fields. `group`: the number of
  // the one that it is; 0: none.
  bool Count(const Descriptor* type, int depth, int group = 0) {
    if (depth > kMostDepth) return false;
    while (const uint32_t tag = in_.ReadTag()) {
      if (++entries_ > kMostEntries) return false;
      const int number = WireFormatLite::GetTagFieldNumber(tag);
      bool read = false;
      switch (WireFormatLite::GetTagWireType(tag)) {
        case WireFormatLite::WIRETYPE_END_GROUP:
          return number == group;
        case WireFormatLite::WIRETYPE_START_GROUP:
          read = Count(nullptr, depth + 1, number);
          break;
        case WireFormatLite::WIRETYPE_LENGTH_DELIMITED:
          read = CountDelimited(type == nullptr ? nullptr : type->FindFieldByNumber(number), depth);
          break;
        default:
          read = WireFormatLite::SkipField(&in_, tag);
      }
      if (!read) return false;
    }
    return group == 0 && in_.ConsumedEntireMessage();
  }

  bool too_many() const { return entries_ > kMostEntries; }

 private:
  bool CountDelimited(const FieldDescriptor* field, int depth) {
    int length = 0;
    if (!in_.ReadVarintSizeAsInt(&length)) return false;
    if (field != nullptr && field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      const CodedInputStream::Limit limit = in_.PushLimit(length);
      if (!Count(field->message_type(), depth + 1)) return false;
      in_.PopLimit(limit);
      return true;
    }
    if (field != nullptr && field->is_packable() && !IsOfFixedSize(*field)) {
      entries_ += length;  // a byte each at least
      if (too_many()) return false;
    }
    return in_.Skip(length);
  }

  CodedInputStream& in_;
  int64_t entries_ = 0;
};

grpc::Status NoMessage(const Descriptor& type) {
  return {grpc::StatusCode::INVALID_ARGUMENT, absl::StrCat("the message is no ", type.full_name())};
}

grpc::Status CheckEntries(grpc::ByteBuffer& message, const Descriptor& type) {
  if (message.Length() <= static_cast<size_t>(kMostEntries)) return grpc::Status::OK;
  Reader reader(&message);
  CodedInputStream in(&reader);
  EntryCounter counter(in);
  if (counter.Count(&type, 1)) return grpc::Status::OK;
  if (!counter.too_many()) return NoMessage(type);
  return {grpc::StatusCode::INVALID_ARGUMENT,
          absl::StrCat("the message has more than ", kMostEntries,
                       " fields and numbers; that many aren't taken")};
}

}  // namespace

int64_t MostUnpacked(int64_t packed) { return std::clamp(16 * packed, kLeastBound, kMostBound); }

grpc::Status Unpack(grpc::ByteBuffer& message) {
  std::string plain;
  {
    Reader reader(&message);
    if (!reader.status().ok()) return reader.status();
    if (!reader.compressed()) return grpc::Status::OK;
    const auto most = static_cast<size_t>(MostUnpacked(static_cast<int64_t>(message.Length())));
    google::protobuf::io::GzipInputStream unpacked(&reader);
    const void* data = nullptr;
    int size = 0;
    while (unpacked.Next(&data, &size)) {
      if (plain.size() + static_cast<size_t>(size) > most) {
        return {grpc::StatusCode::RESOURCE_EXHAUSTED,
                absl::StrCat("the message is compressed from over ", most, " to ", message.Length(),
                             " bytes; that much isn't unpacked, send it as it is")};
      }
      plain.append(static_cast<const char*>(data), static_cast<size_t>(size));
    }
    if (unpacked.ZlibErrorCode() != Z_STREAM_END) {
      return {grpc::StatusCode::INVALID_ARGUMENT, "the message is compressed and damaged"};
    }
  }
  const grpc::Slice slice(plain);
  grpc::ByteBuffer buffer(&slice, 1);
  message.Swap(&buffer);
  return grpc::Status::OK;
}

grpc::Status ReadMessage(grpc::ByteBuffer& message, google::protobuf::MessageLite& parsed) {
  const auto* full = dynamic_cast<const google::protobuf::Message*>(&parsed);
  const bool bounded = full != nullptr && absl::EndsWith(full->GetDescriptor()->name(), "Request");
  if (!bounded) {
    return grpc::GenericDeserialize<grpc::ProtoBufferReader, google::protobuf::Message>(&message,
                                                                                        &parsed);
  }
  grpc::Status status = Unpack(message);
  if (status.ok()) status = CheckEntries(message, *full->GetDescriptor());
  if (status.ok()) {
    Reader reader(&message);
    if (!parsed.ParseFromZeroCopyStream(&reader)) status = NoMessage(*full->GetDescriptor());
  }
  message.Clear();
  return status;
}

}  // namespace pyramid
