// Attention over pages with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
//
// A row of queries goes through the same sequence of float operations whatever is computed beside it. A score is summed
// over the head's elements in order; a block's weights are summed lane by lane, then across the sixteen lanes; values
// are added in order of position; super-blocks are merged in order. What a query does not see has the weight zero, adds
// exact zeros, and so may be left out or not.

#include "attention.h"
#include "simd.h"
#include "vectors.h"

namespace realm {
namespace REALM_ISA {
namespace {

// Register blocks of the products: rows by vectors of sixteen columns.
#if defined(REALM_ISA_AVX512)
constexpr int kRows = 6, kColumns = 4;
#elif defined(REALM_ISA_AVX2)
constexpr int kRows = 3, kColumns = 2;
#else
constexpr int kRows = 1, kColumns = 1;
#endif

// c [R][16 C] = a [R][depth] times b [depth][16 C], plus c times keep [R] where keep is not null.
template <int R, int C>
REALM_INLINE void product(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, const float* keep, float* c,
                          int64_t ldc) {
  F32 sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sums[r][j] = keep == nullptr ? set(0.0f) : load(c + r * ldc + 16 * j) * set(keep[r]);
  }
  for (int64_t i = 0; i < depth; ++i) {
    F32 row[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) row[j] = load(b + i * ldb + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 x = set(a[r * lda + i]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] = fma(x, row[j], sums[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(c + r * ldc + 16 * j, sums[r][j]);
  }
}

using Product = void (*)(int64_t, const float*, int64_t, const float*, int64_t, const float*, float*, int64_t);

template <int R, int C>
void product_of(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, const float* keep, float* c, int64_t ldc) {
  product<R, C>(depth, a, lda, b, ldb, keep, c, ldc);
}

template <int R>
Product product_with(int columns) {
  if constexpr (kColumns > 1) {
    if (columns == 2) return product_of<R, 2>;
  }
  if constexpr (kColumns > 2) {
    if (columns == 3) return product_of<R, 3>;
    if (columns == 4) return product_of<R, 4>;
  }
  return product_of<R, 1>;
}

Product product_for(int rows, int columns) {
  if constexpr (kRows > 1) {
    if (rows == 2) return product_with<2>(columns);
    if (rows == 3) return product_with<3>(columns);
  }
  if constexpr (kRows > 3) {
    if (rows == 4) return product_with<4>(columns);
    if (rows == 5) return product_with<5>(columns);
    if (rows == 6) return product_with<6>(columns);
  }
  return product_with<1>(columns);
}

// The same for any number of rows and vectors of columns.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
              const float* keep, float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += kColumns) {
    const int wide = static_cast<int>(columns - j < kColumns ? columns - j : kColumns);
    for (int64_t r = 0; r < rows; r += kRows) {
      const int high = static_cast<int>(rows - r < kRows ? rows - r : kRows);
      product_for(high, wide)(depth, a + r * lda, lda, b + 16 * j, ldb, keep == nullptr ? nullptr : keep + r, c + r * ldc + 16 * j,
                              ldc);
    }
  }
}

// Where row `at` of a block lies: its index among the rows of the layer.
struct Place {
  int64_t page[2];  // of the block, the first row of each

