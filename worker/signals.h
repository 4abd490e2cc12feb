// What signals ask of a worker.
#ifndef PYRAMID_WORKER_SIGNALS_H_
#define PYRAMID_WORKER_SIGNALS_H_

namespace pyramid {

// SIGTERM and SIGINT ask to save and stop at the next step; a second SIGINT ends the process at
// once. SIGPIPE is ignored: Gloo's sockets raise it when a peer dies (4 of 22 deaths killed the
// survivor without this). No signal comes when the coordinator dies: workers outlive it.
void InstallSignals();

// SIGTERM or SIGINT came.
bool StopSignalled();

// For tests.
void ResetSignals();

}  // namespace pyramid

#endif  // PYRAMID_WORKER_SIGNALS_H_
