#include "client/load.h"

#include <grpcpp/alarm.h>
#include <grpcpp/generic/generic_stub.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <thread>
#include <unordered_set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/load_schedule.h"
#include "client/retry.h"
#include "proto/base/grpc_status.h"
#include "proto/classification.pb.h"

namespace pyramid {
namespace {

constexpr char kPushback[] = "grpc-retry-pushback-ms";
constexpr absl::Duration kPauseAfterRefusal = absl::Milliseconds(10);  // if the server names none

double ProcessCpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// One request, from when it is due. In a closed loop it may first wait for its time (`alarm`).
struct Call {
  absl::Time due;
  bool sent = false;
  grpc::Alarm alarm;
  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
  grpc::ByteBuffer answer;
  grpc::Status status;
};

class Load {
 public:
  Load(const std::shared_ptr<grpc::Channel>& channel, const LoadRequests& requests,
       const LoadOptions& options)
      : stub_(channel), requests_(requests), options_(options) {}

  LoadResult Run() {
    const double cpu = ProcessCpuSeconds();
    start_ = absl::Now();
    counted_from_ = start_ + options_.warm_up;
    end_ = counted_from_ + options_.duration;
    std::thread receiver([this] { Receive(); });
    if (options_.rate > 0) {
      SendOnSchedule();
    } else {
      for (int i = 0; i < options_.closed; ++i) Send(std::make_unique<Call>(), absl::Now());
      absl::SleepFor(end_ - absl::Now());
    }
    AwaitLastAnswers();
    queue_.Shutdown();
    receiver.join();
    absl::MutexLock lock(&mutex_);
    result_.client_cpu_seconds = ProcessCpuSeconds() - cpu;
    return std::move(result_);
  }

 private:
  bool Counts(absl::Time due) const { return due >= counted_from_ && due < end_; }

  void SendOnSchedule() {
    prctl(PR_SET_TIMERSLACK, 1);  // nanoseconds; 50 µs otherwise
    PoissonArrivals arrivals(options_.rate, options_.seed);
    for (absl::Time due = start_ + arrivals.Next(); due < end_; due = start_ + arrivals.Next()) {
      absl::SleepFor(due - absl::Now());
      Send(std::make_unique<Call>(), due);
    }
  }

  void Send(std::unique_ptr<Call> call, absl::Time due) {
    Call* const sent = call.get();
    const absl::Time now = absl::Now();
    const grpc::ByteBuffer* body = nullptr;
    {
      absl::MutexLock lock(&mutex_);
      if (Counts(due)) {
        ++result_.due;
        result_.send_delay.push_back(absl::ToDoubleMilliseconds(now - due));
      }
      if (live_.size() >= kMostInFlight) {
        result_.unsent += Counts(due);
        return;
      }
      live_.insert(sent);
      body = &requests_.bodies[next_body_++ % requests_.bodies.size()];
    }
    sent->due = due;
    sent->sent = true;
    if (options_.deadline != absl::InfiniteDuration()) {
      sent->context.set_deadline(absl::ToChronoTime(due + options_.deadline));
    }
    sent->reader = stub_.PrepareUnaryCall(&sent->context, requests_.method, *body, &queue_);
    sent->reader->StartCall();
    sent->reader->Finish(&sent->answer, &sent->status, call.release());
  }

  void Receive() {
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
      std::unique_ptr<Call> call(static_cast<Call*>(tag));
      const absl::Time now = absl::Now();
      if (!call->sent) {  // its alarm went off
        Forget(call.get());
        if (now < end_) Send(std::make_unique<Call>(), now);
        continue;
      }
      Record(*call, now);
      // Before it is forgotten: AwaitLastAnswers must not see a gap.
      if (options_.rate <= 0 && now < end_) SendAnother(*call);
      Forget(call.get());
    }
  }

