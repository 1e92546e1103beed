/* The causal depthwise convolution over tokens, with SiLU fused, channels last:
 *
 *     out_t = silu(bias + Σ_k weight_k x_{t - width + 1 + k})
 *
 * A task is a run of tokens: rows are read and written from their start to their end, a few tokens at a time, and the
 * lines of the next ones are asked for meanwhile. */

#define CONV_RUN 32
#define TOGETHER 4 /* tokens at a time: they share the weights, and the rows that each of them reads */

INLINE int NAME(lanes_left)(int64_t channels) { return channels < LANES ? (int)channels : LANES; }

/* The rows that the outputs of `tokens` tokens from t on read, where they exist: weight k of token t + j meets rows[k + j].
 * Gives the first that exists. */
INLINE int NAME(conv_rows)(const elem **rows, const ConvArgs *a, int64_t b, int64_t t, int tokens) {
  int64_t from = t < a->width - 1 ? a->width - 1 - t : 0;
  for (int64_t i = from; i < a->width + tokens - 1; i++) rows[i] = line_of(a->x, b, t - a->width + 1 + i, 0);
  return (int)from;
}

/* Their outputs before SiLU, from channel d on. Several tokens at a time all have all their rows. */
INLINE void NAME(conv_at)(vec *y, const ConvArgs *a, const elem *const *rows, int from, int64_t d, int count, const int width,
                          const int tokens) {
  vec x[MAX_WIDTH + TOGETHER], bias = a->bias ? load_real_some((REAL *)a->bias + d, count) : splat(0);
  for (int i = from; i < width + tokens - 1; i++) x[i] = load(rows[i] + d, count);
  for (int j = 0; j < tokens; j++) y[j] = bias;
  for (int k = from; k < width; k++) {
    vec weight = load_real_some((REAL *)a->weight + k * a->channels + d, count);
    for (int j = 0; j < tokens; j++) y[j] += weight * x[k + j];
  }
}
#define conv_at NAME(conv_at)

int NAME(causal_conv1d)(const ConvArgs *a, int threads) {
  int64_t runs = (a->tokens + CONV_RUN - 1) / CONV_RUN;
  const int width = (int)a->width;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < a->batch * runs; task++) {
    int64_t b = task / runs, first = task % runs * CONV_RUN;
    int64_t last = first + CONV_RUN < a->tokens ? first + CONV_RUN : a->tokens;
    for (int64_t t = first, tokens; t < last; t += tokens) {
      const elem *rows[MAX_WIDTH + TOGETHER];
      tokens = t >= width - 1 && t + TOGETHER <= last ? TOGETHER : 1;
      const int from = NAME(conv_rows)(rows, a, b, t, (int)tokens);
      const int64_t left = last - t - tokens, more = left < tokens ? left : tokens; /* tokens to ask for */
      const elem *ahead = line_of(a->x, b, t + tokens, 0);
      elem *out = line_of(a->out, b, t, 0);
      for (int64_t d = 0; d < a->channels;) {
        vec y[RUN], one[RUN];
        int64_t at = d;
        int outputs = 0;
        for (; outputs < RUN && d < a->channels; d += LANES, outputs += (int)tokens) {
          int count = NAME(lanes_left)(a->channels - d);
          for (int j = 0; j < more; j++) {
            __builtin_prefetch(ahead + j * a->x.token + d);
            __builtin_prefetch(out + (tokens + j) * a->out.token + d, 1);
          }
          if (tokens == 1) conv_at(y + outputs, a, rows, from, d, count, width, 1);
          else if (width == 4 && count == LANES) conv_at(y + outputs, a, rows, 0, d, LANES, 4, TOGETHER);
          else conv_at(y + outputs, a, rows, 0, d, count, width, TOGETHER);
        }
        for (int k = 0; k < outputs; k++) one[k] = splat(1);
        if (a->silu) times_silu(one, y, outputs);
        const vec *result = a->silu ? one : y;
        for (int k = 0; k < outputs; at += LANES)
          for (int j = 0; j < tokens; j++) store(out + j * a->out.token + at, result[k++], NAME(lanes_left)(a->channels - at));
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
          vec y, s;
          conv_at(&y, f, rows, NAME(conv_rows)(rows, f, b, t, 1), d, count, (int)width, 1);
          s = sigmoidv(y);
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
        store(line_of(a->dx, b, t, d), dx, count);
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
