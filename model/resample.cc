#include "model/resample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace pyramid::resample {
namespace {

// Output i is the sum over k < used[i], at least one, of input[start[i] + k] * weights[i * taps +
// k]. An input before the first is the first, one behind the last the last.
struct Axis {
  int taps = 0;  // at least any `used`; a multiple of kTapGroup
  std::vector<int> start;
  std::vector<int> used;
  std::vector<int32_t> weights;  // 0 from `used` on

  int count() const { return static_cast<int>(start.size()); }
  int32_t* of(int output) {
    return weights.data() + static_cast<size_t>(output) * static_cast<size_t>(taps);
  }
  const int32_t* of(int output) const { return const_cast<Axis*>(this)->of(output); }
};

int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---- Pillow: the kernel is widened by the scale, weights are 22-bit fixed point, each pass rounds
// to 8 bits, the horizontal one comes first.

double PillowKernel(Kernel kernel, double x) {
  x = std::abs(x);
  if (kernel == Kernel::kBilinear) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

Axis MakePillowAxis(const Span& span, int in_size, Kernel kernel) {
  const double scale = span.length / static_cast<double>(span.size);
  const double filter_scale = std::max(scale, 1.0);
  const double support = (kernel == Kernel::kBicubic ? 2.0 : 1.0) * filter_scale;
  const auto center = [&](int i) {
    return span.start + (static_cast<double>(span.begin + i) + 0.5) * scale;
  };
  Axis axis;
  for (int i = 0; i < span.count; ++i) {
    const int first = std::max(0, static_cast<int>(center(i) - support + 0.5));
    const int last = std::min(in_size, static_cast<int>(center(i) + support + 0.5));
    axis.start.push_back(first);
    axis.used.push_back(std::max(1, last - first));
  }
  axis.taps = RoundUp(*std::max_element(axis.used.begin(), axis.used.end()), kTapGroup);
  axis.weights.resize(static_cast<size_t>(span.count) * static_cast<size_t>(axis.taps));
  std::vector<double> exact(static_cast<size_t>(axis.taps));
  for (int i = 0; i < span.count; ++i) {
    const auto output = static_cast<size_t>(i);
    double sum = 0;
    for (int k = 0; k < axis.used[output]; ++k) {
      exact[static_cast<size_t>(k)] =
          PillowKernel(kernel, (k + axis.start[output] - center(i) + 0.5) * (1.0 / filter_scale));
      sum += exact[static_cast<size_t>(k)];
    }
    for (int k = 0; k < axis.used[output]; ++k) {
      double w = exact[static_cast<size_t>(k)];
      if (sum != 0) w /= sum;
      axis.of(i)[k] = static_cast<int32_t>((w < 0 ? -0.5 : 0.5) + w * (1 << kPillowBits));
    }
  }
  return axis;
}

// ---- OpenCV without antialiasing: 2 or 4 taps, weights are 11-bit fixed point, the horizontal
// pass isn't rounded.

Axis MakeOpenCvAxis(const Span& span, Kernel kernel) {
  const int taps = kernel == Kernel::kBicubic ? 4 : 2;
  Axis axis;
  axis.taps = kTapGroup;
  axis.weights.resize(static_cast<size_t>(span.count) * static_cast<size_t>(axis.taps));
  const double scale = 1.0 / (static_cast<double>(span.size) / span.length);
  for (int i = 0; i < span.count; ++i) {
    auto x =
        static_cast<float>(span.start + (static_cast<double>(span.begin + i) + 0.5) * scale - 0.5);
    const int base = static_cast<int>(std::floor(x));
    x -= static_cast<float>(base);
    std::array<float, 4> exact{};
    if (kernel == Kernel::kBicubic) {
      constexpr float a = -0.75f;
      exact[0] = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a;
      exact[1] = ((a + 2) * x - (a + 3)) * x * x + 1;
      exact[2] = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1;
      exact[3] = 1.f - exact[0] - exact[1] - exact[2];
    } else {
      exact[0] = 1.f - x;
      exact[1] = x;
    }
    axis.start.push_back(base - (taps / 2 - 1));
    axis.used.push_back(taps);
    for (int k = 0; k < taps; ++k) {
      axis.of(i)[k] =
          static_cast<int32_t>(std::lrint(exact[static_cast<size_t>(k)] * (1 << kOpenCvBits)));
    }
  }
  return axis;
}

// ---- The passes.

// An axis as Across wants it: the taps of an output lie side by side, and within the row as far as
// it is long enough.
struct AcrossAxis {
  std::vector<int32_t> first;
  std::vector<int32_t> weights;
  std::vector<int16_t> halves;
};

AcrossAxis SideBySide(const Axis& axis, int in_size, bool cut_in_halves) {
  AcrossAxis packed;
  const auto taps = static_cast<size_t>(axis.taps);
  packed.first.resize(axis.start.size());
  packed.weights.resize(axis.weights.size());
  packed.halves.resize(axis.weights.size() * 2);
  for (size_t i = 0; i < axis.start.size(); ++i) {
    const auto input = [&](int k) { return std::clamp(axis.start[i] + k, 0, in_size - 1); };
    const int first = std::min(input(0), std::max(0, in_size - axis.taps));
    packed.first[i] = first;
    int32_t* weights = packed.weights.data() + i * taps;
    for (int k = 0; k < axis.used[i]; ++k) {
      weights[input(k) - first] += axis.of(static_cast<int>(i))[k];
    }
    int16_t* halves = packed.halves.data() + i * taps * 2;
    for (size_t k = 0; k < taps; ++k) {
      int16_t* group = halves + k / kTapGroup * (2 * kTapGroup);
      const int32_t low = cut_in_halves ? weights[k] & ((1 << kHalfBits) - 1) : weights[k];
      const int32_t high = cut_in_halves ? weights[k] >> kHalfBits : 0;
      group[k % kTapGroup] = static_cast<int16_t>(low);
      group[kTapGroup + k % kTapGroup] = static_cast<int16_t>(high);
    }
  }
  return packed;
}

// The last `count` rows of many, each followed by kSlack.
struct Rows {
  Rows(size_t row_count, size_t row_bytes)
      : count(row_count),
        stride((row_bytes + 2 * kSlack - 1) / kSlack * kSlack),
        bytes(std::make_unique_for_overwrite<uint8_t[]>(count * stride)) {}
  uint8_t* row(size_t i) const { return bytes.get() + i % count * stride; }

  size_t count;
  size_t stride;
  std::unique_ptr<uint8_t[]> bytes;
};

// The rows that a vertical pass reads, ascending, and where each stands in that list.
struct NeededRows {
  std::vector<int> rows;
  std::vector<size_t> place;  // by row of the window; meaningless for others
};

NeededRows RowsOf(const Axis& down, int height) {
  NeededRows needed;
  std::vector<bool> wanted(static_cast<size_t>(height), false);
  for (int y = 0; y < down.count(); ++y) {
    for (int k = 0; k < down.used[static_cast<size_t>(y)]; ++k) {
      wanted[static_cast<size_t>(
          std::clamp(down.start[static_cast<size_t>(y)] + k, 0, height - 1))] = true;
    }
  }
  needed.place.resize(static_cast<size_t>(height));
  for (int y = 0; y < height; ++y) {
    if (!wanted[static_cast<size_t>(y)]) continue;
    needed.place[static_cast<size_t>(y)] = needed.rows.size();
    needed.rows.push_back(y);
  }
  return needed;
}

// Resamples needed rows [index, index + kRowGroup) across, each into its place of `ring`.
void AcrossGroup(const Window& in, const std::vector<int>& needed, size_t index, Across job,
                 void (*loop)(const Across&), const Rows& copies, const Rows& ring) {
  const size_t row_bytes = static_cast<size_t>(in.width) * static_cast<size_t>(in.channels);
  for (size_t r = 0; r < kRowGroup; ++r) {
    const size_t at = std::min(index + r, needed.size() - 1);  // the last may be done twice
    const uint8_t* row = in.pixels + static_cast<size_t>(needed[at]) * in.stride;
    if (static_cast<size_t>(in.end - row) < row_bytes + kSlack) {
      std::memcpy(copies.row(r), row, row_bytes);
      std::memset(copies.row(r) + row_bytes, 0, kSlack);
      row = copies.row(r);
    }
    job.rows[r] = row;
    job.out[r] = ring.row(at);
  }
  loop(job);
}

// ---- The loops that any machine can run. They are what the others must give.

uint8_t Clip(int32_t value) { return static_cast<uint8_t>(std::clamp(value, 0, 255)); }

// Calls put(row, value's index, sum) for every value of the rows.
template <int kChannels, typename Put>
void SumAcross(const Across& p, const Put& put) {
  for (int r = 0; r < kRowGroup; ++r) {
    for (int i = 0; i < p.count; ++i) {
      const uint8_t* in = p.rows[r] + static_cast<ptrdiff_t>(p.first[i]) * kChannels;
      const int32_t* weights = p.weights + static_cast<ptrdiff_t>(i) * p.taps;
      int32_t sum[kChannels] = {};
      for (int k = 0; k < p.taps; ++k) {
        for (int c = 0; c < kChannels; ++c) sum[c] += in[k * kChannels + c] * weights[k];
      }
      for (int c = 0; c < kChannels; ++c) put(r, i * kChannels + c, sum[c]);
    }
  }
}

template <typename Put>
void SumAcrossOf(const Across& p, const Put& put) {
  p.channels == 3 ? SumAcross<3>(p, put) : SumAcross<1>(p, put);
}

void PillowAcross(const Across& p) {
  SumAcrossOf(p, [&](int row, int i, int32_t sum) {
    static_cast<uint8_t*>(p.out[row])[i] = Clip((sum + (1 << (kPillowBits - 1))) >> kPillowBits);
  });
}

void OpenCvAcross(const Across& p) {
  SumAcrossOf(p, [&](int row, int i, int32_t sum) { static_cast<int32_t*>(p.out[row])[i] = sum; });
}

void PillowDown(const Down& p) {
  std::vector<int32_t> sums(p.count, 1 << (kPillowBits - 1));
  for (int k = 0; k < p.taps; ++k) {
    const auto* row = static_cast<const uint8_t*>(p.rows[k]);
    for (size_t i = 0; i < p.count; ++i) sums[i] += row[i] * p.weights[k];
  }
  for (size_t i = 0; i < p.count; ++i) p.out[i] = Clip(sums[i] >> kPillowBits);
}

void OpenCvCubicDown(const Down& p) {
  const auto row = [&](int k) { return static_cast<const int32_t*>(p.rows[k]); };
  const int32_t* w = p.weights;
  for (size_t i = 0; i < p.count; ++i) {
    const int32_t sum = row(0)[i] * w[0] + row(1)[i] * w[1] + row(2)[i] * w[2] + row(3)[i] * w[3];
    p.out[i] = Clip((sum + (1 << (2 * kOpenCvBits - 1))) >> (2 * kOpenCvBits));
  }
}

void OpenCvLinearDown(const Down& p) {
  const auto row = [&](int k) { return static_cast<const int32_t*>(p.rows[k]); };
  const int32_t* w = p.weights;
  for (size_t i = 0; i < p.count; ++i) {
    p.out[i] =
        Clip((((w[0] * (row(0)[i] >> 4)) >> 16) + ((w[1] * (row(1)[i] >> 4)) >> 16) + 2) >> 2);
  }
}

}  // namespace

const Loops kPlainLoops = {.name = "plain",
                           .pillow_across = PillowAcross,
                           .pillow_down = PillowDown,
                           .opencv_across = OpenCvAcross,
                           .opencv_cubic_down = OpenCvCubicDown,
                           .opencv_linear_down = OpenCvLinearDown};

const Loops& BestLoops() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") != 0;
  if (avx2) return kAvx2Loops;
#endif
  return kPlainLoops;
}

