/* The influence of every token on the last output of an SSD scan (docs/method.md), pooled over heads and their channels, as a
 * logarithm:
 *
 *     log|Δy_T(t)[h, p]| = A_h S_t[h] + log|x_t[h, p] Δ_t[h] (C_T·B_t)|,   S_t = Σ_{k>t} Δ_k
 *
 * A head's channels differ in x alone, so its largest and smallest x speak for all of them, and what is left are a few
 * numbers for each token and head. Stretches of tokens are independent once the sums of the steps after them are known. */

#define STRETCH 64 /* tokens; fixed, so that the sums do not depend on the number of threads */

/* Δ of one token, head by head from `head` on, held within the limits. */
INLINE vec NAME(deltas_of)(const SsdInfluenceArgs *a, int64_t b, int64_t t, int64_t head, int count, int with_bias) {
  vec d = load_at(a->dt, b, t, head, count);
  if (with_bias && a->dt_bias) d += load_real_some((REAL *)a->dt_bias + head, count);
  if (a->softplus) softplus_all(&d, 1);
  return limited(d, a->dt_min, a->dt_max);
}
#define deltas_of NAME(deltas_of)

INLINE REAL NAME(most)(vec v) { /* the largest lane, NaN if one is */
  REAL lanes[VECTOR_BYTES / sizeof(REAL)];
  if (any_lane(v != v)) return (REAL)NAN;
  store_real(lanes, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}
#define most_of NAME(most)

/* Of one head's x: the largest and the smallest (POOL_MAX), or the largest magnitude and, for L2, Σ (x / that)². */
static void NAME(extremes)(REAL *high, REAL *other, const elem *x, int64_t size, int64_t pool) {
  vec top = splat((REAL)-INFINITY), low = splat((REAL)-INFINITY);
  for (int64_t i = 0; i < size; i += LANES) {
    int count = (int)(size - i < LANES ? size - i : LANES);
    vec v = load(x + i, count);
    if (pool != POOL_MAX) {
      top = larger(top, absolute(v)); /* zeros past the end do no harm */
      continue;
    }
    if (count < LANES)
      for (int j = count; j < LANES; j++) v[j] = v[0];
    top = larger(top, v);
    low = larger(low, -v);
  }
  *high = most_of(top);
  *other = pool == POOL_MAX ? -most_of(low) : 1;
  if (pool != POOL_L2 || !(*high > 0 && *high < (REAL)INFINITY)) return;
  vec sum = splat(0);
  const REAL scale = 1 / *high;
  for (int64_t i = 0; i < size; i += LANES) {
    vec v = load(x + i, (int)(size - i < LANES ? size - i : LANES)) * scale;
    sum += v * v;
  }
  *other = sum_lanes(sum);
}

int NAME(ssd_influence)(const SsdInfluenceArgs *a, int threads) {
  const int64_t stretches = (a->tokens + STRETCH - 1) / STRETCH, H = (a->heads + LANES - 1) / LANES * LANES, N = a->states;
  const int64_t each = a->heads / a->groups;
  double *later = simba_alloc(a->batch * (stretches + 1) * H * sizeof(double)); /* what comes after each stretch */
  int failed = 0;
  if (!later) return OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < a->batch * stretches; task++) {
    const int64_t b = task / stretches, k = task % stretches;
    double *sum = later + (b * (stretches + 1) + k) * H;
    for (int64_t head = 0; head < a->heads; head += LANES) {
      const int count = (int)(a->heads - head < LANES ? a->heads - head : LANES);
      wide total = to_wide(splat(0));
      for (int64_t t = (k + 1) * STRETCH < a->tokens ? (k + 1) * STRETCH - 1 : a->tokens - 1; t >= k * STRETCH; t--) {
        wide d = to_wide(deltas_of(a, b, t, head, count, (int)a->bias_in_decay));
        for (int i = 0; i < PARTS; i++) total.part[i] += d.part[i];
      }
      memcpy(sum + head, &total, sizeof total);
    }
  }
  for (int64_t b = 0; b < a->batch; b++) /* from a stretch's own steps to those after it */
    for (int64_t head = 0; head < H; head++) {
      double sum = 0;
      for (int64_t k = stretches - 1; k >= 0; k--) {
        double *at = later + (b * (stretches + 1) + k) * H + head, own = *at;
        *at = sum;
        sum += own;
      }
    }
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed)
  for (int64_t task = 0; task < a->batch * stretches; task++) {
    const int64_t b = task / stretches, k = task % stretches, width = (N + LANES - 1) / LANES * LANES;
    double *S = later + (b * (stretches + 1) + k) * H;
    REAL *C = simba_alloc((a->groups * width + 3 * H) * sizeof(REAL)), *high = C + a->groups * width, *other = high + H;
    REAL *weight = other + H; /* C_T·B_t of each head */
    if (!C) { failed = OUT_OF_MEMORY; continue; }
    unsigned mode = simba_flush_subnormals();
    for (int64_t g = 0; g < a->groups; g++) unpack_row(C + g * width, row_of(a->C, b, a->tokens - 1, g), N);
    memset(high, 0, 3 * H * sizeof(REAL));
    for (int64_t t = (k + 1) * STRETCH < a->tokens ? (k + 1) * STRETCH - 1 : a->tokens - 1; t >= k * STRETCH; t--) {
      for (int64_t g = 0; g < a->groups; g++) {
        const elem *B = row_of(a->B, b, t, g);
        vec sum = splat(0);
        for (int64_t n = 0; n < N; n += LANES)
          sum += load(B + n, (int)(N - n < LANES ? N - n : LANES)) * load_real(C + g * width + n);
        const REAL product_of = sum_lanes(sum);
        for (int64_t head = g * each; head < (g + 1) * each; head++) weight[head] = product_of;
      }
      for (int64_t head = 0; head < a->heads; head++)
        NAME(extremes)(high + head, other + head, row_of(a->x, b, t, head), a->channels, a->pool);
      pool_t pool = {.most = to_wide(splat((REAL)-INFINITY)), .sum = splat(0)};
      for (int64_t head = 0; head < a->heads; head += LANES) {
        const int count = (int)(a->heads - head < LANES ? a->heads - head : LANES);
        vec step = deltas_of(a, b, t, head, count, 1), factor = step * load_real(weight + head), value;
        if (a->pool == POOL_MAX) {
          value = larger(load_real(high + head) * factor, load_real(other + head) * factor);
          value = logv(select(value < 0, splat(0), value));
        } else {
          value = logv(absolute(load_real(high + head) * factor));
          if (a->pool == POOL_L2) value += logv(load_real(other + head)) * (REAL)0.5;
        }
        for (int i = count; i < LANES; i++) value[i] = (REAL)-INFINITY;
        wide score = to_wide(value), A = to_wide(load_real_some((REAL *)a->A + head, count)), sum;
        memcpy(&sum, S + head, sizeof sum);
        for (int i = 0; i < PARTS; i++) score.part[i] += A.part[i] * sum.part[i];
        if (a->pool == POOL_L2) NAME(pool_l2)(&pool, score);
        else
          for (int i = 0; i < PARTS; i++) {
            dvec new = score.part[i];
            idvec higher = (new > pool.most.part[i]) | (new != new);
            pool.most.part[i] = (dvec)((higher & (idvec)new) | (~higher & (idvec)pool.most.part[i]));
          }
        wide d = to_wide(a->bias_in_decay ? step : deltas_of(a, b, t, head, count, 0));
        for (int i = 0; i < PARTS; i++) sum.part[i] += d.part[i];
        memcpy(S + head, &sum, sizeof sum);
      }
      a->out[b * a->tokens + t] = NAME(pool_out)(&pool, a->pool == POOL_L2);
    }
    free(C);
    simba_restore_mode(mode);
  }
  free(later);
  return failed;
}
