// What the code of each instruction set offers to row_ops.
#pragma once

#include <cstdint>

namespace realm {

// As the Python side numbers them.
enum Activation : int64_t { kSilu, kGeluTanh, kSwigluOai, kActivations };

struct RowKernels {
  // out = x / sqrt(mean of x^2 + eps) * weight, k each.
  void (*rms_norm)(const float* x, const float* weight, int64_t k, float eps, float* out);
  // out = activation(gate) times up, count each.
  void (*gated[kActivations])(const float* gate, const float* up, int64_t count, float* out);
  // The lowest index of the maximum of x, k numbers; finite tells whether all of them are.
  int32_t (*argmax)(const float* x, int64_t k, bool& finite);
};

namespace plain { extern const RowKernels row_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const RowKernels row_kernels; }
namespace avx512 { extern const RowKernels row_kernels; }
#endif

}  // namespace realm
