// The inner loops of resampling: one table of functions per instruction set, all of which give the
// same bytes (tests/model/resample_test.cc).
//
// Files with instruction-set flags include this, intrinsics and <cstdint> only, everything else in
// an unnamed namespace.
#ifndef PYRAMID_MODEL_RESAMPLE_LOOPS_H_
#define PYRAMID_MODEL_RESAMPLE_LOOPS_H_

#include <cstddef>
#include <cstdint>

namespace pyramid::resample {

inline constexpr int kPillowBits = 32 - 8 - 2;  // Pillow's weights are fixed point
inline constexpr int kOpenCvBits = 11;          // so are OpenCV's
inline constexpr int kHalfBits = 15;            // where `halves` cuts a weight of Pillow's
inline constexpr int kTapGroup = 4;             // weights of an axis come in groups
inline constexpr int kRowGroup = 4;             // rows resampled across at once
inline constexpr size_t kSlack = 32;            // bytes

// Resamples kRowGroup rows across. Output i of a row is the sum over k < taps of
// row[first[i] + k] * weights[i * taps + k], each channel by itself.
struct Across {
  const uint8_t* rows[kRowGroup];  // readable for kSlack bytes behind the last input of weight
  void* out[kRowGroup];            // count * channels values, writable for kSlack bytes behind them
  int channels;                    // 1 or 3, interleaved
  int count;                       // outputs
  int taps;                        // a multiple of kTapGroup; weights of absent ones are 0
  const int32_t* first;            // [count]
  const int32_t* weights;          // [count][taps]
  // The same weights, 16 bits at a time: [count][taps / 4][8], the low kHalfBits of four weights,
  // then the rest of the four. OpenCV's fit into the first four, signed; the rest is 0.
  const int16_t* halves;
};

// Resamples one row down: out[i] is the sum over k < taps of rows[k][i] * weights[k].
struct Down {
  const void* const* rows;  // [taps], readable for kSlack bytes behind `count` values
  const int32_t* weights;   // [taps]
  int taps;                 // even
  size_t count;             // values
  uint8_t* out;             // exactly `count` bytes
};

struct Loops {
  const char* name;                      // "plain" | "avx2"
  void (*pillow_across)(const Across&);  // to 8 bits, rounded
  void (*pillow_down)(const Down&);      // of 8 bits
  void (*opencv_across)(const Across&);  // to int32, not rounded
  void (*opencv_cubic_down)(const Down&);
  void (*opencv_linear_down)(const Down&);  // rounds each of the two products, as OpenCV does
};

extern const Loops kPlainLoops;
extern const Loops kAvx2Loops;  // x86-64 only

}  // namespace pyramid::resample

#endif  // PYRAMID_MODEL_RESAMPLE_LOOPS_H_
