// The operations XLA calls: append rows to a pool of pages, and attention over it.

#include <algorithm>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "attention.h"
#include "buffer.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace realm {
namespace {

const AttentionKernels& kernels_of(int64_t isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::attention;
  if (isa == 1) return avx2::attention;
#endif
  return plain::attention;
}

// Subnormals are flushed to zero, on whichever thread a tile is computed.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// The arrays of a pool: keys, values where they are not a part of the keys, and the scales of either for int8.
struct Arrays {
  int64_t layers, pages, kv_heads;
  Pool pool;
};

ffi::Error read_pool(const std::vector<ffi::AnyBuffer>& arrays, int64_t layer, Arrays& out) {
  if (arrays.empty()) return ffi::Error::InvalidArgument("no pool");
  auto shape = arrays[0].dimensions();
  if (shape.size() != 5 || shape[3] != kPage) return ffi::Error::InvalidArgument("the pool's keys have another shape");
  switch (arrays[0].element_type()) {
    case ffi::F32: out.pool.type = Type::kF32; break;
    case ffi::F16: out.pool.type = Type::kF16; break;
    case ffi::BF16: out.pool.type = Type::kBF16; break;
    case ffi::S8: out.pool.type = Type::kI8; break;
    default: return ffi::Error::InvalidArgument("the pool's rows have another type");
  }
  const bool scaled = out.pool.type == Type::kI8;
  const size_t groups = arrays.size() / (scaled ? 2 : 1);
  if (groups < 1 || groups > 2 || groups * (scaled ? 2 : 1) != arrays.size()) return ffi::Error::InvalidArgument("the pool has other arrays");
  out.layers = shape[0];
  out.pages = out.pool.pages = shape[1];
  out.kv_heads = out.pool.kv_heads = shape[2];
  if (out.layers < 1 || out.pages < 1) return ffi::Error::InvalidArgument("the pool is empty");
  layer = std::min(std::max<int64_t>(layer, 0), out.layers - 1);
  const int64_t rows = out.pages * out.kv_heads * kPage;
  out.pool.values = {nullptr, nullptr, 0};
  for (size_t i = 0; i < groups; ++i) {
    Rows& to = i ? out.pool.values : out.pool.keys;
    auto dims = arrays[i].dimensions();
    if (dims.size() != 5 || !std::equal(dims.begin(), dims.begin() + 4, shape.begin()) || arrays[i].element_type() != arrays[0].element_type()) {
      return ffi::Error::InvalidArgument("the pool's values are unlike its keys");
    }
    to.dim = dims[4];
    to.data = static_cast<uint8_t*>(arrays[i].untyped_data()) + layer * rows * to.dim * size_of(out.pool.type);
    to.scales = nullptr;
    if (!scaled) continue;
    const ffi::AnyBuffer& scales = arrays[groups + i];
    if (scales.element_type() != ffi::F32 || static_cast<int64_t>(scales.element_count()) != out.layers * rows) {
      return ffi::Error::InvalidArgument("the pool's scales have another shape");
    }
    to.scales = static_cast<float*>(scales.untyped_data()) + layer * rows;
  }
  return ffi::Error::Success();
}

// The arguments from `first` on.
ffi::Error collect(const ffi::RemainingArgs& args, size_t first, std::vector<ffi::AnyBuffer>& out) {
  for (size_t i = first; i < args.size(); ++i) {
    auto array = args.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error();
    out.push_back(*array);
  }
  return ffi::Error::Success();
}

// The pool is both argument and result, the same memory: XLA copies it first where it must not be changed.
ffi::Error append(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> tables,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs, ffi::RemainingRets results,
                  int64_t isa) {
  std::vector<ffi::AnyBuffer> arrays;
  for (size_t i = 0; i < results.size(); ++i) {
    auto array = results.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error();
    arrays.push_back(**array);
  }
  Arrays a;
  if (ffi::Error e = read_pool(arrays, layer.typed_data()[0], a); e.failure()) return e;
  const Pool& pool = a.pool;
  const int64_t batch = k.dimensions()[0], tokens = k.dimensions()[1], table_pages = tables.dimensions()[1];
  const int64_t all = batch * tokens;
  if (static_cast<int64_t>(k.element_count()) != all * a.kv_heads * pool.keys.dim ||
      static_cast<int64_t>(v.element_count()) != all * a.kv_heads * pool.values.dim ||
      static_cast<int64_t>(positions.element_count()) != all || tables.dimensions()[0] != batch) {
    return ffi::Error::InvalidArgument("the new rows do not fit the pool");
  }
  const AttentionKernels& kernels = kernels_of(isa);
  const int64_t token_bytes = a.kv_heads * (pool.keys.dim + pool.values.dim) * 4;
  const int64_t each = std::max<int64_t>(1, (16 << 10) / token_bytes);
  auto some = [&](int64_t chunk) {
    FlushSubnormals flush;
    for (int64_t i = chunk * each; i < std::min(all, (chunk + 1) * each); ++i) {
      const int64_t position = positions.typed_data()[i];
      if (position < 0 || position / kPage >= table_pages) continue;
      const int64_t page = tables.typed_data()[i / tokens * table_pages + position / kPage];
      if (page < 0 || page >= a.pages) continue;
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const int64_t row = (page * a.kv_heads + h) * kPage + position % kPage;
        auto write = [&](const Rows& rows, const float* from) {
          kernels.write(pool.type, from + (i * a.kv_heads + h) * rows.dim, rows.dim, rows.data + row * rows.dim * size_of(pool.type),
                        rows.scales == nullptr ? nullptr : rows.scales + row);
        };
        write(pool.keys, k.typed_data());
        if (pool.values.dim) write(pool.values, v.typed_data());
      }
    }
  };
  parallel(threads, all * token_bytes < (128 << 10) ? 1 : 0, Phase{(all + each - 1) / each, some});
  return ffi::Error::Success();
}

