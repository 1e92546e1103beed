/* The C side of the binding in ../native: what each kernel is called with.
 *
 * Every struct is a run of 64-bit words, so that Python fills it as one array of int64. A view is a pointer and its
 * strides, counted in elements; the last axis (channels, states) always has stride 1 and carries no stride of its own.
 * Nothing is checked here: the binding checks devices, dtypes, shapes and strides before it calls. */
#ifndef SIMBA_H
#define SIMBA_H

#include <stdint.h>

typedef struct { void *data; int64_t batch, token; } View3;      /* (batch, token, channel or state) */
typedef struct { void *data; int64_t batch, token, head; } View4; /* (batch, token, head or group, channel or state) */

typedef struct {
  int64_t batch, tokens, kept, channels, states, softplus, slice; /* slice: channels for one task */
  View3 x, dt, B, C, z;                                           /* z.data may be null */
  const void *A, *D, *dt_bias;                                    /* (channels, states), (channels): compute type; D, dt_bias may be null */
  const int64_t *index;                                           /* (batch, kept), or null: every token */
  View3 out;                                                      /* (batch, kept, channels) */
  void *state;                                                    /* (batch, channels, states), compute type */
  void *checkpoints;                                              /* null, or (batch, chunks, channels padded, states) */
} ScanArgs;

typedef struct {
  ScanArgs forward;                                               /* out: the gradient of the output, read only */
  const void *grad_state;                                         /* (batch, channels, states) or null */
  View3 dx, ddt, dz;                                              /* element type */
  void *dA, *dD, *dbias;                                          /* (batch, channels[, states]), compute type */
  void *dB, *dC;                                                  /* (batch, slices, tokens, states), compute type */
} ScanBackwardArgs;

typedef struct {
  int64_t batch, tokens, channels, states, softplus, slice, pool, bias_in_decay;
  View3 x, dt, B, C;
  const void *A, *dt_bias;
  double *partial;                                                /* (batch, slices, tokens): pooled over a slice */
} InfluenceArgs;

typedef struct {
  int64_t batch, tokens, channels, width, silu;
  View3 x;
  const void *weight, *bias;                                      /* (width, channels), (channels): compute type; bias may be null */
  View3 out;
} ConvArgs;

typedef struct {
  ConvArgs forward;                                               /* out: the gradient of the output, read only */
  View3 dx;
  void *dweight, *dbias;                                          /* (width, channels), (channels): compute type */
} ConvBackwardArgs;

typedef struct {
  int64_t batch, channels, states, softplus, log_of_A;            /* log_of_A: A is given as log(-A) */
  void *state;                                                    /* (batch, channels, states), compute type, updated */
  const void *x, *dt, *B, *C, *z;                                 /* (batch, channels | states) */
  int64_t x_batch, dt_batch, B_batch, C_batch, z_batch;
  const void *A, *D, *dt_bias;
  void *out;                                                      /* (batch, channels) */
} UpdateArgs;

typedef struct {
  int64_t batch, channels, width, silu;
  void *state;                                                    /* (batch, channels, width), element type, updated */
  const void *x;                                                  /* (batch, channels) */
  int64_t x_batch;
  const void *weight, *bias;                                      /* (channels, width), (channels): compute type */
  void *out;                                                      /* (batch, channels) */
} ConvUpdateArgs;

typedef struct {
  int64_t batch, tokens, kept, heads, channels, groups, states, softplus, block; /* channels: of a head; block: heads for one task */
  double dt_min, dt_max;
  View4 x;
  View3 dt;                                                       /* (batch, token, head) */
  View4 B, C;
  const void *A, *D, *dt_bias;                                    /* (heads), compute type; D and dt_bias may be null */
  const void *initial;                                            /* as state, or null: zeros */
  const int64_t *index;                                           /* (batch, kept), or null: every token */
  void *y;                                                        /* (batch, kept, heads, channels), compute type */
  void *state;                                                    /* (batch, heads, channels, states), compute type */
} SsdArgs;

typedef struct {
  SsdArgs forward;                                                /* y: the gradient of the output, read only */
  const void *grad_state;                                         /* as state, or null */
  void *dx, *ddt;                                                 /* (batch, tokens, heads[, channels]), element type */
  double *dA, *dD, *dbias;                                        /* (batch, heads), zeros; dD and dbias may be null */
  void *dB, *dC;                                                  /* (batch, parts of a group, tokens, groups, states), compute type */
  void *dinitial;                                                 /* as state, or null */
} SsdBackwardArgs;

