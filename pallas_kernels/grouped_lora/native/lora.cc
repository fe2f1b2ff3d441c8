// The operation XLA calls: adapters of several linear layers that share x, one adapter per row.

#include "lora.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace realm {
namespace {

constexpr int64_t kRowChunk = 32;           // rows of one chunk of work, at most
constexpr int64_t kChunkBytes = 32 << 10;   // of adapter that one chunk of work reads, about
constexpr int64_t kManyRows = 16;           // of a group: from there on chunks are cut by rows, so that x is read once
constexpr int64_t kAloneBytes = 96 << 10;   // of adapter, times rows: below it no other thread is woken

const LoraKernels& kernels_of(int64_t isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::lora_kernels;
  if (isa == 1) return avx2::lora_kernels;
#endif
  return plain::lora_kernels;
}

// One of the two matrices of each adapter, [L, S, rows, columns].
struct Matrix {
  const uint8_t* data = nullptr;  // of the layer at hand
  int type = 0;
  int64_t rows = 0, columns = 0, size = 0;  // size: bytes of an element

  const uint8_t* row(int64_t slot, int64_t i) const { return data + (slot * rows + i) * columns * size; }
};

ffi::Error read(const ffi::AnyBuffer& from, int64_t layer, int64_t slots, int64_t columns, Matrix& out) {
  auto shape = from.dimensions();
  switch (from.element_type()) {
    case ffi::F32: out.type = kAdapterF32; break;
    case ffi::BF16: out.type = kAdapterBF16; break;
    case ffi::F16: out.type = kAdapterF16; break;
    default: return ffi::Error::InvalidArgument("adapters are float32, bfloat16 or float16");
  }
  if (shape.size() != 4 || shape[0] < 1 || shape[1] != slots || shape[3] != columns) {
    return ffi::Error::InvalidArgument("the adapters' shapes do not fit together");
  }
  out.size = out.type == kAdapterF32 ? 4 : 2;
  out.rows = shape[2];
  out.columns = columns;
  layer = std::min(std::max<int64_t>(layer, 0), shape[0] - 1);
  out.data = static_cast<const uint8_t*>(from.untyped_data()) + layer * slots * out.rows * columns * out.size;
  return ffi::Error::Success();
}

struct Linear {
  Matrix a, b;
  const float* scales;
  float* y;
  float* t;               // [active rows, R], in the order of the groups
  int64_t ranks_each;     // ranks of one chunk of work
  int64_t outputs_each;   // outputs of one chunk of work
};

struct Group {  // rows of one slot, or some of them
  int64_t slot, begin, count;
};

// What one chunk of work does: ranks or outputs [from, to) of a linear, for a group.
struct Chunk {
  const Linear* linear;
  const Group* group;
  int64_t from, to;
};

int64_t bounded(int64_t bytes_of_one, int64_t step) { return std::max<int64_t>(1, kChunkBytes / (bytes_of_one * step)) * step; }

ffi::Error grouped_lora(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> layer,
                        ffi::RemainingArgs rest, ffi::RemainingRets outs, int64_t isa) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const size_t count = outs.size();
  if (rest.size() != 4 * count || static_cast<int64_t>(slots.element_count()) != m || layer.element_count() != 1) {
    return ffi::Error::InvalidArgument("a slot per row, a layer, and base, a, b and scales per output");
  }
  // Bases first: they are all there is to do when no row has an adapter. They are the results' own buffers.
  int64_t slot_count = 0;
  for (size_t i = 0; i < count; ++i) {
    auto base = rest.get<ffi::Buffer<ffi::F32>>(4 * i);
    auto y = outs.get<ffi::Buffer<ffi::F32>>(i);
    auto scales = rest.get<ffi::Buffer<ffi::F32>>(4 * i + 3);
    if (!base.has_value()) return base.error();
    if (!y.has_value()) return y.error();
    if (!scales.has_value()) return scales.error();
    if (base->element_count() != (*y)->element_count()) return ffi::Error::InvalidArgument("base has not the shape of the result");
    if (base->typed_data() != (*y)->typed_data()) memcpy((*y)->typed_data(), base->typed_data(), (*y)->size_bytes());
    slot_count = scales->element_count();
  }
  const int32_t* slot_of = slots.typed_data();
  auto has = [&](int64_t i) { return slot_of[i] >= 0 && slot_of[i] < slot_count; };
  int64_t active = 0;
  for (int64_t i = 0; i < m; ++i) active += has(i);
  if (active == 0) return ffi::Error::Success();

