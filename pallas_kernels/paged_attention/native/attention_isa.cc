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

// Sixteen numbers of a row; the scale of int8 rows is the caller's.
template <Type type>
REALM_INLINE F32 load_row(const uint8_t* p) {
  if (type == Type::kF32) return load(reinterpret_cast<const float*>(p));
  if (type == Type::kF16) return load_f16(p);
  if (type == Type::kBF16) return load_bf16(p);
  return to_float(load_i8(p));
}

// The first `count` of sixteen, zeros behind them, reading no further.
template <Type type>
REALM_INLINE F32 load_row(const uint8_t* p, int64_t count) {
  if (count >= 16) return load_row<type>(p);
  alignas(64) uint8_t copy[64] = {};
  memcpy(copy, p, count * size_of(type));
  return load_row<type>(copy);
}

#if defined(REALM_ISA_AVX512)
template <Type type>
REALM_INLINE F32 widen(__m256i x) {
  if (type == Type::kF16) return {_mm512_cvtph_ps(x)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
#endif

// Rows to multiply by: `bytes` apart, a scale each for int8.
struct Matrix {
  const uint8_t* data;
  int64_t bytes;
  const float* scales;
};

// Memory that is read soon. The processor cannot know where a sequence's next page lies, so it is asked for, line by line
// between the sums over this one: all at once would fill the queue of misses and wait.
struct Ahead {
  const uint8_t* next;
  const uint8_t* end;

  explicit Ahead(const Matrix& page) : next(page.data), end(page.data + kPage * page.bytes) {}
  Ahead() : next(nullptr), end(nullptr) {}
  REALM_INLINE void ask(int64_t bytes) {
    const uint8_t* last = end - next < bytes ? end : next + bytes;
    for (; next < last; next += 64) __builtin_prefetch(next, 0, 2);  // to the second level: the first has no room
  }
};

// c [R][16 C] = a [R][depth] times b [depth][16 C], plus c times keep [R] where keep is not null.
template <Type type, int R, int C>
void product(int64_t depth, const float* a, int64_t lda, const Matrix& b, const float* keep, float* c, int64_t ldc,
             Ahead& ahead) {
  F32 sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sums[r][j] = keep == nullptr ? set(0.0f) : load(c + r * ldc + 16 * j) * set(keep[r]);
  }
  const uint8_t* next = b.data;
  for (int64_t i = 0; i < depth; ++i, next += b.bytes) {
    F32 row[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      row[j] = load_row<type>(next + 16 * j * size_of(type));
      if (type == Type::kI8) row[j] = row[j] * set(b.scales[i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 x = set(a[r * lda + i]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] = fma(x, row[j], sums[r][j]);
    }
    ahead.ask(b.bytes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(c + r * ldc + 16 * j, sums[r][j]);
  }
}

using Product = void (*)(int64_t, const float*, int64_t, const Matrix&, const float*, float*, int64_t, Ahead&);

template <Type type, int R>
Product product_with(int columns) {
  if constexpr (kColumns > 1) {
    if (columns == 2) return product<type, R, 2>;
  }
  if constexpr (kColumns > 2) {
    if (columns == 3) return product<type, R, 3>;
    if (columns == 4) return product<type, R, 4>;
  }
  return product<type, R, 1>;
}

template <Type type>
Product product_for(int rows, int columns) {
  if constexpr (kRows > 1) {
    if (rows == 2) return product_with<type, 2>(columns);
    if (rows == 3) return product_with<type, 3>(columns);
  }
  if constexpr (kRows > 3) {
    if (rows == 4) return product_with<type, 4>(columns);
    if (rows == 5) return product_with<type, 5>(columns);
    if (rows == 6) return product_with<type, 6>(columns);
  }
  return product_with<type, 1>(columns);
}

// The same for any number of rows and vectors of columns.
template <Type type>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const Matrix& b, const float* keep,
              float* c, int64_t ldc, Ahead& ahead) {
  for (int64_t j = 0; j < columns; j += kColumns) {
    const int wide = static_cast<int>(columns - j < kColumns ? columns - j : kColumns);
    const Matrix part{b.data + 16 * j * size_of(type), b.bytes, b.scales};
    for (int64_t r = 0; r < rows; r += kRows) {
      const int high = static_cast<int>(rows - r < kRows ? rows - r : kRows);
      product_for<type>(high, wide)(depth, a + r * lda, lda, part, keep == nullptr ? nullptr : keep + r, c + r * ldc + 16 * j, ldc,
                              ahead);
    }
  }
}

// The rows of one key/value head in page `index` of a sequence.
Matrix page_of(const Call& call, const Rows& rows, const Tile& tile, int64_t index) {
  if (call.tables == nullptr) {
    const int64_t bytes = rows.dim * size_of(call.pool.type), first = tile.batch * call.keys + index * kPage;
    return {rows.data + (first * call.pool.kv_heads + tile.kv_head) * bytes, call.pool.kv_heads * bytes, nullptr};
  }
  int64_t number = call.tables[tile.batch * call.table_pages + index];
  number = number < 0 ? 0 : number >= call.pool.pages ? call.pool.pages - 1 : number;
  const int64_t first = (number * call.pool.kv_heads + tile.kv_head) * kPage, bytes = rows.dim * size_of(call.pool.type);
  return {rows.data + first * bytes, bytes, rows.scales == nullptr ? nullptr : rows.scales + first};
}

// Sixteen numbers of each of sixteen rows, `bytes` apart, to keys [16][kPage].
template <Type type>
REALM_INLINE void turn(const uint8_t* first, int64_t bytes, const float* scales, float* keys) {
#if defined(REALM_ISA_AVX512)
  if constexpr (type == Type::kF16 || type == Type::kBF16) {  // shuffled before they are widened
#pragma GCC unroll 2
    for (int d = 0; d < 16; d += 8) {
      __m512i pairs[4];
      turn_halves(first + 2 * d, bytes, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(keys + (d + 2 * i) * kPage, widen<type>(_mm512_castsi512_si256(pairs[i])));
        store(keys + (d + 2 * i + 1) * kPage, widen<type>(_mm512_extracti64x4_epi64(pairs[i], 1)));
      }
    }
    return;
  }
#endif
  F32 square[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    square[i] = load_row<type>(first + i * bytes);
    if (type == Type::kI8) square[i] = square[i] * set(scales[i]);
  }
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(keys + i * kPage, square[i]);
}

// The same for `count` numbers of rows [begin, end), the other columns zero.
template <Type type>
__attribute__((noinline)) void turn_some(const uint8_t* first, int64_t bytes, const float* scales, int64_t begin, int64_t end, int64_t count,
                                         float* keys) {
  F32 square[16];
  for (int64_t i = 0; i < 16; ++i) {
    square[i] = set(0.0f);
    if (i < begin || i >= end) continue;
    square[i] = load_row<type>(first + i * bytes, count);
    if (type == Type::kI8) square[i] = square[i] * set(scales[i]);
  }
  transpose(square);
  for (int64_t i = 0; i < 16 && i < count; ++i) store(keys + i * kPage, square[i]);
}

// Rows [low, high) of a page as columns of keys [dim][kPage]; zeros in the other columns of the sixteens that hold them.
template <Type type>
void load_keys(const Matrix& page, int64_t dim, int64_t low, int64_t high, float* keys, Ahead& ahead) {
  for (int64_t from = low / 16 * 16; from < high; from += 16) {
    const uint8_t* first = page.data + from * page.bytes;
    const float* scales = type == Type::kI8 ? page.scales + from : nullptr;
    const int64_t begin = low > from ? low - from : 0, end = high - from < 16 ? high - from : 16;
    for (int64_t d = 0; d < dim; d += 16) {
      float* out = keys + d * kPage + from;
      if (begin == 0 && end == 16 && dim - d >= 16) {
        turn<type>(first + d * size_of(type), page.bytes, scales, out);
      } else {
        turn_some<type>(first + d * size_of(type), page.bytes, scales, begin, end, dim - d, out);
      }
      ahead.ask(16 * 16 * size_of(type));
    }
  }
}

// Rows [low, high) of a page to values [high - low][width], zeros behind value_dim.
template <Type type>
void load_values(const Matrix& page, int64_t value_dim, int64_t width, int64_t low, int64_t high, float* values) {
  for (int64_t at = low; at < high; ++at, values += width) {
    const uint8_t* row = page.data + at * page.bytes;
    const F32 scale = set(type == Type::kI8 ? page.scales[at] : 1.0f);
    for (int64_t d = 0; d < width; d += 16) {
      const F32 x = load_row<type>(row + d * size_of(type), value_dim - d);
      store(values + d, type == Type::kI8 ? x * scale : x);
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
  const Rows& values = call.pool.values.dim ? call.pool.values : call.pool.keys;
  // Few rows read values where they lie; many share a float32 copy.
  const bool direct = tile.rows <= 2 * kRows && width == call.value_dim;
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
    const int64_t first_page = low / kPage, last_page = (high - 1) / kPage;
    // What of a page's rows is seen.
    auto page_low = [&](int64_t i) { return i == first_page ? low - i * kPage : 0; };
    auto page_high = [&](int64_t i) { return i == last_page ? high - i * kPage : kPage; };
    for (int64_t i = first_page; i <= last_page; ++i) {
      const Matrix page = page_of(call, call.pool.keys, tile, 2 * block + i);
      Ahead ahead(page_of(call, values, tile, 2 * block + i));
      load_keys<type>(page, dim, page_low(i), page_high(i), scratch.keys, ahead);
      const int64_t from = page_low(i) / 16 * 16, columns = (page_high(i) + 15) / 16 - from / 16;
      const Matrix turned{reinterpret_cast<const uint8_t*>(scratch.keys + from), kPage * 4, nullptr};
      multiply<Type::kF32>(tile.rows, columns, dim, scratch.q, dim, turned, nullptr, scratch.scores + i * kPage + from, kBlock,
                           ahead);
    }
    const int64_t from = low / 16 * 16, to = (high + 15) / 16 * 16;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t position = call.positions[tile.batch * call.tokens + (tile.first + r) / call.group];
      const int64_t first = position < 0 ? kBlock : position - call.window + 1 - begin;
      const int64_t end = (position < tile.high ? position : tile.high) + 1 - begin;  // a position may lie behind all rows
      scratch.keep[r] = soften(scratch.scores + r * kBlock, from, to, first > 0 ? first : 0, end, call.softcap,
                               sums.top[r], sums.total[r]);
    }
    for (int64_t i = first_page; i <= last_page; ++i) {
      const Matrix page = page_of(call, values, tile, 2 * block + i);
      const int64_t at = page_low(i), depth = page_high(i) - at;
      const bool more = begin + kBlock + i * kPage <= tile.high;  // the next block has such a page
      Ahead ahead = more ? Ahead(page_of(call, call.pool.keys, tile, 2 * block + 2 + i)) : Ahead();
      const float* weights = scratch.scores + i * kPage + at;
      if (direct) {
        const Matrix rows{page.data + at * page.bytes, page.bytes, page.scales == nullptr ? nullptr : page.scales + at};
        multiply<type>(tile.rows, width / 16, depth, weights, kBlock, rows, scratch.keep, sums.mixed, width, ahead);
      } else {
        load_values<type>(page, call.value_dim, width, at, at + depth, scratch.values);
        const Matrix rows{reinterpret_cast<const uint8_t*>(scratch.values), width * 4, nullptr};
        multiply<Type::kF32>(tile.rows, width / 16, depth, weights, kBlock, rows, scratch.keep, sums.mixed, width, ahead);
      }
      for (int64_t r = 0; r < tile.rows; ++r) scratch.keep[r] = 1.0f;  // the second page adds to the first
    }
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
    float total = sums.total[r], top = sums.top[r], keep = 1.0f;
    const bool nothing = total == 0.0f;
    if (call.sinks != nullptr) {  // a row of its own whose value is zero
      const float sink = call.sinks[tile.batch * call.sinks_stride + head];
      top = sink > top ? sink : top;
      keep = exp(sums.top[r] - top);
      total = total * keep + exp(sink - top);
    }
    if (call.lse != nullptr) {
      const int64_t at = (tile.batch * call.heads + head) * call.tokens + row / call.group;
      call.lse[at] = nothing ? -__builtin_inff() : top + __builtin_logf(total);
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
