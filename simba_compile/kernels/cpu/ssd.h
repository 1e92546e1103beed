/* The scan of Mamba-2 (Dao & Gu 2024) on the kept tokens, where A is one number for each head:
 *
 *     h_t = a_t h_{t-1} + Δ_t x_t ⊗ B_t      y_t = h_t C_t + D x_t      a_t = exp(Δ_t A)
 *
 * A chunk of tokens at a time, as matrix products. With M[t][s] = a_{s+1} ··· a_t, and P_t that product from the chunk's
 * start on,
 *
 *     y_t = P_t h C_t + Σ_{s≤t} M[t][s] (C_t·B_s) Δ_s x_s + D x_t      h' = P_T h + Σ_s M[T][s] Δ_s x_s ⊗ B_s
 *
 * so that a number of the state costs two multiply-adds for each token, and is loaded and stored once in a chunk. All
 * products are of decays, never quotients: nothing overflows. What stands above the diagonal is not computed as zeros,
 * but left out: a NaN or an infinity does not reach the tokens before it.
 *
 * A task is one sequence and a block of heads of one group. It walks the tokens in spans of a few chunks: a span's B and C
 * are packed once for all its heads, and a head's state stays in the first-level cache for the span. */

#define SPAN 4  /* chunks */
#define ROWS 4  /* of a register tile; a chunk is a multiple of it */
#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define WIDE 4  /* vectors in a row of a register tile: the tile is half of the 32 registers, */
#else
#define WIDE 2  /* or of 16 */
#endif

/* --- products of small matrices, all row by row; widths are whole vectors ------------------------------------------- */

INLINE void NAME(product_tile)(REAL *out, const REAL *S, int64_t S_row, const REAL *X, int64_t K, int64_t width,
                               const int wide_by) {
  vec sum[ROWS * WIDE];
  for (int i = 0; i < ROWS * wide_by; i++) sum[i] = splat(0);
  for (int64_t k = 0; k < K; k++, X += width) {
    vec x[WIDE];
    for (int v = 0; v < wide_by; v++) x[v] = load_real(X + v * LANES);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < wide_by; v++) sum[r * wide_by + v] += S[r * S_row + k] * x[v];
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < wide_by; v++) store_real(out + r * width + v * LANES, sum[r * wide_by + v]);
}

/* out = S X with S (ROWS, K), X (K, width). */
static void NAME(product_rows)(REAL *out, const REAL *S, int64_t S_row, const REAL *X, int64_t K, int64_t width) {
  int64_t v = 0;
  for (; v + WIDE * LANES <= width; v += WIDE * LANES) NAME(product_tile)(out + v, S, S_row, X + v, K, width, WIDE);
  for (; v < width; v += LANES) NAME(product_tile)(out + v, S, S_row, X + v, K, width, 1);
}
#define product_rows NAME(product_rows)

/* The same with S (CHUNK, K). */
INLINE void NAME(product)(REAL *out, const REAL *S, int64_t S_row, const REAL *X, int64_t K, int64_t width) {
  for (int t = 0; t < CHUNK; t += ROWS) product_rows(out + t * width, S + t * S_row, S_row, X, K, width);
}
#define product NAME(product)

INLINE void NAME(update_tile)(REAL *X, const REAL *keep, int keep_step, const REAL *S, int64_t S_row, const REAL *W,
                              int64_t width, const int rows, const int wide_by) {
  vec sum[ROWS * WIDE];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < wide_by; v++) sum[r * wide_by + v] = load_real(X + r * width + v * LANES) * keep[r * keep_step];
  for (int s = 0; s < CHUNK; s++) {
    vec w[WIDE];
    for (int v = 0; v < wide_by; v++) w[v] = load_real(W + s * width + v * LANES);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < wide_by; v++) sum[r * wide_by + v] += S[s * S_row + r] * w[v];
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < wide_by; v++) store_real(X + r * width + v * LANES, sum[r * wide_by + v]);
}

/* X = keep X + Sᵀ W with X (K, width), S (CHUNK, K), W (CHUNK, width). keep: one number (keep_step 0) or one a row. */
static void NAME(update)(REAL *X, const REAL *keep, int keep_step, const REAL *S, int64_t S_row, const REAL *W, int64_t K,
                         int64_t width) {
  const int64_t whole = K / ROWS * ROWS;
  for (int64_t k = 0; k < whole; k += ROWS) {
    const REAL *kept = keep + k * keep_step;
    int64_t v = 0;
    for (; v + WIDE * LANES <= width; v += WIDE * LANES)
      NAME(update_tile)(X + k * width + v, kept, keep_step, S + k, S_row, W + v, width, ROWS, WIDE);
    for (; v < width; v += LANES)
      NAME(update_tile)(X + k * width + v, kept, keep_step, S + k, S_row, W + v, width, ROWS, 1);
  }
  for (int64_t k = whole; k < K; k++)
    for (int64_t v = 0; v < width; v += LANES)
      NAME(update_tile)(X + k * width + v, keep + k * keep_step, keep_step, S + k, S_row, W + v, width, 1, 1);
}
#define update NAME(update)

