// A checkpoint on disk: a folder with the files below (docs/formats.md).
//
// manifest.json: what it is, its files' sizes and SHA-256; written last, it is the commit.
// weights.safetensors: parameters, float32, official names; anyone's safetensors reads it.
// self_test.safetensors: 16 validation pictures as arrays and their fp32 logits:
//   "pixels" [N,C,H,W], "logits" [N,classes].
// state.safetensors: training state; not promoted.
//
// Torch-free. Functions are thread-safe; two writers of one folder are not.
#ifndef PYRAMID_MODEL_CHECKPOINT_H_
#define PYRAMID_MODEL_CHECKPOINT_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/model.pb.h"

namespace pyramid {

inline constexpr int kManifestVersion = 1;
inline constexpr absl::string_view kManifestFile = "manifest.json";
inline constexpr absl::string_view kWeightsFile = "weights.safetensors";
inline constexpr absl::string_view kSelfTestFile = "self_test.safetensors";
inline constexpr absl::string_view kStateFile = "state.safetensors";

struct CheckpointFile {
  std::string name;
  absl::string_view bytes;
};

// Writes all files and the manifest into "<folder>.tmp", syncs them, renames to `folder`, syncs the
// parent. Fills in format_version, files, digest, created and created_by and returns the manifest
// as written. An existing `folder` is left alone: AlreadyExists.
//   ResourceExhausted  disk full, with the bytes needed and free; nothing is left behind, older
//                      checkpoints are untouched
//   InvalidArgument    no weights among the files, a file's name twice or not plain, a text that
//                      isn't UTF-8, a manifest over 1.5 MiB (labels, recipe)
absl::StatusOr<v1::Manifest> WriteCheckpoint(const std::filesystem::path& folder,
                                             v1::Manifest manifest,
                                             const std::vector<CheckpointFile>& files);

// Reads and checks the manifest alone.
//   NotFound           no folder or no manifest
//   DataLoss           over 1.5 MiB, not JSON, or its own checksum is wrong
//   FailedPrecondition written by a newer major version
absl::StatusOr<v1::Manifest> ReadManifest(const std::filesystem::path& folder);

// Reads one file of a checkpoint and checks its size and SHA-256. DataLoss if they differ, NotFound
// if the manifest doesn't list it.
absl::StatusOr<std::string> ReadCheckpointFile(const std::filesystem::path& folder,
                                               const v1::Manifest& manifest,
                                               absl::string_view name);

// Reads the manifest and checks every file of it and the digest. Errors as above.
absl::StatusOr<v1::Manifest> VerifyCheckpoint(const std::filesystem::path& folder);

// Copies a checkpoint without its training state, verified, written aside and renamed. Fields of
// the manifest that this version doesn't know are kept.
absl::StatusOr<v1::Manifest> CopyForServing(const std::filesystem::path& from,
                                            const std::filesystem::path& to);

// The finished checkpoints in a folder of checkpoints, "step-<8 digits>", oldest first. Leftovers
// of interrupted writes are skipped.
std::vector<std::filesystem::path> ListCheckpoints(const std::filesystem::path& folder);

// "step-00001880".
std::string CheckpointName(int64_t step);

// What `digest` is for a model with this network, origin, preprocessing and labels and weights of
// this SHA-256 (hex). Empty if a text of the manifest isn't UTF-8.
std::string ManifestDigest(v1::Manifest manifest, absl::string_view weights_sha256);

// The manifest as JSON text, as it stands in the file (with its checksum), and back. Empty if a
// text of the manifest isn't UTF-8, or it would be over 1.5 MiB, which is the most that is read.
std::string ManifestToJson(const v1::Manifest& manifest);
absl::StatusOr<v1::Manifest> ManifestFromJson(absl::string_view json);

}  // namespace pyramid

#endif  // PYRAMID_MODEL_CHECKPOINT_H_
