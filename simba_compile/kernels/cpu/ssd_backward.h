/* The gradient of ssd.h. A first pass over the tokens leaves the state at the start of every span; the second goes through
 * the spans backwards, runs each forward once more to have its chunks' states, and then through its chunks backwards. With
 * λ the gradient of the state after a chunk, g_t that of y_t, and h the state before the chunk,
 *
 *     dC_t = P_t h^T g_t + Σ_{s≤t} Z[t][s] B_s                Z[t][s] = M[t][s] Δ_s (g_t·x_s)
 *     dB_s = M[T][s] Δ_s λ^T x_s + Σ_{t≥s} Z[t][s] C_t
 *     dx_s = Δ_s (M[T][s] λ B_s + Σ_{t≥s} M[t][s] (C_t·B_s) g_t) + D g_s
 *     dλ:  λ' = P_T λ + Σ_t P_t g_t ⊗ C_t
 *
 * and log a_k has as its gradient the sum of all terms of Σ g_t·y_t and λ·h that decay through token k. These are added
 * up as they are, not as a difference of two running sums, so that nothing cancels.
 *
 * States are kept as (p, n) where a product runs over p, and as (n, p) where it runs over n. dB and dC are summed over a
 * task's heads here and over the parts of a group by the caller. Every token is kept: gathering is the caller's. */

/* The gradients of the logarithms of a chunk's decays. `terms`: Z[t][s] (C_t·B_s); `out`: of y_t, what came through the
 * state before the chunk; `in`: of λ·h', what token s brought; `through`: of λ·h', what came from h. */
static void NAME(decay_gradients)(REAL *dlog, const REAL *terms, const REAL *out, const REAL *in, REAL through) {
  REAL column[CHUNK] = {0}, after = through, before = 0;
  for (int k = CHUNK - 1; k >= 0; k--) {
    REAL sum = after += out[k];
    for (int s = 0; s < k; s++) {
      column[s] += terms[k * CHUNK + s];
      sum += column[s];
    }
    dlog[k] = sum;
  }
  for (int k = 1; k < CHUNK; k++) dlog[k] += before += in[k - 1];
}

static REAL NAME(dot)(const REAL *a, const REAL *b, int64_t size) { /* of whole vectors */
  vec sum = splat(0);
  for (int64_t i = 0; i < size; i += LANES) sum += load_real(a + i) * load_real(b + i);
  return sum_lanes(sum);
}

/* One state, as (p, n), through a chunk. */
static void NAME(carry)(REAL *h, const steps_t *steps, const REAL *w, const REAL *B, int64_t p, int64_t n_width) {
  update(h, steps->start + CHUNK - 1, 0, w, padded(p), B, p, n_width);
}

/* A task's scratch. */
typedef struct {
  REAL *checkpoints, *states;     /* (heads, spans, p, n) and (chunks of a span, p, n) */
  REAL *lambda, *lambda_turned;   /* (heads, p, n) and (heads, n, p) */
  REAL *dB, *dC;                  /* (tokens of a span, n) */
  REAL *x, *w, *g, *decayed, *dx; /* (CHUNK, p); decayed: P_t g_t */
  REAL *from_h, *from_lambda;     /* (CHUNK, n): h^T g_t and λ^T x_s, then dC and dB of one head */
} NAME(adjoint);
#define adjoint_t NAME(adjoint)

