// grpc.health.v1 per model: what the registry says goes to gRPC's health service.
#ifndef PYRAMID_SERVER_HEALTH_H_
#define PYRAMID_SERVER_HEALTH_H_

#include <grpcpp/health_check_service_interface.h>

#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace pyramid {

// Once this is made every gRPC service serves; a model's name serves while the model can answer
// requests that name it alone, "" as its owner says. A name that never was one is NOT_FOUND, in
// Watch SERVICE_UNKNOWN.
class HealthFeed {
 public:
  // Each model's name and whether it is ready, and "". Called once at the beginning, then from a
  // thread of this object.
  using Readiness = std::function<std::map<std::string, bool>()>;

  // `health` must outlive it.
  HealthFeed(grpc::HealthCheckServiceInterface& health, std::vector<std::string> services,
             Readiness readiness, absl::Duration interval = absl::Milliseconds(100));
  ~HealthFeed();
  HealthFeed(const HealthFeed&) = delete;
  HealthFeed& operator=(const HealthFeed&) = delete;

  // Nothing serves any more. For draining.
  void Stop();

 private:
  void Run();
  void Tell();

  grpc::HealthCheckServiceInterface& health_;
  const Readiness readiness_;
  const absl::Duration interval_;
  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::string, bool> told_ ABSL_GUARDED_BY(mutex_);  // watchers hear of changes only
  std::thread thread_;
};

}  // namespace pyramid

#endif  // PYRAMID_SERVER_HEALTH_H_