  void SendAnother(const Call& answered) {
    auto next = std::make_unique<Call>();
    if (answered.status.ok()) return Send(std::move(next), absl::Now());
    // Sending at once what was refused a moment ago measures nothing but refusals.
    absl::Duration pause = kPauseAfterRefusal;
    const auto& metadata = answered.context.GetServerTrailingMetadata();
    if (const auto found = metadata.find(kPushback); found != metadata.end()) {
      const int64_t millis =
          ParsePushback(absl::string_view(found->second.data(), found->second.size()));
      if (millis >= 0) pause = absl::Milliseconds(millis);
    }
    {
      absl::MutexLock lock(&mutex_);
      live_.insert(next.get());
    }
    Call* const waiting = next.release();
    waiting->alarm.Set(&queue_, absl::ToChronoTime(absl::Now() + pause), waiting);
  }

  void Record(Call& call, absl::Time now) {
    v1::ClassifyResponse response;
    bool parsed = false;
    if (call.status.ok() && requests_.timings) {
      grpc::Slice slice;
      parsed = call.answer.DumpToSingleSlice(&slice).ok() &&
               response.ParseFromArray(slice.begin(), static_cast<int>(slice.size()));
    }
    absl::MutexLock lock(&mutex_);
    if (!Counts(call.due)) return;
    const double milliseconds = absl::ToDoubleMilliseconds(now - call.due);
    if (!call.status.ok()) {
      result_.refused.push_back(milliseconds);
      const absl::Status status = FromGrpc(call.status);
      if (result_.first_error.ok()) result_.first_error = status;
      ++result_.errors[status.code()];
      return;
    }
    result_.answered.push_back(milliseconds);
    result_.late += now - call.due > options_.deadline;
    if (parsed) RecordAnswer(response);
  }

  void RecordAnswer(const v1::ClassifyResponse& response) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const v1::PictureResult& picture : response.results()) {
      if (picture.code() == 0) continue;
      if (result_.bad_pictures++ == 0) result_.first_bad_picture = picture.message();
    }
    const v1::Timings& timings = response.timings();
    const auto milliseconds = [](const google::protobuf::Duration& duration) {
      return static_cast<double>(duration.seconds()) * 1e3 +
             static_cast<double>(duration.nanos()) * 1e-6;
    };
    const double decode = milliseconds(timings.decode());
    const double queue = milliseconds(timings.queue());
    const double forward = milliseconds(timings.forward());
    const double total = milliseconds(timings.total());
    result_.decode.push_back(decode);
    result_.queue.push_back(queue);
    result_.forward.push_back(forward);
    result_.total.push_back(total);
    result_.overhead.push_back(total - decode - queue - forward);
  }

  void Forget(Call* call) {
    absl::MutexLock lock(&mutex_);
    live_.erase(call);
  }

  void AwaitLastAnswers() {
    const absl::Duration patience = options_.deadline == absl::InfiniteDuration()
                                        ? options_.patience
                                        : options_.deadline + absl::Seconds(2);
    absl::MutexLock lock(&mutex_);
    const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return live_.empty(); };
    if (mutex_.AwaitWithTimeout(absl::Condition(&none), patience)) return;
    for (Call* call : live_) {
      call->context.TryCancel();
      call->alarm.Cancel();
    }
    mutex_.Await(absl::Condition(&none));
  }

  grpc::GenericStub stub_;
  const LoadRequests& requests_;
  const LoadOptions options_;
  absl::Time start_;
  absl::Time counted_from_;
  absl::Time end_;
  grpc::CompletionQueue queue_;

  absl::Mutex mutex_;
  size_t next_body_ ABSL_GUARDED_BY(mutex_) = 0;
  std::unordered_set<Call*> live_ ABSL_GUARDED_BY(mutex_);  // sent, or waiting for their time
  LoadResult result_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

LoadResult RunLoad(const std::shared_ptr<grpc::Channel>& channel, const LoadRequests& requests,
                   const LoadOptions& options) {
  return Load(channel, requests, options).Run();
}

}  // namespace pyramid
