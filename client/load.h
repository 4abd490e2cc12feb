// Sends requests at a rate that doesn't depend on the answers, or keeps a number of them in flight,
// and measures. Latency counts from the moment a request was due, so that a generator that falls
// behind makes the figures worse, not better.
#ifndef PYRAMID_CLIENT_LOAD_H_
#define PYRAMID_CLIENT_LOAD_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace pyramid {

// Requests ready to be sent: nothing is serialised while the clock runs.
struct LoadRequests {
  std::string method = {};                    // "/pyramid.v1.ClassificationService/Classify"
  std::vector<grpc::ByteBuffer> bodies = {};  // sent in turns; at least one
  int pictures = 1;                           // in each
  bool timings = true;                        // answers are ClassifyResponse
};

struct LoadOptions {
  double rate = 0;  // requests a second, a Poisson process; 0: closed
  int closed = 1;   // in flight; the next one goes when one is answered, or when the server says so
  absl::Duration warm_up = absl::Seconds(1);           // sent, not counted
  absl::Duration duration = absl::Seconds(10);         // counted
  absl::Duration deadline = absl::InfiniteDuration();  // of each request, from when it was due
  absl::Duration patience = absl::Seconds(10);         // for the last answers, if no deadline
  uint64_t seed = 1;
};

// Of the requests that were due in the counted time.
struct LoadResult {
  int64_t due = 0;
  int64_t unsent = 0;  // not sent: kMostInFlight were waiting for answers
  int64_t late = 0;    // answered, but after the deadline
  std::map<absl::StatusCode, int64_t> errors = {};  // calls that failed
  absl::Status first_error = {};
  int64_t bad_pictures = 0;  // errors of a picture in a call that was answered
  std::string first_bad_picture = {};

  // Milliseconds.
  std::vector<double> answered = {};  // from when it was due to the answer
  std::vector<double> refused = {};   // the same, of calls that failed
  std::vector<double> send_delay = {};
  // What the server says of each answer.
  std::vector<double> decode = {};
  std::vector<double> queue = {};
  std::vector<double> forward = {};
  std::vector<double> total = {};     // in the handler
  std::vector<double> overhead = {};  // total less decode, queue and forward

  double client_cpu_seconds = 0;  // this process, warm-up included

  int64_t failed() const { return static_cast<int64_t>(refused.size()); }
};

inline constexpr int kMostInFlight = 20'000;

// Blocks for warm_up + duration, and until the last answers are there.
LoadResult RunLoad(const std::shared_ptr<grpc::Channel>& channel, const LoadRequests& requests,
                   const LoadOptions& options);

}  // namespace pyramid

#endif  // PYRAMID_CLIENT_LOAD_H_
