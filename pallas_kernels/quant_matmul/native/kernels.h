// What the code of each instruction set offers.
#pragma once

#include <cstdint>

#include "format.h"

namespace realm {

// One quantized row of activations. K is a multiple of 32.
struct Row {
  const int8_t* codes;     // [K]
  const float* scales;     // [K/32]
  const float* sums;       // [K/16] scale times the sum of 16 codes
  const int32_t* init;     // [K/16] minus bias times the sum of 16 codes, for the bias of the weight at hand
};

// A weight's tile made ready: unsigned codes [K/4][16][4], and [K/16] (groups of 16) or [K/32] times [16] scales, offsets.
struct Ready {
  uint8_t* codes;
  float* scales;
  float* offsets;
};

struct Kernels {
  // x [K] float32 -> codes, scales, sums; sums16 int32 [K/16] of the codes. A row that holds NaN or infinity gives NaN.
  void (*quantize)(const float* x, int64_t k, int8_t* codes, float* scales, float* sums, int32_t* sums16);
  // One row times one tile: out [16].
  void (*vector[kNumFormats])(const uint8_t* tile, int64_t k, const Row& row, float* out);
  void (*ready[kNumFormats])(const uint8_t* tile, int64_t k, const Ready& out);
  // m rows times a tile made ready: row i's 16 results to out[i].
  void (*matrix)(const Format& format, const Ready& tile, int64_t k, const Row* rows, int64_t m, float* const* out);
};

namespace plain { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

}  // namespace realm
