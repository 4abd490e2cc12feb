// Served preprocessing, one picture at a time on one thread: ours against OpenCV's imdecode and
// cubic resize.
//
//   preprocess_bench [PICTURE] [--seconds 1] [--rounds 5] [--only WAY] [--quality 90]
//                    [--write FILE]
//
// PICTURE is a JPEG; without it tests/golden's scene is made one of 500x375. The ways
// from its bytes to 3x224x224 floats, by a shorter side of 248:
//   pillow  ours, as timm's and the official weights want it (antialiased)
//   opencv  ours, as MindCV's want it
//   cv      cv::imdecode, cv::resize cubic, crop, RGB, ÷ 255, mean, std, planes
//   cv-bare imdecode and resize only
// They take turns, `rounds` times `seconds` each; figures are images per second of CPU time of this
// process and of wall-clock time, medians over the rounds. The last line is a JSON object. --only
// measures one and prints its object; --write stores the JPEG and ends.
#include <malloc.h>
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <opencv2/core.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/preprocess.h"
#include "model/resample.h"
#include "proto/base/file.h"

namespace pyramid {
namespace {

constexpr float kMean[] = {0.485f, 0.456f, 0.406f};
constexpr float kStd[] = {0.229f, 0.224f, 0.225f};

v1::Preprocessing Recipe(const char* antialias, const char* other_side) {
  v1::Preprocessing p;
  p.set_channels(3);
  p.set_exif("apply");
  p.mutable_resize()->set_side(248);
  p.mutable_resize()->set_kernel("bicubic");
  p.mutable_resize()->set_antialias(antialias);
  p.mutable_resize()->set_other_side(other_side);
  p.set_crop(224);
  for (int c = 0; c < 3; ++c) {
    p.add_mean(kMean[c]);
    p.add_std(kStd[c]);
  }
  return p;
}

void Ours(const std::string& bytes, const v1::Preprocessing& recipe) {
  const auto floats = DecodeAndPreprocess(bytes, recipe);
  if (!floats.ok()) {
    std::fprintf(stderr, "preprocess_bench: %s\n", floats.status().ToString().c_str());
    std::exit(1);
  }
}

cv::Mat DecodedAndResized(const std::string& bytes) {
  const cv::Mat file(1, static_cast<int>(bytes.size()), CV_8UC1, const_cast<char*>(bytes.data()));
  const cv::Mat picture = cv::imdecode(file, cv::IMREAD_COLOR);
  const double scale = 248.0 / std::min(picture.cols, picture.rows);
  cv::Mat resized;
  cv::resize(
      picture, resized,
      cv::Size(static_cast<int>(picture.cols * scale), static_cast<int>(picture.rows * scale)), 0,
      0, cv::INTER_CUBIC);
  return resized;
}

void OpenCvs(const std::string& bytes) {
  const cv::Mat resized = DecodedAndResized(bytes);
  const cv::Rect middle((resized.cols - 224) / 2, (resized.rows - 224) / 2, 224, 224);
  cv::Mat rgb, floats;
  cv::cvtColor(resized(middle), rgb, cv::COLOR_BGR2RGB);
  rgb.convertTo(floats, CV_32F, 1 / 255.0);
  cv::subtract(floats, cv::Scalar(kMean[0], kMean[1], kMean[2]), floats);
  cv::divide(floats, cv::Scalar(kStd[0], kStd[1], kStd[2]), floats);
  std::vector<float> out(3 * 224 * 224);
  cv::Mat planes[3];
  for (int c = 0; c < 3; ++c) planes[c] = cv::Mat(224, 224, CV_32F, out.data() + c * 224 * 224);
  cv::split(floats, planes);
}

std::string SceneJpeg(int quality) {
  const cv::Mat scene = cv::imread(PYRAMID_SOURCE_DIR "/tests/golden/images/scene.png");
  cv::Mat small;
  cv::resize(scene, small, cv::Size(500, 375), 0, 0, cv::INTER_AREA);
  std::vector<uchar> bytes;
  cv::imencode(".jpg", small, bytes, {cv::IMWRITE_JPEG_QUALITY, quality});
  return std::string(bytes.begin(), bytes.end());
}

double Clock(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

struct Speed {
  double per_cpu_second = 0;
  double per_second = 0;
};

Speed Measure(const std::function<void()>& work, double seconds) {
  work();
  const double wall = Clock(CLOCK_MONOTONIC);
  const double cpu = Clock(CLOCK_PROCESS_CPUTIME_ID);
  int64_t count = 0;
  do {
    for (int i = 0; i < 10; ++i) work();
    count += 10;
  } while (Clock(CLOCK_MONOTONIC) - wall < seconds);
  const auto images = static_cast<double>(count);
  return {.per_cpu_second = images / (Clock(CLOCK_PROCESS_CPUTIME_ID) - cpu),
          .per_second = images / (Clock(CLOCK_MONOTONIC) - wall)};
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

int Run(int argc, char** argv) {
  std::string picture, only, write;
  double seconds = 1;
  int rounds = 5, quality = 90;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const bool takes_value = flag.rfind("--", 0) == 0;
    if (takes_value && i + 1 == argc) {
      std::fprintf(stderr, "preprocess_bench: %s without a value\n", flag.c_str());
      return 2;
    }
    if (flag == "--seconds") {
      seconds = std::atof(argv[++i]);
    } else if (flag == "--rounds") {
      rounds = std::max(1, std::atoi(argv[++i]));
    } else if (flag == "--only") {
      only = argv[++i];
    } else if (flag == "--quality") {
      quality = std::atoi(argv[++i]);
    } else if (flag == "--write") {
      write = argv[++i];
    } else if (takes_value) {
      std::fprintf(stderr, "preprocess_bench: unknown flag %s\n", flag.c_str());
      return 2;
    } else {
      picture = flag;
    }
  }
  cv::setNumThreads(1);
  // As in a process whose network has freed larger blocks: otherwise glibc gives a picture's memory
  // back to the system and fetches it again for the next, which costs every way about a fifth.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  const std::string bytes = picture.empty() ? SceneJpeg(quality) : ReadFile(picture).value();
  if (!write.empty()) {
    std::ofstream(write, std::ios::binary) << bytes;
    return 0;
  }
  const v1::Preprocessing pillow = Recipe("pillow", "floor");
  const v1::Preprocessing opencv = Recipe("none", "floor");
  const std::map<std::string, std::function<void()>> ways = {
      {"pillow", [&] { Ours(bytes, pillow); }},
      {"opencv", [&] { Ours(bytes, opencv); }},
      {"cv", [&] { OpenCvs(bytes); }},
      {"cv-bare", [&] { DecodedAndResized(bytes); }},
  };
  if (!only.empty() && ways.count(only) == 0) {
    std::fprintf(stderr, "preprocess_bench: --only %s; use pillow, opencv, cv or cv-bare\n",
                 only.c_str());
    return 2;
  }
  std::map<std::string, std::vector<double>> cpu, wall;
  for (int round = 0; round < rounds; ++round) {
    for (const auto& [name, work] : ways) {
      if (!only.empty() && name != only) continue;
      const Speed speed = Measure(work, seconds);
      cpu[name].push_back(speed.per_cpu_second);
      wall[name].push_back(speed.per_second);
      if (only.empty()) {
        std::printf("%-7s %8.1f images per CPU second %8.1f images/s\n", name.c_str(),
                    speed.per_cpu_second, speed.per_second);
      }
    }
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::string object =
      absl::StrFormat(R"({"bytes": %d, "loops": "%s", "peak_rss_mb": %d)", bytes.size(),
                      resample::BestLoops().name, usage.ru_maxrss / 1024);
  for (const auto& [name, values] : cpu) {
    absl::StrAppend(&object,
                    absl::StrFormat(R"(, "%s": {"per_cpu_second": %.1f, "per_second": %.1f})", name,
                                    Median(values), Median(wall[name])));
  }
  if (only.empty()) {
    for (const char* ours : {"pillow", "opencv"}) {
      for (const char* theirs : {"cv", "cv-bare"}) {
        std::vector<double> ratios;
        for (size_t i = 0; i < cpu[ours].size(); ++i)
          ratios.push_back(cpu[ours][i] / cpu[theirs][i]);
        absl::StrAppend(&object,
                        absl::StrFormat(R"(, "%s_over_%s": %.3f)", ours, theirs, Median(ratios)));
      }
    }
  } else {
    absl::StrAppend(&object, absl::StrFormat(R"(, "images_per_second": %.1f)", Median(cpu[only])));
  }
  std::printf("%s}\n", object.c_str());
  return 0;
}

}  // namespace
}  // namespace pyramid

int main(int argc, char** argv) { return pyramid::Run(argc, argv); }
