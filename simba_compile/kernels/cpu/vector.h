/* Vectors of the compute type (REAL is float or double) as GCC/Clang vector extensions, and the functions the kernels
 * need on them. Plain operators, so one source serves SSE2, AVX2, AVX-512 and NEON; no -ffast-math, so NaN and
 * infinity go through as IEEE 754 says. Included once for each element type by template.h. */

#define PARTS ((int)(sizeof(double) / sizeof(REAL)))
#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))
typedef REAL NAME(vec) __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef INTEGER NAME(ivec) __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef double NAME(dvec) __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int64_t NAME(idvec) __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef REAL NAME(part) __attribute__((vector_size(VECTOR_BYTES / PARTS), may_alias));
typedef struct { NAME(dvec) part[PARTS]; } NAME(wide); /* LANES doubles, in vectors that the CPU has */
#define dvec NAME(dvec)
#define idvec NAME(idvec)
#define wide NAME(wide)
#define vec NAME(vec)
#define ivec NAME(ivec)

INLINE vec NAME(splat)(REAL a) { return a - (vec){0}; } /* a - 0 keeps the sign of a zero; a + 0 does not */
#define splat NAME(splat)

INLINE vec NAME(select)(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
#define select NAME(select)

INLINE vec NAME(absolute)(vec a) { return (vec)((ivec)a & ~(ivec)splat((REAL)-0.0)); }
#define absolute NAME(absolute)

#if defined(REAL_IS_FLOAT) && defined(__AVX512F__) && VECTOR_BYTES == 64 /* GCC 12 splits the conversions of whole vectors */
#define WIDEN_PART(part) (dvec)_mm512_cvtps_pd((__m256)(part))
#define NARROW_PART(d) (NAME(part))_mm512_cvtpd_ps((__m512d)(d))
#else
#define WIDEN_PART(part) __builtin_convertvector(part, dvec)
#define NARROW_PART(d) __builtin_convertvector(d, NAME(part))
#endif
INLINE wide NAME(widen_vec)(vec v) {
  NAME(part) parts[PARTS];
  wide w;
  __builtin_memcpy(parts, &v, sizeof v);
  for (int p = 0; p < PARTS; p++) w.part[p] = WIDEN_PART(parts[p]);
  return w;
}
INLINE vec NAME(narrow_vec)(wide w) {
  NAME(part) parts[PARTS];
  vec v;
  for (int p = 0; p < PARTS; p++) parts[p] = NARROW_PART(w.part[p]);
  __builtin_memcpy(&v, parts, sizeof v);
  return v;
}
#define to_wide NAME(widen_vec)
#define from_wide NAME(narrow_vec)

/* The larger of two, NaN if either is one. */
INLINE vec NAME(larger)(vec a, vec b) { return select((a > b) | (a != a), a, b); }
#define larger NAME(larger)

/* Held between two limits; NaN stays. */
INLINE vec NAME(limited)(vec a, double low, double high) {
  a = select(a < splat((REAL)low), splat((REAL)low), a);
  return select(a > splat((REAL)high), splat((REAL)high), a);
}
#define limited NAME(limited)

INLINE vec NAME(load_whole)(const REAL *p) { vec v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void NAME(store_whole)(REAL *p, vec v) { __builtin_memcpy(p, &v, sizeof v); }
#define load_real NAME(load_whole)
#define store_real NAME(store_whole)

INLINE vec NAME(load_some)(const REAL *p, int count) {
  vec v = {0};
  if (count >= LANES) return load_real(p);
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
}
INLINE void NAME(store_some)(REAL *p, vec v, int count) {
  if (count >= LANES) { store_real(p, v); return; }
  for (int i = 0; i < count; i++) p[i] = v[i];
}
#define load_real_some NAME(load_some)
#define store_real_some NAME(store_some)

INLINE REAL NAME(sum)(vec v) {
  REAL lanes[VECTOR_BYTES / sizeof(REAL)];
  store_real(lanes, v);
  for (int half = LANES / 2; half; half /= 2) /* pairwise: independent additions */
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
#define sum_lanes NAME(sum)

/* Turns a square of LANES vectors around its diagonal. */
INLINE void NAME(turn)(vec *square) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; stage++) {
    const int step = 1 << stage;
    if (step >= LANES) break;
    ivec low, high; /* squares of `step` change places */
    for (int i = 0; i < LANES; i++) {
      low[i] = i & step ? LANES + i - step : i;
      high[i] = i & step ? LANES + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & step) continue;
      vec a = square[i], b = square[i + step];
      square[i] = __builtin_shuffle(a, b, low);
      square[i + step] = __builtin_shuffle(a, b, high);
    }
  }
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) {
      REAL kept = square[i][j];
      square[i][j] = square[j][i];
      square[j][i] = kept;
    }
