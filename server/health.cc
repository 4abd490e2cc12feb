#include "server/health.h"

#include <pthread.h>

#include <utility>

namespace pyramid {

HealthFeed::HealthFeed(grpc::HealthCheckServiceInterface& health, std::vector<std::string> services,
                       Readiness readiness, absl::Duration interval)
    : health_(health), readiness_(std::move(readiness)), interval_(interval) {
  for (const std::string& service : services) health_.SetServingStatus(service, true);
  Tell();
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "health");
    Run();
  });
}

HealthFeed::~HealthFeed() { Stop(); }

void HealthFeed::Tell() {
  const std::map<std::string, bool> now = readiness_();
  absl::MutexLock lock(&mutex_);
  if (stopping_) return;
  for (const auto& [model, ready] : now) {
    const auto [known, added] = told_.try_emplace(model, ready);
    if (!added && known->second == ready) continue;
    known->second = ready;
    health_.SetServingStatus(model, ready);
  }
}

void HealthFeed::Run() {
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      const auto stopping = [](bool* flag) { return *flag; };
      if (mutex_.AwaitWithTimeout(absl::Condition(+stopping, &stopping_), interval_)) return;
    }
    Tell();
  }
}

void HealthFeed::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    if (std::exchange(stopping_, true)) return;
    health_.SetServingStatus(false);  // of all
  }
  thread_.join();
}

}  // namespace pyramid