/* One head's chunk, backwards. */
static void NAME(adjoint_chunk)(const SsdBackwardArgs *a, const adjoint_t *s, const span_t *span, const REAL *h, REAL *lambda,
                                REAL *lambda_turned, const share_t *share, int64_t i, int64_t first, int c) {
  const SsdArgs *f = &a->forward;
  const int64_t b = share->b, head = share->first + i;
  const int64_t p = f->channels, N = f->states, p_width = padded(p), n_width = padded(N);
  const int T = span->count - c * CHUNK < CHUNK ? span->count - c * CHUNK : CHUNK;
  const REAL *B = span->B + c * CHUNK * n_width, *C = span->C + c * CHUNK * n_width, *products = span->products[c];
  const REAL A = ((REAL *)f->A)[head], D = f->D ? ((REAL *)f->D)[head] : 0;
  REAL agree[CHUNK * CHUNK], Z[CHUNK * CHUNK] = {0}, weights[CHUNK * CHUNK] = {0}, terms[CHUNK * CHUNK] = {0};
  REAL out[CHUNK], in[CHUNK], dlog[CHUNK], ddelta[CHUNK], keep[CHUNK];
  steps_t steps;
  take_steps(&steps, span, f, share, i, c);
  load_x(s->x, s->w, &steps, span, f, b, head, c);
  for (int t = 0; t < CHUNK; t++)
    for (int64_t j = 0; j < p_width; j += LANES) {
      const int count = (int)(p - j < LANES ? p - j : LANES);
      const REAL *row = (REAL *)f->y + ((b * f->tokens + first + t) * f->heads + head) * p;
      vec g = t < T ? load_real_some(row + j, count) : splat(0);
      store_real(s->g + t * p_width + j, g);
      store_real(s->decayed + t * p_width + j, g * steps.start[t]);
    }
  product(s->from_h, s->g, p_width, h, p, n_width);
  product(s->from_lambda, s->x, p_width, lambda, p, n_width);
  product(s->dx, B, n_width, lambda_turned, N, p_width);
  inner(agree, span->across, s->g, s->x, p, p_width);
  for (int t = 0; t < CHUNK; t++) {
    out[t] = steps.start[t] * NAME(dot)(C + t * n_width, s->from_h + t * n_width, n_width);
    ddelta[t] = steps.end[t] * NAME(dot)(B + t * n_width, s->from_lambda + t * n_width, n_width);
    in[t] = steps.delta[t] * ddelta[t];
    keep[t] = steps.delta[t] * steps.end[t];
  }
  for (int t = 0; t < CHUNK; t++)
    for (int k = 0; k <= t; k++) {
      const int at = t * CHUNK + k;
      Z[at] = steps.between[at] * steps.delta[k] * agree[at];
      weights[at] = steps.between[at] * products[at];
      terms[at] = Z[at] * products[at];
      ddelta[k] += weights[at] * agree[at];
    }
  NAME(decay_gradients)(dlog, terms, out, in, steps.start[CHUNK - 1] * NAME(dot)(lambda, h, p * n_width));
  causal(s->from_h, steps.start, Z, B, n_width);
  update(s->from_lambda, keep, 1, Z, CHUNK, C, CHUNK, n_width);
  update(s->dx, steps.end, 1, weights, CHUNK, s->g, CHUNK, p_width);
  update(lambda, steps.start + CHUNK - 1, 0, s->decayed, p_width, C, p, n_width);
  update(lambda_turned, steps.start + CHUNK - 1, 0, C, n_width, s->decayed, N, p_width);
  for (int64_t j = 0; j < T * n_width; j += LANES) {
    REAL *dB = s->dB + c * CHUNK * n_width + j, *dC = s->dC + c * CHUNK * n_width + j;
    store_real(dB, load_real(dB) + load_real(s->from_lambda + j));
    store_real(dC, load_real(dC) + load_real(s->from_h + j));
  }
  for (int t = 0; t < T; t++) {
    const int64_t row = (b * f->tokens + first + t) * f->heads + head;
    const int free = steps.free[t] >= (REAL)f->dt_min && steps.free[t] <= (REAL)f->dt_max;
    REAL ddt = free || !(steps.free[t] == steps.free[t]) ? ddelta[t] + A * dlog[t] : 0;
    if (f->softplus) ddt *= sigmoidv(splat(steps.raw[t]))[0];
    store((elem *)a->ddt + row, splat(ddt), 1);
    a->dA[b * f->heads + head] += steps.delta[t] * dlog[t];
    if (a->dD) a->dD[b * f->heads + head] += agree[t * CHUNK + t];
    if (a->dbias) a->dbias[b * f->heads + head] += ddt;
    for (int64_t j = 0; j < p; j += LANES) {
      vec dx = load_real(s->dx + t * p_width + j) * steps.delta[t] + load_real(s->g + t * p_width + j) * D;
      store((elem *)a->dx + row * p + j, dx, (int)(p - j < LANES ? p - j : LANES));
    }
  }
}