// One thread's working memory, and the sums of a tile so far and of one part.
struct Room {
  Scratch scratch;
  Sums sums, more;

  Room(const Call& call, int64_t rows) {
    const int64_t width = call.width(), dim = call.pool.keys.dim;
    using C = Carver;
    thread_local Buffer buffer;
    Carver carver(buffer.get(C::bytes<float>(rows * dim) + C::bytes<float>(dim * kPage) + C::bytes<float>(kPage * width) +
                             C::bytes<float>(rows * kBlock) + 5 * C::bytes<float>(rows) + 2 * C::bytes<float>(rows * width)));
    scratch.q = carver.take<float>(rows * dim);
    scratch.keys = carver.take<float>(dim * kPage);
    scratch.values = carver.take<float>(kPage * width);
    scratch.scores = carver.take<float>(rows * kBlock);
    scratch.keep = carver.take<float>(rows);
    for (Sums* s : {&sums, &more}) {
      s->top = carver.take<float>(rows);
      s->total = carver.take<float>(rows);
      s->mixed = carver.take<float>(rows * width);
    }
  }
};

void clear(int64_t rows, int64_t width, const Sums& sums) {
  std::fill_n(sums.top, rows, kMasked);
  std::fill_n(sums.total, rows, 0.0f);
  std::fill_n(sums.mixed, rows * width, 0.0f);
}

void compute(ffi::ThreadPool& threads, const Call& call, int64_t most, const AttentionKernels& kernels);

