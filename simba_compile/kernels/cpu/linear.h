/* The product of a linear layer, with what is added to it: out = x Wᵀ + bias + add, x (rows, depth), W (columns, depth). Of
 * `add`, a residual stream, the rows of tokens that stay are read.
 *
 * A few rows (a decoding step) use every weight once: W is read from its start to its end, at the speed of memory. For more
 * rows it is a product of packed operands (Goto & van de Geijn 2008): a tile of the output, TILE_ROWS x TILE_VECS vectors,
 * stays in registers over the whole depth, and reads a tile of x and a panel of W in which the numbers for one k lie side
 * by side. Two orders, by the size of W:
 *
 *   - a W that fits the second-level cache is packed once, and a task packs one tile of x and takes it past all panels;
 *   - else x is packed, a strip at a time, and a task packs one panel and takes it past the strip's tiles. The panel is in the
 *     second-level cache by then, the strip at most in the third. As it goes, it asks for the rows of W that its next panel
 *     is made of. */

#if VECTOR_BYTES == 64
#define TILE_ROWS 14 /* of 32 registers, 28 hold sums, two weights, one a number of x */
#define PASS 4       /* of a few rows, at a time: with ACROSS columns 16 sums */
#else
#define TILE_ROWS 6 /* of 16: 12, two, one */
#define PASS 2
#endif
#define TILE_VECS 2
#define PANEL (TILE_VECS * LANES)                /* columns */
#define TURNED ((TILE_ROWS + LANES - 1) / LANES) /* blocks of LANES rows that cover a tile's */
#define STRIP 1024                               /* rows of x that are packed at once, about */
#define SMALL (512 << 10)                        /* bytes of a packed W that fits the second-level cache */
#define FEW (ELEM_KIND == ELEM_REAL ? 16 : 8)    /* rows that are not worth packing W for; halves are made numbers each pass */
#define ACROSS 4                                 /* columns they meet at a time */
#define AHEAD (int64_t)(2048 / sizeof(elem))     /* how far they ask ahead in W: for ACROSS columns it fits the first cache */

/* A square of a matrix's rows first..first+LANES, at columns k..k+LANES; zeros past its `rows` and `depth`. */
INLINE void NAME(load_square)(vec *square, const elem *matrix, int64_t row, int64_t first, int64_t rows, int64_t k,
                              int64_t depth) {
  int count = (int)(depth - k < LANES ? depth - k : LANES);
  for (int i = 0; i < LANES; i++) square[i] = first + i < rows ? load(matrix + (first + i) * row + k, count) : splat(0);
}

/* The rows of one tile of x: (depth, TILE_ROWS). Whole vectors are stored, in order, so that each puts right what the one
 * before wrote too far; behind the last there is room. Asks for the rows of the next tile. */
static void NAME(pack_rows)(REAL *packed, const LinearArgs *a, int64_t first) {
  for (int64_t k = 0; k < a->depth; k += LANES) {
    vec square[TURNED][LANES];
    for (int64_t next = first + TILE_ROWS; next < first + 2 * TILE_ROWS && next < a->rows; next++)
      __builtin_prefetch((elem *)a->x + next * a->x_row + k);
    for (int g = 0; g < TURNED; g++) {
      int64_t last = first + TILE_ROWS < a->rows ? first + TILE_ROWS : a->rows;
      NAME(load_square)(square[g], (elem *)a->x, a->x_row, first + g * LANES, last, k, a->depth);
      turn(square[g]);
    }
    for (int i = 0; i < LANES && k + i < a->depth; i++)
      for (int g = 0; g < TURNED; g++) store_real(packed + (k + i) * TILE_ROWS + g * LANES, square[g][i]);
  }
}

/* Vectors in the panel that begins at this column: the last one may be narrow. */
INLINE int NAME(vecs_at)(const LinearArgs *a, int64_t column) { return a->columns - column > LANES ? TILE_VECS : 1; }

/* The columns of the panel that begins at `first`: (depth, vectors). */
static void NAME(pack_panel)(vec *packed, const LinearArgs *a, int64_t first) {
  const int vecs = NAME(vecs_at)(a, first);
  for (int64_t k = 0; k < a->depth; k += LANES)
    for (int v = 0; v < vecs; v++) {
      vec square[LANES];
      NAME(load_square)(square, (elem *)a->weight, a->weight_row, first + v * LANES, a->columns, k, a->depth);
      turn(square);
      for (int i = 0; i < LANES && k + i < a->depth; i++) packed[(k + i) * vecs + v] = square[i];
    }
}

/* Rows of W that a tile asks for as it goes along the depth. */
typedef struct { const elem *first; int64_t row, count; } NAME(ask);
#define ask_t NAME(ask)

