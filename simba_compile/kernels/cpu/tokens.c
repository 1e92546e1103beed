/* Choosing tokens and moving them: no arithmetic on what they hold, so one function serves every type and level. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "simba.h"

/* Whether every index is one of the tokens. */
int simba_in_range(const int64_t *index, int64_t count, int64_t tokens) {
  int64_t outside = 0;
  for (int64_t i = 0; i < count; i++) outside |= (index[i] < 0) | (index[i] >= tokens);
  return !outside;
}

WORDS(gather, GatherArgs)
WORDS(select, SelectArgs)

int simba_gather(const GatherArgs *a, int dtype, int threads) {
  (void)dtype;
  if (!simba_in_range(a->index, a->batch * a->kept, a->tokens)) return OUT_OF_RANGE;
#pragma omp parallel for num_threads(threads) schedule(static) if (a->batch * a->kept * a->row_bytes > 1 << 16)
  for (int64_t row = 0; row < a->batch * a->kept; row++)
    memcpy((char *)a->out + row * a->row_bytes,
           (const char *)a->x + row / a->kept * a->batch_bytes + a->index[row] * a->token_bytes, a->row_bytes);
  return 0;
}

/* Whole numbers in the order of the scores, NaN as the largest. */
static uint64_t rank_of(double score) {
  uint64_t bits, sign = UINT64_C(1) << 63;
  if (isnan(score)) return UINT64_MAX;
  score += 0.0; /* -0 is 0 */
  memcpy(&bits, &score, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

/* The k-th largest rank, found a byte at a time from the highest; `ties`: how many of the k have that very rank. */
static uint64_t rank_at(const uint64_t *ranks, int64_t tokens, int64_t k, int64_t *ties) {
  uint64_t known = 0, found = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    int64_t count[256] = {0};
    for (int64_t t = 0; t < tokens; t++)
      if ((ranks[t] & known) == found) count[ranks[t] >> shift & 255]++;
    int byte = 255;
    while (count[byte] < k) k -= count[byte--];
    found |= (uint64_t)byte << shift;
    known |= UINT64_C(255) << shift;
  }
  *ties = k;
  return found;
}

int simba_select(const SelectArgs *a, int dtype, int threads) {
  (void)dtype;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed) if (a->batch > 1)
  for (int64_t b = 0; b < a->batch; b++) {
    const int64_t T = a->tokens, middle = T - a->first - a->last, k = a->k - a->first - a->last;
    const double *scores = a->scores + b * T + a->first;
    int64_t *out = a->out + b * a->k, at = a->k - a->last, ties = 0;
    uint64_t *ranks = malloc((middle + 1) * sizeof *ranks);
    if (!ranks) { failed = OUT_OF_MEMORY; continue; }
    for (int64_t t = 0; t < middle; t++) ranks[t] = rank_of(scores[t]);
    for (int64_t i = 0; i < a->first; i++) out[i] = i;
    for (int64_t i = 0; i < a->last; i++) out[at + i] = T - a->last + i;
    uint64_t least = k > 0 ? rank_at(ranks, middle, k, &ties) : UINT64_MAX;
    for (int64_t t = middle - 1; t >= 0 && at > a->first; t--) /* from the end: of equals, the later ones are taken */
      if (ranks[t] > least || (ranks[t] == least && ties-- > 0)) out[--at] = a->first + t;
    free(ranks);
  }
  return failed;
}