ffi::Error attend(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> blocks, ffi::Buffer<ffi::S32> window, ffi::Buffer<ffi::F32> sinks,
                  ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> out, float scale, float softcap, int64_t isa) {
  std::vector<ffi::AnyBuffer> arrays;
  if (ffi::Error e = collect(rest, 0, arrays); e.failure()) return e;
  Arrays a;
  if (ffi::Error e = read_pool(arrays, layer.typed_data()[0], a); e.failure()) return e;
  if (q.dimensions().size() != 4 || out->dimensions().size() != 4 || tables.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("q, tables or the result have another shape");
  }
  Call call;
  call.pool = a.pool;
  call.q = q.typed_data();
  call.tables = tables.typed_data();
  call.positions = positions.typed_data();
  call.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  call.out = out->typed_data();
  call.batch = q.dimensions()[0];
  call.tokens = q.dimensions()[1];
  call.heads = q.dimensions()[2];
  call.group = call.heads / a.kv_heads;
  call.table_pages = tables.dimensions()[1];
  call.value_dim = out->dimensions()[3];
  call.window = window.typed_data()[0] > 0 ? window.typed_data()[0] : kEverything;
  call.scale = scale;
  call.softcap = softcap;
  if (q.dimensions()[3] != a.pool.keys.dim || call.group * a.kv_heads != call.heads || tables.dimensions()[0] != call.batch ||
      static_cast<int64_t>(positions.element_count()) != call.batch * call.tokens ||
      call.value_dim > (a.pool.values.dim ? a.pool.values.dim : a.pool.keys.dim) ||
      (call.sinks != nullptr && static_cast<int64_t>(sinks.element_count()) != call.heads)) {
    return ffi::Error::InvalidArgument("q, the pool and the result do not fit together");
  }
  if (call.batch * call.tokens * call.heads * call.value_dim == 0) return ffi::Error::Success();
  const int64_t most = std::min<int64_t>(blocks.typed_data()[0] * kBlock, call.table_pages * kPage);
  compute(threads, call, most, kernels_of(isa));
  return ffi::Error::Success();
}

// Attention over contiguous keys and values [batch, keys, kv_heads, dim]; a query at position p sees keys 0..p.
ffi::Error flash(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> positions,
                 ffi::Buffer<ffi::F32> sinks, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse, int64_t window,
                 float scale, float softcap, int64_t isa) {
  auto queries = q.dimensions(), keys = k.dimensions(), values = v.dimensions();
  if (queries.size() != 4 || keys.size() != 4 || values.size() != 4) return ffi::Error::InvalidArgument("q, k and v have four axes");
  Call call;
  switch (k.element_type()) {
    case ffi::F32: call.pool.type = Type::kF32; break;
    case ffi::F16: call.pool.type = Type::kF16; break;
    case ffi::BF16: call.pool.type = Type::kBF16; break;
    default: return ffi::Error::InvalidArgument("keys have another type");
  }
  call.pool.keys = {static_cast<uint8_t*>(k.untyped_data()), nullptr, keys[3]};
  call.pool.values = {static_cast<uint8_t*>(v.untyped_data()), nullptr, values[3]};
  call.pool.pages = 0;
  call.pool.kv_heads = keys[2];
  call.q = q.typed_data();
  call.tables = nullptr;
  call.positions = positions.typed_data();
  call.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  call.out = out->typed_data();
  call.lse = lse->typed_data();
  call.batch = queries[0];
  call.tokens = queries[1];
  call.heads = queries[2];
  call.sinks_stride = call.heads;
  call.keys = keys[1];
  call.table_pages = (keys[1] + kPage - 1) / kPage;
  call.value_dim = values[3];
  call.window = window > 0 ? window : kEverything;
  call.scale = scale;
  call.softcap = softcap;
  if (call.batch * call.tokens * call.heads * call.value_dim * call.keys == 0) return ffi::Error::InvalidArgument("nothing to attend over");
  call.group = call.heads / call.pool.kv_heads;
  const int64_t rows = call.batch * call.tokens;
  if (queries[3] != keys[3] || keys[0] != call.batch || call.group * call.pool.kv_heads != call.heads || values[0] != keys[0] ||
      values[1] != keys[1] || values[2] != keys[2] || v.element_type() != k.element_type() ||
      static_cast<int64_t>(positions.element_count()) != rows || static_cast<int64_t>(out->element_count()) != rows * call.heads * call.value_dim ||
      static_cast<int64_t>(lse->element_count()) != rows * call.heads ||
      (call.sinks != nullptr && static_cast<int64_t>(sinks.element_count()) != call.batch * call.heads)) {
    return ffi::Error::InvalidArgument("q, k, v and the results do not fit together");
  }
  compute(threads, call, call.keys, kernels_of(isa));
  return ffi::Error::Success();
}

