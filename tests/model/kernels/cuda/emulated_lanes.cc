#include "tests/model/kernels/cuda/emulated_lanes.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace pyramid::kernels::cuda {
namespace {

constexpr int kLanesOfWarp = 32, kBlockThreads = 128;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPage = 4096;

[[noreturn]] void Breach(const char* what) {
  std::fprintf(stderr, "emulated lanes: %s\n", what);
  std::abort();
}

unsigned char* Map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) Breach("no memory");
  return static_cast<unsigned char*>(memory);
}

enum class Operation { kNone, kLoad, kMultiply, kShuffle, kSync };

// What a lane brings to an exchange with its warp.
struct Slot {
  Operation operation = Operation::kNone;
  const void* address = nullptr;
  float value = 0;
  std::array<float, 8> a{};  // the A operand's halves
  std::array<float, 4> b{};
};

enum class State { kRunning, kAtWarp, kAtBlock, kDone };

struct Lane {
  jmp_buf resume;
  bool started = false;
  State state = State::kDone;
  unsigned exchanges = 0;
  unsigned char* stack = nullptr;
  dim3 thread{0, 0, 0};
};

// One launch at a time; tests are single-threaded.
struct Machine {
  std::array<Lane, kBlockThreads> lanes;
  std::array<std::array<std::array<Slot, kLanesOfWarp>, kBlockThreads / kLanesOfWarp>, 2> slots;
  int current = 0;
  jmp_buf scheduler;
  ucontext_t start_context, unused;
  const std::function<void()>* body = nullptr;
  dim3 block{0, 0, 0}, grid{1};
  Order order = Order::kForward;
  unsigned char* shared_memory = nullptr;  // kMostBytes, then a page that can't be touched
  unsigned char* shared = nullptr;
  int shared_bytes = 0, most_shared_bytes = 0;
  static constexpr size_t kMostBytes = 256 * 1024;

  Machine() {
    for (int i = 0; i < kBlockThreads; ++i) {
      lanes[i].stack = Map(kStackBytes);
      lanes[i].thread.x = i;
    }
    shared_memory = Map(kMostBytes + kPage);
    mprotect(shared_memory + kMostBytes, kPage, PROT_NONE);
  }
};

Machine& TheMachine() {
  static Machine* machine = new Machine;
  return *machine;
}

void Wait(State state) {
  Machine& m = TheMachine();
  Lane& lane = m.lanes[m.current];
  lane.state = state;
  if (_setjmp(lane.resume) == 0) _longjmp(m.scheduler, 1);
}

void StartLane() {
  (*TheMachine().body)();
  Wait(State::kDone);
}

void Resume(int index) {
  Machine& m = TheMachine();
  Lane& lane = m.lanes[index];
  m.current = index;
  if (_setjmp(m.scheduler) != 0) return;
  lane.state = State::kRunning;
  if (lane.started) _longjmp(lane.resume, 1);
  lane.started = true;
  getcontext(&m.start_context);
  m.start_context.uc_stack.ss_sp = lane.stack;
  m.start_context.uc_stack.ss_size = kStackBytes;
  m.start_context.uc_link = nullptr;
  makecontext(&m.start_context, StartLane, 0);
  setcontext(&m.start_context);
}

// Until all its lanes wait for the block, or are done.
void RunWarp(int first) {
  Machine& m = TheMachine();
  do {
    for (int i = 0; i < kLanesOfWarp; ++i) Resume(first + i);
    for (int i = 1; i < kLanesOfWarp; ++i) {
      if (m.lanes[first + i].state != m.lanes[first].state) Breach("the lanes of a warp part");
      if (m.lanes[first].state == State::kAtWarp) {
        const unsigned parity = (m.lanes[first].exchanges - 1) % 2;
        const auto& slots = m.slots[parity][first / kLanesOfWarp];
        if (slots[i].operation != slots[0].operation ||
            m.lanes[first + i].exchanges != m.lanes[first].exchanges) {
          Breach("the lanes of a warp meet at different operations");
        }
      }
    }
  } while (m.lanes[first].state == State::kAtWarp);
}

void RunBlock() {
  Machine& m = TheMachine();
  for (Lane& lane : m.lanes) lane.started = false, lane.exchanges = 0;
  std::memset(m.shared, 0xFF, m.shared_bytes);
  do {
    for (int w = 0; w < kBlockThreads; w += kLanesOfWarp) {
      RunWarp(m.order == Order::kForward ? w : kBlockThreads - kLanesOfWarp - w);
    }
    for (const Lane& lane : m.lanes) {
      if (lane.state != m.lanes[0].state) Breach("the warps of a block wait for different things");
    }
  } while (m.lanes[0].state != State::kDone);
}

// Leaves `mine` for the warp's other lanes; returns everybody's.
const std::array<Slot, kLanesOfWarp>& Exchange(const Slot& mine) {
  Machine& m = TheMachine();
  const int index = m.current;
  // Two sets in turns: a lane may be one exchange ahead of those that still read.
  auto& slots = m.slots[m.lanes[index].exchanges++ % 2][index / kLanesOfWarp];
  slots[index % kLanesOfWarp] = mine;
  Wait(State::kAtWarp);
  return slots;
}

int LaneInWarp() { return TheMachine().current % kLanesOfWarp; }

const std::array<Slot, kLanesOfWarp>& ExchangeRows(const void* row) {
  const Machine& m = TheMachine();
  const auto* at = static_cast<const unsigned char*>(row);
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) Breach("ldmatrix: a row isn't aligned");
  if (at < m.shared || at + 16 > m.shared + m.shared_bytes)
    Breach("ldmatrix outside shared memory");
  return Exchange({.operation = Operation::kLoad, .address = row});
}

