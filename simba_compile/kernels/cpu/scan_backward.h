/* The gradient of scan.h. A first pass over the tokens leaves the state at the start of every chunk; the second goes
 * through the chunks backwards, runs each forward once more to have its states, and then the adjoint recurrence
 *
 *     λ_t = C_t ḡ_t + exp(Δ_{t+1} A) λ_{t+1}          (ḡ: the gradient of y before the gate)
 *
 * from which every gradient is a product at that token. dB and dC are summed over the slice's channels here and over
 * slices by the caller. Every token is kept (index is null): gathering is the caller's. */

INLINE void NAME(adjoint_lanes)(const ScanBackwardArgs *a, const chunk_t *chunk, const vec *A, const vec *start,
                                vec *lambda, vec *dA, vec *dB, vec *dC, vec *h, vec *decay, vec *dD, vec *dbias,
                                int64_t b, int64_t first, int64_t d, int count) {
  const ScanArgs *f = &a->forward;
  const int N = (int)f->states;
  const REAL *bias = f->dt_bias;
  vec skip = f->D ? load_real_some((REAL *)f->D + d, count) : splat(0);
  for (int i = 0; i < chunk->count; i++) { /* forward again: h (CHUNK, N) and decay (CHUNK, N) */
    int64_t row = first + i;
    const vec *before = i ? h + (i - 1) * N : start;
    vec x = load_at(f->x, b, row, d, count);
    vec delta = step_size(f->dt, bias, (int)f->softplus, b, row, d, count), input = delta * x;
    for (int n = 0; n < N; n++) {
      decay[i * N + n] = exp2v(delta * A[n]);
      h[i * N + n] = decay[i * N + n] * before[n] + input * chunk->B[i * N + n];
    }
  }
  for (int i = chunk->count - 1; i >= 0; i--) {
    int64_t row = first + i;
    const vec *before = i ? h + (i - 1) * N : start;
    const REAL *B = chunk->B + i * N, *C = chunk->C + i * N;
    vec x = load_at(f->x, b, row, d, count);
    vec raw = load_at(f->dt, b, row, d, count);
    if (bias) raw += load_real_some(bias + d, count);
    vec delta = f->softplus ? softplusv(raw) : raw;
    vec grad = load_at(f->out, b, row, d, count);
    if (f->z.data) {
      vec z = load_at(f->z, b, row, d, count), gate = sigmoidv(z), y = skip * x;
      for (int n = 0; n < N; n++) y += h[i * N + n] * C[n];
      vec dz = grad * y * (gate + z * gate * (1 - gate));
      store((elem *)a->dz.data + b * a->dz.batch + row * a->dz.token + d, dz, count);
      grad *= z * gate;
    }
    vec from_B = splat(0), from_A = splat(0), input = delta * x;
    for (int n = 0; n < N; n++) {
      lambda[n] += grad * C[n];
      dC[i * N + n] += grad * h[i * N + n];
      dB[i * N + n] += lambda[n] * input;
      from_B += lambda[n] * B[n];
      lambda[n] *= decay[i * N + n]; /* now exp(Δ_t A) λ_t, what the token before receives */
      vec through = lambda[n] * before[n];
      from_A += through * A[n];
      dA[n] += through * delta;
    }
    vec ddelta = x * from_B + from_A * (REAL)(1 / LOG2E);
    if (f->softplus) ddelta *= sigmoidv(raw);
    *dbias += ddelta;
    *dD += grad * x;
    store((elem *)a->dx.data + b * a->dx.batch + row * a->dx.token + d, delta * from_B + grad * skip, count);
    store((elem *)a->ddt.data + b * a->ddt.batch + row * a->ddt.token + d, ddelta, count);
  }
}
#define adjoint_lanes NAME(adjoint_lanes)

int NAME(selective_scan_backward)(const ScanBackwardArgs *a, int threads) {
  const ScanArgs *f = &a->forward;
  ScanArgs first_pass = *f;
  first_pass.out.data = NULL;
  first_pass.z.data = NULL;
  if (NAME(selective_scan)(&first_pass, threads)) return 1;
  int64_t slices = (f->channels + f->slice - 1) / f->slice, chunks = (f->tokens + CHUNK - 1) / CHUNK, N = f->states;
  int64_t blocks = (f->slice + LANES - 1) / LANES;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < f->batch * slices; task++) {
    int64_t b = task / slices, slice = task % slices, first = slice * f->slice;
    int64_t size = f->channels - first < f->slice ? f->channels - first : f->slice;
    int64_t vectors = 3 * blocks * N + 4 * CHUNK * N + 2 * blocks;
    vec *A = simba_alloc(vectors * sizeof(vec) + 2 * CHUNK * N * sizeof(REAL));
    if (!A) { failed = 1; continue; }
    vec *lambda = A + blocks * N, *dA = lambda + blocks * N, *dB = dA + blocks * N, *dC = dB + CHUNK * N;
    vec *h = dC + CHUNK * N, *decay = h + CHUNK * N, *dD = decay + CHUNK * N, *dbias = dD + blocks;
    chunk_t chunk = {.B = (REAL *)(dbias + blocks)};
    chunk.C = chunk.B + CHUNK * N;
    memset(lambda, 0, (char *)chunk.B - (char *)lambda);
    pack_A(A, f->A, first, size, N);
    if (a->grad_state)
      for (int64_t d = 0; d < size; d++)
        for (int64_t n = 0; n < N; n++)
          lambda[d / LANES * N + n][d % LANES] = ((REAL *)a->grad_state)[(b * f->channels + first + d) * N + n];
    for (int64_t c = chunks - 1; c >= 0; c--) {
      open_chunk(&chunk, f, b, c * CHUNK);
      memset(dB, 0, 2 * CHUNK * N * sizeof(vec));
      for (int64_t d = 0; d < size; d += LANES) {
        int64_t k = d / LANES;
        const vec *start = (vec *)f->checkpoints + ((b * chunks + c) * slices + slice) * blocks * N + k * N;
        adjoint_lanes(a, &chunk, A + k * N, start, lambda + k * N, dA + k * N, dB, dC, h, decay, dD + k, dbias + k, b,
                      c * CHUNK, first + d, (int)(size - d < LANES ? size - d : LANES));
      }
      for (int i = 0; i < chunk.count; i++)
        for (int64_t n = 0; n < N; n++) {
          int64_t at = ((b * slices + slice) * f->tokens + c * CHUNK + i) * N + n;
          ((REAL *)a->dB)[at] = sum_lanes(dB[i * N + n]);
          ((REAL *)a->dC)[at] = sum_lanes(dC[i * N + n]);
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
  }
  return failed;
}
