// The operations XLA calls.

#include "row_ops.h"

#include <algorithm>

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

#pragma GCC visibility pop
