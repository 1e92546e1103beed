/* The selective scan of Mamba-1 (Gu & Dao 2023, algorithm 2) on the kept tokens, with softplus, the D skip, the gate
 * and the last state fused in:
 *
 *     h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t      y_t = (C_t h_t + D x_t) silu(z_t)      Δ_t = softplus(dt_t + dt_bias)
 *
 * A task is one sequence and a slice of channels. It walks the tokens in chunks, and in a chunk its channels, LANES at
 * a time: rows are read in long runs, and a chunk's rows, the slice's states and A stay in the first-level cache. */

#define GROUP 4 /* states at a time: they share what they load, and their exponentials overlap */

/* What one chunk of tokens shares among the channels of a slice. Rows are given by where their channel 0 stands. */
typedef struct {
  int count, lines;                                 /* tokens in this chunk; entries of `ask` */
  const elem *x[CHUNK], *dt[CHUNK], *z[CHUNK];
  elem *out[CHUNK];
  const elem *ask[4 * CHUNK];                       /* the rows of the chunk that comes after this one */
  REAL *B, *C;                                      /* (CHUNK, states) */
} NAME(chunk);
#define chunk_t NAME(chunk)

/* Where channel d of a row stands. */
INLINE elem *NAME(line_of)(View3 view, int64_t b, int64_t row, int64_t d) {
  return (elem *)view.data + b * view.batch + row * view.token + d;
}
#define line_of NAME(line_of)

INLINE vec NAME(load_at)(View3 view, int64_t b, int64_t row, int64_t d, int count) {
  return load(line_of(view, b, row, d), count);
}
#define load_at NAME(load_at)

INLINE void NAME(unpack_states)(REAL *to, const elem *from, int64_t states) {
  int64_t n = 0;
  for (; n + LANES <= states; n += LANES) store_real(to + n, load(from + n, LANES));
  for (; n < states; n++) to[n] = NAME(widen_one)(from[n]);
}

/* `next`: where the chunk that comes after this one starts. No hardware prefetcher follows rows that are kilobytes apart, so
 * the kernels ask for its rows, one line at a time between their exponentials: a core has a dozen requests under way at most,
 * and one more would wait. */
INLINE void NAME(open_chunk)(chunk_t *chunk, const ScanArgs *a, int64_t b, int64_t first, int64_t next) {
  const int64_t *index = a->index ? a->index + b * a->kept : NULL;
  chunk->count = (int)(a->kept - first < CHUNK ? a->kept - first : CHUNK);
  chunk->lines = 0;
  for (int i = 0; i < chunk->count; i++) {
    int64_t row = index ? index[first + i] : first + i;
    chunk->x[i] = line_of(a->x, b, row, 0);
    chunk->dt[i] = line_of(a->dt, b, row, 0);
    chunk->z[i] = a->z.data ? line_of(a->z, b, first + i, 0) : NULL;
    chunk->out[i] = a->out.data ? line_of(a->out, b, first + i, 0) : NULL;
    NAME(unpack_states)(chunk->B + i * a->states, line_of(a->B, b, row, 0), a->states);
    NAME(unpack_states)(chunk->C + i * a->states, line_of(a->C, b, row, 0), a->states);
  }
  for (int64_t t = next; t >= 0 && t < next + CHUNK && t < a->kept; t++) {
    int64_t row = index ? index[t] : t;
    chunk->ask[chunk->lines++] = line_of(a->x, b, row, 0);
    chunk->ask[chunk->lines++] = line_of(a->dt, b, row, 0);
    if (a->z.data) chunk->ask[chunk->lines++] = line_of(a->z, b, t, 0);
    if (a->out.data) chunk->ask[chunk->lines++] = line_of(a->out, b, t, 0);
  }
}
#define open_chunk NAME(open_chunk)

/* Δ of a chunk's tokens. */
INLINE void NAME(step_sizes)(vec *delta, const chunk_t *chunk, const REAL *bias, int softplus, int64_t d, int count) {
  vec add = bias ? load_real_some(bias + d, count) : splat((REAL)-0.0);
  for (int t = 0; t < chunk->count; t++) delta[t] = load(chunk->dt[t] + d, count) + add;
  if (softplus) softplus_all(delta, chunk->count);
}
#define step_sizes NAME(step_sizes)

/* Channels first..first+size of A, times log2(e), as (size / LANES, states) vectors. */
INLINE void NAME(pack_A)(vec *packed, const REAL *A, int64_t first, int64_t size, int64_t states) {
  for (int64_t d = 0; d < size; d += LANES)
    for (int64_t n = 0; n < states; n++) {
      vec v = {0};
      for (int i = 0; i < LANES && d + i < size; i++) v[i] = A[(first + d + i) * states + n] * (REAL)LOG2E;
      packed[d / LANES * states + n] = v;
    }
}
#define pack_A NAME(pack_A)

/* The larger magnitude, lane by lane; a NaN may get lost. */
INLINE vec NAME(farther)(vec a, vec b) { b = absolute(b); return select(a < b, b, a); }
#define farther NAME(farther)

/* Whether exp2_tame may multiply factors of at most these magnitudes: not if one is infinite. */
INLINE int NAME(is_tame)(vec a, vec b) { return !any_lane(~(a * b < (REAL)1e5)); }
#define is_tame NAME(is_tame)

