// Small operations on rows, for one instruction set.
//
// A row's sum of squares is taken in sixteen lanes times four, lane l of vector v summing columns 64 i + 16 v + l in
// order of i; the vectors are added in order, then the lanes, halves to halves. So its bits depend on the row alone.

#include "row_ops.h"
#include "vectors.h"

namespace realm {
namespace REALM_ISA {
namespace {

// The first `count` of sixteen, zeros behind them, reading no further.
REALM_INLINE F32 load_some(const float* p, int64_t count) {
  if (count >= 16) return load(p);
  float copy[16] = {};
  memcpy(copy, p, count * sizeof(float));
  return load(copy);
}

REALM_INLINE void store_some(float* p, F32 x, int64_t count) {
  if (count >= 16) return store(p, x);
  float copy[16];
  store(copy, x);
  memcpy(p, copy, count * sizeof(float));
}

void rms_norm(const float* x, const float* weight, int64_t k, float eps, float* out) {
  F32 sums[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    for (int v = 0; v < 4; ++v) {
      const F32 part = load(x + i + 16 * v);
      sums[v] = fma(part, part, sums[v]);
    }
  }
  for (int v = 0; i < k; i += 16, ++v) {
    const F32 part = load_some(x + i, k - i);
    sums[v] = fma(part, part, sums[v]);
  }
  const float square = sum(((sums[0] + sums[1]) + sums[2]) + sums[3]);
  const F32 factor = set(1.0f / __builtin_sqrtf(square * (1.0f / static_cast<float>(k)) + eps));
  for (i = 0; i + 16 <= k; i += 16) store(out + i, load(x + i) * factor * load(weight + i));
  if (i < k) store_some(out + i, load_some(x + i, k - i) * factor * load_some(weight + i, k - i), k - i);
}

// x / (1 + exp(-slope)).
REALM_INLINE F32 times_sigmoid(F32 x, F32 slope) { return divide(x, set(1.0f) + exp(negate(slope))); }

template <Activation activation>
REALM_INLINE F32 activated(F32 gate, F32 up) {
  if (activation == kSilu) return times_sigmoid(gate, gate) * up;
  if (activation == kGeluTanh) {  // x (1 + tanh u) / 2 = x sigmoid(2 u)
    const F32 cube = gate * gate * gate;
    return times_sigmoid(gate, set(1.5957691216057308f) * fma(set(0.044715f), cube, gate)) * up;
  }
  gate = min(gate, set(7.0f));
  up = min(max(up, set(-7.0f)), set(7.0f));
  return times_sigmoid(gate, set(1.702f) * gate) * (up + set(1.0f));
}

template <Activation activation>
void gated(const float* gate, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, activated<activation>(load(gate + i), load(up + i)));
  if (i < count) {
    store_some(out + i, activated<activation>(load_some(gate + i, count - i), load_some(up + i, count - i)), count - i);
  }
}

int32_t argmax(const float* x, int64_t k, bool& finite) {
  constexpr int64_t kBlock = 1024;  // the maximum's is looked through a second time
  F32 zeros = set(0.0f);  // NaN once a number is not finite
  float best = -__builtin_inff();
  int64_t at = 0;
  for (int64_t first = 0; first < k; first += kBlock) {
    const int64_t count = k - first < kBlock ? k - first : kBlock;
    F32 top = set(-__builtin_inff());
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const F32 part = load(x + first + i);
      top = max(top, part);
      zeros = fma(part, set(0.0f), zeros);
    }
    float highest = largest(top);
    for (; i < count; ++i) {
      const float one = x[first + i];
      highest = one > highest ? one : highest;
      zeros = fma(set(one), set(0.0f), zeros);
    }
    if (highest > best) {
      best = highest;
      at = first;
    }
  }
  finite = sum(zeros) == 0.0f;
  while (at < k - 1 && x[at] != best) ++at;
  return static_cast<int32_t>(at);
}

}  // namespace

extern const RowKernels row_kernels;
const RowKernels row_kernels = {rms_norm, {gated<kSilu>, gated<kGeluTanh>, gated<kSwigluOai>}, argmax};

}  // namespace REALM_ISA
}  // namespace realm