// most: positions there are.
void compute(ffi::ThreadPool& threads, const Call& call, int64_t most, const AttentionKernels& kernels) {
  const int64_t rows = call.tokens * call.group, width = call.width(), kv_heads = call.pool.kv_heads;
  // Tiles hold whole tokens where a token's rows fit into one.
  const int64_t tile_rows = call.group >= kTileRows ? kTileRows : kTileRows / call.group * call.group;
  std::vector<Tile> tiles;
  int64_t reads = 0, supers = 0;  // positions that are read; super-blocks there are
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t first = 0; first < rows; first += tile_rows) {
      Tile tile{b, 0, first, std::min(tile_rows, rows - first), most, -1};
      for (int64_t t = first / call.group; t <= (first + tile.rows - 1) / call.group; ++t) {
        const int64_t position = std::min<int64_t>(call.positions[b * call.tokens + t], most - 1);
        if (position < 0) continue;
        tile.low = std::min(tile.low, std::max<int64_t>(0, position - call.window + 1));
        tile.high = std::max(tile.high, position);
      }
      if (tile.high >= 0) {
        reads += (tile.high - tile.low + 1) * kv_heads;
        supers = std::max(supers, tile.high / (kBlock * kSuper) + 1);
      }
      for (tile.kv_head = 0; tile.kv_head < kv_heads; ++tile.kv_head) tiles.push_back(tile);
    }
  }
  const int64_t count = static_cast<int64_t>(tiles.size()), in_tile = std::min(tile_rows, rows);
  const int64_t bytes = reads * (call.pool.keys.dim + call.pool.values.dim) * size_of(call.pool.type);
  const int64_t wanted = bytes * (1 + in_tile / 4) < (64 << 10) ? 1 : 0;
  const int64_t helpers = wanted == 1 ? 1 : threads.num_threads();
  auto span = [&](const Tile& tile, int64_t& begin, int64_t& end) {  // the super-blocks a tile sees
    begin = tile.low / (kBlock * kSuper);
    end = tile.high < 0 ? begin : tile.high / (kBlock * kSuper) + 1;
  };
  if (helpers == 1 || supers <= 1 || count >= 8 * helpers) {  // a tile each
    parallel(threads, wanted, Phase{count, [&](int64_t i) {
               FlushSubnormals flush;
               // The longest first, so that the last to finish is short.
               const Tile& tile = tiles[count - 1 - i];
               const Room room(call, in_tile);
               clear(tile.rows, width, room.sums);
               kernels.queries(call, tile, room.scratch);
               int64_t begin, end;
               span(tile, begin, end);
               for (int64_t s = begin; s < end; ++s) {
                 kernels.part(call, tile, s, room.scratch, room.more);
                 kernels.merge(tile.rows, width, room.sums, room.more);
               }
               kernels.finish(call, tile, room.sums);
             }});
    return;
  }
  // Few tiles: their super-blocks apart, then together, in order.
  thread_local Buffer buffer;
  const int64_t each = in_tile * (width + 2);
  float* parts = reinterpret_cast<float*>(buffer.get(count * supers * each * sizeof(float)));
  auto part_of = [&, parts](int64_t tile, int64_t super) {
    float* at = parts + (tile * supers + super) * each;
    return Sums{at, at + in_tile, at + 2 * in_tile};
  };
  parallel(threads, 0,
           Phase{count * supers, [&](int64_t i) {
                   const int64_t number = i / supers, super = i % supers;
                   const Tile& tile = tiles[number];
                   int64_t begin, end;
                   span(tile, begin, end);
                   if (super < begin || super >= end) return;
                   FlushSubnormals flush;
                   const Room room(call, in_tile);
                   kernels.queries(call, tile, room.scratch);
                   kernels.part(call, tile, super, room.scratch, part_of(number, super));
                 }},
           Phase{count, [&](int64_t i) {
                   FlushSubnormals flush;
                   const Room room(call, in_tile);
                   clear(tiles[i].rows, width, room.sums);
                   int64_t begin, end;
                   span(tiles[i], begin, end);
                   for (int64_t s = begin; s < end; ++s) kernels.merge(tiles[i].rows, width, room.sums, part_of(i, s));
                   kernels.finish(call, tiles[i], room.sums);
                 }});
}

}  // namespace
}  // namespace realm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_paged_append, realm::append,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_paged_attention, realm::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_flash_attention, realm::flash,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("isa"));

#pragma GCC visibility pop
