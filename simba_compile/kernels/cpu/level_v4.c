/* x86-64-v4: AVX-512. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define LEVEL v4
#define VECTOR_BYTES 64
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