#endif
}
#define turn NAME(turn)

/* The sums of LANES vectors, each in a lane; as `sum_lanes` adds them up. Leaves the vectors turned and added up. */
INLINE vec NAME(sum_each)(vec *rows) {
  turn(rows);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) rows[i] += rows[i + half];
  return rows[0];
}
#define sum_each NAME(sum_each)

/* Whether any lane of a mask is set. */
INLINE int NAME(any)(ivec mask) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  INTEGER set = 0;
  for (int i = 0; i < LANES; i++) set |= mask[i];
  return set != 0;
#endif
}
#define any_lane NAME(any)

#ifdef REAL_IS_FLOAT

#define LOG2E 1.44269504088896341f

#if defined(__AVX512F__) && VECTOR_BYTES == 64
/* The table's entries at the low five bits of each lane. */
INLINE vec NAME(look_up)(const float *table, ivec place) {
  return (vec)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)place, _mm512_loadu_ps(table + 16));
}

/* 2^(ab) to 1.5 ulp for |ab| < 10^5, 0 below 2^-126: a table of 2^(i/32) and a quadratic for the rest. NaN stays. */
INLINE vec NAME(exp2_tame)(vec a, vec b) {
  vec shifted = a * b + 0x1.8p18f; /* rounds the product to 1/32: its low bits are the place in the table */
  vec n = shifted - 0x1.8p18f, r = a * b - n;
  vec power = NAME(look_up)(simba_power, (ivec)shifted);
  vec p = power * r * (r * 0.24022651f + 0.69315734f) + power; /* ln 2 raised to spread the error of the cubic term */
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);          /* by 2^floor(n) */
}

/* 2^t for any t but inf. */
INLINE vec NAME(exp2)(vec t) {
  t = (vec)_mm512_max_ps(_mm512_set1_ps(-1e4f), (__m512)t); /* for -inf; in this order NaN comes through */
  return NAME(exp2_tame)(t, splat(1));
}

/* ln(1 + u) for u in [0, 1], to the last bits also where u is tiny: with c near 1/(1 + u), -ln c + ln(1 + (cu + c - 1)). */
INLINE vec NAME(log1p_unit)(vec u) {
  ivec place = (ivec)(u * 31.0f + 0x1.8p23f);
  vec c = NAME(look_up)(simba_inverse, place), r = u * c + (c - 1.0f);
  vec p = (r * -0.25f + 0.33333333f) * r - 0.5f;
  return (r * r * p + r) + NAME(look_up)(simba_log, place);
}

/* ln a for a >= 0 (0 gives -inf, NaN and inf stay). */
INLINE vec NAME(log)(vec a) {
  vec mantissa = (vec)_mm512_getmant_ps((__m512)a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  return (vec)_mm512_getexp_ps((__m512)a) * 0.69314718f + NAME(log1p_unit)(mantissa - 1.0f);
}

/* 1/a for a of 1 to 10^38. */
INLINE vec NAME(inverse)(vec a) {
  vec guess = (vec)_mm512_rcp14_ps((__m512)a);
  return guess + guess * (1.0f - a * guess);
}

#else

#if defined(__AVX2__) && VECTOR_BYTES == 32
#define EIGHTHS 0x1.8p20f /* added to t, it rounds it to 1/8: the low bits are the place in a table of 2^(i/8) */

/* 2^t for t = shifted - EIGHTHS + r, and 0 where that is -127: a table in one register and a cubic, 1.2 ulp. */
INLINE vec NAME(exp2_parts)(vec shifted, vec r) {
  ivec place = (ivec)shifted;
  ivec entry = (ivec)_mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)simba_eighths), (__m256i)place);
  vec power = (vec)(entry + (place << 20)); /* by 2^floor(t): the place has been taken off the entry */
  vec p = (r * 5.5504109e-2f + 0.24025762f) * r + 0.69314718f;
  return power * (p * r) + power; /* power * r would be subnormal too soon */
}

/* 2^(ab) for |ab| < 10^5, as above. A large ab leaves r large and overflows. In this order NaN comes through min and max. */
INLINE vec NAME(exp2_tame)(vec a, vec b) {
  __m256 low = _mm256_set1_ps(EIGHTHS - 127), high = _mm256_set1_ps(EIGHTHS + 127.875f);
  vec shifted = (vec)_mm256_min_ps(high, _mm256_max_ps(low, (__m256)(a * b + EIGHTHS)));
  return NAME(exp2_parts)(shifted, a * b - (shifted - EIGHTHS));
}

