// Randomness by counter: a number is a pure function of its key and of how many were drawn before,
// so a picture's augmentation doesn't depend on which worker or thread makes it.
#ifndef PYRAMID_WORKER_DATA_RANDOM_H_
#define PYRAMID_WORKER_DATA_RANDOM_H_

#include <cmath>
#include <cstdint>

namespace pyramid {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every output bit depends on every input
// bit.
constexpr uint64_t MixBits(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// What numbers are drawn for; keeps the draws of different purposes apart.
enum class RandomStream : uint64_t { kOrder = 1, kSubset = 2, kAugment = 3, kSubstitute = 4 };

// Cheap to make and to copy. Not thread-safe.
class CounterRandom {
 public:
  CounterRandom(RandomStream stream, uint64_t seed, uint64_t epoch, uint64_t position)
      : key_(MixBits(MixBits(MixBits(MixBits(seed) ^ static_cast<uint64_t>(stream)) ^ epoch) ^
                     position)) {}

  uint64_t Next() { return MixBits(key_ + 0x9e3779b97f4a7c15 * counter_++); }

  // Uniform in [0, 1), 53 bits.
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  double Uniform(double low, double high) { return low + (high - low) * Uniform(); }

  // Uniform in 0..n-1; n ≥ 1. The bias of the multiplication is under n / 2^64.
  int64_t Below(int64_t n) {
    return static_cast<int64_t>(
        (static_cast<unsigned __int128>(Next()) * static_cast<uint64_t>(n)) >> 64);
  }

  bool Chance(double probability) { return Uniform() < probability; }

  // N(0, 1), Box-Muller; draws two numbers.
  double Normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - Uniform()));
    return radius * std::cos(6.283185307179586 * Uniform());
  }

 private:
  uint64_t key_;
  uint64_t counter_ = 0;
};

}  // namespace pyramid

#endif  // PYRAMID_WORKER_DATA_RANDOM_H_
