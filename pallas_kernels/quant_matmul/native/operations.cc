// The operations XLA calls: matmul with several weights that share x, matmul by one expert per row, and rows of a weight.

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "buffer.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace realm {
namespace {

const Kernels& kernels_of(int64_t isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::kernels;
  if (isa == 1) return avx2::kernels;
#endif
  return plain::kernels;
}

// A stack of weights as tiles, uint8 [..., tiles, bytes of a tile].
struct Weight {
  const Format* format;
  int64_t number;  // of the format
  const uint8_t* tiles;
  int64_t count, stride;  // tiles of one weight, bytes of a tile

  const uint8_t* tile(int64_t i) const { return tiles + i * stride; }
};

// Reads weight `index` of a stack; an error when the shapes do not belong together.
ffi::Error read(const ffi::AnyBuffer& tiles, int64_t index, int64_t number, int64_t n, int64_t k, Weight& out) {
  auto shape = tiles.dimensions();
  if (number < 0 || number >= kNumFormats || shape.size() < 2) return ffi::Error::InvalidArgument("no such format or weight");
  out.format = kFormats[number];
  out.number = number;
  out.stride = shape[shape.size() - 1];
  out.count = shape[shape.size() - 2];
  if (k % out.format->block || out.stride != k / out.format->block * out.format->bytes() || out.count != (n + kRows - 1) / kRows) {
    return ffi::Error::InvalidArgument("the weight's tiles do not have the shape of x and y");
  }
  int64_t stack = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) stack *= shape[i];
  index = std::min(std::max<int64_t>(index, 0), stack - 1);
  out.tiles = static_cast<const uint8_t*>(tiles.untyped_data()) + index * out.count * out.stride;
  return ffi::Error::Success();
}

// What a panel's `extra` holds for a weight.
struct Kind {
  int bias;
  bool mins, halves;

  explicit Kind(const Format& f) : bias(f.mins ? 0 : f.bias), mins(f.mins), halves(f.group < kGroup) {}
  bool operator==(const Kind& o) const { return bias == o.bias && mins == o.mins && halves == o.halves; }
};

// The quantized activations of a call, in panels of rows. order: which row of x is which of theirs, or null for 0, 1, ...;
// a panel never reaches over one of `cuts`, ascending, the first 0 and the last m.
class Activations {
 public:
  Activations(const float* x, int64_t k, const int64_t* order, const std::vector<int64_t>& cuts, const std::vector<Kind>& kinds)
      : x_(x), k_(k), order_(order) {
    for (size_t c = 0; c + 1 < cuts.size(); ++c) {
      first_panel.push_back(static_cast<int64_t>(starts_.size()));
      for (int64_t at = cuts[c]; at < cuts[c + 1]; at += kPanel) starts_.push_back(at);
    }
    const int64_t m = cuts.back();
    first_panel.push_back(static_cast<int64_t>(starts_.size()));
    starts_.push_back(m);
    for (size_t c = 0, p = 0; p + 1 < starts_.size(); ++p) {
      while (cuts[c + 1] <= starts_[p]) ++c;
      ends_.push_back(std::min(starts_[p] + kPanel, cuts[c + 1]));
    }
    const size_t panels = ends_.size();
    size_t bytes = Carver::bytes<int32_t>(m * k / 4) + Carver::bytes<float>(m * k / kGroup);
    for (const Kind& kind : kinds) bytes += Carver::bytes<int32_t>(m * k / (kind.halves ? 16 : kGroup)) + Carver::bytes<Panel>(panels);
    thread_local Buffer buffer;
    Carver carver(buffer.get(bytes));
    codes_ = carver.take<int32_t>(m * k / 4);
    scales_ = carver.take<float>(m * k / kGroup);
    for (const Kind& kind : kinds) {
      int32_t* extra = carver.take<int32_t>(m * k / (kind.halves ? 16 : kGroup));
      sets_.push_back({kind, extra, carver.take<Panel>(panels)});
    }
  }

  int64_t count() const { return static_cast<int64_t>(ends_.size()); }

