// What the processor can do at most: reads of memory, 8-bit dot products, float32 multiply-adds, on all threads at once.
//
//   cc -O3 -march=native -pthread peaks.c -o peaks && ./peaks THREADS MEBIBYTES
//
// Prints one JSON object. A rate that this compiler or processor has no instruction for is null.

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

typedef uint64_t words __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(REALM_VECTOR)));

enum { ACCUMULATORS = 12, TURNS = 1000000, ROUNDS = 15 };

#if defined(__AVX512VNNI__)
typedef __m512i bytes;
#define INT8_OPERATIONS 128  // 64 products and 64 sums
static inline bytes dot(bytes sum, bytes a, bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
typedef __m256i bytes;
#define INT8_OPERATIONS 64
static inline bytes dot(bytes sum, bytes a, bytes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
typedef __m256i bytes;
#define INT8_OPERATIONS 64
static inline bytes dot(bytes sum, bytes a, bytes b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t bytes;
#define INT8_OPERATIONS 32
static inline bytes dot(bytes sum, bytes a, bytes b) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#endif

// Keeps a value in a register and hides from the compiler what it is.
#if defined(__x86_64__)
#define HIDE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define HIDE(x) __asm__ volatile("" : "+w"(x))
#else
#define HIDE(x) __asm__ volatile("" : "+m"(x))
#endif

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static uint64_t sink;

struct work {
  const words* data;
  size_t count;
};

static void* read_memory(void* argument) {
  const struct work* work = argument;
  words sum[8] = {{0}};
  for (size_t i = 0; i + 8 <= work->count; i += 8)
    for (int j = 0; j < 8; j++) sum[j] ^= work->data[i + j];
  for (int j = 1; j < 8; j++) sum[0] ^= sum[j];
  __atomic_fetch_xor(&sink, sum[0][0] ^ sum[0][7], __ATOMIC_RELAXED);
  return NULL;
}

static void* touch_memory(void* argument) {
  const struct work* work = argument;
  memset((void*)work->data, 0x5a, work->count * sizeof(words));
  return NULL;
}

static void* multiply_add(void* argument) {
  (void)argument;
  floats sum[ACCUMULATORS] = {{0}}, a = {0}, b = {0};
  HIDE(a);
  HIDE(b);
  for (int i = 0; i < TURNS; i++)
#pragma GCC unroll 16
    for (int j = 0; j < ACCUMULATORS; j++) {
      sum[j] = a * b + sum[j];
      HIDE(sum[j]);
    }
  return NULL;
}

#ifdef INT8_OPERATIONS
static void* dot_products(void* argument) {
  (void)argument;
  bytes sum[ACCUMULATORS] = {{0}}, a = {0}, b = {0};
  HIDE(a);
  HIDE(b);
  for (int i = 0; i < TURNS; i++)
#pragma GCC unroll 16
    for (int j = 0; j < ACCUMULATORS; j++) {
      sum[j] = dot(sum[j], a, b);
      HIDE(sum[j]);
    }
  return NULL;
}
#endif

// Seconds until every thread is through.
static double together(int threads, void* (*run)(void*), struct work* work) {
  pthread_t* ids = malloc(threads * sizeof *ids);
  double begun = now();
  for (int i = 0; i < threads; i++)
    if (pthread_create(&ids[i], NULL, run, &work[i])) exit(1);
  for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
  double seconds = now() - begun;
  free(ids);
  return seconds;
}

static double best(int threads, void* (*run)(void*), struct work* work) {
  double least = 1e30;
  for (int i = 0; i < ROUNDS; i++) {
    double seconds = together(threads, run, work);
    if (seconds < least) least = seconds;
  }
  return least;
}

int main(int argc, char** argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 1;
  size_t mebibytes = argc > 2 ? atoi(argv[2]) : 256;
  if (threads < 1 || mebibytes < 1) return 2;
  size_t each = (mebibytes << 20) / threads / sizeof(words) / 8 * 8;
  words* data = aligned_alloc(4096, (each * threads * sizeof(words) + 4095) / 4096 * 4096);
  struct work* work = malloc(threads * sizeof *work);
  if (!data || !work) return 1;
  for (int i = 0; i < threads; i++) work[i] = (struct work){data + i * each, each};
  together(threads, touch_memory, work);
  double read = (double)each * threads * sizeof(words) / best(threads, read_memory, work) * 1e-9;
  double turns = (double)TURNS * ACCUMULATORS * threads * 1e-9;
  double float32 = turns * 2 * (REALM_VECTOR / 4) / best(threads, multiply_add, work);
  printf("{\"read_gbs\": %.2f, \"float32_gflops\": %.1f, ", read, float32);
#ifdef INT8_OPERATIONS
  printf("\"int8_gops\": %.1f}\n", turns * INT8_OPERATIONS / best(threads, dot_products, work));
#else
  printf("\"int8_gops\": null}\n");
#endif
  return 0;
}
