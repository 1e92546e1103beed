/* One token through the recurrence and through the convolution's window: what decoding needs. States lie with their
 * numbers innermost, as transformers' cache keeps them, so the vectors run over those. */

#define DECODE_GRAIN (1 << 16) /* state numbers below which a second thread costs more than it brings */
#define MIXER_GRAIN (1 << 9)   /* the same of a whole mixer's channels */

/* So many numbers of one channel's state: what becomes of them, which is stored, too. */
INLINE vec NAME(advance)(REAL *h, const REAL *A, REAL step, vec input, int count, const int log_of_A) {
  vec rate = load_real_some(A, count);
  if (log_of_A) rate = -exp2v(rate * (REAL)LOG2E);
  vec next = exp2v(rate * (step * (REAL)LOG2E)) * load_real_some(h, count) + input;
  store_real_some(h, next, count);
  return next;
}

/* A vector of channels of one sequence. `log_of_A` is known where this is called: nothing of it is left in the loops. */
INLINE void NAME(update_block)(const UpdateArgs *a, int64_t task, const int log_of_A) {
  const int64_t N = a->states, blocks = (a->channels + LANES - 1) / LANES, b = task / blocks, d = task % blocks * LANES;
  const int count = (int)(a->channels - d < LANES ? a->channels - d : LANES);
  vec x = load((elem *)a->x + b * a->x_batch + d, count), delta = load((elem *)a->dt + b * a->dt_batch + d, count);
  if (a->dt_bias) delta += load_real_some((REAL *)a->dt_bias + d, count);
  if (a->softplus) softplus_all(&delta, 1);
  REAL steps[LANES], inputs[LANES];
  vec rows[LANES];
  store_real(steps, delta);
  store_real(inputs, delta * x);
  for (int i = 0; i < LANES; i++) rows[i] = splat(0);
  REAL *h = (REAL *)a->state + (b * a->channels + d) * N;
  const REAL *A = (REAL *)a->A + d * N;
  for (int64_t n = 0; n < N; n += LANES) {
    const int left = (int)(N - n < LANES ? N - n : LANES);
    const vec B = load((elem *)a->B + b * a->B_batch + n, left), C = load((elem *)a->C + b * a->C_batch + n, left);
    if (left == LANES) /* known here, the common case has no branches in its loop */
      for (int i = 0; i < count; i++)
        rows[i] += NAME(advance)(h + i * N + n, A + i * N + n, steps[i], B * inputs[i], LANES, log_of_A) * C;
    else
      for (int i = 0; i < count; i++)
        rows[i] += NAME(advance)(h + i * N + n, A + i * N + n, steps[i], B * inputs[i], left, log_of_A) * C;
  }
  vec y = sum_each(rows);
  if (a->D) y += x * load_real_some((REAL *)a->D + d, count);
  if (a->z) {
    vec z = load((elem *)a->z + b * a->z_batch + d, count);
    y *= z * sigmoidv(z);
  }
  store((elem *)a->out + b * a->channels + d, y, count);
}

int NAME(state_update)(const UpdateArgs *a, int threads) {
  const int64_t tasks = a->batch * ((a->channels + LANES - 1) / LANES);
  int many = a->batch * a->channels * a->states >= DECODE_GRAIN && threads > 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (many)
  for (int64_t task = 0; task < tasks; task++)
    if (a->log_of_A)
      NAME(update_block)(a, task, 1);
    else
      NAME(update_block)(a, task, 0);
  return 0;
}

/* A row for each channel: the window moves on by one and takes x in, and is summed up with its weights into y. */
INLINE void NAME(move_windows)(elem *window, const REAL *weight, const elem *x, REAL *y, int width, int count) {
  for (int i = 0; i < count; i++) {
    REAL total = 0;
    for (int k = 0; k < width; k++) {
      elem next = k + 1 < width ? window[i * width + k + 1] : x[i];
      window[i * width + k] = next;
      total += weight[i * width + k] * NAME(widen_one)(next);
    }
    y[i] = total;
  }
}

/* A vector of channels of one sequence. */
INLINE void NAME(conv_update_block)(const ConvUpdateArgs *a, int64_t task) {
  const int64_t blocks = (a->channels + LANES - 1) / LANES, b = task / blocks, d = task % blocks * LANES;
  const int count = (int)(a->channels - d < LANES ? a->channels - d : LANES);
  elem *window = (elem *)a->state + (b * a->channels + d) * a->width;
  const elem *x = (elem *)a->x + b * a->x_batch + d;
  const REAL *weight = (REAL *)a->weight + d * a->width;
  REAL sums[LANES];
  if (a->width == 4 && count == LANES) /* what models have: known sizes, so that the compiler can use vectors */
    NAME(move_windows)(window, weight, x, sums, 4, LANES);
  else
    NAME(move_windows)(window, weight, x, sums, (int)a->width, count);
  vec y = load_real_some(sums, count);
  if (a->bias) y += load_real_some((REAL *)a->bias + d, count);
  if (a->silu) y *= sigmoidv(y);
  store((elem *)a->out + b * a->channels + d, y, count);
}