/* `size` states of LANES channels through one chunk, h and A in registers; B and C are those of the chunk's first token.
 * `tame`: see exp2_tame. At each token it asks for channel d of one of the rows in `ask`, if that is not null. */
INLINE void NAME(scan_states)(const vec *A, vec *state, const REAL *B, const REAL *C, int64_t states, const vec *delta,
                              const vec *input, vec *y, int T, const int size, const int tame, const elem *const *ask,
                              int64_t d) {
  vec h[GROUP], decay[GROUP];
  for (int n = 0; n < size; n++) {
    h[n] = state[n];
    decay[n] = A[n];
  }
  for (int t = 0; t < T; t++, B += states, C += states) {
    vec step = delta[t], in = input[t], out = y[t];
    if (ask) __builtin_prefetch(ask[t] + d);
    for (int n = 0; n < size; n++) {
      vec kept = tame ? exp2_tame(step, decay[n]) : exp2v(step * decay[n]);
      h[n] = kept * h[n] + in * B[n];
      out += h[n] * C[n];
    }
    y[t] = out;
  }
  for (int n = 0; n < size; n++) state[n] = h[n];
}

/* LANES channels through one chunk. What does not depend on the token before stands in loops of its own. */
INLINE void NAME(scan_lanes)(const ScanArgs *a, const chunk_t *chunk, const vec *A, vec *state, int64_t d, int count) {
  const int N = (int)a->states, T = chunk->count;
  vec skip = a->D ? load_real_some((REAL *)a->D + d, count) : splat(0), longest = splat(0), steepest = splat(0);
  vec delta[CHUNK], input[CHUNK], y[CHUNK];
  step_sizes(delta, chunk, a->dt_bias, (int)a->softplus, d, count);
  for (int t = 0; t < T; t++) {
    vec x = load(chunk->x[t] + d, count);
    longest = farther(longest, delta[t]);
    input[t] = delta[t] * x;
    y[t] = skip * x;
  }
  for (int n = 0; n < N; n++) steepest = farther(steepest, A[n]);

  const int tame = is_tame(longest, steepest);
  for (int n = 0, asked = 0; n < N; n += GROUP) {
    const REAL *B = chunk->B + n, *C = chunk->C + n;
    if (n + GROUP > N || !tame) {
      for (int m = 0; m < GROUP && n + m < N; m++)
        NAME(scan_states)(A + n + m, state + n + m, B + m, C + m, N, delta, input, y, T, 1, 0, NULL, d);
      continue;
    }
    const int more = asked + T <= chunk->lines;
    NAME(scan_states)(A + n, state + n, B, C, N, delta, input, y, T, GROUP, 1, more ? chunk->ask + asked : NULL, d);
    asked += more ? T : 0;
  }
  if (!a->out.data) return;
  if (a->z.data) {
    for (int t = 0; t < T; t++) input[t] = load(chunk->z[t] + d, count);
    times_silu(y, input, T);
  }
  for (int t = 0; t < T; t++) store(chunk->out[t] + d, y[t], count);
}
#define scan_lanes NAME(scan_lanes)

int NAME(selective_scan)(const ScanArgs *a, int threads) {
  int64_t slices = (a->channels + a->slice - 1) / a->slice, chunks = (a->kept + CHUNK - 1) / CHUNK, N = a->states;
  int64_t blocks = (a->slice + LANES - 1) / LANES;
  int failed = 0;
  if (a->index && !simba_in_range(a->index, a->batch * a->kept, a->tokens)) return OUT_OF_RANGE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < a->batch * slices; task++) {
    int64_t b = task / slices, first = task % slices * a->slice;
    int64_t size = a->channels - first < a->slice ? a->channels - first : a->slice;
    vec *A = simba_alloc((2 * blocks * N) * sizeof(vec) + 2 * CHUNK * N * sizeof(REAL));
    if (!A) { failed = OUT_OF_MEMORY; continue; }
    unsigned mode = simba_flush_subnormals();
    vec *state = A + blocks * N;
    chunk_t chunk = {.B = (REAL *)(state + blocks * N)};
    chunk.C = chunk.B + CHUNK * N;
    pack_A(A, a->A, first, size, N);
    memset(state, 0, blocks * N * sizeof(vec));
    for (int64_t c = 0; c < chunks; c++) {
      open_chunk(&chunk, a, b, c * CHUNK, (c + 1) * CHUNK);
      for (int64_t d = 0; d < size; d += LANES) {
        int64_t block = d / LANES;
        int count = (int)(size - d < LANES ? size - d : LANES);
        if (a->checkpoints) {
          vec *saved = (vec *)a->checkpoints + ((b * chunks + c) * slices + first / a->slice) * blocks * N + block * N;
          memcpy(saved, state + block * N, N * sizeof(vec));
        }
        scan_lanes(a, &chunk, A + block * N, state + block * N, first + d, count);
      }
    }
    if (a->state)
      for (int64_t d = 0; d < size; d++)
        for (int64_t n = 0; n < N; n++)
          ((REAL *)a->state)[(b * a->channels + first + d) * N + n] = state[d / LANES * N + n][d % LANES];
    free(A);
    simba_restore_mode(mode);
  }
  return failed;
}
