// What float32 work needs beside simd.h: maxima, exponentials, masks, narrow types and transposition.
#pragma once

#include "simd.h"

namespace realm {
namespace REALM_ISA {

#if defined(REALM_ISA_AVX512)

REALM_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
REALM_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
REALM_INLINE F32 divide(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
REALM_INLINE F32 absolute(F32 x) { return {_mm512_abs_ps(x.v)}; }
REALM_INLINE F32 with_sign_of(F32 x, F32 sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN), s = _mm512_castps_si512(sign.v);
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x.v), _mm512_and_si512(s, bit)))};
}
// Lane i of x where low <= i < high, else of other.
REALM_INLINE F32 inside(F32 x, int low, int high, F32 other) {
  low = low < 0 ? 0 : low > 16 ? 16 : low;
  high = high < 0 ? 0 : high > 16 ? 16 : high;
  const uint32_t keep = ((1u << high) - 1) & ~((1u << low) - 1);
  return {_mm512_mask_mov_ps(other.v, static_cast<__mmask16>(keep), x.v)};
}
// x to the nearest integers, of magnitude below 2^22, as float and as int.
REALM_INLINE F32 nearest(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
REALM_INLINE I32 to_int(F32 x) { return {_mm512_cvtps_epi32(x.v)}; }
REALM_INLINE F32 load_bf16(const uint8_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
REALM_INLINE void store_f16(uint8_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
REALM_INLINE float largest(F32 x) { return _mm512_reduce_max_ps(x.v); }
// The lanes' sum: halves added to halves.
REALM_INLINE float sum(F32 x) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
// Row i, lane j to row j, lane i.
REALM_INLINE void transpose(F32* x) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: column c of each quarter, of rows i .. i + 3
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xDD);
    __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xDD);
    x[c] = {_mm512_shuffle_f32x4(even_low, even_high, 0x88)};
    x[4 + c] = {_mm512_shuffle_f32x4(odd_low, odd_high, 0x88)};
    x[8 + c] = {_mm512_shuffle_f32x4(even_low, even_high, 0xDD)};
    x[12 + c] = {_mm512_shuffle_f32x4(odd_low, odd_high, 0xDD)};
  }
}

// Eight 16-bit numbers of each of sixteen rows, `bytes` apart: number 2 i of all rows, then number 2 i + 1, to out[i].
REALM_INLINE void turn_halves(const uint8_t* first, int64_t bytes, __m512i* out) {
  __m512i a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // quarter q: row 4 q + i
    auto row = [&](int q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + (4 * q + i) * bytes)); };
    a[i] = _mm512_zextsi128_si512(row(0));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00F0, row(1));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0F00, row(2));
    a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xF000, row(3));
  }
  const __m512i low01 = _mm512_unpacklo_epi16(a[0], a[1]), high01 = _mm512_unpackhi_epi16(a[0], a[1]);
  const __m512i low23 = _mm512_unpacklo_epi16(a[2], a[3]), high23 = _mm512_unpackhi_epi16(a[2], a[3]);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  out[0] = _mm512_permutexvar_epi64(order, _mm512_unpacklo_epi32(low01, low23));
  out[1] = _mm512_permutexvar_epi64(order, _mm512_unpackhi_epi32(low01, low23));
  out[2] = _mm512_permutexvar_epi64(order, _mm512_unpacklo_epi32(high01, high23));
  out[3] = _mm512_permutexvar_epi64(order, _mm512_unpackhi_epi32(high01, high23));
}

#elif defined(REALM_ISA_AVX2)