int NAME(conv_update)(const ConvUpdateArgs *a, int threads) {
  (void)threads;
  for (int64_t task = 0; task < a->batch * ((a->channels + LANES - 1) / LANES); task++) NAME(conv_update_block)(a, task);
  return 0;
}

/* Window, x_proj, dt_proj and state, one after the other: what is between the outer projections. */
int NAME(mixer_update)(const MixerUpdateArgs *a, int threads) {
  const int64_t tasks = a->conv.batch * ((a->conv.channels + LANES - 1) / LANES);
#pragma omp parallel num_threads(threads) if (a->conv.batch * a->conv.channels >= MIXER_GRAIN)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) NAME(conv_update_block)(&a->conv, task);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a->x_proj.columns; n += ACROSS) NAME(linear_few)(&a->x_proj, n);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a->dt_proj.columns; n += ACROSS) NAME(linear_few)(&a->dt_proj, n);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) NAME(update_block)(&a->update, task, 1);
  }
  return 0;
}

/* One head of one sequence, two rows of its state (p, n) at a time: they share what they load of B and C. */
#define UPDATED 2
INLINE void NAME(update_head)(const SsdUpdateArgs *a, int64_t task) {
  const int64_t N = a->states, p = a->channels, b = task / a->heads, head = task % a->heads, group = head / (a->heads / a->groups);
  const elem *x = (elem *)a->x + b * a->x_batch + head * a->x_head;
  const elem *B = (elem *)a->B + b * a->B_batch + group * a->B_group;
  const elem *C = (elem *)a->C + b * a->C_batch + group * a->C_group;
  const REAL D = a->D ? ((REAL *)a->D)[head] : 0;
  vec delta = splat(NAME(widen_one)(((elem *)a->dt)[b * a->dt_batch + head]));
  if (a->dt_bias) delta += ((REAL *)a->dt_bias)[head];
  if (a->softplus) softplus_all(&delta, 1);
  vec rate = splat(((REAL *)a->A)[head]);
  if (a->log_of_A) rate = -exp2v(rate * (REAL)LOG2E);
  const vec decay = exp2v(delta * rate * (REAL)LOG2E);
  for (int64_t i = 0; i < p; i += LANES) { /* outputs that are stored together */
    const int count = (int)(p - i < LANES ? p - i : LANES);
    const vec rows = load(x + i, count), input = delta * rows;
    vec sums[LANES] = {{0}};
    for (int j = 0; j < count; j += UPDATED) {
      const int size = count - j < UPDATED ? count - j : UPDATED;
      REAL *h = (REAL *)a->state + (task * p + i + j) * N;
      vec *const out = sums + j;
      for (int64_t n = 0; n < N; n += LANES) {
        const int left = (int)(N - n < LANES ? N - n : LANES);
        const vec b_n = load(B + n, left), c_n = load(C + n, left);
        for (int r = 0; r < size; r++) {
          vec next = decay * load_real_some(h + r * N + n, left) + b_n * input[j + r];
          store_real_some(h + r * N + n, next, left);
          out[r] += next * c_n;
        }
      }
    }
    store((elem *)a->out + task * p + i, sum_each(sums) + rows * D, count);
  }
}

int NAME(ssd_state_update)(const SsdUpdateArgs *a, int threads) {
  int many = a->batch * a->heads * a->channels * a->states >= DECODE_GRAIN && threads > 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (many)
  for (int64_t task = 0; task < a->batch * a->heads; task++) NAME(update_head)(a, task);
  return 0;
}

/* Window, state and the gated norm: what is between the projections of Mamba-2. */
int NAME(ssd_mixer_update)(const SsdMixerUpdateArgs *a, int threads) {
  const SsdUpdateArgs *u = &a->update;
  const int64_t blocks = a->conv.batch * ((a->conv.channels + LANES - 1) / LANES);
#pragma omp parallel num_threads(threads) if (u->batch * u->heads * u->channels * u->states >= DECODE_GRAIN && threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks; task++) NAME(conv_update_block)(&a->conv, task);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < u->batch * u->heads; task++) NAME(update_head)(u, task);
  }
  return NAME(rms_norm)(&a->norm, threads);
}
