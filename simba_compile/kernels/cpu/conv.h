/* The causal depthwise convolution over tokens, with SiLU fused, channels last:
 *
 *     out_t = silu(bias + Σ_k weight_k x_{t - width + 1 + k})
 *
 * A task is a run of tokens: every row is read and written from its start to its end, and the lines of the next one are
 * asked for meanwhile. */

#define CONV_RUN 32

INLINE int NAME(lanes_left)(int64_t channels) { return channels < LANES ? (int)channels : LANES; }

/* The rows that out_t reads, where they exist: weight k meets rows[k]. Gives the first k that has one. */
INLINE int NAME(conv_rows)(const elem **rows, const ConvArgs *a, int64_t b, int64_t t) {
  int64_t from = t < a->width - 1 ? a->width - 1 - t : 0;
  for (int64_t k = from; k < a->width; k++) rows[k] = line_of(a->x, b, t - a->width + 1 + k, 0);
  return (int)from;
}

INLINE vec NAME(conv_at)(const ConvArgs *a, const elem *const *rows, int from, int64_t d, int count) {
  vec y = a->bias ? load_real_some((REAL *)a->bias + d, count) : splat(0);
  for (int k = from; k < (int)a->width; k++)
    y += load_real_some((REAL *)a->weight + k * a->channels + d, count) * load(rows[k] + d, count);
  return y;
}

int NAME(causal_conv1d)(const ConvArgs *a, int threads) {
  int64_t runs = (a->tokens + CONV_RUN - 1) / CONV_RUN;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < a->batch * runs; task++) {
    int64_t b = task / runs, first = task % runs * CONV_RUN;
    int64_t last = first + CONV_RUN < a->tokens ? first + CONV_RUN : a->tokens;
    for (int64_t t = first; t < last; t++) {
      const elem *rows[MAX_WIDTH];
      int from = NAME(conv_rows)(rows, a, b, t);
      elem *out = (elem *)a->out.data + b * a->out.batch + t * a->out.token;
      const elem *ahead = t + 1 < last ? line_of(a->x, b, t + 1, 0) : NULL;
      for (int64_t d = 0; d < a->channels; d += RUN * LANES) {
        vec y[RUN], one[RUN];
        int blocks = 0;
        for (; blocks < RUN && d + (blocks + 1) * LANES <= a->channels; blocks++) {
          if (ahead) {
            __builtin_prefetch(ahead + d + blocks * LANES);
            __builtin_prefetch(out + a->out.token + d + blocks * LANES, 1);
          }
          y[blocks] = NAME(conv_at)(a, rows, from, d + blocks * LANES, LANES);
        }
        if (blocks < RUN && d + blocks * LANES < a->channels) {
          y[blocks] = NAME(conv_at)(a, rows, from, d + blocks * LANES, (int)(a->channels - d - blocks * LANES));
          blocks++;
        }
        for (int k = 0; k < blocks; k++) one[k] = splat(1);
        if (a->silu) times_silu(one, y, blocks);
        for (int k = 0; k < blocks; k++)
          store(out + d + k * LANES, a->silu ? one[k] : y[k], NAME(lanes_left)(a->channels - d - k * LANES));
      }
    }
  }
  return 0;
}

#define CONV_BLOCKS 4 /* vectors of channels in one task of the gradient */

/* The gradient: a task is a few vectors of channels of all sequences, so that dweight and dbias need no reduction. */
int NAME(causal_conv1d_backward)(const ConvBackwardArgs *a, int threads) {
  const ConvArgs *f = &a->forward;
  const int64_t width = f->width, slice = CONV_BLOCKS * LANES;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < (f->channels + slice - 1) / slice; task++) {
    int64_t first = task * slice, last = first + slice < f->channels ? first + slice : f->channels;
    /* For every block of the task: the gradients of the last width outputs before SiLU, dweight, dbias. */
    vec *scratch = simba_alloc(CONV_BLOCKS * (2 * width + 1) * sizeof(vec));
    if (!scratch) { failed = OUT_OF_MEMORY; continue; }
    memset(scratch, 0, CONV_BLOCKS * (2 * width + 1) * sizeof(vec));
    for (int64_t b = 0, t = f->tokens - 1; b < f->batch; t > 0 ? t-- : (b++, t = f->tokens - 1))
      for (int64_t d = first; d < last; d += LANES) {
        int count = (int)(last - d < LANES ? last - d : LANES);
        vec *grads = scratch + (d - first) / LANES * (2 * width + 1), *dweight = grads + width, *dbias = dweight + width;
        if (t == f->tokens - 1) memset(grads, 0, width * sizeof(vec));
        vec g = load_at(f->out, b, t, d, count), dx = splat(0);
        if (f->silu) {
          const elem *rows[MAX_WIDTH];
          vec y = NAME(conv_at)(f, rows, NAME(conv_rows)(rows, f, b, t), d, count), s = sigmoidv(y);
          g *= s + y * s * (1 - s);
        }
        *dbias += g;
        for (int64_t k = width - 1; k > 0; k--) grads[k] = grads[k - 1]; /* grads[j] is that of out_{t + j} */
        grads[0] = g;
        for (int64_t k = 0; k < width; k++) {
          int64_t row = t - width + 1 + k; /* what out_t reads with weight k; x_t is read so by out_{t + width - 1 - k} */
          if (row >= 0) dweight[k] += g * load_at(f->x, b, row, d, count);
          dx += grads[width - 1 - k] * load_real_some((REAL *)f->weight + k * f->channels + d, count);
        }
        store((elem *)a->dx.data + b * a->dx.batch + t * a->dx.token + d, dx, count);
      }
    for (int64_t d = first; d < last; d += LANES) {
      int count = (int)(last - d < LANES ? last - d : LANES);
      vec *dweight = scratch + (d - first) / LANES * (2 * width + 1) + width;
      for (int64_t k = 0; k < width; k++) store_real_some((REAL *)a->dweight + k * f->channels + d, dweight[k], count);
      if (a->dbias) store_real_some((REAL *)a->dbias + d, dweight[width], count);
    }
    free(scratch);
  }
  return failed;
}