/* One tile of x Wᵀ, from packed operands. */
INLINE void NAME(linear_tile)(vec *out, const REAL *x, const vec *w, int64_t depth, ask_t ask, const int vecs) {
  vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 16
  for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vecs; v++) sum[r][v] = splat(0);
  for (int64_t start = 0; start < depth; start += LANES) {
    const int64_t end = start + LANES < depth ? start + LANES : depth;
    for (int64_t i = 0; i < ask.count; i++) __builtin_prefetch(ask.first + i * ask.row + start, 0, 2);
    for (int64_t k = start; k < end; k++, x += TILE_ROWS, w += vecs) {
#pragma GCC unroll 16
      for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) sum[r][v] += x[r] * w[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vecs; v++) out[r * vecs + v] = sum[r][v];
}

/* By themselves, so that each has all registers to its loop. */
static __attribute__((noinline)) void NAME(wide_tile)(vec *out, const REAL *x, const vec *w, int64_t depth, ask_t ask) {
  NAME(linear_tile)(out, x, w, depth, ask, TILE_VECS);
}
static __attribute__((noinline)) void NAME(narrow_tile)(vec *out, const REAL *x, const vec *w, int64_t depth, ask_t ask) {
  NAME(linear_tile)(out, x, w, depth, ask, 1);
}

/* What is added to a row of the output. */
INLINE const elem *NAME(add_row)(const LinearArgs *a, int64_t row) {
  if (!a->index) return (elem *)a->add + row * a->add_row;
  return (elem *)a->add + row / a->kept * a->add_batch + a->index[row] * a->add_row;
}

/* The vector of bias and `add` (of a row, or null) at a place of the output. */
INLINE vec NAME(added)(const LinearArgs *a, const elem *add, int64_t column, int count) {
  vec y = a->bias ? load_real_some((REAL *)a->bias + column, count) : splat(0);
  if (add) y += load(add + column, count);
  return y;
}

/* Rows of x and columns of W multiplied at k..k+count. Where there is an `ahead`, asks for what stands so far on in W. */
INLINE void NAME(few_products)(vec *sum, const elem *x, int64_t x_row, const elem *const *w, int64_t k, int count,
                               int64_t ahead, const int rows) {
  vec values[PASS];
  for (int r = 0; r < rows; r++) values[r] = load(x + r * x_row + k, count);
  for (int i = 0; i < ACROSS; i++) {
    const vec weight = load(w[i] + k, count);
    if (ahead) __builtin_prefetch(w[i] + k + ahead);
    for (int r = 0; r < rows; r++) sum[r * ACROSS + i] += weight * values[r];
  }
}

/* The columns n..n+ACROSS for the rows first..first+rows. The first rows bring the columns into the cache. */
INLINE void NAME(few_columns)(const LinearArgs *a, int64_t n, int64_t first, const int rows) {
  const int64_t depth = a->depth, whole = depth / LANES * LANES;
  const int64_t near = first > 0 ? whole : depth > AHEAD ? (depth - AHEAD) / LANES * LANES : 0;
  const int64_t ahead = first > 0 ? 0 : AHEAD, next = ACROSS * a->weight_row - near; /* past a row's end: the next columns */
  const elem *const x = (elem *)a->x + first * a->x_row, *w[ACROSS];
  vec sum[PASS * ACROSS];
  for (int i = 0; i < ACROSS; i++) /* of the last columns, some twice */
    w[i] = (elem *)a->weight + (n + i < a->columns ? n + i : a->columns - 1) * a->weight_row;
  for (int i = 0; i < rows * ACROSS; i++) sum[i] = splat(0);
  for (int64_t k = 0; k < near; k += LANES) NAME(few_products)(sum, x, a->x_row, w, k, LANES, ahead, rows);
  for (int64_t k = near; k < whole; k += LANES) NAME(few_products)(sum, x, a->x_row, w, k, LANES, next, rows);
  if (whole < depth) NAME(few_products)(sum, x, a->x_row, w, whole, (int)(depth - whole), 0, rows);
  for (int r = 0; r < rows; r++) {
    const elem *add = a->add ? NAME(add_row)(a, first + r) : NULL;
    for (int i = 0; i < ACROSS && n + i < a->columns; i++) {
      vec y = NAME(added)(a, add, n + i, 1) + sum_lanes(sum[r * ACROSS + i]);
      store((elem *)a->out + (first + r) * a->columns + n + i, y, 1);
    }
  }
}

/* The columns n..n+ACROSS for a few rows. How many a pass takes is known where few_columns is compiled, or its sums would not
 * stay in registers. */
INLINE void NAME(linear_few)(const LinearArgs *a, int64_t n) {
  for (int64_t first = 0, left = a->rows; left > 0; first = a->rows - left) {
    if (left >= PASS) NAME(few_columns)(a, n, first, PASS), left -= PASS;
    else if (left >= 2) NAME(few_columns)(a, n, first, 2), left -= 2;
    else NAME(few_columns)(a, n, first, 1), left--;
  }
}

