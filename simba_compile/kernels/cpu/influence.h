/* The influence of every token on the last output (docs/method.md; the paper's equation 4), pooled over channels, as a
 * logarithm:
 *
 *     log|Δy_T(t)| = m + log|x_t Δ_t Σ_n C_T B_t exp(A S_t - m)|,   m = max_n A S_t,   S_t = Σ_{k>t} Δ_k
 *
 * S and m are double, so that a million steps lose nothing and far tokens keep their order. The exponents are taken as
 * (A - max_n A) S: exact where they are 0. A state whose exponent is below -126 (base 2) for all of a block's tokens
 * adds nothing to a float sum and is left out; far from the end that is most of them. */

#define NOTHING (-126)

typedef struct { wide S, top; } NAME(decay); /* Σ of the later steps; max_n A in natural units */
#define decay_t NAME(decay)

/* What a slice's channels have brought a token so far, lane by lane: the largest log-magnitude and, for L2,
 * Σ exp(2 (value - largest)). */
typedef struct { wide most; vec sum; } NAME(pool);
#define pool_t NAME(pool)

INLINE void NAME(pool_l2)(pool_t *pool, wide value) {
  wide shrink, add;
  for (int p = 0; p < PARTS; p++) {
    dvec v = value.part[p], before = pool->most.part[p];
    idvec higher = (v > before) | (v != v);
    dvec most = pool->most.part[p] = (dvec)((higher & (idvec)v) | (~higher & (idvec)before));
    /* of equals (two infinities among them) the difference is 0 */
    shrink.part[p] = (dvec)(~(idvec)(before == most) & (idvec)(2 * (before - most)));
    add.part[p] = (dvec)(~(idvec)(v == most) & (idvec)(2 * (v - most)));
    add.part[p] -= (dvec)((idvec)(v == -INFINITY) & (idvec)(INFINITY - (dvec){0})); /* nothing to add */
  }
  pool->sum = pool->sum * exp2v(from_wide(shrink) * (REAL)LOG2E) + exp2v(from_wide(add) * (REAL)LOG2E);
}

INLINE double NAME(pool_out)(const pool_t *pool, int l2) {
  const double *most = (const double *)&pool->most;
  double top = -INFINITY, sum = 0;
  for (int i = 0; i < LANES; i++)
    if (!(most[i] <= top) && top == top) top = most[i];
  if (!l2 || !(top - top == 0)) return top; /* -inf, inf and NaN speak for themselves */
  for (int i = 0; i < LANES; i++)
    if (pool->sum[i] > 0) sum += exp(2 * (most[i] - top)) * pool->sum[i];
  return top + log(sum) / 2;
}

/* Adds Σ C_T B_t exp((A - max_n A) S_t) over `size` states, given by their places in `weight`, to a chunk's totals. */
INLINE void NAME(add_states)(vec *total, const vec *near, const int *place, const REAL *weight, int64_t states, const vec *S,
                             const vec *excess, int T, const int size, const int tame) {
  const REAL *w[GROUP];
  vec rate[GROUP];
  for (int n = 0; n < size; n++) {
    w[n] = weight + place[n];
    rate[n] = near[n];
  }
  for (int t = 0; t < T; t++) {
    vec far = S[t], sum = total[t];
    for (int n = 0; n < size; n++)
      sum += (tame ? exp2_tame(far, rate[n]) : exp2v(far * rate[n] - excess[t])) * w[n][t * states];
    total[t] = sum;
  }
}

/* LANES channels of one chunk: adds their part to the tokens' pools, and the chunk's steps to their decay. */
INLINE void NAME(influence_lanes)(const InfluenceArgs *a, const chunk_t *chunk, const REAL *weight, const vec *A,
                                  const REAL *reach, vec range, decay_t *decay, pool_t *pool, int64_t d, int count) {
  const int N = (int)a->states, T = chunk->count;
  vec S[CHUNK], later[CHUNK], value[CHUNK], total[CHUNK], excess[CHUNK], base = from_wide(decay->S);
  step_sizes(later, chunk, a->dt_bias, (int)a->softplus, d, count);
  for (int t = 0; t < T; t++) value[t] = load(chunk->x[t] + d, count) * later[t];
  if (a->dt_bias && !a->bias_in_decay) step_sizes(later, chunk, NULL, (int)a->softplus, d, count);
  vec sum = splat(0), longest = splat(0), shortest = splat(0); /* sum: of the later steps in this chunk */
  for (int t = T - 1; t >= 0; t--) {
    vec delta = later[t];
    later[t] = sum;
    S[t] = base + sum;
    longest = farther(longest, S[t]);
    shortest = select(S[t] < shortest, S[t], shortest);
    sum += delta;
    total[t] = splat(0);
  }
  REAL least = base[0]; /* no S is smaller, unless a step is negative */
  for (int i = 1; i < count; i++) least = base[i] < least ? base[i] : least;
  vec near[MAX_STATES], steepest = splat(0);
  int place[MAX_STATES], alive = 0;
  for (int n = 0; n < N; n++)
    if (!(reach[n] * least < NOTHING) || !a->softplus) {
      near[alive] = A[n];
      steepest = farther(steepest, A[n]);
      place[alive++] = n;
    }
  int negative = any_lane(shortest < 0), n = 0; /* S may be, where dt may: then the smallest A leads */
  for (int t = 0; t < T; t++) excess[t] = negative ? select(S[t] < 0, range * S[t], splat(0)) : splat(0);
  if (!negative && is_tame(longest, steepest))
    for (; n + GROUP <= alive; n += GROUP) NAME(add_states)(total, near + n, place + n, weight, N, S, excess, T, GROUP, 1);
  for (; n < alive; n++) NAME(add_states)(total, near + n, place + n, weight, N, S, excess, T, 1, 0);
  vec check = splat(0); /* stays 0 unless there is a NaN or an infinity */
  for (int t = 0; t < T; t++) {
    if (chunk->lines) __builtin_prefetch(chunk->ask[t] + d);
    value[t] *= total[t];
    check += value[t] * 0;
    value[t] = logv(a->pool == POOL_MAX ? select(value[t] < 0, splat(0), value[t]) : absolute(value[t]));
  }
  const int bad = any_lane(check != 0);
  for (int t = 0; t < T && (negative || count < LANES); t++) {
    value[t] += excess[t] * (REAL)(1 / LOG2E);
    for (int i = count; i < LANES; i++) value[t][i] = (REAL)-INFINITY; /* past the last channel */
  }
  wide top = decay->top, top_S;
  for (int p = 0; p < PARTS; p++) top_S.part[p] = top.part[p] * decay->S.part[p];
  for (int t = 0; t < T; t++) {
    if (chunk->lines) __builtin_prefetch(chunk->ask[CHUNK + t] + d);
    wide score = to_wide(value[t]), far = to_wide(later[t]);
    for (int p = 0; p < PARTS; p++) score.part[p] += top_S.part[p] + top.part[p] * far.part[p];
    if (a->pool == POOL_L2) NAME(pool_l2)(pool + t, score);
    else
      for (int p = 0; p < PARTS; p++) {
        dvec *most = &pool[t].most.part[p], new = score.part[p];
        idvec higher = bad ? (new > *most) | (new != new) : new > *most; /* NaN is the largest; one that is there stays */
        *most = (dvec)((higher & (idvec)new) | (~higher & (idvec)*most));
      }
  }
  wide steps = to_wide(sum);
  for (int p = 0; p < PARTS; p++) decay->S.part[p] += steps.part[p];
}

