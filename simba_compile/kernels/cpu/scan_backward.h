/* The gradient of scan.h. A first pass over the tokens leaves the state at the start of every chunk; the second goes
 * through the chunks backwards, runs each forward once more to have its states, and then the adjoint recurrence
 *
 *     λ_t = C_t ḡ_t + exp(Δ_{t+1} A) λ_{t+1}          (ḡ: the gradient of y before the gate)
 *
 * from which every gradient is a product at that token. dB and dC are summed over the slice's channels here and over
 * slices by the caller. Every token is kept (index is null): gathering is the caller's. */

INLINE void NAME(adjoint_lanes)(const ScanBackwardArgs *a, const chunk_t *chunk, const vec *A, const vec *start,
                                vec *lambda, vec *dA, vec *dB, vec *dC, vec *dD, vec *dbias, int64_t b, int64_t first,
                                int64_t d, int count) {
  const ScanArgs *f = &a->forward;
  const int N = (int)f->states, T = chunk->count;
  vec skip = f->D ? load_real_some((REAL *)f->D + d, count) : splat(0);
  vec x[CHUNK], raw[CHUNK], delta[CHUNK], input[CHUNK], grad[CHUNK], y[CHUNK], from_A[CHUNK], from_B[CHUNK];
  step_sizes(raw, chunk, f->dt_bias, 0, d, count);
  memcpy(delta, raw, sizeof raw);
  if (f->softplus) softplus_all(delta, T);
  for (int t = 0; t < T; t++) {
    x[t] = load(chunk->x[t] + d, count);
    input[t] = delta[t] * x[t];
    y[t] = skip * x[t];
    from_A[t] = from_B[t] = splat(0);
    grad[t] = load(chunk->out[t] + d, count);
    if (f->z.data) {
      vec z = load(chunk->z[t] + d, count);
      grad[t] *= z * sigmoidv(z);
    }
  }
  for (int n = 0; n < N; n++) { /* one state through the chunk and back: what it needs stays in the first-level cache */
    vec h[CHUNK + 1], decay[CHUNK], l = lambda[n], sum = dA[n];
    for (int i = chunk->lines * n / N; i < chunk->lines * (n + 1) / N; i++) __builtin_prefetch(chunk->ask[i] + d);
    h[0] = start[n]; /* h[t + 1] is that after token t */
    for (int t = 0; t < T; t++) {
      decay[t] = exp2v(delta[t] * A[n]);
      h[t + 1] = decay[t] * h[t] + input[t] * chunk->B[t * N + n];
      y[t] += h[t + 1] * chunk->C[t * N + n];
    }
    for (int t = T - 1; t >= 0; t--) {
      l += grad[t] * chunk->C[t * N + n];
      dC[n * CHUNK + t] += grad[t] * h[t + 1];
      dB[n * CHUNK + t] += l * input[t];
      from_B[t] += l * chunk->B[t * N + n];
      l *= decay[t]; /* now exp(Δ_t A) λ_t, what the token before receives */
      vec through = l * h[t];
      from_A[t] += through * A[n];
      sum += through * delta[t];
    }
    lambda[n] = l;
    dA[n] = sum;
  }
  for (int t = 0; t < T; t++) {
    vec ddelta = x[t] * from_B[t] + from_A[t] * (REAL)(1 / LOG2E);
    if (f->softplus) ddelta *= sigmoidv(raw[t]);
    *dbias += ddelta;
    *dD += grad[t] * x[t];
    vec dx = delta[t] * from_B[t] + grad[t] * skip;
    store(line_of(a->dx, b, first + t, d), dx, count);
    store(line_of(a->ddt, b, first + t, d), ddelta, count);
    if (f->z.data) {
      vec z = load(chunk->z[t] + d, count), gate = sigmoidv(z);
      vec dz = load(chunk->out[t] + d, count) * y[t] * (gate + z * gate * (1 - gate));
      store(line_of(a->dz, b, first + t, d), dz, count);
    }
  }
}
#define adjoint_lanes NAME(adjoint_lanes)

int NAME(selective_scan_backward)(const ScanBackwardArgs *a, int threads) {
  const ScanArgs *f = &a->forward;
  ScanArgs first_pass = *f;
  first_pass.out.data = NULL;
  first_pass.z.data = NULL;
  if (NAME(selective_scan)(&first_pass, threads)) return OUT_OF_MEMORY;
  int64_t slices = (f->channels + f->slice - 1) / f->slice, chunks = (f->tokens + CHUNK - 1) / CHUNK, N = f->states;
  int64_t blocks = (f->slice + LANES - 1) / LANES;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < f->batch * slices; task++) {
    int64_t b = task / slices, slice = task % slices, first = slice * f->slice;
    int64_t size = f->channels - first < f->slice ? f->channels - first : f->slice;
    int64_t vectors = 3 * blocks * N + 2 * CHUNK * N + 2 * blocks;
    vec *A = simba_alloc(vectors * sizeof(vec) + 2 * CHUNK * N * sizeof(REAL));
    if (!A) { failed = OUT_OF_MEMORY; continue; }
    unsigned mode = simba_flush_subnormals();
    vec *lambda = A + blocks * N, *dA = lambda + blocks * N, *dB = dA + blocks * N, *dC = dB + CHUNK * N;
    vec *dD = dC + CHUNK * N, *dbias = dD + blocks;
    chunk_t chunk = {.B = (REAL *)(dbias + blocks)};
    chunk.C = chunk.B + CHUNK * N;
    memset(lambda, 0, (char *)chunk.B - (char *)lambda);
    pack_A(A, f->A, first, size, N);
    if (a->grad_state)
      for (int64_t d = 0; d < size; d++)
        for (int64_t n = 0; n < N; n++)
          lambda[d / LANES * N + n][d % LANES] = ((REAL *)a->grad_state)[(b * f->channels + first + d) * N + n];
    for (int64_t c = chunks - 1; c >= 0; c--) {
      open_chunk(&chunk, f, b, c * CHUNK, (c - 1) * CHUNK);
      memset(dB, 0, 2 * CHUNK * N * sizeof(vec));
      for (int64_t d = 0; d < size; d += LANES) {
        int64_t k = d / LANES;
        const vec *start = (vec *)f->checkpoints + ((b * chunks + c) * slices + slice) * blocks * N + k * N;
        adjoint_lanes(a, &chunk, A + k * N, start, lambda + k * N, dA + k * N, dB, dC, dD + k, dbias + k, b, c * CHUNK,
                      first + d, (int)(size - d < LANES ? size - d : LANES));
      }
      for (int i = 0; i < chunk.count; i++)
        for (int64_t n = 0; n < N; n++) {
          int64_t at = ((b * slices + slice) * f->tokens + c * CHUNK + i) * N + n;
          ((REAL *)a->dB)[at] = sum_lanes(dB[n * CHUNK + i]);
          ((REAL *)a->dC)[at] = sum_lanes(dC[n * CHUNK + i]);
        }
    }
    for (int64_t d = 0; d < size; d++) {
      int64_t channel = b * f->channels + first + d;
      for (int64_t n = 0; n < N; n++)
        ((REAL *)a->dA)[channel * N + n] = dA[d / LANES * N + n][d % LANES];
      if (a->dD) ((REAL *)a->dD)[channel] = dD[d / LANES][d % LANES];
      if (a->dbias) ((REAL *)a->dbias)[channel] = dbias[d / LANES][d % LANES];
    }
    free(A);
    simba_restore_mode(mode);
  }
  return failed;
}
