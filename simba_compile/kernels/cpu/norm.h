/* RMS norm of rows, group by group: out = weight * y / sqrt(mean(y²) + eps) with y = x, or x * silu(gate), or residual + x.
 * The elements are those of the gate, or of x without one; what is said to be full is of the compute type. */

/* The output of one group from its y: all vectors of it, and the sums of their squares. */
INLINE void NAME(put_normed)(const vec *y, vec squares, int64_t size, double eps, const REAL *weight, void *out, int full) {
  REAL mean = sum_lanes(squares) / (REAL)size;
  REAL scale = (REAL)(1 / sqrt((double)mean + eps));
  for (int64_t from = 0; from < size; from += LANES) {
    int count = NAME(lanes_left)(size - from);
    vec p = y[from / LANES] * scale;
    if (weight) p *= load_real_some(weight + from, count);
    if (full) store_real_some((REAL *)out + from, p, count);
    else store((elem *)out + from, p, count);
  }
}
#define put_normed NAME(put_normed)

int NAME(rms_norm)(const NormArgs *a, int threads) {
  const int64_t groups = a->group ? a->channels / a->group : 0, blocks = (a->group + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (a->rows > 8)
  for (int64_t row = 0; row < a->rows; row++) {
    vec y[blocks];
    for (int64_t first = 0; first < groups * a->group; first += a->group) {
      const int64_t x = row * a->x_row + first, out = row * a->channels + first;
      const elem *gate = (elem *)a->gate + row * a->gate_row + first;
      vec squares[2] = {splat(0), splat(0)};
      for (int64_t k = 0; k < blocks; k++) {
        int count = NAME(lanes_left)(a->group - k * LANES);
        vec p = a->full_x ? load_real_some((REAL *)a->x + x + k * LANES, count) : load((elem *)a->x + x + k * LANES, count);
        if (a->gate) {
          vec g = load(gate + k * LANES, count);
          p *= g * sigmoidv(g);
        }
        squares[k & 1] += p * p;
        y[k] = p;
      }
      void *to = a->full_out ? (void *)((REAL *)a->out + out) : (void *)((elem *)a->out + out);
      const REAL *weight = a->weight ? (REAL *)a->weight + first : NULL;
      put_normed(y, squares[0] + squares[1], a->group, a->eps, weight, to, a->full_out);
    }
  }
  return 0;
}

/* The residual stream with a layer's output added, gathered with an index; and the norm of that as rounded to an element. */
int NAME(add_norm)(const AddNormArgs *a, int threads) {
  const int64_t blocks = (a->channels + LANES - 1) / LANES;
  if (a->index && !simba_in_range(a->index, a->rows, a->tokens)) return OUT_OF_RANGE;
#pragma omp parallel for num_threads(threads) schedule(static) if (a->rows > 8)
  for (int64_t row = 0; row < a->rows; row++) {
    vec y[blocks], squares[2] = {splat(0), splat(0)};
    const int64_t from = a->index ? row / a->kept * a->residual_batch + a->index[row] * a->residual_row : row * a->residual_row;
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t d = k * LANES, to = row * a->channels + d;
      int count = NAME(lanes_left)(a->channels - d);
      vec p = load((elem *)a->x + row * a->x_row + d, count);
      p += a->full ? load_real_some((REAL *)a->residual + from + d, count) : load((elem *)a->residual + from + d, count);
      y[k] = NAME(rounded)(p);
      if (a->full) store_real_some((REAL *)a->sum + to, p, count);
      else store((elem *)a->sum + to, p, count);
      squares[k & 1] += y[k] * y[k];
    }
    elem *out = (elem *)a->out + row * a->channels;
    put_normed(y, squares[0] + squares[1], a->channels, a->eps, a->weight, out, 0);
  }
  return 0;
}