  // Makes panel p.
  void quantize(const Kernels& kernels, int64_t p) const {
    const int64_t first = starts_[p], rows = ends_[p] - first, k = k_, g16 = k / 16, g32 = k / kGroup;
    thread_local Buffer buffer;
    Carver carver(buffer.get(Carver::bytes<int8_t>(k) + Carver::bytes<float>(g32) + Carver::bytes<int32_t>(g16)));
    int8_t* row_codes = carver.take<int8_t>(k);
    float* row_scales = carver.take<float>(g32);
    int32_t* sums = carver.take<int32_t>(g16);
    int32_t* codes = codes_ + first * k / 4;
    float* scales = scales_ + first * g32;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = order_ == nullptr ? first + r : order_[first + r];
      kernels.quantize(x_ + row * k, k, row_codes, row_scales, sums);
      for (int64_t i = 0; i < k / 4; ++i) memcpy(codes + i * rows + r, row_codes + 4 * i, 4);
      for (int64_t g = 0; g < g32; ++g) scales[g * rows + r] = row_scales[g];
      for (const Set& set : sets_) {
        int32_t* extra = set.extra + first * (set.kind.halves ? g16 : g32);
        for (int64_t g = 0; g < (set.kind.halves ? g16 : g32); ++g) {
          const int32_t sum = set.kind.halves ? sums[g] : sums[2 * g] + sums[2 * g + 1];
          if (set.kind.mins) {
            const float scaled = row_scales[set.kind.halves ? g / 2 : g] * static_cast<float>(sum);
            memcpy(extra + g * rows + r, &scaled, 4);
          } else {
            extra[g * rows + r] = -set.kind.bias * sum;
          }
        }
      }
    }
    for (const Set& set : sets_) {
      set.panels[p] = {static_cast<int>(rows), codes, scales, set.extra + first * (set.kind.halves ? g16 : g32)};
    }
  }

  const Panel* panels(const Format& f) const {
    for (const Set& set : sets_) {
      if (set.kind == Kind(f)) return set.panels;
    }
    return nullptr;
  }

  std::vector<int64_t> first_panel;  // of each cut

 private:
  struct Set {
    Kind kind;
    int32_t* extra;
    Panel* panels;
  };
  const float* x_;
  int64_t k_;
  const int64_t* order_;
  std::vector<int64_t> starts_, ends_;
  int32_t* codes_;
  float* scales_;
  std::vector<Set> sets_;
};

// `count` panels of m rows in all times tiles [from, to) of a weight. y_of(i): where the i-th row's outputs begin.
template <class OutOf>
void multiply(const Kernels& kernels, const Weight& w, int64_t n, int64_t k, const Panel* panels, int64_t count, int64_t m,
              int64_t from, int64_t to, const OutOf& y_of) {
  thread_local Buffer buffer;
  const int64_t per_row = w.format->group < kGroup ? k / 16 : k / kGroup;
  Carver carver(buffer.get(Carver::bytes<uint8_t>(k * kRows) + 2 * Carver::bytes<float>(per_row * kRows) +
                           Carver::bytes<float*>(m) + Carver::bytes<float>(m * kRows)));
  Ready ready{carver.take<uint8_t>(k * kRows), carver.take<float>(per_row * kRows), carver.take<float>(per_row * kRows)};
  float** out = carver.take<float*>(m);
  float* last = carver.take<float>(m * kRows);
  Direct direct = nullptr;
  if (m == 1 || m == 2 || m == 4 || m == 8) direct = kernels.direct[m == 1 ? 0 : m == 2 ? 1 : m == 4 ? 2 : 3][w.number];
  for (int64_t t = from; t < to; ++t) {
    const int64_t first = t * kRows;
    const bool whole = first + kRows <= n;
    for (int64_t i = 0; i < m; ++i) out[i] = whole ? y_of(i) + first : last + i * kRows;
    if (direct != nullptr) {
      direct(w.tile(t), k, panels[0], out);
    } else {
      kernels.ready[w.number](w.tile(t), k, ready);
      kernels.matrix(*w.format, ready, k, panels, count, out);
    }
    if (!whole) {
      for (int64_t i = 0; i < m; ++i) memcpy(y_of(i) + first, out[i], (n - first) * sizeof(float));
    }
  }
}

