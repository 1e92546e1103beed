/* Loads and stores of the element type (what tensors hold), as vectors of the compute type. ELEM_KIND picks one of:
 * the compute type itself, bfloat16, float16. Halves take bit operations; float16 an instruction where the level has it. */

#if ELEM_KIND == ELEM_REAL

typedef REAL NAME(elem);
#define elem NAME(elem)
INLINE vec NAME(widen)(const elem *p) { return load_real(p); }
INLINE void NAME(narrow)(elem *p, vec v) { store_real(p, v); }
INLINE REAL NAME(widen_one)(elem e) { return e; }
INLINE vec NAME(rounded)(vec v) { return v; }

#else

typedef uint16_t NAME(elem);
#define elem NAME(elem)
typedef uint16_t NAME(half_vec) __attribute__((vector_size(VECTOR_BYTES / 2), may_alias));
typedef uint32_t NAME(word_vec) __attribute__((vector_size(VECTOR_BYTES), may_alias));
#define half_vec NAME(half_vec)
#define word_vec NAME(word_vec)

#if ELEM_KIND == ELEM_FLOAT16 && defined(__AVX512F__) && VECTOR_BYTES == 64
INLINE vec NAME(widen)(const elem *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void NAME(narrow)(elem *p, vec v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif ELEM_KIND == ELEM_FLOAT16 && defined(__F16C__) && VECTOR_BYTES == 32
INLINE vec NAME(widen)(const elem *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void NAME(narrow)(elem *p, vec v) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
INLINE vec NAME(widen)(const elem *p) {
  half_vec h;
  __builtin_memcpy(&h, p, sizeof h);
  word_vec w = __builtin_convertvector(h, word_vec);
#if ELEM_KIND == ELEM_BFLOAT16
  return (vec)(w << 16);
#else
  word_vec sign = (w & 0x8000) << 16, magnitude = (w & 0x7fff) << 13;
  word_vec normal = magnitude + ((127 - 15) << 23); /* the exponent's bias */
  word_vec special = (word_vec)((w & 0x7c00) == 0x7c00), small = (word_vec)((w & 0x7c00) == 0);
  word_vec subnormal = (word_vec)(__builtin_convertvector(w & 0x3ff, vec) * 0x1p-24f);
  normal |= special & 0x7f800000; /* inf and NaN keep their exponent of ones */
  return (vec)(((small & subnormal) | (~small & normal)) | sign);
#endif
}

INLINE void NAME(narrow)(elem *p, vec v) {
  word_vec w = (word_vec)v, nan = (word_vec)(v != v);
#if ELEM_KIND == ELEM_BFLOAT16
  word_vec rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16; /* to nearest, ties to even */
  rounded = (nan & 0x7fc0) | (~nan & rounded);
#else
  word_vec sign = (w >> 16) & 0x8000, magnitude = w & 0x7fffffff;
  word_vec normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  /* below 2^-14: adding 1/2 puts the float16 subnormal, rounded to even, into the low bits */
  word_vec subnormal = (word_vec)((vec)magnitude + 0.5f) - 0x3f000000u;
  word_vec small = (word_vec)(magnitude < 0x38800000u), large = (word_vec)(magnitude >= 0x477ff000u);
  word_vec rounded = (small & subnormal) | (~small & normal);
  rounded = (large & 0x7c00) | (~large & rounded);
  rounded = ((nan & 0x7e00) | (~nan & rounded)) | sign;
#endif
  half_vec h = __builtin_convertvector(rounded, half_vec);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif
/* What numbers are once an element has held them. */
INLINE vec NAME(rounded)(vec v) {
  elem held[LANES];
  NAME(narrow)(held, v);
  return NAME(widen)(held);
}
#endif

/* Up to LANES elements; the lanes past count read as zero and are not written. */
INLINE vec NAME(load_elem)(const elem *p, int count) {
  if (count >= LANES) return NAME(widen)(p);
  elem padded[VECTOR_BYTES / sizeof(REAL)] = {0};
  __builtin_memcpy(padded, p, count * sizeof(elem));
  return NAME(widen)(padded);
}
INLINE void NAME(store_elem)(elem *p, vec v, int count) {
  if (count >= LANES) { NAME(narrow)(p, v); return; }
  elem padded[VECTOR_BYTES / sizeof(REAL)];
  NAME(narrow)(padded, v);
  __builtin_memcpy(p, padded, count * sizeof(elem));
}
#define load NAME(load_elem)
#define store NAME(store_elem)

#if ELEM_KIND == ELEM_BFLOAT16
INLINE REAL NAME(widen_one)(elem e) {
  uint32_t word = (uint32_t)e << 16;
  REAL value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}
#elif ELEM_KIND == ELEM_FLOAT16
INLINE REAL NAME(widen_one)(elem e) { return load(&e, 1)[0]; }
#endif