REALM_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
REALM_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
REALM_INLINE F32 divide(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
REALM_INLINE F32 absolute(F32 x) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, x.a), _mm256_andnot_ps(bit, x.b)};
}
REALM_INLINE F32 with_sign_of(F32 x, F32 sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(x.a, _mm256_and_ps(sign.a, bit)), _mm256_or_ps(x.b, _mm256_and_ps(sign.b, bit))};
}
REALM_INLINE F32 inside(F32 x, int low, int high, F32 other) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), below = _mm256_set1_epi32(low - 1), end = _mm256_set1_epi32(high);
  const __m256i later = _mm256_add_epi32(lanes, _mm256_set1_epi32(8));
  auto keep = [&](__m256i lane) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(lane, below), _mm256_cmpgt_epi32(end, lane)));
  };
  return {_mm256_blendv_ps(other.a, x.a, keep(lanes)), _mm256_blendv_ps(other.b, x.b, keep(later))};
}
REALM_INLINE F32 nearest(F32 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
REALM_INLINE I32 to_int(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
REALM_INLINE F32 load_bf16(const uint8_t* p) {
  auto wide = [](__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); };
  return {wide(load16(p)), wide(load16(p + 16))};
}
REALM_INLINE void store_f16(uint8_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
REALM_INLINE float largest(F32 x) {
  __m256 half = _mm256_max_ps(x.a, x.b);
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
REALM_INLINE float sum(F32 x) {
  __m256 half = _mm256_add_ps(x.a, x.b);
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
REALM_INLINE void transpose8(const __m256* in, __m256* out) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    out[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    out[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}
REALM_INLINE void transpose(F32* x) {
  __m256 quarter[4][8], out[4][8];
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = x[i].a;
    quarter[1][i] = x[i].b;
    quarter[2][i] = x[8 + i].a;
    quarter[3][i] = x[8 + i].b;
  }
  for (int q = 0; q < 4; ++q) transpose8(quarter[q], out[q]);
  for (int i = 0; i < 8; ++i) {
    x[i] = {out[0][i], out[2][i]};
    x[8 + i] = {out[1][i], out[3][i]};
  }
}

#else  // plain

#define REALM_EACH(EXPRESSION) F32 r; for (int i = 0; i < 16; ++i) r.v[i] = EXPRESSION; return r;
REALM_INLINE F32 max(F32 a, F32 b) { REALM_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
REALM_INLINE F32 min(F32 a, F32 b) { REALM_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
REALM_INLINE F32 divide(F32 a, F32 b) { REALM_EACH(a.v[i] / b.v[i]) }
REALM_INLINE F32 absolute(F32 x) { REALM_EACH(__builtin_fabsf(x.v[i])) }
REALM_INLINE F32 with_sign_of(F32 x, F32 sign) { REALM_EACH(__builtin_copysignf(x.v[i], sign.v[i])) }
REALM_INLINE F32 inside(F32 x, int low, int high, F32 other) { REALM_EACH(low <= i && i < high ? x.v[i] : other.v[i]) }
// Adding 1.5 * 2^23 leaves no bits behind the point.
REALM_INLINE F32 nearest(F32 x) { REALM_EACH((x.v[i] + 12582912.0f) - 12582912.0f) }
REALM_INLINE I32 to_int(F32 x) { I32 r; for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(x.v[i]); return r; }
REALM_INLINE F32 load_bf16(const uint8_t* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  I32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(h[i]) << 16);
  return as_float(r);
}
// Rounds to the nearest, ties to even; what is too large becomes infinite.
REALM_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (bits >= 0x47800000) return static_cast<uint16_t>(sign | 0x7C00);
  if (bits < 0x38800000) {  // subnormal: adding 1/2 leaves units of 2^-24
    float small;
    memcpy(&small, &bits, 4);
    small += 0.5f;
    memcpy(&bits, &small, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13));
}
REALM_INLINE void store_f16(uint8_t* p, F32 x) {
  uint16_t h[16];
  for (int i = 0; i < 16; ++i) h[i] = float_to_half(x.v[i]);
  memcpy(p, h, 32);
}
REALM_INLINE float largest(F32 x) {
  float r = x.v[0];
  for (int i = 1; i < 16; ++i) r = x.v[i] > r ? x.v[i] : r;
  return r;
}
REALM_INLINE float sum(F32 x) {
  for (int n = 8; n; n /= 2) {
    for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
  }
  return x.v[0];
}
REALM_INLINE void transpose(F32* x) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float held = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = held;
    }
  }
}
#undef REALM_EACH

#endif

// e to the x, the argument clamped to [-87, 88]: Cody and Waite's split of ln 2, Moshier's polynomial (Cephes).
REALM_INLINE F32 exp(F32 x) {
  x = min(max(x, set(-87.0f)), set(88.0f));
  const F32 n = nearest(x * set(1.44269504089f));
  F32 r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F32 p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  const F32 mantissa = fma(p, r * r, r) + set(1.0f);
  return mantissa * as_float(shift_left<23>(to_int(n) + set(int32_t{127})));
}

REALM_INLINE float exp(float x) {
  float lanes[16];
  store(lanes, exp(set(x)));
  return lanes[0];
}

REALM_INLINE F32 tanh(F32 x) {
  const F32 e = exp(set(-2.0f) * absolute(x)), one = set(1.0f);
  return with_sign_of(divide(one - e, one + e), x);
}

}  // namespace REALM_ISA
}  // namespace realm
