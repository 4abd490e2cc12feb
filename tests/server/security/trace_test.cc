#include "server/security/trace.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace pyramid {
namespace {

constexpr char kGiven[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceTest, AValidHeaderGoesOn) {
  const TraceContext trace = ContinueTrace(kGiven);
  EXPECT_EQ(trace.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(trace.flags, "01");
  EXPECT_NE(trace.parent_id, "00f067aa0ba902b7") << "our part of the trace has an id of its own";
  EXPECT_EQ(trace.Header(), "00-4bf92f3577b34da6a3ce929d0e0e4736-" + trace.parent_id + "-01");
}

TEST(TraceTest, ALaterVersionMayHaveMoreFields) {
  const std::string later = "cc" + std::string(kGiven).substr(2) + "-what-comes";
  EXPECT_EQ(ContinueTrace(later).trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(ContinueTrace(later).Header().substr(0, 3), "00-");
}

TEST(TraceTest, AnInvalidHeaderBeginsANewTrace) {
  for (const char* given : {
           "",
           "00",
           "garbage",
           "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",    // version ff
           "00-00000000000000000000000000000000-00f067aa0ba902b7-01",    // no trace
           "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",    // no parent
           "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",    // upper case
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",     // short
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",  // version 00 has no more
           "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
           "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
       }) {
    const TraceContext trace = ContinueTrace(given);
    EXPECT_EQ(trace.trace_id.size(), 32u) << given;
    EXPECT_NE(trace.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736") << given;
    EXPECT_EQ(trace.flags, "00") << given;
    EXPECT_EQ(trace.Header().size(), 55u) << given;
  }
}

TEST(TraceTest, NewTracesDiffer) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(ContinueTrace("").trace_id);
  EXPECT_EQ(seen.size(), 1000u);
}

TEST(RequestIdTest, AUsableIdIsKept) {
  EXPECT_EQ(RequestIdFrom("r-7/a:b"), "r-7/a:b");
  EXPECT_EQ(RequestIdFrom(std::string(128, 'x')), std::string(128, 'x'));
}

TEST(RequestIdTest, AnotherOneIsReplaced) {
  for (const std::string& given :
       {std::string(), std::string(129, 'x'), std::string("a b"), std::string("a\nb"),
        std::string("a\"b"), std::string("\xc3\xa4"), std::string("a\\b"), std::string("it's")}) {
    const std::string id = RequestIdFrom(given);
    EXPECT_EQ(id.size(), 32u) << given;
    EXPECT_EQ(id.find_first_not_of("0123456789abcdef"), std::string::npos) << id;
  }
}

}  // namespace
}  // namespace pyramid
