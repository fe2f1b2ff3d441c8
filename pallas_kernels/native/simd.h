// Sixteen lanes of float32 or int32 and sixty-four bytes, for the instruction set this file is compiled for.
//
// Everything lies in a namespace named after the instruction set, is always inlined and uses no template of the
// standard library: otherwise the linker could keep the AVX-512 copy of a function for every caller.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(REALM_ISA_AVX512) || defined(REALM_ISA_AVX2)
#include <immintrin.h>
#endif

#define REALM_INLINE inline __attribute__((always_inline))

namespace realm {
namespace REALM_ISA {

#if defined(REALM_ISA_AVX512)

struct F32 { __m512 v; };
struct I32 { __m512i v; };
struct U8 { __m512i v; };  // 64 bytes: row r's four are 4r .. 4r+3

REALM_INLINE F32 set(float x) { return {_mm512_set1_ps(x)}; }
REALM_INLINE I32 set(int32_t x) { return {_mm512_set1_epi32(x)}; }
REALM_INLINE U8 set(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
REALM_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
REALM_INLINE U8 load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
REALM_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
REALM_INLINE void store(uint8_t* p, U8 x) { _mm512_storeu_si512(p, x.v); }
REALM_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
REALM_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
REALM_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
REALM_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
REALM_INLINE F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
REALM_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
REALM_INLINE F32 negate(F32 x) { return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(INT32_MIN)))}; }

REALM_INLINE F32 load_f16(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
REALM_INLINE I32 load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
REALM_INLINE I32 load_i8(const uint8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
REALM_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
REALM_INLINE I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> REALM_INLINE I32 shift_right(I32 x) { return {_mm512_srli_epi32(x.v, N)}; }
template <int N> REALM_INLINE I32 shift_left(I32 x) { return {_mm512_slli_epi32(x.v, N)}; }
REALM_INLINE F32 as_float(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
REALM_INLINE I32 where_equal(I32 a, I32 b, I32 yes, I32 no) {
  return {_mm512_mask_mov_epi32(no.v, _mm512_cmpeq_epi32_mask(a.v, b.v), yes.v)};
}

REALM_INLINE U8 operator&(U8 a, U8 b) { return {_mm512_and_si512(a.v, b.v)}; }
REALM_INLINE U8 operator|(U8 a, U8 b) { return {_mm512_or_si512(a.v, b.v)}; }
REALM_INLINE U8 operator^(U8 a, U8 b) { return {_mm512_xor_si512(a.v, b.v)}; }
REALM_INLINE U8 operator+(U8 a, U8 b) { return {_mm512_add_epi8(a.v, b.v)}; }
// Each byte shifted, neighbours' bits coming in: mask afterwards.
template <int N> REALM_INLINE U8 bits_right(U8 x) { return {N ? _mm512_srli_epi16(x.v, N) : x.v}; }
template <int N> REALM_INLINE U8 bits_left(U8 x) { return {N ? _mm512_slli_epi16(x.v, N) : x.v}; }
// table[x] of codes below 16.
REALM_INLINE U8 lookup(const uint8_t* table, U8 x) {
  __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm512_shuffle_epi8(t, x.v)};
}
// Byte r of sixteen to the four bytes of row r.
REALM_INLINE U8 spread(const uint8_t* p) {
  __m512i t = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_shuffle_epi8(t, _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0x00000000))};
}
// acc + the dot product, row by row, of four codes and the four int8 activations that *x holds. WIDE codes, up to 255,
// stand for code - 128; kSigned tells whether dot has subtracted the 128 itself.
constexpr bool kSigned = false;
template <bool WIDE> REALM_INLINE I32 dot(I32 acc, U8 codes, const int32_t* x) {
  return {_mm512_dpbusd_epi32(acc.v, codes.v, _mm512_set1_epi32(*x))};
}

#elif defined(REALM_ISA_AVX2)

struct F32 { __m256 a, b; };
struct I32 { __m256i a, b; };
struct U8 { __m256i a, b; };

