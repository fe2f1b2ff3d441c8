// Products with low-rank adapters for one instruction set.
//
// The order of every sum is fixed by K and R alone, so that a row's bits depend neither on the number of rows nor on how
// the work is cut up. Shrinking: sixteen lanes, lane l summing columns l, l + 16, ... in order, then lanes i and i + 8,
// i + 4, i + 2, i + 1. Expanding: over the ranks in order, from zero; then the sum is added to y.

#include "lora.h"
#include "simd.h"

namespace realm {
namespace REALM_ISA {
namespace {

template <int T> constexpr int kSize = T == kAdapterF32 ? 4 : 2;  // bytes of an element

// What is computed at once: rows of x by rows of A (more of these for few rows, when memory is what limits), and rows
// of t by blocks of sixteen columns.
#if defined(REALM_ISA_AVX512)
constexpr int kRowBlock = 4, kExpandBlock = 4;
template <int ROWS> constexpr int kRankBlock = ROWS <= 2 ? 8 : 4;
template <int ROWS> constexpr int kColumnBlocks = 4;
#else
constexpr int kRowBlock = 2, kExpandBlock = 4;
template <int ROWS> constexpr int kRankBlock = 4 / ROWS;
template <int ROWS> constexpr int kColumnBlocks = ROWS == 4 ? 1 : 2;
#endif

// ---- sixteen elements of an adapter, or the first `count`, the others zero ----

#if defined(REALM_ISA_AVX512)

REALM_INLINE F32 from_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }

template <int T> REALM_INLINE F32 elements(const uint8_t* p) {
  if constexpr (T == kAdapterF32) return {_mm512_loadu_ps(p)};
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (T == kAdapterBF16) return from_bf16(h);
  return {_mm512_cvtph_ps(h)};
}

template <int T> REALM_INLINE F32 elements(const uint8_t* p, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (T == kAdapterF32) return {_mm512_maskz_loadu_ps(mask, p)};
  const __m256i h = _mm256_maskz_loadu_epi16(mask, p);
  if constexpr (T == kAdapterBF16) return from_bf16(h);
  return {_mm512_cvtph_ps(h)};
}

REALM_INLINE float sum_of(__m256 h) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
REALM_INLINE float sum_lanes(F32 x) { return sum_of(_mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1))); }

// Rows become columns. In four steps pairs of rows exchange the halves of 2, 4, 8 and 16 lanes.
REALM_INLINE void transpose(F32* r) {
  __m512 s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    s[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(s[i + j]), y = _mm512_castps_pd(s[i + j + 2]);
      r[i + 2 * j].v = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));  // columns 2j of every four
      r[i + 2 * j + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int j = 0; j < 4; ++j) {  // r[4g + j]: rows 4g .. 4g+3 of columns j, j + 4, j + 8, j + 12
    const __m512 a = _mm512_shuffle_f32x4(r[j].v, r[4 + j].v, 0x88), b = _mm512_shuffle_f32x4(r[j].v, r[4 + j].v, 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j].v, r[12 + j].v, 0x88), d = _mm512_shuffle_f32x4(r[8 + j].v, r[12 + j].v, 0xDD);
    s[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    s[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    s[8 + j] = _mm512_shuffle_f32x4(a, c, 0xDD);
    s[12 + j] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; ++i) r[i].v = s[i];
}

