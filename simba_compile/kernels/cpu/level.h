/* Every kernel for one level of the instruction set: the level's file sets LEVEL and VECTOR_BYTES and includes this. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "simba.h"

#define INLINE static inline __attribute__((always_inline, unused))
#define PASTE(f, suffix, level) PASTE_(f, suffix, level)
#define PASTE_(f, suffix, level) simba_##f##_##suffix##_##level
#define MAX_STATES 256

#define ELEM_REAL 0
#define ELEM_BFLOAT16 1
#define ELEM_FLOAT16 2

#define REAL float
#define INTEGER int32_t
#define REAL_IS_FLOAT
#define ELEM_KIND ELEM_REAL
#define SUFFIX f32
#include "template.h"

#define REAL float
#define INTEGER int32_t
#define REAL_IS_FLOAT
#define ELEM_KIND ELEM_BFLOAT16
#define SUFFIX bf16
#include "template.h"

#define REAL float
#define INTEGER int32_t
#define REAL_IS_FLOAT
#define ELEM_KIND ELEM_FLOAT16
#define SUFFIX f16
#include "template.h"

#define REAL double
#define INTEGER int64_t
#define ELEM_KIND ELEM_REAL
#define SUFFIX f64
#include "template.h"