void add(std::vector<Kind>& kinds, const Kind& kind) {
  if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
}

// Tiles that one chunk of work holds, of a call that reads so many bytes: some eight chunks to a thread for balance, but
// long ones, since memory is slow to start (two threads that read 18 KiB at a time reached 65 % of what 256 KiB reach).
int64_t tiles_per_chunk(const Weight& w, int64_t bytes, int64_t threads) {
  const int64_t wanted = std::min<int64_t>(std::max<int64_t>(bytes / (8 * threads), 16 << 10), 256 << 10);
  return std::max<int64_t>(1, wanted / w.stride);
}

// Threads worth waking for so many bytes of weight read by so many rows: a thread costs as much as some 100 KB.
int64_t threads_for(int64_t bytes, int64_t m) { return bytes * (1 + m / 4) < (96 << 10) ? 1 : 0; }

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs weights, ffi::RemainingRets outs,
                  ffi::Span<const int64_t> formats, int64_t isa) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const size_t count = outs.size();
  if (weights.size() != 2 * count || formats.size() != count) return ffi::Error::InvalidArgument("one index and one weight per output");
  struct Job {
    Weight weight;
    int64_t n, per_chunk, first_chunk;
    float* y;
  };
  std::vector<Job> jobs(count);
  std::vector<Kind> kinds;
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    auto index = weights.get<ffi::Buffer<ffi::S32>>(2 * i);
    auto tiles = weights.get<ffi::AnyBuffer>(2 * i + 1);
    auto y = outs.get<ffi::Buffer<ffi::F32>>(i);
    if (!index.has_value()) return index.error();
    if (!tiles.has_value()) return tiles.error();
    if (!y.has_value()) return y.error();
    Job& job = jobs[i];
    job.n = (*y)->dimensions().back();
    job.y = (*y)->typed_data();
    if (ffi::Error e = read(*tiles, index->typed_data()[0], formats.begin()[i], job.n, k, job.weight); e.failure()) return e;
    bytes += job.weight.count * job.weight.stride;
    add(kinds, Kind(*job.weight.format));
  }
  int64_t chunks = 0;
  for (Job& job : jobs) {
    job.per_chunk = tiles_per_chunk(job.weight, bytes, pool.num_threads());
    job.first_chunk = chunks;
    chunks += (job.weight.count + job.per_chunk - 1) / job.per_chunk;
  }
  if (m == 0) return ffi::Error::Success();
  const Kernels& kernels = kernels_of(isa);
  Activations activations(x.typed_data(), k, nullptr, {0, m}, kinds);
  auto multiply_chunk = [&](int64_t chunk) {
    size_t i = count - 1;
    while (jobs[i].first_chunk > chunk) --i;
    const Job& job = jobs[i];
    const int64_t from = (chunk - job.first_chunk) * job.per_chunk, to = std::min(from + job.per_chunk, job.weight.count);
    multiply(kernels, job.weight, job.n, k, activations.panels(*job.weight.format), activations.count(), m, from, to,
             [&](int64_t r) { return job.y + r * job.n; });
  };
  parallel(pool, threads_for(bytes, m), Phase{activations.count(), [&](int64_t p) { activations.quantize(kernels, p); }},
           Phase{chunks, multiply_chunk});
  return ffi::Error::Success();
}

