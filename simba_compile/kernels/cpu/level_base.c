/* What every CPU of the architecture runs: SSE2 on x86-64, NEON on arm64. */
#define LEVEL base
#define VECTOR_BYTES 16
#include "level.h"
