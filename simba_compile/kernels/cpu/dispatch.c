/* The exported functions: each picks the kernel for the element type and the best level that this CPU has. */
#include <math.h>
#include <string.h>
#include "simba.h"

enum { F32, F64, BF16, F16 };
enum { BASE, V3, V4 };

static int level = BASE;

#define DECLARE(op, Args, suffix, lv) int simba_##op##_##suffix##_##lv(const Args *, int);
#define DECLARE_LEVEL(op, Args, lv) \
  DECLARE(op, Args, f32, lv) DECLARE(op, Args, f64, lv) DECLARE(op, Args, bf16, lv) DECLARE(op, Args, f16, lv)
#define ROW(op, lv) {simba_##op##_f32_##lv, simba_##op##_f64_##lv, simba_##op##_bf16_##lv, simba_##op##_f16_##lv}

#if defined(__x86_64__)
#define EXPORT(op, Args)                                                                      \
  WORDS(op, Args)                                                                             \
  DECLARE_LEVEL(op, Args, base) DECLARE_LEVEL(op, Args, v3) DECLARE_LEVEL(op, Args, v4)       \
  int simba_##op(const Args *args, int dtype, int threads) {                                  \
    static int (*const table[3][4])(const Args *, int) = {ROW(op, base), ROW(op, v3), ROW(op, v4)}; \
    return table[level][dtype](args, threads);                                                \
  }
#else
#define EXPORT(op, Args)                                                                      \
  WORDS(op, Args)                                                                             \
  DECLARE_LEVEL(op, Args, base)                                                               \
  int simba_##op(const Args *args, int dtype, int threads) {                                  \
    static int (*const table[1][4])(const Args *, int) = {ROW(op, base)};                     \
    return table[level][dtype](args, threads);                                                \
  }
#endif

EXPORT(selective_scan, ScanArgs)
EXPORT(selective_scan_backward, ScanBackwardArgs)
EXPORT(influence, InfluenceArgs)
EXPORT(causal_conv1d, ConvArgs)
EXPORT(causal_conv1d_backward, ConvBackwardArgs)
EXPORT(state_update, UpdateArgs)
EXPORT(conv_update, ConvUpdateArgs)
EXPORT(mixer_update, MixerUpdateArgs)
EXPORT(rms_norm, NormArgs)
EXPORT(add_norm, AddNormArgs)
EXPORT(linear, LinearArgs)
EXPORT(ssd_scan, SsdArgs)
EXPORT(ssd_scan_backward, SsdBackwardArgs)
EXPORT(ssd_influence, SsdInfluenceArgs)
EXPORT(ssd_state_update, SsdUpdateArgs)
EXPORT(ssd_mixer_update, SsdMixerUpdateArgs)

static int best_level(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return V4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return V3;
#endif
  return BASE;
}

float simba_power[TABLE], simba_inverse[TABLE], simba_log[TABLE];
int32_t simba_eighths[EIGHT];

static void fill_tables(void) {
  for (int i = 0; i < TABLE; i++) {
    simba_power[i] = (float)exp2(i / 32.0);
    simba_inverse[i] = (float)(1 / (1 + i / 31.0));
    simba_log[i] = (float)-log((double)simba_inverse[i]);
  }
  for (int i = 0; i < EIGHT; i++) {
    memcpy(&simba_eighths[i], &simba_power[i * TABLE / EIGHT], sizeof(float));
    simba_eighths[i] -= i << 20;
  }
}

/* Pick the level: the best there is, or the one that is asked for (tests) where the CPU has it. Gives the level. Called
 * before any kernel. */
int simba_set_level(int wanted) {
  int best = best_level();
  fill_tables();
  level = wanted >= 0 && wanted < best ? wanted : best;
  return level;
}

/* Lanes of a float vector at the present level: the binding sizes scratch by it. */
int simba_lanes(void) { return 4 << level; }

/* Whether Intel made this CPU: native/linear.py asks. */
int simba_is_intel(void) {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return 0;
#endif
}

/* What setup.py compiled: library.py compares it with the sources that it finds. */
uint64_t simba_sources(void) { return SIMBA_SOURCES; }