/* One tile of the output, from the packed `x` and `panel`, into its place. */
INLINE void NAME(put_tile)(const LinearArgs *a, int64_t row, int64_t column, const REAL *x, const vec *panel, ask_t ask) {
  vec sum[TILE_ROWS * TILE_VECS];
  const elem *add[TILE_ROWS] = {0};
  const int rows = (int)(a->rows - row < TILE_ROWS ? a->rows - row : TILE_ROWS), vecs = NAME(vecs_at)(a, column);
  for (int r = 0; r < rows && a->add; r++) {
    add[r] = NAME(add_row)(a, row + r);
    for (int v = 0; v < vecs; v++) __builtin_prefetch(add[r] + column + v * LANES);
  }
  (vecs == 1 ? NAME(narrow_tile) : NAME(wide_tile))(sum, x, panel, a->depth, ask);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) {
      const int64_t n = column + v * LANES;
      const int lanes = (int)(a->columns - n < LANES ? a->columns - n : LANES);
      vec y = sum[r * vecs + v] + NAME(added)(a, add[r], n, lanes);
      store((elem *)a->out + (row + r) * a->columns + n, y, lanes);
    }
}

static int NAME(linear_by_rows)(const LinearArgs *a, int threads) {
  const int64_t tiles = (a->rows + TILE_ROWS - 1) / TILE_ROWS, panels = (a->columns + PANEL - 1) / PANEL;
  vec *w = simba_alloc(panels * a->depth * TILE_VECS * sizeof(vec));
  if (!w) return OUT_OF_MEMORY;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *x = simba_alloc((a->depth * TILE_ROWS + TURNED * LANES) * sizeof(REAL));
    if (!x) failed = OUT_OF_MEMORY;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p++) NAME(pack_panel)(w + p * a->depth * TILE_VECS, a, p * PANEL);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; t++) {
      if (!x) continue;
      NAME(pack_rows)(x, a, t * TILE_ROWS);
      for (int64_t p = 0; p < panels; p++)
        NAME(put_tile)(a, t * TILE_ROWS, p * PANEL, x, w + p * a->depth * TILE_VECS, (ask_t){0});
    }
    free(x);
  }
  free(w);
  return failed;
}

static int NAME(linear_by_panels)(const LinearArgs *a, int threads) {
  const int64_t tiles = (a->rows + TILE_ROWS - 1) / TILE_ROWS, panels = (a->columns + PANEL - 1) / PANEL;
  const int64_t strips = (a->rows + STRIP - 1) / STRIP, strip = (tiles + strips - 1) / strips; /* a strip in tiles */
  const int64_t tile_size = a->depth * TILE_ROWS + TURNED * LANES;                             /* with the room behind it */
  REAL *x = simba_alloc(strip * tile_size * sizeof(REAL));
  if (!x) return OUT_OF_MEMORY;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    vec *panel = simba_alloc(a->depth * TILE_VECS * sizeof(vec));
    if (!panel) failed = OUT_OF_MEMORY;
    for (int64_t first = 0; first < tiles; first += strip) {
      const int64_t count = tiles - first < strip ? tiles - first : strip;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; t++) NAME(pack_rows)(x + t * tile_size, a, (first + t) * TILE_ROWS);
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < panels; p++) {
        if (!panel) continue;
        NAME(pack_panel)(panel, a, p * PANEL);
        const int64_t next = (p + threads) * PANEL, left = a->columns - next; /* likely this thread's next panel */
        const int64_t wanted = left < 0 ? 0 : left < PANEL ? left : PANEL;
        for (int64_t t = 0; t < count; t++) {
          const int64_t asked = wanted * t / count;
          ask_t ask = {(elem *)a->weight + (next + asked) * a->weight_row, a->weight_row, wanted * (t + 1) / count - asked};
          NAME(put_tile)(a, (first + t) * TILE_ROWS, p * PANEL, x + t * tile_size, panel, ask);
        }
      }
    }
    free(panel);
  }
  free(x);
  return failed;
}

int NAME(linear)(const LinearArgs *a, int threads) {
  if (a->index && !simba_in_range(a->index, a->rows, a->tokens)) return OUT_OF_RANGE;
  if (a->rows <= FEW) {
#pragma omp parallel for num_threads(threads) schedule(static) if (a->columns * a->depth > 1 << 14)
    for (int64_t n = 0; n < a->columns; n += ACROSS) NAME(linear_few)(a, n);
    return 0;
  }
  const int small = a->columns * a->depth * (int64_t)sizeof(REAL) <= SMALL;
  return small ? NAME(linear_by_rows)(a, threads) : NAME(linear_by_panels)(a, threads);
}
