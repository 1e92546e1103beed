/* The influence of every token on the last output (DESIGN 1.1; the paper's equation 4), pooled over channels, as a
 * logarithm:
 *
 *     log|Δy_T(t)| = m + log|x_t Δ_t Σ_n C_T B_t exp(A S_t - m)|,   m = max_n A S_t,   S_t = Σ_{k>t} Δ_k
 *
 * S and m are double, so that a million steps lose nothing and far tokens keep their order. The exponents are taken as
 * (A - max_n A) S: exact where they are 0. A state whose exponent is below -150 (base 2) for all of a block's tokens
 * adds nothing to a float sum and is left out; far from the end that is most of them. */

#define NOTHING (-150)

typedef struct { wide S, top; } NAME(decay); /* Σ of the later steps; max_n A in natural units */
#define decay_t NAME(decay)
typedef struct { wide best; vec sum; } NAME(pool); /* of one token, for each lane */
#define pool_t NAME(pool)

/* Take log-magnitudes into a token's pool: the largest so far, and for L2 also Σ exp(2 (value - largest)). NaN stays. */
INLINE void NAME(pool_in)(pool_t *pool, wide value, int l2) {
  wide before = pool->best;
  pool->best = select_wide((value > before) | (value != value), value, before);
  if (!l2) return;
  /* equal values (two infinities among them) differ by 0; the smaller one of unequal values shrinks */
  vec shrink = __builtin_convertvector(select_wide(before == pool->best, (wide){0}, 2 * (before - pool->best)), vec);
  vec add = __builtin_convertvector(select_wide(value == pool->best, (wide){0}, 2 * (value - pool->best)), vec);
  vec one = __builtin_convertvector(select_wide(value == -INFINITY, (wide){0}, 1 - (wide){0}), vec);
  pool->sum = pool->sum * exp2v(shrink * (REAL)LOG2E) + one * exp2v(add * (REAL)LOG2E);
}

INLINE void NAME(influence_lanes)(const InfluenceArgs *a, const chunk_t *chunk, const REAL *weight, const vec *A, vec range,
                                  decay_t *decay, pool_t *pool, int *active, int64_t b, int64_t d, int count) {
  const int N = (int)a->states;
  vec nearest = __builtin_convertvector(decay->S, vec), S[CHUNK], scale[CHUNK], total[CHUNK];
  ivec inside;
  for (int i = 0; i < LANES; i++) inside[i] = i < count ? -1 : 0;
  int terms = 0;
  for (int n = 0; n < N; n++) {
    ivec alive = inside & ~(A[n] * nearest < NOTHING);
    INTEGER any = 0;
    for (int i = 0; i < LANES; i++) any |= alive[i];
    if (any || !a->softplus) active[terms++] = n;
  }
  for (int t = 0; t < chunk->count; t++) {
    vec delta = step_size(a->dt, a->dt_bias, (int)a->softplus, b, chunk->row[t], d, count);
    scale[t] = load_at(a->x, b, chunk->row[t], d, count) * delta;
    if (a->dt_bias && !a->bias_in_decay) delta = step_size(a->dt, NULL, (int)a->softplus, b, chunk->row[t], d, count);
    S[t] = delta;
  }
  wide exact[CHUNK];
  for (int t = chunk->count - 1; t >= 0; t--) {
    exact[t] = decay->S;
    decay->S += __builtin_convertvector(S[t], wide);
    S[t] = __builtin_convertvector(exact[t], vec);
  }
  for (int t = 0; t < chunk->count; t++) {
    const REAL *w = weight + t * N;
    vec excess = select(S[t] < 0, range * S[t], splat(0)); /* only where dt may be negative: then the smallest A leads */
    total[t] = splat(0);
    for (int j = 0; j < terms; j++) total[t] += exp2v(A[active[j]] * S[t] - excess) * w[active[j]];
  }
  for (int t = 0; t < chunk->count; t++) {
    vec excess = select(S[t] < 0, range * S[t], splat(0)), value = scale[t] * total[t];
    if (a->pool == POOL_MAX) value = select(value < 0, splat(0), value);
    value = logv(absolute(value)) + excess * (REAL)(1 / LOG2E);
    value = select(inside, value, splat((REAL)-INFINITY));
    NAME(pool_in)(pool + t, __builtin_convertvector(value, wide) + decay->top * exact[t], a->pool == POOL_L2);
  }
}

