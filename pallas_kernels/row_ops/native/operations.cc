// The operations XLA calls.

#include "row_ops.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace realm {
namespace {

constexpr int64_t kChunk = 16 << 10;  // elements of one chunk of work, about: some microseconds

const RowKernels& kernels_of(int64_t isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::row_kernels;
  if (isa == 1) return avx2::row_kernels;
#endif
  return plain::row_kernels;
}

// weight: [..., layers, k], of which there is one stack; the rows of x [..., k] are normalized on their own.
ffi::Error rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::S32> layer,
                    ffi::ResultBuffer<ffi::F32> out, float eps, int64_t isa) {
  auto shape = weight.dimensions();
  if (shape.size() < 2 || x.dimensions().size() < 1 || x.dimensions().back() != shape.back() || layer.element_count() != 1 ||
      static_cast<int64_t>(weight.element_count()) != shape[shape.size() - 2] * shape.back() ||
      out->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("x, the weights and the result do not fit together");
  }
  const int64_t k = shape.back(), layers = shape[shape.size() - 2];
  const int64_t elements = x.element_count();
  if (elements == 0) return ffi::Error::Success();
  const int64_t rows = elements / k, each = std::max<int64_t>(1, kChunk / k);
  const float* w = weight.typed_data() + std::min<int64_t>(std::max(layer.typed_data()[0], 0), layers - 1) * k;
  const RowKernels& kernels = kernels_of(isa);
  parallel(pool, 0, Phase{(rows + each - 1) / each, [&](int64_t chunk) {
             for (int64_t i = chunk * each; i < std::min(rows, (chunk + 1) * each); ++i) {
               kernels.rms_norm(x.typed_data() + i * k, w, k, eps, out->typed_data() + i * k);
             }
           }});
  return ffi::Error::Success();
}

ffi::Error gated(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up, ffi::ResultBuffer<ffi::F32> out,
                 int64_t activation, int64_t isa) {
  const int64_t count = gate.element_count();
  if (static_cast<int64_t>(up.element_count()) != count || static_cast<int64_t>(out->element_count()) != count || activation < 0 ||
      activation >= kActivations) {
    return ffi::Error::InvalidArgument("gate, up and the result do not fit together");
  }
  const RowKernels& kernels = kernels_of(isa);
  parallel(pool, 0, Phase{(count + kChunk - 1) / kChunk, [&](int64_t chunk) {
             const int64_t i = chunk * kChunk;
             kernels.gated[activation](gate.typed_data() + i, up.typed_data() + i, std::min(kChunk, count - i), out->typed_data() + i);
           }});
  return ffi::Error::Success();
}

ffi::Error argmax(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::S32> index,
                  ffi::ResultBuffer<ffi::PRED> finite, int64_t isa) {
  const int64_t rows = index->element_count();
  if (rows == 0) return ffi::Error::Success();
  const int64_t k = x.element_count() / rows;
  if (k == 0 || k > INT32_MAX || finite->element_count() != index->element_count()) {
    return ffi::Error::InvalidArgument("a row has a number or more, and one index");
  }
  const RowKernels& kernels = kernels_of(isa);
  const int64_t each = std::max<int64_t>(1, kChunk / k);
  parallel(pool, 0, Phase{(rows + each - 1) / each, [&](int64_t chunk) {
             for (int64_t i = chunk * each; i < std::min(rows, (chunk + 1) * each); ++i) {
               index->typed_data()[i] = kernels.argmax(x.typed_data() + i * k, k, finite->typed_data()[i]);
             }
           }});
  return ffi::Error::Success();
}

// A key whose order is that of the floats; the two zeros are equal.
inline uint32_t ordered(float x) {
  if (x == 0.0f) x = 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | (1u << 31);
}

// The best-scored entries whose masses, added in order, reach the target, with equal scores in order of index: narrowed
// down to a bucket of the key's upper bits, then of its middle bits, then sorted. Without a target reached, all of them.
class TopMask {
 public:
  TopMask(const float* score, const float* mass, int64_t k, double target) : score_(score), mass_(mass), target_(target) {
    thread_local std::vector<int32_t> entries, bucket;
    entries.resize(k);
    for (int64_t i = 0; i < k; ++i) entries[i] = static_cast<int32_t>(i);
    for (int shift : {21, 10}) {
      if (!narrow(entries, shift, bucket)) return;
      entries.swap(bucket);
    }
    std::sort(entries.begin(), entries.end(), [&](int32_t a, int32_t b) {
      const uint32_t left = ordered(score_[a]), right = ordered(score_[b]);
      return left != right ? left > right : a < b;
    });
    for (int32_t i : entries) {
      sum_ += mass_[i];
      last_ = i;
      if (reached(sum_)) break;
    }
  }

  void write(int64_t k, bool* out) const {
    const uint32_t threshold = last_ < 0 ? 0 : ordered(score_[last_]);
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t key = ordered(score_[i]);
      out[i] = last_ < 0 || key > threshold || (key == threshold && i <= last_);
    }
  }

 private:
  static constexpr int kBuckets = 2048;

  bool reached(double sum) const { return sum >= target_ && sum > 0.0; }

  // Of the entries, those in the bucket in which the target is reached; false when it is not reached.
  bool narrow(const std::vector<int32_t>& entries, int shift, std::vector<int32_t>& out) {
    double sums[kBuckets] = {};
    for (int32_t i : entries) sums[ordered(score_[i]) >> shift & (kBuckets - 1)] += mass_[i];
    for (int b = kBuckets - 1; b >= 0; --b) {
      if (reached(sum_ + sums[b])) {
        out.clear();
        for (int32_t i : entries) {
          if (static_cast<int>(ordered(score_[i]) >> shift & (kBuckets - 1)) == b) out.push_back(i);
        }
        return true;
      }
      sum_ += sums[b];
    }
    return false;
  }

  const float* score_;
  const float* mass_;
  double target_, sum_ = 0.0;  // sum_: of the entries above those that are left
  int32_t last_ = -1;          // the last entry to keep; -1: all are kept
};

ffi::Error top_mask(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> score, ffi::Buffer<ffi::F32> mass, ffi::Buffer<ffi::F32> target,
                    ffi::ResultBuffer<ffi::PRED> kept) {
  const int64_t rows = target.element_count(), elements = score.element_count();
  if (elements == 0) return ffi::Error::Success();
  if (rows == 0 || elements % rows || elements / rows > INT32_MAX || mass.element_count() != score.element_count() ||
      kept->element_count() != score.element_count()) {
    return ffi::Error::InvalidArgument("score, mass, target and the result do not fit together");
  }
  const int64_t k = elements / rows;
  parallel(pool, 0, Phase{rows, [&](int64_t i) {
             TopMask mask(score.typed_data() + i * k, mass.typed_data() + i * k, k, target.typed_data()[i]);
             mask.write(k, kept->typed_data() + i * k);
           }});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace realm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_rms_norm, realm::rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_gated, realm::gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_argmax, realm::argmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(realm_top_mask, realm::top_mask,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>());

#pragma GCC visibility pop