/* 2^t for any t. */
INLINE vec NAME(exp2)(vec t) {
  t = (vec)_mm256_max_ps(_mm256_set1_ps(-127), (__m256)t);
  vec shifted = (vec)_mm256_min_ps(_mm256_set1_ps(EIGHTHS + 127.875f), (__m256)(t + EIGHTHS));
  return NAME(exp2_parts)(shifted, t - (shifted - EIGHTHS));
}

#else

/* 2^t, and 0 below 2^-126, to 1.5 ulp; NaN stays. A polynomial for [-1/2, 1/2] (Cephes' exp2f). */
INLINE vec NAME(exp2)(vec t) {
  ivec gone = t < -126.0f;
  t = (vec)(~gone & (ivec)t);
  t = select(t > 128.0f, splat(128.0f), t);
  vec shifted = t + 0x1.8p23f; /* rounds t to an integer, which lands in the low bits */
  vec r = t - (shifted - 0x1.8p23f);
  vec p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  vec scale = (vec)(((ivec)shifted << 23) + 0x3f800000);
  return (vec)(~gone & (ivec)(p * scale));
}

INLINE vec NAME(exp2_tame)(vec a, vec b) { return NAME(exp2)(a * b); }

#endif

/* ln(1 + u) for u in [0, 1], to the last bits also where u is tiny: 2 artanh(u / (2 + u)) as its series. */
INLINE vec NAME(log1p_unit)(vec u) {
  vec s = u / (u + 2.0f), s2 = s * s;
  vec p = s2 * 0.13846153f + 0.18181818f; /* 2/13 taken a little lower stands for the terms that are left out */
  p = p * s2 + 0.22222222f;
  p = p * s2 + 0.28571429f;
  p = p * s2 + 0.4f;
  p = p * s2 + 0.66666667f;
  return s * (p * s2 + 2.0f);
}

/* ln a for a >= 0 (0 gives -inf, NaN and inf stay). Subnormals count as zero. */
INLINE vec NAME(log)(vec a) {
  ivec bits = (ivec)a;
  vec mantissa = (vec)((bits & 0x007fffff) | 0x3f800000);
  vec result = __builtin_convertvector((bits >> 23) - 127, vec) * 0.69314718f + NAME(log1p_unit)(mantissa - 1.0f);
  result = select(a < 1.17549435e-38f, splat(-__builtin_inff()), result);
  return select(a < splat(__builtin_inff()), result, a); /* inf and NaN */
}

INLINE vec NAME(inverse)(vec a) { return 1.0f / a; }
#endif

#else /* double: for tests and float64 models; clear rather than fast */

#define LOG2E 1.44269504088896340736
#define EACH_LANE(f) vec result; for (int i = 0; i < LANES; i++) result[i] = f(a[i]); return result;
INLINE vec NAME(exp2)(vec a) { EACH_LANE(exp2) }
INLINE vec NAME(log)(vec a) { EACH_LANE(log) }
INLINE vec NAME(log1p_unit)(vec a) { EACH_LANE(log1p) }
INLINE vec NAME(exp2_tame)(vec a, vec b) { return NAME(exp2)(a * b); }
INLINE vec NAME(inverse)(vec a) { return 1 / a; }

#endif

#define exp2v NAME(exp2)
#define exp2_tame NAME(exp2_tame)
#define logv NAME(log)

INLINE vec NAME(sigmoid_of_exp)(vec t, vec e) { /* e = 2^t, t = -a log2(e); e may be inf */
  return select(t >= (sizeof(REAL) == 4 ? 126 : 1022), splat(0), NAME(inverse)(1 + e));
}
INLINE vec NAME(sigmoid)(vec a) { return NAME(sigmoid_of_exp)(a * (REAL)-LOG2E, exp2v(a * (REAL)-LOG2E)); }
#define sigmoidv NAME(sigmoid)

/* On arrays, in short loops: one loop over a long chain of operations has only a value or two in flight. */

/* max(a, 0) + ln(1 + e^-|a|): torch's softplus, without its switch to the identity above 20 (equal to rounding). */
INLINE void NAME(softplus)(vec *a, int count) {
  vec u[RUN];
  for (int i = 0; i < count; i++) u[i] = exp2v(absolute(a[i]) * (REAL)-LOG2E);
  for (int i = 0; i < count; i++) a[i] = select(a[i] < 0, splat(0), a[i]) + NAME(log1p_unit)(u[i]);
}
#define softplus_all NAME(softplus)

/* y silu(a) = y a / (1 + e^-a), into y. */
INLINE void NAME(times_silu)(vec *y, const vec *a, int count) {
  vec e[RUN];
  for (int i = 0; i < count; i++) e[i] = exp2v(a[i] * (REAL)-LOG2E);
  for (int i = 0; i < count; i++) y[i] *= a[i] * NAME(sigmoid_of_exp)(a[i] * (REAL)-LOG2E, e[i]);
}
#define times_silu NAME(times_silu)
