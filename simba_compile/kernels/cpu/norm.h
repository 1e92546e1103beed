/* RMS norm of rows, group by group: out = weight * y / sqrt(mean(y²) + eps) with y = x, or x * silu(gate). The elements are
 * those of the gate; x may be of the compute type beside it (`full_x`), as Mamba-2's scan leaves it, and so may the output. */

int NAME(rms_norm)(const NormArgs *a, int threads) {
  const int64_t groups = a->group ? a->channels / a->group : 0, blocks = (a->group + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (a->rows > 8)
  for (int64_t row = 0; row < a->rows; row++) {
    vec y[blocks];
    for (int64_t first = 0; first < groups * a->group; first += a->group) {
      const int64_t x = row * a->x_row + first, out = row * a->channels + first;
      const elem *gate = (elem *)a->gate + row * a->gate_row + first;
      vec sums[2] = {splat(0), splat(0)};
      for (int64_t k = 0; k < blocks; k++) {
        int count = NAME(lanes_left)(a->group - k * LANES);
        vec p = a->full_x ? load_real_some((REAL *)a->x + x + k * LANES, count) : load((elem *)a->x + x + k * LANES, count);
        if (a->gate) {
          vec g = load(gate + k * LANES, count);
          p *= g * sigmoidv(g);
        }
        sums[k & 1] += p * p;
        y[k] = p;
      }
      REAL mean = sum_lanes(sums[0] + sums[1]) / (REAL)a->group;
      REAL scale = (REAL)(1 / sqrt((double)mean + a->eps));
      for (int64_t k = 0; k < blocks; k++) {
        int count = NAME(lanes_left)(a->group - k * LANES);
        vec p = y[k] * scale;
        if (a->weight) p *= load_real_some((REAL *)a->weight + first + k * LANES, count);
        if (a->full_out) store_real_some((REAL *)a->out + out + k * LANES, p, count);
        else store((elem *)a->out + out + k * LANES, p, count);
      }
    }
  }
  return 0;
}
