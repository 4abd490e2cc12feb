// softmax(q·kᵀ)·v of one head for a short key list, in one pass. The scale, head size^-0.5, and
// log2(e) are folded into q's weights beforehand: scores are base-2 exponents. A score of minus
// infinity is a key out of reach; a query that reaches none gives zeros, never NaN.
#ifndef PYRAMID_MODEL_KERNELS_ATTENTION_H_
#define PYRAMID_MODEL_KERNELS_ATTENTION_H_

#include <cstdint>

namespace pyramid::kernels {

inline constexpr int kMostKeys = 256;  // more: the plain path

// Keys and values of one picture and head, packed for the queries that follow.
struct PackKeysParams {
  const void* k;  // [keys, d] activations, row stride ld elements
  const void* v;  // the same
  int64_t ld;
  int keys;      // 1..kMostKeys
  int d;         // head size: 32 or 64
  void* packed;  // packed_keys_bytes(keys, d), aligned to 64 bytes
};

struct AttentionParams {
  const void* q;       // [queries, d] activations, row stride ld elements
  const void* packed;  // by PackKeys with the same keys and d
  void* out;           // [queries, d] activations, row stride ld elements; not q
  int64_t ld;
  int64_t queries;
  int keys;
  int d;
};

}  // namespace pyramid::kernels

#endif  // PYRAMID_MODEL_KERNELS_ATTENTION_H_