  Place(const Call& call, const Tile& tile, int64_t block) {
    for (int i = 0; i < 2; ++i) {
      int64_t number = call.tables[tile.batch * call.table_pages + 2 * block + i];
      number = number < 0 ? 0 : number >= call.pool.pages ? call.pool.pages - 1 : number;
      page[i] = (number * call.pool.kv_heads + tile.kv_head) * kPage;
    }
  }
  int64_t row(int64_t at) const { return page[at / kPage] + at % kPage; }
};

// Rows [low, high) of a block as columns of scratch.keys; zeros in the other columns of the sixteens that hold them.
template <Type type>
void load_keys(const Call& call, const Place& place, int64_t low, int64_t high, float* keys) {
  const Rows& rows = call.pool.keys;
  const int64_t bytes = rows.dim * size_of(type);
  for (int64_t from = low / 16 * 16; from < high; from += 16) {
    const uint8_t* first = rows.data + place.row(from) * bytes;
    const float* scales = type == Type::kI8 ? rows.scales + place.row(from) : nullptr;
    const int begin = static_cast<int>(low > from ? low - from : 0), end = static_cast<int>(high - from < 16 ? high - from : 16);
    for (int64_t d = 0; d < rows.dim; d += 16) {
      F32 square[16];
      const int64_t count = rows.dim - d;
      if (begin == 0 && end == 16 && count >= 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          square[i] = load_row<type>(first + i * bytes + d * size_of(type));
          if (type == Type::kI8) square[i] = square[i] * set(scales[i]);
        }
      } else {
        for (int i = 0; i < 16; ++i) {
          square[i] = set(0.0f);
          if (i < begin || i >= end) continue;
          square[i] = load_row<type>(first + i * bytes + d * size_of(type), count);
          if (type == Type::kI8) square[i] = square[i] * set(scales[i]);
        }
      }
      transpose(square);
      float* out = keys + d * kBlock + from;
      if (count >= 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store(out + i * kBlock, square[i]);
      } else {
        for (int i = 0; i < count; ++i) store(out + i * kBlock, square[i]);
      }
    }
  }
}

// Rows [low, high) of a block to the same rows of scratch.values, zeros behind value_dim.
template <Type type>
void load_values(const Call& call, const Place& place, int64_t low, int64_t high, float* values) {
  const Rows& rows = call.pool.values.dim ? call.pool.values : call.pool.keys;
  const int64_t bytes = rows.dim * size_of(type), width = call.width();
  for (int64_t at = low; at < high; ++at) {
    const uint8_t* row = rows.data + place.row(at) * bytes;
    const F32 scale = set(type == Type::kI8 ? rows.scales[place.row(at)] : 1.0f);
    for (int64_t d = 0; d < width; d += 16) {
      const F32 x = load_row<type>(row + d * size_of(type), call.value_dim - d);
      store(values + at * width + d, type == Type::kI8 ? x * scale : x);
    }
  }
}

// Scores of lanes [from, to) of a block, of which the row sees [low, high), to weights; top and total are brought up to
// date. Returns what the sums so far are to be multiplied by.
REALM_INLINE float soften(float* scores, int64_t from, int64_t to, int64_t low, int64_t high, float softcap, float& top, float& total) {
  F32 most = set(kMasked);
  for (int64_t j = from; j < to; j += 16) {
    F32 x = load(scores + j);
    if (softcap != 0.0f) x = set(softcap) * tanh(x * set(1.0f / softcap));
    if (low > j || high < j + 16) x = inside(x, static_cast<int>(low - j), static_cast<int>(high - j), set(kMasked));
    store(scores + j, x);
    most = max(most, x);
  }
  const float block_top = largest(most), new_top = block_top > top ? block_top : top;
  F32 sums = set(0.0f);
  const F32 shift = set(new_top);
  for (int64_t j = from; j < to; j += 16) {
    F32 x = exp(load(scores + j) - shift);
    if (low > j || high < j + 16) x = inside(x, static_cast<int>(low - j), static_cast<int>(high - j), set(0.0f));
    store(scores + j, x);
    sums = sums + x;
  }
  const float keep = exp(top - new_top);
  top = new_top;
  total = total * keep + sum(sums);
  return keep;
}

template <Type type>
void one_part(const Call& call, const Tile& tile, int64_t super, const Scratch& scratch, const Sums& sums) {
  const int64_t width = call.width(), dim = call.pool.keys.dim;
  for (int64_t r = 0; r < tile.rows; ++r) {
    sums.top[r] = kMasked;
    sums.total[r] = 0.0f;
  }
  for (int64_t i = 0; i < tile.rows * width; i += 16) store(sums.mixed + i, set(0.0f));
  for (int64_t block = super * kSuper; block < (super + 1) * kSuper; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t low = (tile.low > begin ? tile.low : begin) - begin;
    const int64_t high = (tile.high + 1 < begin + kBlock ? tile.high + 1 : begin + kBlock) - begin;
    if (low >= high) continue;
    const Place place(call, tile, block);
    const int64_t from = low / 16 * 16, to = (high + 15) / 16 * 16;
    load_keys<type>(call, place, low, high, scratch.keys);
    multiply(tile.rows, (to - from) / 16, dim, scratch.q, dim, scratch.keys + from, kBlock, nullptr, scratch.scores + from, kBlock);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t position = call.positions[tile.batch * call.tokens + (tile.first + r) / call.group];
      const int64_t first = position < 0 ? kBlock : position - call.window + 1 - begin;
      scratch.keep[r] = soften(scratch.scores + r * kBlock, from, to, first > 0 ? first : 0, position + 1 - begin, call.softcap,
                               sums.top[r], sums.total[r]);
    }
    load_values<type>(call, place, low, high, scratch.values);
    multiply(tile.rows, width / 16, high - low, scratch.scores + low, kBlock, scratch.values + low * width, width, scratch.keep,
             sums.mixed, width);
  }
}

void part(const Call& call, const Tile& tile, int64_t super, const Scratch& scratch, const Sums& sums) {
  switch (call.pool.type) {
    case Type::kF32: return one_part<Type::kF32>(call, tile, super, scratch, sums);
    case Type::kF16: return one_part<Type::kF16>(call, tile, super, scratch, sums);
    case Type::kBF16: return one_part<Type::kBF16>(call, tile, super, scratch, sums);
    case Type::kI8: return one_part<Type::kI8>(call, tile, super, scratch, sums);
  }
}

void queries(const Call& call, const Tile& tile, const Scratch& scratch) {
  const int64_t dim = call.pool.keys.dim;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first + r;
    const int64_t token = tile.batch * call.tokens + row / call.group, head = tile.kv_head * call.group + row % call.group;
    const float* q = call.q + (token * call.heads + head) * dim;
    float* out = scratch.q + r * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = q[d] * call.scale;
  }
}