/* X_t = keep_t X_t + Σ_{s≤t} S[t][s] W_s with S (CHUNK, CHUNK), W and X (CHUNK, width). */
static void NAME(causal)(REAL *X, const REAL *keep, const REAL *S, const REAL *W, int64_t width) {
  for (int t = 0; t < CHUNK; t += ROWS)
    for (int64_t v = 0; v < width; v += LANES) {
      vec sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = load_real(X + (t + r) * width + v) * keep[t + r];
      for (int s = 0; s < t; s++) {
        vec w = load_real(W + s * width + v);
        for (int r = 0; r < ROWS; r++) sum[r] += S[(t + r) * CHUNK + s] * w;
      }
      for (int s = 0; s < ROWS; s++) {
        vec w = load_real(W + (t + s) * width + v);
        for (int r = s; r < ROWS; r++) sum[r] += S[(t + r) * CHUNK + t + s] * w;
      }
      for (int r = 0; r < ROWS; r++) store_real(X + (t + r) * width + v, sum[r]);
    }
}
#define causal NAME(causal)

/* out[t][s] = U_t·V_s for the rows of a chunk, with V turned around into `across` (size, CHUNK). */
static void NAME(inner)(REAL *out, REAL *across, const REAL *U, const REAL *V, int64_t size, int64_t width) {
  for (int64_t n = 0; n < size; n++)
    for (int s = 0; s < CHUNK; s++) across[n * CHUNK + s] = V[s * width + n];
  product(out, U, width, across, size, CHUNK);
}
#define inner NAME(inner)

/* --- what a chunk needs ---------------------------------------------------------------------------------------------- */

/* Which heads a task has: blocks of a->block heads that do not cross a group's end. */
typedef struct { int64_t b, group, part, first, count; } NAME(share);
#define share_t NAME(share)
INLINE int64_t NAME(parts)(const SsdArgs *a) { return (a->heads / a->groups + a->block - 1) / a->block; }
#define parts_of NAME(parts)
INLINE share_t NAME(share_of)(const SsdArgs *a, int64_t task) {
  const int64_t each = a->heads / a->groups, parts = parts_of(a);
  share_t share = {task / (parts * a->groups), task / parts % a->groups, task % parts, 0, 0};
  share.first = share.group * each + share.part * a->block;
  share.count = each - share.part * a->block < a->block ? each - share.part * a->block : a->block;
  return share;
}
#define share_of NAME(share_of)

/* The tokens of a span; B and C as (SPAN CHUNK, width), zeros past the last token; their products C_t·B_s chunk by chunk;
 * and the heads' steps as they came in, (heads of the task, SPAN CHUNK). */
typedef struct {
  int64_t row[SPAN * CHUNK];
  int count, chunks;
  REAL *B, *C, *across, *raw;
  REAL products[SPAN][CHUNK * CHUNK];
} NAME(span);
#define span_t NAME(span)

/* One head's steps through a chunk. Past the last token Δ is 0 and a is 1: nothing happens there. */
typedef struct {
  REAL raw[CHUNK], free[CHUNK], delta[CHUNK]; /* before softplus, after it, and within the limits */
  REAL decay[CHUNK], start[CHUNK], end[CHUNK]; /* a_t, P_t and M[T][s] */
  REAL between[CHUNK * CHUNK];                 /* M[t][s]; 0 above the diagonal */
} NAME(steps);
#define steps_t NAME(steps)

INLINE int64_t NAME(padded)(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
#define padded NAME(padded)

/* One row in the compute type, zeros up to the padded size. */
static void NAME(unpack_row)(REAL *to, const elem *from, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) store_real(to + i, load(from + i, (int)(size - i < LANES ? size - i : LANES)));
}
#define unpack_row NAME(unpack_row)

INLINE const elem *NAME(row_of)(View4 view, int64_t b, int64_t row, int64_t head) {
  return (elem *)view.data + b * view.batch + row * view.token + head * view.head;
}
#define row_of NAME(row_of)

