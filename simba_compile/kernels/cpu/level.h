/* Every kernel for one level of the instruction set: the level's file sets LEVEL and VECTOR_BYTES and includes this. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "simba.h"

#define INLINE static inline __attribute__((always_inline, unused))
#define PASTE(f, suffix, level) PASTE_(f, suffix, level)
#define PASTE_(f, suffix, level) simba_##f##_##suffix##_##level
#define MAX_STATES 256
#define MAX_WIDTH 64
#define RUN CHUNK /* the longest array that vector.h's functions on arrays take */

#define ELEM_REAL 0
#define ELEM_BFLOAT16 1
#define ELEM_FLOAT16 2

/* Subnormals count as zero while a task runs: one of them costs a hundred cycles, and a state that fades away would stay
 * subnormal to the end of the sequence. The mode is the thread's, which is torch's: it is put back. */
#if defined(__x86_64__)
INLINE unsigned simba_flush_subnormals(void) {
  unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  return before;
}
INLINE void simba_restore_mode(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
#else
INLINE unsigned simba_flush_subnormals(void) { return 0; }
INLINE void simba_restore_mode(unsigned mode) { (void)mode; }
#endif

/* Scratch of one task, aligned for vectors. NULL where memory is out: the task then reports failure. */
INLINE void *simba_alloc(int64_t bytes) {
  void *p = NULL;
  return posix_memalign(&p, 64, bytes > 0 ? (size_t)bytes : 64) ? NULL : p;
}

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
