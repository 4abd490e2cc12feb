// Data parallel over processes: c10d's Gloo, and c10d::Reducer, whose gradient buckets are summed
// while the backward pass goes on.
#ifndef PYRAMID_WORKER_COLLECTIVE_H_
#define PYRAMID_WORKER_COLLECTIVE_H_

#include <torch/torch.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace pyramid {

// The ranks of one job. With one rank everything here does nothing. Functions throw c10::Error or
// std::runtime_error when a peer is gone; the caller's Guard makes that a Status and CommError its
// class.
class Collective {
 public:
  struct Options {
    int rank = 0;
    int world = 1;
    std::filesystem::path
        meeting_file;         // where rank 0 publishes "host:port", unless master_host is set
    std::string master_host;  // rank 0 listens on master_host:master_port
    int master_port = 0;
    std::string prefix;  // of every key: job and epoch
    absl::Duration timeout = absl::Seconds(60);
  };

  // Waits for all ranks. Aborted: they didn't meet within the timeout.
  static absl::StatusOr<std::unique_ptr<Collective>> Join(const Options& options);
  virtual ~Collective() = default;

  virtual int rank() const = 0;
  virtual int world() const = 0;

  // Every rank gets rank 0's values. In place.
  virtual void Broadcast(std::vector<torch::Tensor> tensors) = 0;

  // Sums over ranks, in place. The second returns at once; Wait ends it.
  virtual void SumNow(torch::Tensor tensor) = 0;
  virtual void StartSum(torch::Tensor tensor) = 0;
  virtual void WaitSum() = 0;

  // Checks that all ranks have the same parameters (count, shape, dtype), gives them rank 0's
  // values and averages their gradients from then on. `bucket_bytes`: gradients are sent in pieces
  // of about this size.
  virtual void AttachParameters(std::vector<torch::Tensor> parameters, int64_t bucket_bytes) = 0;

  // Before the forward pass, and before the backward pass of an optimizer step's last micro-batch:
  // only that one sends gradients.
  virtual void BeforeForward() = 0;
  virtual void BeforeLastBackward() = 0;

  // After the last collective: waits up to 5 s until every rank has come here, so that none closes
  // its connections while another still reads from them. Never throws.
  virtual void Leave() = 0;
};

// A message from Gloo or its store: a peer died, hangs, or was never there.
bool IsCommError(absl::string_view message);

// 3 MiB for networks whose gradients are under 64 MB (b0, b1), so that several buckets overlap; 25
// MiB (PyTorch's default) above.
int64_t BucketBytes(int64_t gradient_bytes);

}  // namespace pyramid

#endif  // PYRAMID_WORKER_COLLECTIVE_H_