int NAME(ssd_scan_backward)(const SsdBackwardArgs *a, int threads) {
  const SsdArgs *f = &a->forward;
  const int64_t N = f->states, p = f->channels, n_width = padded(N), p_width = padded(p), rows = SPAN * CHUNK;
  const int64_t spans = (f->tokens + rows - 1) / rows, size = p * n_width, turned = N * p_width, state = p * N;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int64_t task = 0; task < f->batch * f->groups * parts_of(f); task++) {
    const share_t share = share_of(f, task);
    const int64_t H = share.count, b = share.b, at = (b * f->heads + share.first) * state;
    REAL *all = simba_alloc((H * (spans + 1) * size + SPAN * size + H * turned + 4 * rows * n_width + 5 * CHUNK * p_width +
                             2 * CHUNK * n_width + CHUNK * (N > p ? N : p) + H * rows) * sizeof(REAL));
    if (!all) { failed = OUT_OF_MEMORY; continue; }
    unsigned mode = simba_flush_subnormals();
    adjoint_t s = {.checkpoints = all, .states = all + H * spans * size};
    s.lambda = s.states + SPAN * size, s.lambda_turned = s.lambda + H * size;
    s.dB = s.lambda_turned + H * turned, s.dC = s.dB + rows * n_width;
    span_t span = {.B = s.dC + rows * n_width};
    span.C = span.B + rows * n_width;
    s.x = span.C + rows * n_width, s.w = s.x + CHUNK * p_width, s.g = s.w + CHUNK * p_width;
    s.decayed = s.g + CHUNK * p_width, s.dx = s.decayed + CHUNK * p_width;
    s.from_h = s.dx + CHUNK * p_width, s.from_lambda = s.from_h + CHUNK * n_width;
    span.across = s.from_lambda + CHUNK * n_width;
    span.raw = span.across + CHUNK * (N > p ? N : p);
    memset(s.lambda, 0, (H * size + H * turned) * sizeof(REAL));
    for (int64_t i = 0; i < H; i++) {
      const REAL *initial = f->initial ? (REAL *)f->initial + at + i * state : NULL;
      const REAL *grad = a->grad_state ? (REAL *)a->grad_state + at + i * state : NULL;
      memset(s.checkpoints + i * spans * size, 0, size * sizeof(REAL));
      for (int64_t j = 0; j < p && initial; j++)
        memcpy(s.checkpoints + i * spans * size + j * n_width, initial + j * N, N * sizeof(REAL));
      for (int64_t j = 0; j < p && grad; j++)
        memcpy(s.lambda + i * size + j * n_width, grad + j * N, N * sizeof(REAL));
      if (grad) turn_state(s.lambda_turned + i * turned, grad, p, N);
    }
    steps_t steps;
    for (int64_t k = 0; k < spans - 1; k++) {
      open_span(&span, f, &share, k * rows, 0);
      for (int64_t i = 0; i < H; i++) {
        REAL *h = s.checkpoints + (i * spans + k + 1) * size;
        memcpy(h, h - size, size * sizeof(REAL));
        for (int c = 0; c < SPAN; c++) {
          take_steps(&steps, &span, f, &share, i, c);
          load_x(s.x, s.w, &steps, &span, f, b, share.first + i, c);
          NAME(carry)(h, &steps, s.w, span.B + c * CHUNK * n_width, p, n_width);
        }
      }
    }
    for (int64_t k = spans - 1; k >= 0; k--) {
      open_span(&span, f, &share, k * rows, 1);
      memset(s.dB, 0, 2 * rows * n_width * sizeof(REAL));
      for (int64_t i = 0; i < H; i++) {
        memcpy(s.states, s.checkpoints + (i * spans + k) * size, size * sizeof(REAL));
        for (int c = 0; c + 1 < span.chunks; c++) {
          REAL *h = s.states + (c + 1) * size;
          memcpy(h, h - size, size * sizeof(REAL));
          take_steps(&steps, &span, f, &share, i, c);
          load_x(s.x, s.w, &steps, &span, f, b, share.first + i, c);
          NAME(carry)(h, &steps, s.w, span.B + c * CHUNK * n_width, p, n_width);
        }
        for (int c = span.chunks - 1; c >= 0; c--)
          NAME(adjoint_chunk)(a, &s, &span, s.states + c * size, s.lambda + i * size, s.lambda_turned + i * turned, &share,
                              i, k * rows + c * CHUNK, c);
      }
      for (int t = 0; t < span.count; t++) {
        int64_t row = (((b * parts_of(f) + share.part) * f->tokens + k * rows + t) * f->groups + share.group) * N;
        memcpy((REAL *)a->dB + row, s.dB + t * n_width, N * sizeof(REAL));
        memcpy((REAL *)a->dC + row, s.dC + t * n_width, N * sizeof(REAL));
      }
    }
    if (a->dinitial)
      for (int64_t i = 0; i < H * p; i++)
        memcpy((REAL *)a->dinitial + at + i * N, s.lambda + i * n_width, N * sizeof(REAL));
    free(all);
    simba_restore_mode(mode);
  }
  return failed;
}