// Sixteen rows of sixteen 16-bit elements at p, `stride` bytes apart, of which `rows` and `width` exist: as columns to out.
REALM_INLINE void transpose16(const uint8_t* p, int64_t stride, int64_t rows, int64_t width, uint8_t* out) {
  __m512i z[8], u[8], v[8];
  const bool whole = rows == 16 && width == 16;
  const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
  for (int i = 0; i < 8; ++i) {  // z[i]: rows 2i and 2i + 1, whose elements 2p and 2p + 1 stay together as pair p
    const uint8_t *even = p + 2 * i * stride, *odd = even + stride;
    if (whole && stride == 32) {
      z[i] = _mm512_loadu_si512(even);
    } else {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i a = 2 * i < rows ? _mm256_maskz_loadu_epi16(mask, even) : zero;
      const __m256i b = 2 * i + 1 < rows ? _mm256_maskz_loadu_epi16(mask, odd) : zero;
      z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    }
  }
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm512_unpacklo_epi32(z[i], z[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(z[i], z[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(u[i + j], u[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(u[i + j], u[i + j + 2]);
    }
  }
  // v[q] and v[4 + q]: rows 0..7 and 8..15, pair q of the even rows in quarter 0, of the odd ones in quarter 2, and pair
  // q + 4 in quarters 1 and 3. A result is element 2p of all rows, then element 2p + 1 of all rows.
  alignas(64) static const uint16_t order[32] = {0, 16, 2, 18, 4, 20, 6, 22, 32, 48, 34, 50, 36, 52, 38, 54,
                                                 1, 17, 3, 19, 5, 21, 7, 23, 33, 49, 35, 51, 37, 53, 39, 55};
  const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(8));
  for (int q = 0; q < 4; ++q) {
    _mm512_store_si512(out + 64 * q, _mm512_permutex2var_epi16(v[q], low, v[4 + q]));
    _mm512_store_si512(out + 64 * (q + 4), _mm512_permutex2var_epi16(v[q], high, v[4 + q]));
  }
}

#elif defined(REALM_ISA_AVX2)

template <int T> REALM_INLINE F32 elements(const uint8_t* p) {
  if constexpr (T == kAdapterF32) return load(reinterpret_cast<const float*>(p));
  if constexpr (T == kAdapterF16) return load_f16(p);
  const __m256i a = _mm256_cvtepu16_epi32(load16(p)), b = _mm256_cvtepu16_epi32(load16(p + 16));
  return as_float(shift_left<16>(I32{a, b}));
}

REALM_INLINE float sum_lanes(F32 x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

REALM_INLINE void transpose8(const __m256* in, __m256* out) {
  __m256 s[8], r[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(s[i + j]), y = _mm256_castps_pd(s[i + j + 2]);
      r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  }
  for (int j = 0; j < 4; ++j) {
    out[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    out[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
}

REALM_INLINE void transpose(F32* r) {
  __m256 in[4][8], out[4][8];
  for (int i = 0; i < 8; ++i) {
    in[0][i] = r[i].a;
    in[1][i] = r[i].b;
    in[2][i] = r[8 + i].a;
    in[3][i] = r[8 + i].b;
  }
  for (int q = 0; q < 4; ++q) transpose8(in[q], out[q]);
  for (int i = 0; i < 8; ++i) {
    r[i] = {out[0][i], out[2][i]};
    r[8 + i] = {out[1][i], out[3][i]};
  }
}

#else  // plain

template <int T> REALM_INLINE F32 elements(const uint8_t* p) {
  if constexpr (T == kAdapterF16) return load_f16(p);
  F32 r;
  if constexpr (T == kAdapterF32) {
    memcpy(r.v, p, sizeof r.v);
  } else {
    uint16_t h[16];
    memcpy(h, p, sizeof h);
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = static_cast<uint32_t>(h[i]) << 16;
      memcpy(&r.v[i], &bits, 4);
    }
  }
  return r;
}

REALM_INLINE float sum_lanes(F32 x) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  }
  return x.v[0];
}

REALM_INLINE void transpose(F32* r) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float v = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = v;
    }
  }
}

#endif

#if !defined(REALM_ISA_AVX512)
template <int T> REALM_INLINE F32 elements(const uint8_t* p, int64_t count) {
  uint8_t whole[16 * kSize<T>] = {};
  memcpy(whole, p, count * kSize<T>);
  return elements<T>(whole);
}
#endif

// ---- A x ----

template <int T, int ROWS, int RANKS>
REALM_INLINE void dots(const float* const* x, int64_t k, const uint8_t* a, float scale, float* out, int64_t stride) {
  F32 sums[ROWS][RANKS];
  for (int i = 0; i < ROWS; ++i) {
    for (int r = 0; r < RANKS; ++r) sums[i][r] = set(0.0f);
  }
  int64_t c = 0;
  for (; c + 16 <= k; c += 16) {
    F32 xs[ROWS];
    for (int i = 0; i < ROWS; ++i) xs[i] = load(x[i] + c);
    for (int r = 0; r < RANKS; ++r) {
      const F32 w = elements<T>(a + (r * k + c) * kSize<T>);
      for (int i = 0; i < ROWS; ++i) sums[i][r] = fma(w, xs[i], sums[i][r]);
    }
  }
  if (c < k) {
    F32 xs[ROWS];
    for (int i = 0; i < ROWS; ++i) xs[i] = elements<kAdapterF32>(reinterpret_cast<const uint8_t*>(x[i] + c), k - c);
    for (int r = 0; r < RANKS; ++r) {
      const F32 w = elements<T>(a + (r * k + c) * kSize<T>, k - c);
      for (int i = 0; i < ROWS; ++i) sums[i][r] = fma(w, xs[i], sums[i][r]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int r = 0; r < RANKS; ++r) out[i * stride + r] = scale * sum_lanes(sums[i][r]);
  }
}

template <int T, int ROWS>
void shrink_rows(const float* const* x, int64_t k, const uint8_t* a, int64_t ranks, float scale, float* out, int64_t stride) {
  int64_t r = 0;
  for (; r + kRankBlock<ROWS> <= ranks; r += kRankBlock<ROWS>) {
    dots<T, ROWS, kRankBlock<ROWS>>(x, k, a + r * k * kSize<T>, scale, out + r, stride);
  }
  for (; r < ranks; ++r) dots<T, ROWS, 1>(x, k, a + r * k * kSize<T>, scale, out + r, stride);
}

template <int T>
void shrink(const float* x, int64_t k, const int32_t* rows, int64_t m, const uint8_t* a, int64_t ranks, float scale,
            float* out, int64_t stride) {
  for (int64_t i = 0; i < m; i += kRowBlock) {
    const float* block[kRowBlock];
    const int64_t count = m - i < kRowBlock ? m - i : kRowBlock;
    for (int64_t j = 0; j < count; ++j) block[j] = x + rows[i + j] * k;
    float* to = out + i * stride;
    if (count == kRowBlock) {
      shrink_rows<T, kRowBlock>(block, k, a, ranks, scale, to, stride);
    } else if (count == 1) {
      shrink_rows<T, 1>(block, k, a, ranks, scale, to, stride);
#if defined(REALM_ISA_AVX512)
    } else if (count == 2) {
      shrink_rows<T, 2>(block, k, a, ranks, scale, to, stride);
    } else {
      shrink_rows<T, 3>(block, k, a, ranks, scale, to, stride);
#endif
    }
  }
}

// ---- B t ----

// The type in which sixteen rows of b wait, as columns, for the rows of t.
#if defined(REALM_ISA_AVX512)
template <int T> constexpr int kReady = T;
#else
template <int T> constexpr int kReady = kAdapterF32;
#endif

// Ranks [r, r + 16) of sixteen rows of b, of which `rows` and `width` exist, as columns to out.
template <int T>
REALM_INLINE void make_ready(const uint8_t* b, int64_t rank, int64_t rows, int64_t width, uint8_t* out) {
  const int64_t stride = rank * kSize<T>;
#if defined(REALM_ISA_AVX512)
  if constexpr (T != kAdapterF32) return transpose16(b, stride, rows, width, out);
#endif
  F32 block[16];
  if (rows == 16 && width == 16) {
    for (int64_t j = 0; j < 16; ++j) block[j] = elements<T>(b + j * stride);
  } else {
    for (int64_t j = 0; j < 16; ++j) block[j] = j < rows ? elements<T>(b + j * stride, width) : set(0.0f);
  }
  transpose(block);
  for (int64_t j = 0; j < 16; ++j) store(reinterpret_cast<float*>(out) + 16 * j, block[j]);
}

// Adds the products of ROWS rows of t with BLOCKS times sixteen columns, ready [BLOCKS][padded_rank][16], to y, of which
// `columns` exist.
template <int T, int ROWS, int BLOCKS>
REALM_INLINE void add_products(const float* t, int64_t rank, const uint8_t* ready, int64_t padded_rank, float* y,
                               int64_t n, const int32_t* rows, int64_t columns) {
  constexpr int64_t size = kSize<kReady<T>>;
  F32 sums[ROWS][BLOCKS];
  for (int i = 0; i < ROWS; ++i) {
    for (int b = 0; b < BLOCKS; ++b) sums[i][b] = set(0.0f);
  }
  for (int64_t r = 0; r < rank; ++r) {
    F32 w[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) w[b] = elements<kReady<T>>(ready + (b * padded_rank + r) * 16 * size);
    for (int i = 0; i < ROWS; ++i) {
      const F32 factor = set(t[i * rank + r]);
      for (int b = 0; b < BLOCKS; ++b) sums[i][b] = fma(w[b], factor, sums[i][b]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    float* to = y + rows[i] * n;
    if (columns >= 16 * BLOCKS) {
      for (int b = 0; b < BLOCKS; ++b) store(to + 16 * b, load(to + 16 * b) + sums[i][b]);
    } else {  // one block, the last
      float last[16];
      store(last, sums[i][0]);
      for (int64_t c = 0; c < columns; ++c) to[c] = to[c] + last[c];
    }
  }
}

template <int T, int ROWS>
REALM_INLINE void add_all_products(const float* t, int64_t rank, const uint8_t* ready, int64_t padded_rank, float* y,
                                   int64_t n, const int32_t* rows, int64_t columns) {
  constexpr int blocks = kColumnBlocks<ROWS>;
  int64_t c = 0;
  for (; c + 16 * blocks <= columns; c += 16 * blocks) {
    add_products<T, ROWS, blocks>(t, rank, ready + c * padded_rank * kSize<kReady<T>>, padded_rank, y + c, n, rows, columns - c);
  }
  for (; c < columns; c += 16) {
    add_products<T, ROWS, 1>(t, rank, ready + c * padded_rank * kSize<kReady<T>>, padded_rank, y + c, n, rows, columns - c);
  }
}

template <int T>
void expand(const float* t, int64_t rank, const int32_t* rows, int64_t m, const uint8_t* b, int64_t columns, float* y,
            int64_t n, uint8_t* ready) {
  const int64_t padded_rank = (rank + 15) / 16 * 16;
  for (int64_t first = 0; first < columns; first += kLoraColumns) {
    const int64_t count = columns - first < kLoraColumns ? columns - first : kLoraColumns;
    for (int64_t c = 0; c < count; c += 16) {
      for (int64_t r = 0; r < rank; r += 16) {
        make_ready<T>(b + ((first + c) * rank + r) * kSize<T>, rank, count - c < 16 ? count - c : 16, rank - r < 16 ? rank - r : 16,
                      ready + (c * padded_rank + 16 * r) * kSize<kReady<T>>);
      }
    }
    float* to = y + first;
    int64_t i = 0;
    for (; i + kExpandBlock <= m; i += kExpandBlock) {
      add_all_products<T, kExpandBlock>(t + i * rank, rank, ready, padded_rank, to, n, rows + i, count);
    }
    for (; i + 2 <= m; i += 2) add_all_products<T, 2>(t + i * rank, rank, ready, padded_rank, to, n, rows + i, count);
    if (i < m) add_all_products<T, 1>(t + i * rank, rank, ready, padded_rank, to, n, rows + i, count);
  }
}

}  // namespace

extern const LoraKernels lora_kernels;
const LoraKernels lora_kernels = {
    {shrink<kAdapterF32>, shrink<kAdapterBF16>, shrink<kAdapterF16>},
    {expand<kAdapterF32>, expand<kAdapterBF16>, expand<kAdapterF16>},
};

}  // namespace REALM_ISA
}  // namespace realm