static void NAME(open_span)(span_t *span, const SsdArgs *a, const share_t *share, int64_t first, int with_C) {
  const int64_t N = a->states, width = padded(N), left = a->kept - first, b = share->b;
  span->count = (int)(left < SPAN * CHUNK ? left : SPAN * CHUNK);
  span->chunks = (span->count + CHUNK - 1) / CHUNK;
  for (int i = 0; i < span->chunks * CHUNK; i++) {
    if (i >= span->count) {
      memset(span->B + i * width, 0, width * sizeof(REAL));
      memset(span->C + i * width, 0, width * sizeof(REAL));
      for (int64_t h = 0; h < share->count; h++) span->raw[h * SPAN * CHUNK + i] = 0;
      continue;
    }
    const int64_t row = span->row[i] = a->index ? a->index[b * a->kept + first + i] : first + i;
    unpack_row(span->B + i * width, row_of(a->B, b, row, share->group), N);
    if (with_C) unpack_row(span->C + i * width, row_of(a->C, b, row, share->group), N);
    for (int64_t h = 0; h < share->count; h++)
      span->raw[h * SPAN * CHUNK + i] = NAME(widen_one)(*line_of(a->dt, b, row, share->first + h));
  }
  for (int c = 0; with_C && c < span->chunks; c++)
    inner(span->products[c], span->across, span->C + c * CHUNK * width, span->B + c * CHUNK * width, N, width);
}
#define open_span NAME(open_span)

/* The steps of head share->first + i. */
static void NAME(take_steps)(steps_t *steps, const span_t *span, const SsdArgs *a, const share_t *share, int64_t i, int c) {
  const int64_t head = share->first + i;
  const int T = span->count - c * CHUNK < CHUNK ? span->count - c * CHUNK : CHUNK, vectors = CHUNK / LANES;
  const REAL A = ((REAL *)a->A)[head] * (REAL)LOG2E, bias = a->dt_bias ? ((REAL *)a->dt_bias)[head] : (REAL)-0.0;
  vec v[CHUNK * sizeof(REAL) / VECTOR_BYTES], M[CHUNK * sizeof(REAL) / VECTOR_BYTES];
  ivec lane[CHUNK * sizeof(REAL) / VECTOR_BYTES];
  REAL P = 1;
  for (int j = 0; j < vectors; j++) v[j] = load_real(span->raw + (i * SPAN + c) * CHUNK + j * LANES) + bias;
  for (int j = 0; j < vectors; j++) store_real(steps->raw + j * LANES, v[j]);
  if (a->softplus) softplus_all(v, vectors);
  for (int j = 0; j < vectors; j++) {
    for (int k = 0; k < LANES; k++) lane[j][k] = j * LANES + k;
    vec delta = limited(v[j], a->dt_min, a->dt_max), past = (vec)(lane[j] >= T);
    store_real(steps->free + j * LANES, v[j]);
    store_real(steps->delta + j * LANES, select((ivec)past, splat(0), delta));
    store_real(steps->decay + j * LANES, select((ivec)past, splat(1), exp2v(delta * A)));
    M[j] = splat(0);
  }
  for (int t = 0; t < CHUNK; t++) {
    const REAL decay = steps->decay[t];
    steps->start[t] = P *= decay;
    for (int j = 0; j < vectors; j++) { /* zeros stay zeros, also where a step is not finite */
      M[j] = select(lane[j] < t, M[j] * decay, (vec)((lane[j] == t) & (ivec)splat(1)));
      store_real(steps->between + t * CHUNK + j * LANES, M[j]);
    }
  }
  for (int j = 0; j < vectors; j++) store_real(steps->end + j * LANES, M[j]);
}
#define take_steps NAME(take_steps)

/* Asks for a head's part of a row, ahead of its use: rows are kilobytes apart, which no hardware prefetcher follows. So are
 * the rows of y that are soon written: else the stores wait for their lines, and what comes after waits for the stores. */
#define ask(row, bytes, to_write) \
  for (int64_t ask_at = 0; ask_at < (int64_t)(bytes); ask_at += 64) __builtin_prefetch((const char *)(row) + ask_at, to_write)

/* A chunk of one head's x, (CHUNK, width), zeros past the last token; and the same times Δ_s M[T][s] into w. */
static void NAME(load_x)(REAL *x, REAL *w, const steps_t *steps, const span_t *span, const SsdArgs *a, int64_t b,
                         int64_t head, int c) {
  const int64_t p = a->channels, width = padded(p);
  for (int t = 0; t < CHUNK; t++) {
    const REAL weight = steps->delta[t] * steps->end[t];
    const int64_t i = c * CHUNK + t;
    if (i < span->count) unpack_row(x + t * width, row_of(a->x, b, span->row[i], head), p);
    else memset(x + t * width, 0, width * sizeof(REAL));
    for (int64_t v = 0; v < width; v += LANES) store_real(w + t * width + v, load_real(x + t * width + v) * weight);
  }
}
#define load_x NAME(load_x)

