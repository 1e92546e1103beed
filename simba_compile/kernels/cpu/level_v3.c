/* x86-64-v3: AVX2 and FMA, with them F16C. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define LEVEL v3
#define VECTOR_BYTES 32
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
