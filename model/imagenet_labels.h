// The names of ImageNet-1k's classes (configs/imagenet_labels.txt, compiled in).
#ifndef PYRAMID_MODEL_IMAGENET_LABELS_H_
#define PYRAMID_MODEL_IMAGENET_LABELS_H_

#include <span>
#include <string>

namespace pyramid {

// 1000 names by index: "tench, Tinca tinca" … "toilet tissue, toilet paper, bathroom tissue".
std::span<const std::string> ImageNetLabels();

}  // namespace pyramid

#endif  // PYRAMID_MODEL_IMAGENET_LABELS_H_
