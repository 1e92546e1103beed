/* RMS norm of rows: out = weight * x / sqrt(mean(x²) + eps). */

int NAME(rms_norm)(const NormArgs *a, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (a->rows > 8)
  for (int64_t row = 0; row < a->rows; row++) {
    const elem *x = (elem *)a->x + row * a->x_row;
    vec even = splat(0), odd = splat(0);
    int64_t d = 0;
    for (; d + 2 * LANES <= a->channels; d += 2 * LANES) {
      vec p = load(x + d, LANES), q = load(x + d + LANES, LANES);
      even += p * p;
      odd += q * q;
    }
    for (; d < a->channels; d += LANES) {
      vec p = load(x + d, (int)(a->channels - d < LANES ? a->channels - d : LANES));
      even += p * p;
    }
    REAL mean = sum_lanes(even + odd) / (REAL)a->channels;
    REAL scale = (REAL)(1 / sqrt((double)mean + a->eps));
    for (d = 0; d < a->channels; d += LANES) {
      int count = (int)(a->channels - d < LANES ? a->channels - d : LANES);
      vec y = load(x + d, count) * scale;
      if (a->weight) y *= load_real_some((REAL *)a->weight + d, count);
      store((elem *)a->out + row * a->channels + d, y, count);
    }
  }
  return 0;
}