int NAME(influence)(const InfluenceArgs *a, int threads) {
  int64_t slices = (a->channels + a->slice - 1) / a->slice, chunks = (a->tokens + CHUNK - 1) / CHUNK, N = a->states;
  int64_t blocks = (a->slice + LANES - 1) / LANES;
  ScanArgs rows = {.kept = a->tokens, .states = N, .x = a->x, .dt = a->dt, .B = a->B, .C = a->C}; /* for open_chunk */
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < a->batch * slices; task++) {
    int64_t b = task / slices, slice = task % slices, first = slice * a->slice;
    int64_t size = a->channels - first < a->slice ? a->channels - first : a->slice;
    vec *A = simba_alloc((blocks * N + blocks) * sizeof(vec) + CHUNK * sizeof(pool_t) + blocks * sizeof(decay_t) +
                         ((2 * CHUNK + 1) * N + blocks * N) * sizeof(REAL));
    if (!A) { failed = OUT_OF_MEMORY; continue; }
    unsigned mode = simba_flush_subnormals();
    vec *range = A + blocks * N;
    pool_t *pool = (pool_t *)(range + blocks);
    decay_t *decay = (decay_t *)(pool + CHUNK);
    chunk_t chunk = {.B = (REAL *)(decay + blocks)};
    chunk.C = chunk.B + CHUNK * N;
    REAL *C_last = chunk.C + CHUNK * N, *reach = C_last + N; /* reach: of a block's exponents of a state, the largest */
    pack_A(A, a->A, first, size, N);
    for (int64_t n = 0; n < N; n++)
      C_last[n] = NAME(widen_one)(((elem *)a->C.data + b * a->C.batch + (a->tokens - 1) * a->C.token)[n]);
    for (int64_t k = 0; k < blocks; k++) {
      vec high = A[k * N], low = A[k * N];
      for (int64_t n = 1; n < N; n++) {
        high = larger(high, A[k * N + n]);
        low = -larger(-low, -A[k * N + n]);
      }
      range[k] = low - high;
      decay[k].S = to_wide(splat(0));
      for (int i = 0; i < LANES; i++) { /* from A itself: in double, times S, the rounding of A log2(e) would show */
        double *top = (double *)&decay[k].top + i;
        *top = 0;
        if (k * LANES + i >= size) continue;
        const REAL *row = (REAL *)a->A + (first + k * LANES + i) * N;
        *top = row[0];
        for (int64_t n = 1; n < N; n++) *top = row[n] > *top || row[n] != row[n] ? row[n] : *top;
      }
      for (int64_t n = 0; n < N; n++) {
        A[k * N + n] -= high;
        reach[k * N + n] = A[k * N + n][0];
        for (int i = 1; i < LANES && k * LANES + i < size; i++)
          if (!(A[k * N + n][i] <= reach[k * N + n])) reach[k * N + n] = A[k * N + n][i];
      }
    }
    for (int64_t c = chunks - 1; c >= 0; c--) {
      open_chunk(&chunk, &rows, b, c * CHUNK, (c - 1) * CHUNK);
      for (int64_t i = 0; i < N * chunk.count; i++) chunk.B[i] *= C_last[i % N];
      for (int i = 0; i < CHUNK; i++) {
        pool[i].most = to_wide(splat((REAL)-INFINITY));
        pool[i].sum = splat(0);
      }
      for (int64_t k = 0; k * LANES < size; k++)
        NAME(influence_lanes)(a, &chunk, chunk.B, A + k * N, reach + k * N, range[k], decay + k, pool,
                              first + k * LANES, (int)(size - k * LANES < LANES ? size - k * LANES : LANES));
      for (int i = 0; i < chunk.count; i++)
        a->partial[(b * slices + slice) * a->tokens + c * CHUNK + i] = NAME(pool_out)(pool + i, a->pool == POOL_L2);
    }
    free(A);
    simba_restore_mode(mode);
  }
  return failed;
}