Window WholeOf(const RgbImage& image) {
  return {.pixels = image.pixels.data(),
          .end = image.pixels.data() + image.pixels.size(),
          .stride = static_cast<size_t>(image.width) * static_cast<size_t>(image.channels),
          .width = image.width,
          .height = image.height,
          .channels = image.channels};
}

RgbImage Resample(const Window& in, const Span& across, const Span& down, Kernel kernel,
                  bool antialias, const Loops& loops) {
  const Axis x_axis =
      antialias ? MakePillowAxis(across, in.width, kernel) : MakeOpenCvAxis(across, kernel);
  const Axis y_axis =
      antialias ? MakePillowAxis(down, in.height, kernel) : MakeOpenCvAxis(down, kernel);
  const AcrossAxis packed = SideBySide(x_axis, in.width, /*cut_in_halves=*/antialias);
  const Across job = {.rows = {},
                      .out = {},
                      .channels = in.channels,
                      .count = across.count,
                      .taps = x_axis.taps,
                      .first = packed.first.data(),
                      .weights = packed.weights.data(),
                      .halves = packed.halves.data()};
  const auto across_loop = antialias ? loops.pillow_across : loops.opencv_across;
  const auto down_loop = antialias                    ? loops.pillow_down
                         : kernel == Kernel::kBicubic ? loops.opencv_cubic_down
                                                      : loops.opencv_linear_down;
  RgbImage out = BlankImage(across.count, down.count, in.channels);
  const NeededRows needed = RowsOf(y_axis, in.height);
  const size_t values = static_cast<size_t>(across.count) * static_cast<size_t>(in.channels);
  // Rows resampled across: those of one output and the rest of a group.
  const Rows ring(static_cast<size_t>(y_axis.taps + kRowGroup),
                  values * (antialias ? sizeof(uint8_t) : sizeof(int32_t)));
  // Of rows so near the picture's end that slack is missing.
  const Rows copies(kRowGroup, static_cast<size_t>(in.width) * static_cast<size_t>(in.channels));
  std::vector<const void*> rows(static_cast<size_t>(y_axis.taps));
  size_t done = 0;
  for (int y = 0; y < down.count; ++y) {
    const int used = y_axis.used[static_cast<size_t>(y)];
    const auto place = [&](int k) {
      return needed.place[static_cast<size_t>(
          std::clamp(y_axis.start[static_cast<size_t>(y)] + k, 0, in.height - 1))];
    };
    for (; done <= place(used - 1); done += kRowGroup) {
      AcrossGroup(in, needed.rows, done, job, across_loop, copies, ring);
    }
    const int taps = RoundUp(used, 2);  // one too many has weight 0
    for (int k = 0; k < taps; ++k) {
      rows[static_cast<size_t>(k)] = ring.row(place(std::min(k, used - 1)));
    }
    down_loop({.rows = rows.data(),
               .weights = y_axis.of(y),
               .taps = taps,
               .count = values,
               .out = out.pixels.data() + static_cast<size_t>(y) * values});
  }
  return out;
}

}  // namespace pyramid::resample
