// The packed formats, as formats.py describes them, and how a weight lies in memory as tiles.
//
// A tile is 16 rows of a weight, block after block along K. In a block, every number of all 16 rows lies together:
//
//   super scales float16 [16], super minima float16 [16]                 where the format has them
//   group scales and minima, by kind:
//     F16, F32      [groups][16], then the minima of kind F16 [groups][16]
//     K6            [pairs of groups][3][16] bytes: the scales and the first minimum in the low six bits of the three,
//                   the second minimum in their high two (Q4_K, Q5_K: scales and minima of six bits)
//     K4            [groups][16] bytes: scale in the low four bits, minimum in the high four (Q2_K)
//     U4            [pairs of groups][16] bytes: four bits each
//     I8, E8M0, UE4M3, IQ1S, IQ1M   [groups][16] bytes
//   codes of 32 columns after 32 columns: for each plane of b bits, b vectors of 64 bytes. Byte 4r+j of vector i holds,
//     at bits s*b, the code of row r and column 4(i + b s) + j.
//
// So 64 bytes are the codes of 16 rows and 4 columns, what one dot-product instruction takes.
#pragma once

#include <cstdint>

namespace realm {

constexpr int kRows = 16;    // of a tile
constexpr int kGroup = 32;   // columns of an activation group

enum class Scale { F16, F32, K6, K4, U4, I8, E8M0, UE4M3, IQ1S, IQ1M };

struct Format {
  int block;          // columns
  int bits[2];        // of the code planes, low first
  int group;          // columns per scale
  Scale scale;
  bool super;         // a float16 per block times the group's scale
  bool mins;          // an offset per group, added (F16) or times the super minimum and subtracted
  int bias;           // subtracted from the code; with a table, 128
  bool table;         // the code is an index into `values`, which holds value + 128
  float mul, add;     // scale = super * (mul * stored + add)
  uint8_t values[16];
  constexpr bool wide() const { return bias == 128; }
  constexpr int groups() const { return block / group; }
  constexpr int code_bytes() const { return (bits[0] + bits[1]) * 64; }  // of 32 columns
  constexpr int scale_bytes() const {
    switch (scale) {
      case Scale::F16: return groups() * 32 * (mins ? 2 : 1);
      case Scale::F32: return groups() * 64;
      case Scale::K6: return groups() / 2 * 48;
      case Scale::U4: return groups() / 2 * 16;
      default: return groups() * 16;
    }
  }
  constexpr int super_bytes() const { return super ? (mins ? 64 : 32) : 0; }
  constexpr int bytes() const { return super_bytes() + scale_bytes() + block / kGroup * code_bytes(); }  // a block of a tile
};

#define IQ4 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241
#define E2M1 128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116
#define SIGNED4(a, b, c, d) 128 + a, 128 + b, 128 + c, 128 + d, 128 - a, 128 - b, 128 - c, 128 - d
#define SIGNED8(a, b, c, d, e, f, g, h) \
  128 + a, 128 + b, 128 + c, 128 + d, 128 + e, 128 + f, 128 + g, 128 + h, \
  128 - a, 128 - b, 128 - c, 128 - d, 128 - e, 128 - f, 128 - g, 128 - h

// Every format: name, block, planes, group, scale, super, mins, bias, table?, mul, add, values. The order is the format's
// number; native.py reads the names from realm_quant_format_name. Types with the same planes share an entry.
#define REALM_FORMATS(X)                                                                              \
  X(Q4_0, 32, 4, 0, 32, F16, false, false, 8, false, 1, 0, 0)                                         \
  X(Q4_1, 32, 4, 0, 32, F16, false, true, 0, false, 1, 0, 0)                                          \
  X(Q5_0, 32, 4, 1, 32, F16, false, false, 16, false, 1, 0, 0)                                        \
  X(Q5_1, 32, 4, 1, 32, F16, false, true, 0, false, 1, 0, 0)                                          \
  X(Q8_0, 32, 8, 0, 32, F16, false, false, 128, false, 1, 0, 0)                                       \
  X(Q8_1, 32, 8, 0, 32, F16, false, false, 128, false, 1, 0, 0)                                       \
  X(Q8_K, 256, 8, 0, 256, F32, false, false, 128, false, 1, 0, 0)                                     \
  X(Q1_0, 128, 1, 0, 128, F16, false, false, 128, true, 1, 0, 127, 129)                               \
  X(Q2_0, 64, 2, 0, 64, F16, false, false, 1, false, 1, 0, 0)                                         \
  X(Q2_K, 256, 2, 0, 16, K4, true, true, 0, false, 1, 0, 0)                                           \
  X(Q3_K, 256, 2, 1, 16, I8, true, false, 4, false, 1, 0, 0)                                          \
  X(Q4_K, 256, 4, 0, 32, K6, true, true, 0, false, 1, 0, 0)                                           \
  X(Q5_K, 256, 4, 1, 32, K6, true, true, 0, false, 1, 0, 0)                                           \
  X(Q6_K, 256, 4, 2, 16, I8, true, false, 32, false, 1, 0, 0)                                         \
  X(TQ1_0, 256, 2, 0, 256, F16, false, false, 1, false, 1, 0, 0)                                      \
  X(TQ2_0, 256, 2, 0, 256, F16, false, false, 1, false, 1, 0, 0)                                      \
  X(MXFP4, 32, 4, 0, 32, E8M0, false, false, 128, true, 1, 0, E2M1)                                   \
  X(NVFP4, 64, 4, 0, 16, UE4M3, false, false, 128, true, 1, 0, E2M1)                                  \
  X(IQ4_NL, 32, 4, 0, 32, F16, false, false, 128, true, 1, 0, IQ4)                                    \
  X(IQ4_XS, 256, 4, 0, 32, I8, true, false, 128, true, 1, 0, IQ4)                                     \
  X(IQ2_XXS, 256, 2, 1, 32, U4, true, false, 128, true, 0.25f, 0.125f, SIGNED4(8, 25, 43, 0))         \
  X(IQ2_XS, 256, 2, 1, 16, U4, true, false, 128, true, 0.25f, 0.125f, SIGNED4(8, 25, 43, 0))          \
  X(IQ2_S, 256, 2, 1, 16, U4, true, false, 128, true, 0.25f, 0.125f, SIGNED4(8, 25, 43, 0))           \
  X(IQ3_XXS, 256, 4, 0, 32, U4, true, false, 128, true, 0.5f, 0.25f, SIGNED8(4, 12, 20, 28, 36, 44, 52, 62)) \
  X(IQ3_S, 256, 4, 0, 32, U4, true, false, 128, true, 2, 1, SIGNED8(1, 3, 5, 7, 9, 11, 13, 15))       \
  X(IQ1_S, 256, 2, 0, 32, IQ1S, true, false, 9, false, 2, 1, 0)                                       \
  X(IQ1_M, 256, 2, 0, 16, IQ1M, true, false, 9, false, 2, 1, 0)

// IQ1: value = code - 1 +- 1/8. Eightfold that is 8 code + (0 or 2) - 9, a code with a bias of 9 and an eighth of the scale.

#define X(NAME, BLOCK, LOW, HIGH, GROUP, SCALE, SUPER, MINS, BIAS, TABLE, MUL, ADD, ...) \
  inline constexpr Format k##NAME{BLOCK, {LOW, HIGH}, GROUP, Scale::SCALE, SUPER, MINS, BIAS, TABLE, MUL, ADD, {__VA_ARGS__}};
REALM_FORMATS(X)
#undef X

inline constexpr const Format* kFormats[] = {
#define X(NAME, ...) &k##NAME,
    REALM_FORMATS(X)
#undef X
};
inline constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

}  // namespace realm