/* What the lanes of one token hold, as one number. */
INLINE double NAME(pool_out)(const pool_t *pool, int l2) {
  double best = -INFINITY, sum = 0;
  for (int i = 0; i < LANES; i++)
    if (pool->best[i] > best || pool->best[i] != pool->best[i]) best = pool->best[i];
  if (!l2 || !(best - best == 0)) return best; /* -inf, inf and NaN speak for themselves */
  for (int i = 0; i < LANES; i++)
    if (pool->sum[i] > 0) sum += exp(2 * (pool->best[i] - best)) * pool->sum[i];
  return best + log(sum) / 2;
}

int NAME(influence)(const InfluenceArgs *a, int threads) {
  int64_t slices = (a->channels + a->slice - 1) / a->slice, chunks = (a->tokens + CHUNK - 1) / CHUNK, N = a->states;
  int64_t blocks = (a->slice + LANES - 1) / LANES;
  ScanArgs rows = {.tokens = a->tokens, .kept = a->tokens, .states = N, .B = a->B, .C = a->C}; /* for open_chunk */
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < a->batch * slices; task++) {
    int64_t b = task / slices, slice = task % slices, first = slice * a->slice;
    int64_t size = a->channels - first < a->slice ? a->channels - first : a->slice;
    vec *A = simba_alloc((blocks * N + blocks) * sizeof(vec) + CHUNK * sizeof(pool_t) + blocks * sizeof(decay_t) +
                         (2 * CHUNK + 1) * N * sizeof(REAL) + N * sizeof(int));
    if (!A) { failed = 1; continue; }
    vec *range = A + blocks * N;
    pool_t *pool = (pool_t *)(range + blocks);
    decay_t *decay = (decay_t *)(pool + CHUNK);
    chunk_t chunk = {.B = (REAL *)(decay + blocks)};
    chunk.C = chunk.B + CHUNK * N;
    REAL *C_last = chunk.C + CHUNK * N;
    int *active = (int *)(C_last + N);
    pack_A(A, a->A, first, size, N);
    widen_row(C_last, (elem *)a->C.data + b * a->C.batch + (a->tokens - 1) * a->C.token, (int)N);
    for (int64_t k = 0; k < blocks; k++) {
      vec high = A[k * N], low = A[k * N];
      for (int64_t n = 1; n < N; n++) {
        high = larger(high, A[k * N + n]);
        low = -larger(-low, -A[k * N + n]);
      }
      range[k] = low - high;
      decay[k].S = (wide){0};
      decay[k].top = __builtin_convertvector(high, wide) / LOG2E;
      for (int64_t n = 0; n < N; n++) A[k * N + n] -= high;
    }
    for (int64_t c = chunks - 1; c >= 0; c--) {
      prefetch(a->x, b, NULL, (c - 1) * CHUNK, a->tokens, first, size);
      prefetch(a->dt, b, NULL, (c - 1) * CHUNK, a->tokens, first, size);
      open_chunk(&chunk, &rows, b, c * CHUNK);
      for (int64_t i = 0; i < chunk.count * N; i++) chunk.B[i] *= C_last[i % N];
      for (int i = 0; i < CHUNK; i++) {
        pool[i].best = (wide){0} - INFINITY;
        pool[i].sum = splat(0);
      }
      for (int64_t k = 0; k * LANES < size; k++)
        NAME(influence_lanes)(a, &chunk, chunk.B, A + k * N, range[k], decay + k, pool, active, b, first + k * LANES,
                              (int)(size - k * LANES < LANES ? size - k * LANES : LANES));
      for (int i = 0; i < chunk.count; i++)
        a->partial[(b * slices + slice) * a->tokens + c * CHUNK + i] = NAME(pool_out)(pool + i, a->pool == POOL_L2);
    }
    free(A);
  }
  return failed;
}

