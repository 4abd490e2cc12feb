#include "worker/collective.h"

#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "model/exception_guard.h"
#include "proto/base/file.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

constexpr char kLoopback[] = "127.0.0.1";

class OneRank final : public Collective {
 public:
  int rank() const override { return 0; }
  int world() const override { return 1; }
  void Broadcast(std::vector<torch::Tensor>) override {}
  void SumNow(torch::Tensor) override {}
  void StartSum(torch::Tensor) override {}
  void WaitSum() override {}
  void AttachParameters(std::vector<torch::Tensor>, int64_t) override {}
  void BeforeForward() override {}
  void BeforeLastBackward() override {}
  void Leave() override {}
};

class GlooCollective final : public Collective {
 public:
  GlooCollective(const Options& options, c10::intrusive_ptr<c10d::Store> store, bool local)
      : rank_(options.rank), world_(options.world) {
    const auto timeout = absl::ToChronoMilliseconds(options.timeout);
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>(options.prefix, std::move(store));
    store_ = prefixed;
    auto gloo_options = c10d::ProcessGroupGloo::Options::create(timeout);
    gloo_options->devices.push_back(local
                                        ? c10d::ProcessGroupGloo::createDeviceForHostname(kLoopback)
                                        : c10d::ProcessGroupGloo::createDefaultDevice());
    auto backend =
        c10::make_intrusive<c10d::ProcessGroupGloo>(prefixed, rank_, world_, gloo_options);
    group_ = c10::make_intrusive<c10d::ProcessGroup>(prefixed, rank_, world_);
    group_->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, backend);
    group_->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    // All have come.
    torch::Tensor hello = torch::ones({1});
    SumNow(hello);
    TORCH_CHECK(hello.item<float>() == static_cast<float>(world_), "the ranks' first sum is ",
                hello.item<float>(), ", not ", world_);
  }

  int rank() const override { return rank_; }
  int world() const override { return world_; }

  void Broadcast(std::vector<torch::Tensor> tensors) override {
    const torch::NoGradGuard no_grad;
    c10d::broadcast_coalesced(group_, tensors, /*buffer_size=*/16 << 20, /*rank=*/0);
  }

  void SumNow(torch::Tensor tensor) override {
    std::vector<torch::Tensor> tensors = {tensor};
    group_->allreduce(tensors)->wait();
  }
  void StartSum(torch::Tensor tensor) override {
    std::vector<torch::Tensor> tensors = {tensor};
    sum_ = group_->allreduce(tensors);
  }
  void WaitSum() override { std::exchange(sum_, nullptr)->wait(); }

  void AttachParameters(std::vector<torch::Tensor> parameters, int64_t bucket_bytes) override {
    c10d::verify_params_across_processes(group_, parameters, std::nullopt);
    Broadcast(parameters);
    // The backward pass makes gradients from the last parameter to the first.
    std::vector<std::vector<size_t>> buckets = std::get<0>(
        c10d::compute_bucket_assignment_by_size(parameters, {static_cast<size_t>(bucket_bytes)}));
    std::reverse(buckets.begin(), buckets.end());
    const std::vector<bool> sparse(parameters.size(), false);
    reducer_ = std::make_unique<c10d::Reducer>(
        std::move(parameters), std::move(buckets), group_, sparse, bucket_bytes,
        /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true,
        std::unordered_map<size_t, std::string>{}, /*first_bucket_bytes_cap=*/bucket_bytes,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false,
        std::vector<int64_t>{bucket_bytes});
  }

  void BeforeForward() override {
    // Once, after the first backward pass: buckets by the order in which gradients come.
    if (reducer_->should_rebuild_buckets()) reducer_->rebuild_buckets();
    reducer_->prepare_for_forward();
  }
  void BeforeLastBackward() override { reducer_->prepare_for_backward({}); }

  void Leave() override {
    try {
      store_->add("left", 1);
      const absl::Time give_up = absl::Now() + absl::Seconds(5);
      while (store_->add("left", 0) < world_ && absl::Now() < give_up)
        absl::SleepFor(absl::Milliseconds(5));
      if (rank_ != 0) {
        store_->add("gone", 1);
        return;
      }
      // Rank 0 hosts the store, so it goes last.
      while (store_->add("gone", 0) < world_ - 1 && absl::Now() < give_up)
        absl::SleepFor(absl::Milliseconds(5));
    } catch (const std::exception&) {
      // Someone has left already, and everything is on disk.
    }
  }

 private:
  const int rank_;
  const int world_;
  c10::intrusive_ptr<c10d::Store> store_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::intrusive_ptr<c10d::Work> sum_;
  std::unique_ptr<c10d::Reducer> reducer_;
};

