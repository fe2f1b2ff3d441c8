// What the code of each instruction set offers to grouped_lora.
#pragma once

#include <cstdint>

namespace realm {

constexpr int64_t kLoraColumns = 64;  // outputs computed together

// Types of adapters.
enum AdapterType { kAdapterF32, kAdapterBF16, kAdapterF16, kAdapterTypes };

struct LoraKernels {
  // out[i * stride + r] = scale * (row r of a, [ranks, k]) . (row rows[i] of x, [*, k]), for i < m and r < ranks.
  void (*shrink[kAdapterTypes])(const float* x, int64_t k, const int32_t* rows, int64_t m, const uint8_t* a, int64_t ranks,
                                float scale, float* out, int64_t stride);
  // y[rows[i] * n + c] += (row c of b, [columns, rank]) . (row i of t, [m, rank]), for i < m and c < columns.
  // scratch: kLoraColumns floats for each rank, the rank rounded up to a multiple of 16; aligned to 64 bytes.
  void (*expand[kAdapterTypes])(const float* t, int64_t rank, const int32_t* rows, int64_t m, const uint8_t* b,
                                int64_t columns, float* y, int64_t n, uint8_t* scratch);
};

namespace plain { extern const LoraKernels lora_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const LoraKernels lora_kernels; }
namespace avx512 { extern const LoraKernels lora_kernels; }
#endif

}  // namespace realm