  // Rows by slot, in their order.
  std::vector<int32_t> begin(slot_count + 1, 0), rows(active);
  for (int64_t i = 0; i < m; ++i) {
    if (has(i)) ++begin[slot_of[i] + 1];
  }
  for (int64_t s = 0; s < slot_count; ++s) begin[s + 1] += begin[s];
  std::vector<Group> groups;
  for (int64_t s = 0; s < slot_count; ++s) {
    for (int64_t i = begin[s]; i < begin[s + 1]; i += kRowChunk) {
      groups.push_back({s, i, std::min<int64_t>(kRowChunk, begin[s + 1] - i)});
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    if (has(i)) rows[begin[slot_of[i]]++] = static_cast<int32_t>(i);
  }

  std::vector<Linear> linears(count);
  size_t t_bytes = 0;
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    Linear& one = linears[i];
    auto a = rest.get<ffi::AnyBuffer>(4 * i + 1);
    auto b = rest.get<ffi::AnyBuffer>(4 * i + 2);
    auto scales = rest.get<ffi::Buffer<ffi::F32>>(4 * i + 3);
    auto y = outs.get<ffi::Buffer<ffi::F32>>(i);
    if (!a.has_value()) return a.error();
    if (!b.has_value()) return b.error();
    if (static_cast<int64_t>(scales->element_count()) != slot_count) return ffi::Error::InvalidArgument("linears differ in slots");
    if (ffi::Error e = read(*a, layer.typed_data()[0], slot_count, k, one.a); e.failure()) return e;
    if (ffi::Error e = read(*b, layer.typed_data()[0], slot_count, one.a.rows, one.b); e.failure()) return e;
    if (static_cast<int64_t>((*y)->element_count()) != m * one.b.rows) return ffi::Error::InvalidArgument("result and b differ in outputs");
    one.scales = scales->typed_data();
    one.y = (*y)->typed_data();
    one.ranks_each = bounded(k * one.a.size, 4);
    one.outputs_each = bounded(one.a.rows * one.b.size, kLoraColumns);
    t_bytes += Carver::bytes<float>(active * one.a.rows);
    bytes += one.a.rows * (k * one.a.size + one.b.rows * one.b.size);
  }
  bytes *= static_cast<int64_t>(groups.size());

  thread_local Buffer t_buffer;
  Carver carver(t_buffer.get(t_bytes));
  std::vector<Chunk> shrinks, expands;
  for (Linear& one : linears) {
    one.t = carver.take<float>(active * one.a.rows);
    for (const Group& group : groups) {
      const int64_t ranks = group.count < kManyRows ? one.ranks_each : one.a.rows;
      for (int64_t r = 0; r < one.a.rows; r += ranks) {
        shrinks.push_back({&one, &group, r, std::min(r + ranks, one.a.rows)});
      }
      for (int64_t c = 0; c < one.b.rows; c += one.outputs_each) {
        expands.push_back({&one, &group, c, std::min(c + one.outputs_each, one.b.rows)});
      }
    }
  }
  const LoraKernels& kernels = kernels_of(isa);
  auto shrink = [&](int64_t i) {
    const auto& [one, group, from, to] = shrinks[i];
    const int64_t rank = one->a.rows;
    kernels.shrink[one->a.type](x.typed_data(), k, rows.data() + group->begin, group->count, one->a.row(group->slot, from),
                                to - from, one->scales[group->slot], one->t + group->begin * rank + from, rank);
  };
  auto expand = [&](int64_t i) {
    const auto& [one, group, from, to] = expands[i];
    const int64_t rank = one->a.rows;
    thread_local Buffer buffer;
    uint8_t* scratch = buffer.get((rank + 15) / 16 * 16 * kLoraColumns * sizeof(float));
    kernels.expand[one->b.type](one->t + group->begin * rank, rank, rows.data() + group->begin, group->count,
                                one->b.row(group->slot, from), to - from, one->y + from, one->b.rows, scratch);
  };
  const int64_t rows_each = active / static_cast<int64_t>(groups.size());
  parallel(pool, bytes * (1 + rows_each / 4) < kAloneBytes ? 1 : 0, Phase{static_cast<int64_t>(shrinks.size()), shrink},
           Phase{static_cast<int64_t>(expands.size()), expand});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace realm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_grouped_lora, realm::grouped_lora,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("isa"));

#pragma GCC visibility pop