uint16_t Element(const void* row, int i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const unsigned char*>(row) + 2 * i, 2);
  return bits;
}

template <typename T>
void MultiplyAs(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Slot mine{.operation = Operation::kMultiply};
  for (int i = 0; i < 8; ++i) {
    mine.a[i] = ToFloat(T{static_cast<uint16_t>(a[i / 2] >> (i % 2 * 16))});
  }
  for (int i = 0; i < 4; ++i) {
    mine.b[i] = ToFloat(T{static_cast<uint16_t>((i < 2 ? b0 : b1) >> (i % 2 * 16))});
  }
  const auto& slots = Exchange(mine);
  const int lane = LaneInWarp(), group = lane >> 2, in_group = lane & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    double total = sum[i];
    for (int k = 0; k < 16; ++k) {
      // a_i: row groupID for i = 0, 1, 4, 5, else groupID + 8; column 2 · threadID_in_group + (i &
      // 1), 8 more from i = 4 on. b_i: row 2 · threadID_in_group + (i & 1), 8 more from i = 2 on;
      // column groupID.
      const int from = k % 8 / 2;
      const float left = slots[row % 8 * 4 + from].a[k % 2 + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0)];
      const float right = slots[column * 4 + from].b[k % 2 + (k >= 8 ? 2 : 0)];
      total += double{left} * right;
    }
    sum[i] = static_cast<float>(total);
  }
}

}  // namespace

float ToFloat(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

void FromFloat(float x, Bf16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  out.bits =
      std::isnan(x) ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float ToFloat(F16 x) {
  static const std::vector<float>* table = [] {
    auto* all = new std::vector<float>(65536);
    for (int bits = 0; bits < 65536; ++bits) {
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      const double size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(fraction, -24)
                                          : std::ldexp(1024 + fraction, exponent - 25);
      (*all)[bits] = static_cast<float>(bits & 0x8000 ? -size : size);
    }
    return all;
  }();
  return (*table)[x.bits];
}

void FromFloat(float x, F16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const uint32_t size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) {
    out.bits = 0x7FFF;
  } else if (size >= 0x477FF000) {  // 65520
    out.bits = static_cast<uint16_t>(sign | 0x7C00);
  } else if (size < 0x38800000) {  // 2^-14: below it, units of 2^-24
    out.bits = static_cast<uint16_t>(
        sign | static_cast<uint32_t>(std::nearbyint(std::bit_cast<float>(size) * 0x1p24f)));
  } else {
    out.bits = static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
  }
}

void LoadMatrices(uint32_t (&r)[4], const void* row) {
  const auto& slots = ExchangeRows(row);
  const int lane = LaneInWarp();
  for (int m = 0; m < 4; ++m) {
    const void* from = slots[8 * m + lane / 4].address;
    r[m] = Element(from, lane % 4 * 2) | uint32_t{Element(from, lane % 4 * 2 + 1)} << 16;
  }
}

void LoadMatricesTransposed(uint32_t (&r)[4], const void* row) {
  const auto& slots = ExchangeRows(row);
  const int lane = LaneInWarp();
  for (int m = 0; m < 4; ++m) {
    const int first = 8 * m + lane % 4 * 2;
    r[m] = Element(slots[first].address, lane / 4) |
           uint32_t{Element(slots[first + 1].address, lane / 4)} << 16;
  }
}

template <>
void Multiply<F16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyAs<F16>(sum, a, b0, b1);
}
template <>
void Multiply<Bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyAs<Bf16>(sum, a, b0, b1);
}

float ShuffleXor(float x, int mask) {
  const auto& slots = Exchange({.operation = Operation::kShuffle, .value = x});
  return slots[LaneInWarp() ^ mask].value;
}

void SyncWarp() { Exchange({.operation = Operation::kSync}); }
void SyncBlock() { Wait(State::kAtBlock); }
unsigned char* SharedMemory() { return TheMachine().shared; }
void SetOrder(Order order) { TheMachine().order = order; }
int MostSharedBytes() { return TheMachine().most_shared_bytes; }

const dim3& ThreadIndex() { return TheMachine().lanes[TheMachine().current].thread; }
const dim3& BlockIndex() { return TheMachine().block; }
const dim3& GridSize() { return TheMachine().grid; }

int LaunchLanes(const std::function<void()>& lane, dim3 grid, int shared_bytes) {
  Machine& m = TheMachine();
  if (grid.y > 65535 || grid.z > 65535) Breach("the grid is larger than a card takes");
  if (shared_bytes % 16 != 0) Breach("shared memory isn't a multiple of 16 bytes");
  if (static_cast<size_t>(shared_bytes) > Machine::kMostBytes) Breach("too much shared memory");
  m.body = &lane;
  m.grid = grid;
  m.shared_bytes = shared_bytes;
  m.most_shared_bytes = std::max(m.most_shared_bytes, shared_bytes);
  m.shared = m.shared_memory + Machine::kMostBytes - shared_bytes;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t n = 0; n < blocks; ++n) {
    const uint64_t i = m.order == Order::kForward ? n : blocks - 1 - n;
    m.block.x = static_cast<unsigned>(i % grid.x);
    m.block.y = static_cast<unsigned>(i / grid.x % grid.y);
    m.block.z = static_cast<unsigned>(i / grid.x / grid.y);
    RunBlock();
  }
  return 0;
}

}  // namespace pyramid::kernels::cuda
