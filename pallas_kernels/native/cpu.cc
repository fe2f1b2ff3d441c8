// What this library is and what this processor can do. Compiled for the baseline processor.

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Raised with every change of an interface between this library and the Python that calls it.
extern "C" __attribute__((visibility("default"))) int32_t realm_native_version() { return 1; }

// The widest instruction set that both this library and this processor have: 0 plain, 1 AVX2, 2 AVX-512 with VNNI.
extern "C" __attribute__((visibility("default"))) int32_t realm_native_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c, d;
  bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return 2;
  }
  if (avx2) return 1;
#endif
  return 0;
}