/* The state of a head, (p, n) in memory, as (n, padded p): what the products over p take. */
static void NAME(turn_state)(REAL *to, const REAL *from, int64_t p, int64_t n) {
  const int64_t width = padded(p);
  for (int64_t j = 0; j < n; j++) {
    for (int64_t i = 0; i < p; i++) to[j * width + i] = from[i * n + j];
    for (int64_t i = p; i < width; i++) to[j * width + i] = 0;
  }
}
#define turn_state NAME(turn_state)

/* --- the scan -------------------------------------------------------------------------------------------------------- */

int NAME(ssd_scan)(const SsdArgs *a, int threads) {
  const int64_t N = a->states, p = a->channels, n_width = padded(N), p_width = padded(p), rows = SPAN * CHUNK;
  int failed = 0;
  if (a->index && !simba_in_range(a->index, a->batch * a->kept, a->tokens)) return OUT_OF_RANGE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < a->batch * a->groups * parts_of(a); task++) {
    const share_t share = share_of(a, task);
    REAL *states = simba_alloc((share.count * (N * p_width + rows) + 2 * rows * n_width + N * CHUNK + 3 * CHUNK * p_width) *
                               sizeof(REAL));
    if (!states) { failed = OUT_OF_MEMORY; continue; }
    unsigned mode = simba_flush_subnormals();
    span_t span = {.B = states + share.count * N * p_width};
    span.C = span.B + rows * n_width;
    span.across = span.C + rows * n_width;
    span.raw = span.across + N * CHUNK;
    REAL *x = span.raw + share.count * rows, *w = x + CHUNK * p_width, *y = w + CHUNK * p_width;
    const int64_t state_size = p * N, at = (share.b * a->heads + share.first) * state_size;
    if (a->initial)
      for (int64_t i = 0; i < share.count; i++)
        turn_state(states + i * N * p_width, (REAL *)a->initial + at + i * state_size, p, N);
    else memset(states, 0, share.count * N * p_width * sizeof(REAL));
    for (int64_t first = 0; first < a->kept; first += rows) {
      open_span(&span, a, &share, first, 1);
      for (int64_t i = 0; i < share.count; i++) {
        const int64_t head = share.first + i;
        const REAL D = a->D ? ((REAL *)a->D)[head] : 0;
        REAL *h = states + i * N * p_width;
        for (int c = 0; c < span.chunks; c++) {
          const REAL *B = span.B + c * CHUNK * n_width, *C = span.C + c * CHUNK * n_width;
          REAL *out = (REAL *)a->y + ((share.b * a->kept + first + c * CHUNK) * a->heads + head) * p;
          steps_t steps;
          take_steps(&steps, &span, a, &share, i, c);
          load_x(x, w, &steps, &span, a, share.b, head, c);
          for (int t = 0; t < CHUNK; t++) {
            const int next = c + 1 < span.chunks ? (c + 1) * CHUNK + t : t;
            const int64_t next_head = c + 1 < span.chunks || i + 1 == share.count ? head : head + 1;
            if (c * CHUNK + t < span.count) ask(out + t * a->heads * p, p * sizeof(REAL), 1);
            if (next < span.count) ask(row_of(a->x, share.b, span.row[next], next_head), p * sizeof(elem), 0);
            if (t % ROWS == 0) product_rows(y + t * p_width, C + t * n_width, n_width, h, N, p_width);
          }
          for (int t = 0; t < CHUNK; t++) { /* between: now what x_s adds to y_t */
            for (int s = 0; s < CHUNK; s++) steps.between[t * CHUNK + s] *= span.products[c][t * CHUNK + s] * steps.delta[s];
            steps.between[t * CHUNK + t] += D;
          }
          causal(y, steps.start, steps.between, x, p_width);
          update(h, steps.start + CHUNK - 1, 0, B, n_width, w, N, p_width);
          for (int t = 0; t < CHUNK && c * CHUNK + t < span.count; t++)
            memcpy(out + t * a->heads * p, y + t * p_width, p * sizeof(REAL));
        }
      }
    }
    for (int64_t i = 0; i < share.count; i++)
      for (int64_t j = 0; j < p; j++)
        for (int64_t n = 0; n < N; n++)
          ((REAL *)a->state)[at + i * state_size + j * N + n] = states[(i * N + n) * p_width + j];
    free(states);
    simba_restore_mode(mode);
  }
  return failed;
}
