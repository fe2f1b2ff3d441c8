// What attention over a pool of pages is made of, and what the code of each instruction set offers.
#pragma once

#include <cstdint>

namespace realm {

constexpr int64_t kPage = 64;          // positions
constexpr int64_t kBlock = 2 * kPage;  // positions whose scores are made at once
constexpr int64_t kSuper = 4;          // blocks that make a partial result
constexpr int64_t kTileRows = 64;      // most query rows that share the reading of a block
constexpr float kMasked = -1e30f;      // finite, so that what sees nothing adds exact zeros rather than NaN

enum class Type { kF32, kF16, kBF16, kI8 };

constexpr int64_t size_of(Type type) { return type == Type::kF32 ? 4 : type == Type::kI8 ? 1 : 2; }

// Rows [layers, pages, kv_heads, kPage, dim] of one layer: `data` is where it begins. scales: of int8 rows. Without page
// tables: rows [batch, keys, kv_heads, dim] of contiguous sequences.
struct Rows {
  uint8_t* data;
  float* scales;
  int64_t dim;
};

struct Pool {
  Type type;
  Rows keys, values;  // values.dim 0: values are the first elements of the keys
  int64_t pages, kv_heads;
};

// One call. Row r of a key/value head is query head kv_head * group + r % group of token r / group.
struct Call {
  Pool pool;
  const float* q;           // [batch, tokens, heads, dim]
  const int32_t* tables;    // [batch, table_pages], or null for contiguous sequences
  const int32_t* positions; // [batch, tokens]
  const float* sinks;       // [heads], or [batch, heads] with sinks_stride = heads, or null
  float* out;               // [batch, tokens, heads, value_dim]
  float* lse = nullptr;     // [batch, heads, tokens], -inf where nothing is seen, or null
  int64_t sinks_stride = 0, keys = 0;  // keys: of each contiguous sequence
  int64_t batch, tokens, heads, group, table_pages, value_dim;
  int64_t window;           // positions a query sees; kEverything for all
  float scale, softcap;

  int64_t width() const { return (value_dim + 15) / 16 * 16; }  // of a row of sums
};

constexpr int64_t kEverything = int64_t{1} << 40;

// Query rows that are computed together: `rows` of them from `first` on, which see positions low .. high at most
// (high < low: none).
struct Tile {
  int64_t batch, kv_head, first, rows, low, high;
};

// Per row: the largest score, the sum of weights, and the weighted values [rows][width].
struct Sums {
  float* top;
  float* total;
  float* mixed;
};

// A thread's working memory for one tile.
struct Scratch {
  float* q;       // [kTileRows][dim], scaled
  float* keys;    // [dim][kPage]
  float* values;  // [kPage][width]
  float* scores;  // [kTileRows][kBlock]
  float* keep;    // [kTileRows]
};

struct AttentionKernels {
  // The tile's queries, scaled, into scratch.q.
  void (*queries)(const Call& call, const Tile& tile, const Scratch& scratch);
  // Sums over super-block `super` alone.
  void (*part)(const Call& call, const Tile& tile, int64_t super, const Scratch& scratch, const Sums& sums);
  // sums = those of both.
  void (*merge)(int64_t rows, int64_t width, const Sums& sums, const Sums& more);
  // Takes in the sinks, normalises, writes the result.
  void (*finish)(const Call& call, const Tile& tile, const Sums& sums);
  // A float32 row [dim] to a row of the pool; the scale is written for int8.
  void (*write)(Type type, const float* row, int64_t dim, uint8_t* out, float* scale);
};

namespace plain { extern const AttentionKernels attention; }
#if defined(__x86_64__)
namespace avx2 { extern const AttentionKernels attention; }
namespace avx512 { extern const AttentionKernels attention; }
#endif

}  // namespace realm
