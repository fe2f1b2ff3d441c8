// What the code of each instruction set offers.
#pragma once

#include <cstdint>

#include "format.h"

namespace realm {

constexpr int kPanel = 8;  // most rows of activations that a kernel takes at once

// Quantized activations of 1 to kPanel rows, side by side as a kernel reads them.
struct Panel {
  int rows;
  const int32_t* codes;  // [K/4][rows] four int8 codes each
  const float* scales;   // [K/32][rows]
  // For weights with offsets float [K/32][rows], the scale times the sum of the codes; for others int32, minus the
  // weight's bias times that sum. [K/16][rows] when the weight's groups are of 16.
  const int32_t* extra;
};

// A weight's tile made ready: unsigned codes [K/4][16][4], and [K/16] (groups of 16) or [K/32] times [16] scales, offsets.
struct Ready {
  uint8_t* codes;
  float* scales;
  float* offsets;
};

using Direct = void (*)(const uint8_t* tile, int64_t k, const Panel& panel, float* const* out);

struct Kernels {
  // x [K] float32 -> codes [K], scales [K/32], and the sums of each 16 codes. A group that holds NaN or infinity gets a
  // scale of NaN.
  void (*quantize)(const float* x, int64_t k, int8_t* codes, float* scales, int32_t* sums16);
  // A panel of 1, 2, 4 or 8 rows times one tile: row i's 16 results to out[i]. Null where there is no such kernel.
  Direct direct[4][kNumFormats];
  void (*ready[kNumFormats])(const uint8_t* tile, int64_t k, const Ready& out);
  // Panels times a tile made ready, the rows of all panels numbered through.
  void (*matrix)(const Format& format, const Ready& tile, int64_t k, const Panel* panels, int64_t count, float* const* out);
};

namespace plain { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

}  // namespace realm
