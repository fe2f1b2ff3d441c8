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

int bias_number(int bias) {
  return static_cast<int>(std::find(std::begin(kBiases), std::end(kBiases), bias) - std::begin(kBiases));
}

// Quantized activations of a call.
class Activations {
 public:
  // biases: of all weights x meets, as numbers in kBiases.
  Activations(const float* x, int64_t m, int64_t k, const std::vector<int>& biases) : x_(x), m_(m), k_(k) {
    const int64_t g16 = k / 16;
    size_t bytes = Carver::bytes<int8_t>(m * k) + Carver::bytes<float>(m * k / kGroup) + Carver::bytes<float>(m * g16) +
                   Carver::bytes<int32_t>(m * g16) * (1 + biases.size()) + Carver::bytes<Row>(m) * biases.size();
    thread_local Buffer buffer;
    Carver carver(buffer.get(bytes));
    codes_ = carver.take<int8_t>(m * k);
    scales_ = carver.take<float>(m * k / kGroup);
    sums_ = carver.take<float>(m * g16);
    sums16_ = carver.take<int32_t>(m * g16);
    for (int b : biases) {
      sets_.push_back({b, carver.take<int32_t>(m * g16), carver.take<Row>(m)});
    }
  }

  void quantize(const Kernels& kernels, int64_t i) const {
    const int64_t g16 = k_ / 16;
    kernels.quantize(x_ + i * k_, k_, codes_ + i * k_, scales_ + i * k_ / kGroup, sums_ + i * g16, sums16_ + i * g16);
    for (const Set& set : sets_) {
      int32_t* init = set.init + i * g16;
      const int32_t* sums = sums16_ + i * g16;
      for (int64_t g = 0; g < g16; ++g) init[g] = -kBiases[set.bias] * sums[g];
      set.rows[i] = {codes_ + i * k_, scales_ + i * k_ / kGroup, sums_ + i * g16, init};
    }
  }

  const Row* rows(int bias) const {
    for (const Set& set : sets_) {
      if (set.bias == bias) return set.rows;
    }
    return nullptr;
  }

 private:
  struct Set {
    int bias;
    int32_t* init;
    Row* rows;
  };
  const float* x_;
  int64_t m_, k_;
  int8_t* codes_;
  float *scales_, *sums_;
  int32_t* sums16_;
  std::vector<Set> sets_;
};

// m rows times tiles [from, to) of a weight. row_of(i): the i-th row's quantized form; y_of(i): where its outputs begin.
template <class RowOf, class OutOf>
void multiply(const Kernels& kernels, const Weight& w, int64_t n, int64_t k, int64_t m, int64_t from, int64_t to,
              const RowOf& row_of, const OutOf& y_of) {
  thread_local Buffer buffer;
  if (m == 1) {
    alignas(64) float last[kRows];
    for (int64_t t = from; t < to; ++t) {
      const int64_t first = t * kRows;
      const bool whole = first + kRows <= n;
      kernels.vector[w.number](w.tile(t), k, row_of(0), whole ? y_of(0) + first : last);
      if (!whole) memcpy(y_of(0) + first, last, (n - first) * sizeof(float));
    }
    return;
  }
  const int64_t per_row = w.format->group < kGroup ? k / 16 : k / kGroup;
  Carver carver(buffer.get(Carver::bytes<uint8_t>(k * kRows) + 2 * Carver::bytes<float>(per_row * kRows) + Carver::bytes<Row>(m) +
                           Carver::bytes<float*>(m) + Carver::bytes<float>(m * kRows)));
  Ready ready{carver.take<uint8_t>(k * kRows), carver.take<float>(per_row * kRows), carver.take<float>(per_row * kRows)};
  Row* rows = carver.take<Row>(m);
  float** out = carver.take<float*>(m);
  float* last = carver.take<float>(m * kRows);
  for (int64_t i = 0; i < m; ++i) rows[i] = row_of(i);
  for (int64_t t = from; t < to; ++t) {
    const int64_t first = t * kRows;
    const bool whole = first + kRows <= n;
    for (int64_t i = 0; i < m; ++i) out[i] = whole ? y_of(i) + first : last + i * kRows;
    kernels.ready[w.number](w.tile(t), k, ready);
    kernels.matrix(*w.format, ready, k, rows, m, out);
    if (!whole) {
      for (int64_t i = 0; i < m; ++i) memcpy(y_of(i) + first, out[i], (n - first) * sizeof(float));
    }
  }
}