void merge(int64_t rows, int64_t width, const Sums& sums, const Sums& more) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = more.top[r] > sums.top[r] ? more.top[r] : sums.top[r];
    const float keep = exp(sums.top[r] - top), take = exp(more.top[r] - top);
    sums.top[r] = top;
    sums.total[r] = sums.total[r] * keep + more.total[r] * take;
    float* mixed = sums.mixed + r * width;
    for (int64_t d = 0; d < width; d += 16) {
      store(mixed + d, fma(load(more.mixed + r * width + d), set(take), load(mixed + d) * set(keep)));
    }
  }
}

void finish(const Call& call, const Tile& tile, const Sums& sums) {
  const int64_t width = call.width();
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first + r;
    const int64_t token = tile.batch * call.tokens + row / call.group, head = tile.kv_head * call.group + row % call.group;
    float total = sums.total[r], keep = 1.0f;
    if (call.sinks != nullptr) {  // a row of its own whose value is zero
      const float sink = call.sinks[head], top = sink > sums.top[r] ? sink : sums.top[r];
      keep = exp(sums.top[r] - top);
      total = total * keep + exp(sink - top);
    }
    const F32 factor = set(keep / (total > 1e-30f ? total : 1e-30f));
    float* out = call.out + (token * call.heads + head) * call.value_dim;
    for (int64_t d = 0; d < call.value_dim; d += 16) {
      const F32 x = load(sums.mixed + r * width + d) * factor;
      if (call.value_dim - d >= 16) {
        store(out + d, x);
      } else {
        float last[16];
        store(last, x);
        memcpy(out + d, last, (call.value_dim - d) * sizeof(float));
      }
    }
  }
}

void write(Type type, const float* row, int64_t dim, uint8_t* out, float* scale) {
  if (type == Type::kF32) {
    memcpy(out, row, dim * sizeof(float));
  } else if (type == Type::kF16) {
    for (int64_t d = 0; d < dim; d += 16) {
      const int64_t count = dim - d < 16 ? dim - d : 16;
      const F32 x = load_row<Type::kF32>(reinterpret_cast<const uint8_t*>(row + d), count);
      uint8_t halves[32];
      store_f16(halves, max(min(set(65504.0f), x), set(-65504.0f)));
      memcpy(out + 2 * d, halves, 2 * count);
    }
  } else if (type == Type::kBF16) {
    for (int64_t d = 0; d < dim; ++d) {
      uint32_t bits;
      memcpy(&bits, row + d, 4);
      const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
      const uint16_t rounded = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
      memcpy(out + 2 * d, &rounded, 2);
    }
  } else {
    float most = 0.0f;
    for (int64_t d = 0; d < dim; ++d) most = __builtin_fabsf(row[d]) > most ? __builtin_fabsf(row[d]) : most;
    const float factor = most > 0.0f ? 127.0f / most : 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
      const float x = __builtin_rintf(row[d] * factor);
      out[d] = static_cast<uint8_t>(static_cast<int8_t>(x > 127.0f ? 127.0f : x > -127.0f ? x : -127.0f));
    }
    *scale = most * (1.0f / 127.0f);
  }
}

}  // namespace

const AttentionKernels attention = {queries, part, merge, finish, write};

}  // namespace REALM_ISA
}  // namespace realm