REALM_INLINE F32 set(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
REALM_INLINE I32 set(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
REALM_INLINE U8 set(uint8_t x) { __m256i v = _mm256_set1_epi8(static_cast<char>(x)); return {v, v}; }
REALM_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
REALM_INLINE U8 load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
REALM_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
REALM_INLINE void store(uint8_t* p, U8 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
REALM_INLINE F32 operator+(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
REALM_INLINE F32 operator-(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
REALM_INLINE F32 operator*(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
REALM_INLINE F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
REALM_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
REALM_INLINE I32 operator+(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
REALM_INLINE F32 negate(F32 x) { __m256 s = _mm256_set1_ps(-0.0f); return {_mm256_xor_ps(x.a, s), _mm256_xor_ps(x.b, s)}; }

REALM_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
REALM_INLINE F32 load_f16(const uint8_t* p) { return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 16))}; }
REALM_INLINE I32 load_u8(const uint8_t* p) {
  __m128i v = load16(p);
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
REALM_INLINE I32 load_i8(const uint8_t* p) {
  __m128i v = load16(p);
  return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
REALM_INLINE I32 operator&(I32 x, I32 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
REALM_INLINE I32 operator|(I32 x, I32 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int N> REALM_INLINE I32 shift_right(I32 x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> REALM_INLINE I32 shift_left(I32 x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
REALM_INLINE F32 as_float(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
REALM_INLINE I32 where_equal(I32 x, I32 y, I32 yes, I32 no) {
  return {_mm256_blendv_epi8(no.a, yes.a, _mm256_cmpeq_epi32(x.a, y.a)),
          _mm256_blendv_epi8(no.b, yes.b, _mm256_cmpeq_epi32(x.b, y.b))};
}

REALM_INLINE U8 operator&(U8 x, U8 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
REALM_INLINE U8 operator|(U8 x, U8 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
REALM_INLINE U8 operator^(U8 x, U8 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
REALM_INLINE U8 operator+(U8 x, U8 y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
template <int N> REALM_INLINE U8 bits_right(U8 x) { return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)}; }
template <int N> REALM_INLINE U8 bits_left(U8 x) { return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)}; }
REALM_INLINE U8 lookup(const uint8_t* table, U8 x) {
  __m256i t = _mm256_broadcastsi128_si256(load16(table));
  return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}
REALM_INLINE U8 spread(const uint8_t* p) {
  I32 v = load_u8(p);
  __m256i order = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  return {_mm256_shuffle_epi8(v.a, order), _mm256_shuffle_epi8(v.b, order)};
}
// Pairs of products are summed in 16 bits, which codes up to 127 cannot overflow. WIDE codes are made signed first, and
// their sign moved to the activation, which is never -128.
constexpr bool kSigned = true;
template <bool WIDE> REALM_INLINE I32 dot(I32 acc, U8 codes, const int32_t* x) {
  __m256i xs = _mm256_set1_epi32(*x), ones = _mm256_set1_epi16(1);
  __m256i a, b;
  if (WIDE) {
    __m256i flip = _mm256_set1_epi8(-128), wa = _mm256_xor_si256(codes.a, flip), wb = _mm256_xor_si256(codes.b, flip);
    a = _mm256_maddubs_epi16(_mm256_abs_epi8(wa), _mm256_sign_epi8(xs, wa));
    b = _mm256_maddubs_epi16(_mm256_abs_epi8(wb), _mm256_sign_epi8(xs, wb));
  } else {
    a = _mm256_maddubs_epi16(codes.a, xs);
    b = _mm256_maddubs_epi16(codes.b, xs);
  }
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(a, ones)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(b, ones))};
}

#else  // plain

struct F32 { float v[16]; };
struct I32 { int32_t v[16]; };
struct U8 { uint8_t v[64]; };

#define REALM_EACH(N, T, EXPRESSION) T r; for (int i = 0; i < N; ++i) r.v[i] = EXPRESSION; return r;
REALM_INLINE F32 set(float x) { REALM_EACH(16, F32, x) }
REALM_INLINE I32 set(int32_t x) { REALM_EACH(16, I32, x) }
REALM_INLINE U8 set(uint8_t x) { REALM_EACH(64, U8, x) }
REALM_INLINE F32 load(const float* p) { REALM_EACH(16, F32, p[i]) }
REALM_INLINE U8 load(const uint8_t* p) { REALM_EACH(64, U8, p[i]) }
REALM_INLINE void store(float* p, F32 x) { memcpy(p, x.v, sizeof x.v); }
REALM_INLINE void store(uint8_t* p, U8 x) { memcpy(p, x.v, sizeof x.v); }
REALM_INLINE F32 operator+(F32 a, F32 b) { REALM_EACH(16, F32, a.v[i] + b.v[i]) }
REALM_INLINE F32 operator-(F32 a, F32 b) { REALM_EACH(16, F32, a.v[i] - b.v[i]) }
REALM_INLINE F32 operator*(F32 a, F32 b) { REALM_EACH(16, F32, a.v[i] * b.v[i]) }
REALM_INLINE F32 fma(F32 a, F32 b, F32 c) { REALM_EACH(16, F32, a.v[i] * b.v[i] + c.v[i]) }  // two roundings
REALM_INLINE F32 to_float(I32 x) { REALM_EACH(16, F32, static_cast<float>(x.v[i])) }
REALM_INLINE I32 operator+(I32 a, I32 b) { REALM_EACH(16, I32, a.v[i] + b.v[i]) }
REALM_INLINE F32 negate(F32 x) { REALM_EACH(16, F32, -x.v[i]) }

REALM_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7FFF, bits;
  float f;
  if (rest >= 0x7C00) {
    bits = sign | 0x7F800000 | (rest & 0x3FF) << 13 | (rest > 0x7C00 ? 0x400000 : 0);  // NaNs made quiet, as F16C does
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    f = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  memcpy(&f, &bits, 4);
  return f;
}
REALM_INLINE F32 load_f16(const uint8_t* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  REALM_EACH(16, F32, half_to_float(h[i]))
}
REALM_INLINE I32 load_u8(const uint8_t* p) { REALM_EACH(16, I32, p[i]) }
REALM_INLINE I32 load_i8(const uint8_t* p) { REALM_EACH(16, I32, static_cast<int8_t>(p[i])) }
REALM_INLINE I32 operator&(I32 a, I32 b) { REALM_EACH(16, I32, a.v[i] & b.v[i]) }
REALM_INLINE I32 operator|(I32 a, I32 b) { REALM_EACH(16, I32, a.v[i] | b.v[i]) }
template <int N> REALM_INLINE I32 shift_right(I32 x) { REALM_EACH(16, I32, static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) >> N)) }
template <int N> REALM_INLINE I32 shift_left(I32 x) { REALM_EACH(16, I32, static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) << N)) }
REALM_INLINE F32 as_float(I32 x) { F32 r; memcpy(r.v, x.v, sizeof r.v); return r; }
REALM_INLINE I32 where_equal(I32 a, I32 b, I32 yes, I32 no) { REALM_EACH(16, I32, a.v[i] == b.v[i] ? yes.v[i] : no.v[i]) }

REALM_INLINE U8 operator&(U8 a, U8 b) { REALM_EACH(64, U8, a.v[i] & b.v[i]) }
REALM_INLINE U8 operator|(U8 a, U8 b) { REALM_EACH(64, U8, a.v[i] | b.v[i]) }
REALM_INLINE U8 operator^(U8 a, U8 b) { REALM_EACH(64, U8, a.v[i] ^ b.v[i]) }
REALM_INLINE U8 operator+(U8 a, U8 b) { REALM_EACH(64, U8, static_cast<uint8_t>(a.v[i] + b.v[i])) }
template <int N> REALM_INLINE U8 bits_right(U8 x) { REALM_EACH(64, U8, static_cast<uint8_t>(x.v[i] >> N)) }
template <int N> REALM_INLINE U8 bits_left(U8 x) { REALM_EACH(64, U8, static_cast<uint8_t>(x.v[i] << N)) }
REALM_INLINE U8 lookup(const uint8_t* table, U8 x) { REALM_EACH(64, U8, table[x.v[i] & 15]) }
REALM_INLINE U8 spread(const uint8_t* p) { REALM_EACH(64, U8, p[i / 4]) }
constexpr bool kSigned = false;
template <bool WIDE> REALM_INLINE I32 dot(I32 acc, U8 codes, const int32_t* four) {
  int8_t x[4];
  memcpy(x, four, 4);
  for (int r = 0; r < 16; ++r) {
    int32_t sum = 0;
    for (int j = 0; j < 4; ++j) sum += codes.v[4 * r + j] * x[j];
    acc.v[r] += sum;
  }
  return acc;
}
#undef REALM_EACH

#endif

// The float whose bits are x, in every lane.
REALM_INLINE F32 set_bits(int32_t x) {
  float f;
  memcpy(&f, &x, 4);
  return set(f);
}

}  // namespace REALM_ISA
}  // namespace realm