ffi::Error expert_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::S32> index,
                         ffi::AnyBuffer tiles, ffi::ResultBuffer<ffi::F32> y, int64_t format, int64_t isa) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  auto shape = tiles.dimensions();
  if (shape.size() < 3) return ffi::Error::InvalidArgument("the weights of experts have at least three axes");
  const int64_t experts = shape[shape.size() - 3];
  if (m == 0) return ffi::Error::Success();
  Weight first;
  if (ffi::Error e = read(tiles, index.typed_data()[0] * experts, format, n, k, first); e.failure()) return e;
  // Rows by expert, in their order.
  std::vector<int64_t> begin(experts + 1, 0), order(m);
  auto expert_of = [&](int64_t i) { return std::min<int64_t>(std::max(ids.typed_data()[i], 0), experts - 1); };
  for (int64_t i = 0; i < m; ++i) ++begin[expert_of(i) + 1];
  for (int64_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < m; ++i) order[next[expert_of(i)]++] = i;
  std::vector<int64_t> used;  // experts
  for (int64_t e = 0; e < experts; ++e) {
    if (begin[e + 1] > begin[e]) used.push_back(e);
  }
  const int64_t jobs = static_cast<int64_t>(used.size()), bytes = jobs * first.count * first.stride;
  const int64_t per_chunk = tiles_per_chunk(first, bytes, pool.num_threads());
  const int64_t chunks_each = (first.count + per_chunk - 1) / per_chunk;
  const Kernels& kernels = kernels_of(isa);
  Activations activations(x.typed_data(), k, order.data(), begin, {Kind(*first.format)});
  const Panel* panels = activations.panels(*first.format);
  auto multiply_chunk = [&](int64_t chunk) {
    const int64_t e = used[chunk / chunks_each], from = chunk % chunks_each * per_chunk;
    Weight w = first;
    w.tiles += e * w.count * w.stride;
    const int64_t* mine = order.data() + begin[e];
    const int64_t p = activations.first_panel[e];
    multiply(kernels, w, n, k, panels + p, activations.first_panel[e + 1] - p, begin[e + 1] - begin[e], from,
             std::min(from + per_chunk, w.count), [&](int64_t r) { return y->typed_data() + mine[r] * n; });
  };
  parallel(pool, threads_for(bytes, m / jobs), Phase{activations.count(), [&](int64_t p) { activations.quantize(kernels, p); }},
           Phase{jobs * chunks_each, multiply_chunk});
  return ffi::Error::Success();
}

// XLA's threads flush subnormals to zero; dequantization keeps them.
class KeepSubnormals {
 public:
#if defined(__SSE__)
  KeepSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Rows `ids` of a weight as float32, the same bits as the reference.
ffi::Error rows(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::S32> index, ffi::AnyBuffer tiles,
                ffi::ResultBuffer<ffi::F32> y, int64_t format, int64_t n, int64_t isa) {
  const int64_t count = ids.element_count(), k = y->dimensions().back();
  Weight w;
  if (ffi::Error e = read(tiles, index.typed_data()[0], format, n, k, w); e.failure()) return e;
  const Kernels& kernels = kernels_of(isa);
  const Format& f = *w.format;
  const int64_t columns = f.group < kGroup ? 16 : kGroup;
  auto some = [&](int64_t chunk) {
    KeepSubnormals keep;
    thread_local Buffer buffer;
    Carver carver(buffer.get(Carver::bytes<uint8_t>(k * kRows) + 2 * Carver::bytes<float>(k / columns * kRows)));
    Ready ready{carver.take<uint8_t>(k * kRows), carver.take<float>(k / columns * kRows), carver.take<float>(k / columns * kRows)};
    int64_t loaded = -1;
    for (int64_t i = chunk * kRows; i < std::min(count, (chunk + 1) * kRows); ++i) {
      const int64_t row = std::min<int64_t>(std::max(ids.typed_data()[i], 0), n - 1), t = row / kRows, r = row % kRows;
      if (t != loaded) kernels.ready[w.number](w.tile(t), k, ready);
      loaded = t;
      float* out = y->typed_data() + i * k;
      for (int64_t c = 0; c < k; ++c) {
        const int64_t g = c / columns;
        float value = static_cast<float>(static_cast<int>(ready.codes[c / 4 * 64 + 4 * r + c % 4]) - f.bias);
        value = ready.scales[g * kRows + r] * value;
        out[c] = f.mins ? value + ready.offsets[g * kRows + r] : value;
      }
    }
  };
  const int64_t chunks = (count + kRows - 1) / kRows;
  parallel(pool, count * k < (64 << 10) ? 1 : 0, Phase{chunks, some});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace realm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_quant_matmul, realm::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_quant_expert_matmul, realm::expert_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_quant_rows, realm::rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("isa"));

#pragma GCC visibility pop