typedef struct {
  int64_t batch, tokens, heads, channels, groups, states, softplus, pool, bias_in_decay;
  double dt_min, dt_max;
  View4 x;
  View3 dt;
  View4 B, C;
  const void *A, *dt_bias;
  double *out;                                                    /* (batch, tokens) */
} SsdInfluenceArgs;

typedef struct {
  int64_t batch, heads, channels, groups, states, softplus, log_of_A; /* log_of_A: A is given as log(-A) */
  void *state;                                                    /* (batch, heads, channels, states), compute type, updated */
  const void *x, *dt, *B, *C;                                     /* (batch, heads, channels), (batch, heads), (batch, groups, states) */
  int64_t x_batch, x_head, dt_batch, B_batch, B_group, C_batch, C_group;
  const void *A, *D, *dt_bias;
  void *out;                                                      /* (batch, heads, channels) */
} SsdUpdateArgs;

typedef struct {
  int64_t rows, channels;
  double eps;
  const void *x;
  int64_t x_row;
  const void *weight;                                             /* (channels), compute type, or null */
  void *out;                                                      /* (rows, channels) */
  const void *gate;                                               /* (rows, channels), or null */
  int64_t gate_row, group;                                        /* each so many channels are normalised by themselves */
  int64_t full_x, full_out;                                       /* they are of the compute type */
} NormArgs;

typedef struct {
  int64_t rows, tokens, kept, channels;                           /* rows: batch * kept; tokens: of the residual */
  double eps;
  const void *residual;                                           /* (rows, channels) or, with an index, (batch, tokens, channels) */
  int64_t residual_batch, residual_row;
  const int64_t *index;                                           /* (batch, kept), or null */
  const void *x;                                                  /* (rows, channels) */
  int64_t x_row;
  const void *weight;                                             /* (channels), compute type, or null */
  void *sum, *out;                                                /* (rows, channels) */
  int64_t full;                                                   /* residual and sum are of the compute type */
} AddNormArgs;

typedef struct {
  int64_t rows, tokens, kept, depth, columns;                     /* rows: batch * kept; tokens: of `add` */
  const void *x, *weight;                                         /* (rows, depth), (columns, depth) */
  int64_t x_row, weight_row;
  const void *bias;                                               /* (columns), compute type, or null */
  const void *add;                                                /* (rows, columns) or, with an index, (batch, tokens, columns); or null */
  int64_t add_batch, add_row;
  const int64_t *index;                                           /* (batch, kept), or null */
  void *out;                                                      /* (rows, columns) */
} LinearArgs;

typedef struct {
  ConvUpdateArgs conv;
  LinearArgs x_proj, dt_proj;
  UpdateArgs update;
} MixerUpdateArgs;

typedef struct {
  ConvUpdateArgs conv;
  SsdUpdateArgs update;
  NormArgs norm;                                                  /* of no rows: there is none */
} SsdMixerUpdateArgs;

typedef struct {
  int64_t batch, tokens, kept, row_bytes, batch_bytes, token_bytes;
  const void *x;
  const int64_t *index;                                           /* (batch, kept) */
  void *out;                                                      /* (batch, kept, row) */
} GatherArgs;

typedef struct {
  int64_t batch, tokens, k, first, last;
  const double *scores;                                           /* (batch, tokens) */
  int64_t *out;                                                   /* (batch, k) */
} SelectArgs;

/* How many words of 64 bits a kernel's struct has: tests/test_bindings.py compares it with what the binding writes. */
#define WORDS(op, Args) const int64_t simba_words_##op = sizeof(Args) / sizeof(int64_t);

enum { OUT_OF_MEMORY = 1, OUT_OF_RANGE = 2 }; /* what kernels return instead of 0 */
int simba_in_range(const int64_t *index, int64_t count, int64_t tokens);

enum { POOL_MAX, POOL_ABSMAX, POOL_L2 };
enum { TABLE = 32, EIGHT = 8 }; /* floats in two AVX-512 registers, in one of AVX2 */
/* For i of 0..31: 2^(i/32); 1/(1 + i/31), and minus its logarithm. */
extern float simba_power[TABLE], simba_inverse[TABLE], simba_log[TABLE];
extern int32_t simba_eighths[EIGHT]; /* the bits of 2^(i/8), less i << 20 */
enum { CHUNK = 16 }; /* tokens between two state checkpoints: a chunk's rows stay in cache while channels are walked */

#endif