c10::intrusive_ptr<c10d::Store> OpenStore(const Collective::Options& options,
                                          const std::string& host, int port) {
  c10d::TCPStoreOptions store;
  store.port = static_cast<uint16_t>(port);
  store.isServer = options.rank == 0;
  store.numWorkers = static_cast<size_t>(options.world);
  store.waitWorkers = false;
  store.timeout = absl::ToChronoMilliseconds(options.timeout);
  return c10::make_intrusive<c10d::TCPStore>(host, store);
}

// Rank 0 publishes where its store listens; the others wait for the file.
absl::StatusOr<c10::intrusive_ptr<c10d::Store>> Meet(const Collective::Options& options) {
  if (options.rank == 0) {
    auto store = c10::make_intrusive<c10d::TCPStore>(kLoopback, [&] {
      c10d::TCPStoreOptions o;
      o.port = 0;
      o.isServer = true;
      o.numWorkers = static_cast<size_t>(options.world);
      o.waitWorkers = false;
      o.timeout = absl::ToChronoMilliseconds(options.timeout);
      return o;
    }());
    RETURN_IF_ERROR(
        WriteFileAtomically(options.meeting_file, absl::StrCat(kLoopback, ":", store->getPort())));
    return store;
  }
  const absl::Time give_up = absl::Now() + options.timeout;
  while (true) {
    if (const absl::StatusOr<std::string> text = ReadFile(options.meeting_file, 1024); text.ok()) {
      const std::vector<std::string> parts = absl::StrSplit(*text, ':');
      int port = 0;
      if (parts.size() == 2 && absl::SimpleAtoi(parts[1], &port))
        return OpenStore(options, parts[0], port);
    }
    if (absl::Now() > give_up) {
      return absl::AbortedError(absl::StrCat("rank 0 hasn't published its address in ",
                                             options.meeting_file.string(), " within ",
                                             absl::FormatDuration(options.timeout)));
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Collective>> Collective::Join(const Options& options) {
  if (options.world == 1) return std::make_unique<OneRank>();
  return Guard("joining the other ranks", absl::StatusCode::kAborted,
               [&]() -> absl::StatusOr<std::unique_ptr<Collective>> {
                 const bool by_address = !options.master_host.empty();
                 c10::intrusive_ptr<c10d::Store> store;
                 if (by_address) {
                   store = OpenStore(options, options.master_host, options.master_port);
                 } else {
                   ASSIGN_OR_RETURN(store, Meet(options));
                 }
                 const bool local = !by_address || options.master_host == kLoopback ||
                                    options.master_host == "localhost";
                 auto collective =
                     std::make_unique<GlooCollective>(options, std::move(store), local);
                 if (options.rank == 0 && !by_address) {
                   std::error_code ignored;
                   std::filesystem::remove(options.meeting_file, ignored);  // everyone has read it
                 }
                 return collective;
               });
}

bool IsCommError(absl::string_view message) {
  for (const absl::string_view sign :
       {"gloo", "Gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe",
        "TCPStore", "c10d", "recvValue", "sendBytes", "recvBytes"}) {
    if (absl::StrContains(message, sign)) return true;
  }
  return false;
}

int64_t BucketBytes(int64_t gradient_bytes) {
  return gradient_bytes < (64 << 20) ? 3 << 20 : 25 << 20;
}

}  // namespace pyramid
