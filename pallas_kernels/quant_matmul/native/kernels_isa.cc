// Quantized products for one instruction set.
//
// One numerics class: an output is, over the groups of 32 columns in order,
//   y = fma(float(exact integer sum of code * activation code), weight scale * activation scale, y)
//   y = fma(offset, activation scale * sum of activation codes, y)          for formats with offsets
// (for weight groups of 16, the two halves' sums are joined first), whether computed by `direct` or by `matrix`, for one
// row or for many. Integer sums are exact in any order.

#include "kernels.h"
#include "simd.h"

namespace realm {
namespace REALM_ISA {
namespace {

// ---- one block of a tile ----

// Scales and offsets of a block, a vector of 16 rows for each group (groups beyond 32 columns: for each 32).
template <const Format& F>
struct Parts {
  static constexpr int columns = F.group < kGroup ? 16 : kGroup;
  static constexpr int count = F.block / columns;
  F32 scale[count];
  F32 offset[F.mins ? count : 1];
};

REALM_INLINE F32 e8m0(const uint8_t* p) {  // 2^(e-128), subnormal for e of 0 and 1
  I32 e = load_u8(p);
  I32 normal = shift_left<23>(e + set(int32_t{-1}));
  I32 out = where_equal(e, set(int32_t{0}), set(int32_t{0x00200000}), normal);
  return as_float(where_equal(e, set(int32_t{1}), set(int32_t{0x00400000}), out));
}

REALM_INLINE F32 ue4m3(const uint8_t* p) {  // halved, as the table holds doubled values; 0x7F is 0
  I32 x = load_u8(p), exponent = shift_right<3>(x) & set(int32_t{15}), mantissa = x & set(int32_t{7});
  I32 normal = shift_left<23>(exponent + set(int32_t{119})) | shift_left<20>(mantissa);
  F32 small = to_float(mantissa) * set(0.0009765625f);
  alignas(64) float bits[16];
  store(bits, small);
  I32 subnormal;
  memcpy(&subnormal, bits, 64);
  I32 out = where_equal(exponent, set(int32_t{0}), subnormal, normal);
  return as_float(where_equal(x, set(int32_t{0x7F}), set(int32_t{0}), out));
}

template <const Format& F>
REALM_INLINE F32 scaled(I32 stored, F32 super) {
  F32 s = to_float(stored);
  if constexpr (F.mul != 1.0f || F.add != 0.0f) s = s * set(F.mul) + set(F.add);
  s = super * s;
  if constexpr (F.scale == Scale::IQ1S || F.scale == Scale::IQ1M) s = s * set(0.125f);
  return s;
}

template <const Format& F>
REALM_INLINE void parts(const uint8_t* block, Parts<F>& out) {
  constexpr int groups = F.groups();
  constexpr int each = F.group > kGroup ? F.group / kGroup : 1;  // parts a group fills
  F32 super = set(1.0f), super_min = set(0.0f);
  if constexpr (F.super) {
    super = load_f16(block);
    if constexpr (F.mins) super_min = load_f16(block + 32);
  }
  const uint8_t* p = block + F.super_bytes();
  const I32 low6 = set(int32_t{63}), low4 = set(int32_t{15}), low3 = set(int32_t{7});
  for (int g = 0; g < groups; ++g) {
    F32 scale, offset;
    if constexpr (F.scale == Scale::F16) {
      scale = load_f16(p + 32 * g);
      if constexpr (F.mins) offset = load_f16(p + 32 * (groups + g));
    } else if constexpr (F.scale == Scale::F32) {
      float stored[16];
      memcpy(stored, p + 64 * g, 64);
      scale = load(stored);
    } else if constexpr (F.scale == Scale::K6) {
      const uint8_t* pair = p + 48 * (g / 2);
      if (g % 2) continue;
      I32 a = load_u8(pair), b = load_u8(pair + 16), c = load_u8(pair + 32);
      I32 min1 = shift_right<6>(a) | (shift_left<2>(shift_right<6>(b))) | (shift_left<4>(shift_right<6>(c)));
      out.scale[g] = scaled<F>(a & low6, super);
      out.scale[g + 1] = scaled<F>(c & low6, super);
      out.offset[g] = negate(super_min * to_float(b & low6));
      out.offset[g + 1] = negate(super_min * to_float(min1));
      continue;
    } else if constexpr (F.scale == Scale::K4) {
      I32 x = load_u8(p + 16 * g);
      scale = scaled<F>(x & low4, super);
      offset = negate(super_min * to_float(shift_right<4>(x)));
    } else if constexpr (F.scale == Scale::U4) {
      I32 x = load_u8(p + 16 * (g / 2));
      scale = scaled<F>(g % 2 ? shift_right<4>(x) : x & low4, super);
    } else if constexpr (F.scale == Scale::I8) {
      scale = scaled<F>(load_i8(p + 16 * g), super);
    } else if constexpr (F.scale == Scale::E8M0) {
      scale = e8m0(p + 16 * g);
    } else if constexpr (F.scale == Scale::UE4M3) {
      scale = ue4m3(p + 16 * g);
    } else {
      scale = scaled<F>(load_u8(p + 16 * g) & low3, super);
    }
    for (int e = 0; e < each; ++e) {
      out.scale[g * each + e] = scale;
      if constexpr (F.mins) out.offset[g * each + e] = offset;
    }
  }
}

// The unsigned codes of 16 rows and columns 4q .. 4q+3 of 32 columns. block: for the signs of IQ1; part: which 32 columns.
template <const Format& F, int Q>
REALM_INLINE U8 codes(const uint8_t* block, const uint8_t* p, int part) {
  if constexpr (F.bits[0] == 8) {
    return load(p + 64 * Q) ^ set(uint8_t{0x80});
  } else {
    constexpr int b = F.bits[0], h = F.bits[1];
    U8 c = bits_right<Q / b * b>(load(p + 64 * (Q % b))) & set(uint8_t{(1 << b) - 1});
    if constexpr (h != 0) {
      constexpr int at = Q / h * h;
      U8 high = load(p + 64 * (b + Q % h));
      if constexpr (at >= b) {
        high = bits_right<at - b>(high);
      } else {
        high = bits_left<b - at>(high);
      }
      c = c | (high & set(uint8_t{((1 << h) - 1) << b}));
    }
    if constexpr (F.table) c = lookup(F.values, c);
    if constexpr (F.scale == Scale::IQ1S || F.scale == Scale::IQ1M) {
      // The sign's bit moved to the value 2: bit 3 (and for the second eight of IQ1_M's sixteen, bit 4).
      const uint8_t* stored = block + F.super_bytes() + 16 * (F.scale == Scale::IQ1S ? part : 2 * part + Q / 4);
      constexpr int bit = F.scale == Scale::IQ1S ? 3 : 3 + Q / 2 % 2;
      U8 minus = bits_right<bit - 1>(spread(stored)) & set(uint8_t{2});
      c = (bits_left<3>(c) & set(uint8_t{0x18})) + (minus ^ set(uint8_t{2}));
    }
    return c;
  }
}

// ---- a panel times a tile as it lies in memory ----

// The sums of columns 4Q .. 4End-1 of 32, for M rows; x: the panel's codes of these 32 columns.
template <const Format& F, int M, int Q, int End>
REALM_INLINE void dots(const uint8_t* block, const uint8_t* p, int part, const int32_t* x, I32* sum, I32* other) {
  if constexpr (Q < End) {
    U8 c = codes<F, Q>(block, p, part);
    // Few rows: two sums each, so that a dot does not wait for the one before it.
    I32* into = M <= 2 && Q % 2 ? other : sum;
    for (int i = 0; i < M; ++i) into[i] = dot<F.wide()>(into[i], c, x + Q * M + i);
    dots<F, M, Q + 1, End>(block, p, part, x, sum, other);
  }
}

template <bool MINS, bool WIDE>
REALM_INLINE I32 start(const int32_t* extra) {
  if constexpr (MINS || (WIDE && kSigned)) return set(int32_t{0});
  return set(*extra);
}

template <const Format& F, int M>
[[maybe_unused]] void direct(const uint8_t* tile, int64_t k, const Panel& panel, float* const* out) {
  constexpr bool halves = F.group < kGroup, two = M <= 2;
  constexpr int per_block = F.block / kGroup;
  constexpr int skip = F.super_bytes() + F.scale_bytes();
  const int32_t *x = panel.codes, *extra = panel.extra;
  const float* scales = panel.scales;
  F32 y[M];
  for (int i = 0; i < M; ++i) y[i] = set(0.0f);
  for (int64_t at = 0; at < k; at += F.block, tile += F.bytes()) {
    Parts<F> block;
    parts<F>(tile, block);
    const uint8_t* p = tile + skip;
    for (int j = 0; j < per_block; ++j, p += F.code_bytes(), x += 8 * M, scales += M) {
      I32 a[M], b[M];
      for (int i = 0; i < M; ++i) {
        a[i] = start<F.mins, F.wide()>(extra + i);
        if constexpr (two) b[i] = set(int32_t{0});
      }
      if constexpr (halves) {
        F32 first[M];
        dots<F, M, 0, 4>(tile, p, j, x, a, b);
        for (int i = 0; i < M; ++i) {
          first[i] = to_float(two ? a[i] + b[i] : a[i]) * block.scale[2 * j];
          a[i] = start<F.mins, F.wide()>(extra + M + i);
          if constexpr (two) b[i] = set(int32_t{0});
        }
        dots<F, M, 4, 8>(tile, p, j, x, a, b);
        for (int i = 0; i < M; ++i) {
          F32 both = fma(to_float(two ? a[i] + b[i] : a[i]), block.scale[2 * j + 1], first[i]);
          y[i] = fma(both, set(scales[i]), y[i]);
          if constexpr (F.mins) {
            y[i] = fma(block.offset[2 * j], set_bits(extra[i]), y[i]);
            y[i] = fma(block.offset[2 * j + 1], set_bits(extra[M + i]), y[i]);
          }
        }
        extra += 2 * M;
      } else {
        dots<F, M, 0, 8>(tile, p, j, x, a, b);
        for (int i = 0; i < M; ++i) {
          y[i] = fma(to_float(two ? a[i] + b[i] : a[i]), block.scale[j] * set(scales[i]), y[i]);
          if constexpr (F.mins) y[i] = fma(block.offset[j], set_bits(extra[i]), y[i]);
        }
        extra += M;
      }
    }
  }
  for (int i = 0; i < M; ++i) store(out[i], y[i]);
}

// ---- a tile made ready, and many rows ----

template <const Format& F, int Q>
REALM_INLINE void store_codes(const uint8_t* block, const uint8_t* p, int part, uint8_t* out) {
  if constexpr (Q < 8) {
    store(out + 64 * Q, codes<F, Q>(block, p, part));
    store_codes<F, Q + 1>(block, p, part, out);
  }
}

template <const Format& F>
void ready(const uint8_t* tile, int64_t k, const Ready& out) {
  constexpr int per_block = F.block / kGroup;
  constexpr int skip = F.super_bytes() + F.scale_bytes();
  uint8_t* codes_out = out.codes;
  float *scales = out.scales, *offsets = out.offsets;
  for (int64_t at = 0; at < k; at += F.block, tile += F.bytes()) {
    Parts<F> block;
    parts<F>(tile, block);
    for (int i = 0; i < Parts<F>::count; ++i, scales += 16) {
      store(scales, block.scale[i]);
      if constexpr (F.mins) {
        store(offsets, block.offset[i]);
        offsets += 16;
      }
    }
    const uint8_t* p = tile + skip;
    for (int j = 0; j < per_block; ++j, p += F.code_bytes(), codes_out += 512) store_codes<F, 0>(tile, p, j, codes_out);
  }
}

template <int M, bool HALVES, bool MINS, bool WIDE>
void rows(const Ready& tile, int64_t k, const Panel& panel, float* const* out) {
  const uint8_t* codes = tile.codes;
  const float *scales = tile.scales, *offsets = tile.offsets, *x_scales = panel.scales;
  const int32_t *x = panel.codes, *extra = panel.extra;
  F32 y[M];
  for (int i = 0; i < M; ++i) y[i] = set(0.0f);
  for (int64_t g = 0; g < k / kGroup; ++g, codes += 512, x += 8 * M, x_scales += M) {
    I32 a[M];
    for (int i = 0; i < M; ++i) a[i] = start<MINS, WIDE>(extra + i);
    if constexpr (HALVES) {
      F32 first[M];
      F32 s = load(scales), t = load(scales + 16);
      for (int q = 0; q < 4; ++q) {
        U8 c = load(codes + 64 * q);
        for (int i = 0; i < M; ++i) a[i] = dot<WIDE>(a[i], c, x + q * M + i);
      }
      for (int i = 0; i < M; ++i) {
        first[i] = to_float(a[i]) * s;
        a[i] = start<MINS, WIDE>(extra + M + i);
      }
      for (int q = 4; q < 8; ++q) {
        U8 c = load(codes + 64 * q);
        for (int i = 0; i < M; ++i) a[i] = dot<WIDE>(a[i], c, x + q * M + i);
      }
      for (int i = 0; i < M; ++i) y[i] = fma(fma(to_float(a[i]), t, first[i]), set(x_scales[i]), y[i]);
      if constexpr (MINS) {
        F32 o = load(offsets), r = load(offsets + 16);
        for (int i = 0; i < M; ++i) {
          y[i] = fma(o, set_bits(extra[i]), y[i]);
          y[i] = fma(r, set_bits(extra[M + i]), y[i]);
        }
        offsets += 32;
      }
      scales += 32;
      extra += 2 * M;
    } else {
      F32 s = load(scales);
      for (int q = 0; q < 8; ++q) {
        U8 c = load(codes + 64 * q);
        for (int i = 0; i < M; ++i) a[i] = dot<WIDE>(a[i], c, x + q * M + i);
      }
      for (int i = 0; i < M; ++i) y[i] = fma(to_float(a[i]), s * set(x_scales[i]), y[i]);
      if constexpr (MINS) {
        F32 o = load(offsets);
        for (int i = 0; i < M; ++i) y[i] = fma(o, set_bits(extra[i]), y[i]);
        offsets += 16;
      }
      scales += 16;
      extra += M;
    }
  }
  for (int i = 0; i < M; ++i) store(out[i], y[i]);
}

template <bool HALVES, bool MINS, bool WIDE>
void panels(const Ready& tile, int64_t k, const Panel* panel, int64_t count, float* const* out) {
  for (; count > 0; --count, out += panel->rows, ++panel) {
    switch (panel->rows) {
      case 8: rows<8, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 7: rows<7, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 6: rows<6, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 5: rows<5, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 4: rows<4, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 3: rows<3, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 2: rows<2, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
      case 1: rows<1, HALVES, MINS, WIDE>(tile, k, *panel, out); break;
    }
  }
}

void matrix(const Format& f, const Ready& tile, int64_t k, const Panel* panel, int64_t count, float* const* out) {
  const bool halves = f.group < kGroup;
  if (f.mins) return halves ? panels<true, true, false>(tile, k, panel, count, out) : panels<false, true, false>(tile, k, panel, count, out);
  if (f.wide()) return halves ? panels<true, false, true>(tile, k, panel, count, out) : panels<false, false, true>(tile, k, panel, count, out);
  return halves ? panels<true, false, false>(tile, k, panel, count, out) : panels<false, false, false>(tile, k, panel, count, out);
}

// ---- activations ----

void quantize(const float* x, int64_t k, int8_t* codes, float* scales, int32_t* sums16) {
  for (int64_t g = 0; g < k / kGroup; ++g, x += kGroup, codes += kGroup) {
    int32_t top = 0;  // the bits of a magnitude are ordered as it is, infinity and NaN above all
    for (int i = 0; i < kGroup; ++i) {
      int32_t bits;
      memcpy(&bits, x + i, 4);
      bits &= 0x7FFFFFFF;
      top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    const bool finite = top < 0x7F800000;
    // Below 2^-120 the reciprocal would overflow; such a group is zero.
    const bool some = finite && top >= 0x03800000;
    const float inverse = some ? 127.0f / largest : 0.0f;
    int32_t sum[2] = {0, 0};
    for (int h = 0; h < 2; ++h) {
      for (int i = 16 * h; i < 16 * h + 16; ++i) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest even integer, as every instruction set does alike.
        float value = (some ? x[i] * inverse : 0.0f) + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &value, 4);
        int32_t code = bits - 0x4B400000;
        codes[i] = static_cast<int8_t>(code);
        sum[h] += code;
      }
    }
    float scale = some ? largest * (1.0f / 127.0f) : 0.0f;
    if (!finite) {
      uint32_t nan = 0x7FC00000;
      memcpy(&scale, &nan, 4);
    }
    scales[g] = scale;
    sums16[2 * g] = sum[0];
    sums16[2 * g + 1] = sum[1];
  }
}

}  // namespace

const Kernels kernels = {
    quantize,
#if defined(REALM_ISA_PLAIN)
    {},  // without vectors nothing is saved, and every instance takes seconds to compile
#else
    {
#define X(NAME, ...) direct<k##NAME, 1>,
        {REALM_FORMATS(X)},
#undef X
#define X(NAME, ...) direct<k##NAME, 2>,
        {REALM_FORMATS(X)},
#undef X
#define X(NAME, ...) direct<k##NAME, 4>,
        {REALM_FORMATS(X)},
#undef X
#define X(NAME, ...) direct<k##NAME, 8>,
        {REALM_FORMATS(X)},
#undef X
    },
#endif
    {
#define X(NAME, ...) ready<k##NAME>,
        REALM_FORMATS(X)
#undef X
    },
    matrix,
};

}  // namespace REALM_ISA
}  // namespace realm
