#include "worker/signals.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace pyramid {
namespace {

std::atomic<int> g_stops{0};
std::atomic<int> g_interrupts{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler touches it");

void OnStop(int signal) {
  g_stops.fetch_add(1, std::memory_order_relaxed);
  if (signal == SIGINT && g_interrupts.fetch_add(1, std::memory_order_relaxed) >= 1) _exit(1);
}

}  // namespace

void InstallSignals() {
  struct sigaction action = {};
  action.sa_handler = OnStop;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);
}

bool StopSignalled() { return g_stops.load(std::memory_order_relaxed) > 0; }

void ResetSignals() {
  g_stops = 0;
  g_interrupts = 0;
}

}  // namespace pyramid