// Tiles that one chunk of work holds: about 32 KiB of weight for one row, fewer for more rows.
int64_t tiles_per_chunk(const Weight& w, int64_t m) {
  return std::max<int64_t>(1, (32 << 10) / (w.stride * std::max<int64_t>(1, m)));
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
    const Row* rows;
  };
  std::vector<Job> jobs(count);
  std::vector<int> biases;
  int64_t chunks = 0, bytes = 0;
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
    job.per_chunk = tiles_per_chunk(job.weight, m);
    job.first_chunk = chunks;
    chunks += (job.weight.count + job.per_chunk - 1) / job.per_chunk;
    bytes += job.weight.count * job.weight.stride;
    int bias = bias_number(job.weight.format->bias);
    if (std::find(biases.begin(), biases.end(), bias) == biases.end()) biases.push_back(bias);
  }
  if (m == 0) return ffi::Error::Success();
  const Kernels& kernels = kernels_of(isa);
  Activations activations(x.typed_data(), m, k, biases);
  for (Job& job : jobs) job.rows = activations.rows(bias_number(job.weight.format->bias));
  auto multiply_chunk = [&](int64_t chunk) {
    size_t i = count - 1;
    while (jobs[i].first_chunk > chunk) --i;
    const Job& job = jobs[i];
    const int64_t from = (chunk - job.first_chunk) * job.per_chunk, to = std::min(from + job.per_chunk, job.weight.count);
    multiply(kernels, job.weight, job.n, k, m, from, to, [&](int64_t r) -> const Row& { return job.rows[r]; },
             [&](int64_t r) { return job.y + r * job.n; });
  };
  parallel(pool, threads_for(bytes, m), Phase{m, [&](int64_t i) { activations.quantize(kernels, i); }}, Phase{chunks, multiply_chunk});
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
  struct Job {
    int64_t expert, first_chunk;
  };
  std::vector<Job> jobs;
  const int64_t per_chunk = tiles_per_chunk(first, 1);
  const int64_t chunks_each = (first.count + per_chunk - 1) / per_chunk;
  for (int64_t e = 0; e < experts; ++e) {
    if (begin[e + 1] > begin[e]) jobs.push_back({e, static_cast<int64_t>(jobs.size()) * chunks_each});
  }
  const Kernels& kernels = kernels_of(isa);
  const int bias = bias_number(first.format->bias);
  Activations activations(x.typed_data(), m, k, {bias});
  const Row* rows = activations.rows(bias);
  auto multiply_chunk = [&](int64_t chunk) {
    const int64_t e = jobs[chunk / chunks_each].expert, from = chunk % chunks_each * per_chunk;
    Weight w = first;
    w.tiles += e * w.count * w.stride;
    const int64_t* mine = order.data() + begin[e];
    multiply(kernels, w, n, k, begin[e + 1] - begin[e], from, std::min(from + per_chunk, w.count),
             [&](int64_t r) -> const Row& { return rows[mine[r]]; }, [&](int64_t r) { return y->typed_data() + mine[r] * n; });
  };
  const int64_t chunks = static_cast<int64_t>(jobs.size()) * chunks_each;
  parallel(pool, threads_for(static_cast<int64_t>(jobs.size()) * first.count * first.stride, m / static_cast<int64_t>(jobs.size())),
           Phase{m, [&](int64_t i) { activations.quantize(kernels, i); }}, Phase{chunks, multiply_chunk});
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
