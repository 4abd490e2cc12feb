// A server whose only model, "formula", has weights from a formula: nothing is trained.
#ifndef PYRAMID_TESTS_INTEGRATION_SERVED_MODEL_H_
#define PYRAMID_TESTS_INTEGRATION_SERVED_MODEL_H_

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "proto/classification.pb.h"
#include "tests/integration/cluster.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/weight_file.h"

namespace pyramid::testing {

// Before Cluster::Start.
inline void InstallFormulaModel(Cluster& cluster, const std::string& name = "formula") {
  ASSERT_OK(WriteFormulaFile(cluster.folder() / "in.safetensors"));
  std::filesystem::create_directories(cluster.data() / "models" / name);
  const RunResult convert = cluster.Cli({"convert", (cluster.folder() / "in.safetensors").string(),
                                         (cluster.data() / "models" / name / "1").string()});
  ASSERT_EQ(convert.exit_code, 0) << convert.err;
}

// Of tensors for the smallest network input: decoding costs nothing.
inline v1::ClassifyRequest TensorRequest(int pictures = 1) {
  v1::ClassifyRequest request;
  for (int i = 0; i < pictures; ++i) {
    v1::ImageTensor& tensor = *request.add_pictures()->mutable_tensor();
    tensor.set_channels(3);
    tensor.set_height(32);
    tensor.set_width(32);
    for (int v = 0; v < 3 * 32 * 32; ++v) {
      tensor.add_values(static_cast<float>((v + i) % 7) / 7.0F);
    }
  }
  return request;
}

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_INTEGRATION_SERVED_MODEL_H_
