/* Every kernel set of this processor against the plain one, bit for bit; and the plain one against double precision.
 *
 * Prints a checksum of all results for each set: they are the same on every machine, whatever its instructions. With a name
 * as argument, fails unless that set is the one this processor prefers.
 */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef float real;
typedef uint32_t word;
#include "kernels_math.h"

enum { MOST_SETS = 8, GUARD = 0xa5 };
static const edgeml_kernels *sets[MOST_SETS];
static uint64_t checksums[MOST_SETS];
static size_t set_count;
static int failures;
static uint64_t random_state = 1;

static void expect(int condition, const char *what, const char *set) {
  if (condition) return;
  if (failures++ < 20) printf("FAILED %s (%s)\n", what, set);
}

static uint32_t random_bits(void) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 32);
}

static size_t random_from(size_t low, size_t high) { return low + random_bits() % (high - low + 1); }

static float random_unit(void) { return (float)(int32_t)random_bits() * 0x1p-31f; }

static void *allocate(size_t bytes) {
  void *p = malloc(bytes);
  if (p == NULL) abort();
  memset(p, GUARD, bytes);
  return p;
}

static void add_checksum(size_t set, const void *data, size_t bytes) {
  const uint8_t *p = data;
  for (size_t i = 0; i < bytes; i++) checksums[set] = (checksums[set] ^ p[i]) * 1099511628211u;
}

/* Values of all kinds: `wild` rows hold blocks of zeros, of tiny and huge values, and some with NaN or infinity. */
static void fill(float *x, size_t rows, size_t k, int wild) {
  static const float sizes[] = {1, 1, 0, 1e-40f, 3e-37f, 1e-30f, 1e30f, 3e38f};
  for (size_t r = 0; r < rows; r++)
    for (size_t i = 0; i < k; i++) {
      uint32_t mood = wild ? (uint32_t)(r * 7 + i / 32 * 3) : 0;
      x[r * k + i] = random_unit() * sizes[mood % 8];
      if (mood % 11 != 10 || random_bits() % 16 != 0) continue;
      uint32_t bits = random_bits();
      x[r * k + i] = real_of(bits % 3 ? NAN_BITS | bits : INFINITY_BITS | (bits & SIGN_BIT));
    }
}

/* ---- matrices ---- */

typedef struct matrix {
  int type;
  size_t rows, cols, bytes;
  uint8_t *tiles;
  double *values; /* (rows, cols) as integers or floats */
  double *scales; /* (rows, blocks) */
} matrix;

static void put_weight(matrix *m, size_t row, size_t col, int stored, float value) {
  size_t blocks = (m->cols + 31) / 32, r = row % 16, c = col % 32, number = row / 16 * blocks + col / 32;
  uint8_t *tile = m->tiles + number * edgeml_matrix_bytes(m->type, 16, 32);
  if (m->type == WEIGHT_F32) memcpy(tile + 64 * c + 4 * r, &value, 4);
  if (m->type == WEIGHT_INT8) tile[64 * (c / 4) + 4 * r + c % 4] = (uint8_t)stored;
  if (m->type == WEIGHT_INT4) tile[64 * (c / 4 % 4) + 4 * r + c % 4] |= (uint8_t)(c < 16 ? stored : stored << 4);
}

static void put_scale(matrix *m, size_t row, size_t block, uint16_t half) {
  size_t blocks = (m->cols + 31) / 32, bytes = edgeml_matrix_bytes(m->type, 16, 32);
  memcpy(m->tiles + (row / 16 * blocks + block) * bytes + bytes - 32 + 2 * (row % 16), &half, 2);
}

static double half_reference(uint16_t half) {
  int exponent = half >> 10 & 31, mantissa = half & 1023;
  double value = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
  return half >> 15 ? -value : value;
}

/* style 0: usual weights. 1: only extremes. 2: every bit pattern, scales and padding included. 3: rows all of the lowest or of
 * the highest stored value, where sums of products are largest. */
static matrix make_matrix(int type, size_t rows, size_t cols, int style) {
  size_t blocks = (cols + 31) / 32;
  matrix m = {type, rows, cols, edgeml_matrix_bytes(type, rows, cols), NULL, NULL, NULL};
  m.tiles = allocate(m.bytes);
  m.values = allocate(rows * cols * sizeof(double));
  m.scales = allocate(rows * blocks * sizeof(double));
  memset(m.tiles, 0, m.bytes);
  const int zero = type == WEIGHT_INT8 ? 128 : 8, most = zero - 1;
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < cols; c++) {
      int value = style == 1 ? (random_bits() % 2 ? most : -most) : (int)(random_bits() % (uint32_t)(2 * most + 1)) - most;
      if (style == 3) value = r % 2 ? most : -zero;
      float real_value = random_unit();
      put_weight(&m, r, c, value + zero, real_value);
      m.values[r * cols + c] = type == WEIGHT_F32 ? (double)real_value : value;
    }
  for (size_t r = 0; type != WEIGHT_F32 && r < rows; r++)
    for (size_t b = 0; b < blocks; b++) {
      uint16_t half = (uint16_t)(random_bits() % 5 == 0 ? random_bits() % 1024 : 0x1000 + random_bits() % 0x2c00);
      put_scale(&m, r, b, half);
      m.scales[r * blocks + b] = half_reference(half);
    }
  if (style == 2)
    for (size_t i = 0; i < m.bytes; i++) m.tiles[i] = (uint8_t)(random_bits() >> 8);
  return m;
}

static void free_matrix(matrix *m) {
  free(m->tiles);
  free(m->values);
  free(m->scales);
}

/* ---- quantize ---- */

typedef struct quantized {
  int8_t *q;
  float *scale;
  int32_t *qsum;
} quantized;

static quantized quantize_by(const edgeml_kernels *set, const float *x, size_t n, size_t k) {
  size_t blocks = (k + 31) / 32 * n;
  quantized out = {allocate(blocks * 32), allocate(blocks * sizeof(float)), allocate(blocks * sizeof(int32_t))};
  set->quantize(x, n, k, out.q, out.scale, out.qsum);
  return out;
}

static void free_quantized(quantized *q) {
  free(q->q);
  free(q->scale);
  free(q->qsum);
}

static void check_quantized(const quantized *got, const float *x, size_t n, size_t k) {
  size_t blocks = (k + 31) / 32;
  for (size_t t = 0; t < n; t++)
    for (size_t b = 0; b < blocks; b++) {
      float most = 0;
      int finite = 1, sum = 0;
      for (size_t i = 32 * b; i < k && i < 32 * b + 32; i++) {
        finite = finite && isfinite(x[t * k + i]);
        most = fmaxf(most, fabsf(x[t * k + i]));
      }
      float inverse = most > 0 && isfinite(127.0f / most) ? 127.0f / most : 0;
      for (size_t i = 32 * b; i < 32 * b + 32; i++) {
        int q = got->q[t * blocks * 32 + i];
        sum += q;
        expect(q == (i < k && finite ? (int)nearbyintf(x[t * k + i] * inverse) : 0), "a quantized value", "scalar");
      }
      float scale = got->scale[t * blocks + b];
      expect(finite ? scale == most / 127.0f : bits_of(scale) == NAN_BITS, "a scale", "scalar");
      expect(got->qsum[t * blocks + b] == sum, "a sum of quantized values", "scalar");
    }
}

/* ---- matmul ---- */

typedef struct product {
  const matrix *m;
  const float *x, *bias;
  const quantized *in;
  size_t n, ldy;
} product;

static void multiply(const edgeml_kernels *set, const product *p, size_t begin, size_t end, float *y) {
  const matrix *m = p->m;
  if (m->type == WEIGHT_F32) {
    set->matmul_f32(m->tiles, m->rows, m->cols, begin, end, p->x, p->n, p->bias, y, p->ldy);
    return;
  }
  edgeml_matmul_int *matmul = m->type == WEIGHT_INT8 ? set->matmul_int8 : set->matmul_int4;
  matmul(m->tiles, m->rows, m->cols, begin, end, p->in->q, p->in->scale, p->in->qsum, p->n, p->bias, y, p->ldy);
}

static void check_product(const product *p, const float *y) {
  const matrix *m = p->m;
  size_t blocks = (m->cols + 31) / 32;
  for (size_t t = 0; t < p->n; t++)
    for (size_t r = 0; r < m->rows; r++) {
      double sum = p->bias == NULL ? 0 : p->bias[r], size = fabs(sum);
      for (size_t c = 0; c < m->cols; c++) {
        double term = m->values[r * m->cols + c];
        if (m->type == WEIGHT_F32) term *= p->x[t * m->cols + c];
        else term *= p->in->q[t * blocks * 32 + c] * m->scales[r * blocks + c / 32] * p->in->scale[t * blocks + c / 32];
        sum += term;
        size += fabs(term);
      }
      expect(fabs(y[t * p->ldy + r] - sum) <= 2e-6 * size + 1e-30, "a product", "scalar");
    }
}

/* Rows of [begin, end) are written, and nothing else. */
static void check_guards(const product *p, size_t begin, size_t end, const float *y, const char *set) {
  const uint8_t *bytes = (const uint8_t *)y;
  for (size_t i = 0; i < p->n * p->ldy; i++) {
    size_t row = i % p->ldy;
    if (row >= begin && row < end && row < p->m->rows) continue;
    for (size_t j = 0; j < 4; j++) expect(bytes[4 * i + j] == GUARD, "bytes beyond the rows stay", set);
  }
}

static void check_shape(int type, size_t rows, size_t k, size_t n, int style, int wild, int biased) {
  static const char *const names[] = {[WEIGHT_F32] = "f32 products", [WEIGHT_INT8] = "int8 products", [WEIGHT_INT4] = "int4 products"};
  size_t ldy = rows + random_from(0, 3), bytes = n * ldy * sizeof(float);
  matrix m = make_matrix(type, rows, k, style);
  float *x = allocate(n * k * sizeof(float)), *bias = allocate(rows * sizeof(float));
  float *plain = allocate(bytes), *y = allocate(bytes);
  fill(x, n, k, wild);
  fill(bias, 1, rows, 0);
  for (size_t i = 0; style == 3 && i < n * k; i++) x[i] = i / k % 2 ? 1.0f : -1.0f;
  quantized in = quantize_by(sets[0], x, n, k);
  check_quantized(&in, x, n, k);
  const product p = {&m, x, biased ? bias : NULL, &in, n, ldy};
  const size_t padded = (rows + 15) / 16 * 16, cut = random_from(0, padded / 16) * 16;
  multiply(sets[0], &p, 0, random_bits() % 2 ? padded : rows, plain);
  if (style != 2 && !wild) check_product(&p, plain);
  for (size_t s = 0; s < set_count; s++) {
    quantized again = quantize_by(sets[s], x, n, k);
    size_t blocks = n * ((k + 31) / 32);
    expect(memcmp(again.q, in.q, blocks * 32) == 0, "quantized values", sets[s]->name);
    expect(memcmp(again.scale, in.scale, blocks * sizeof(float)) == 0, "scales", sets[s]->name);
    expect(memcmp(again.qsum, in.qsum, blocks * sizeof(int32_t)) == 0, "sums of quantized values", sets[s]->name);
    free_quantized(&again);
    memset(y, GUARD, bytes);
    multiply(sets[s], &p, 0, cut, y);
    check_guards(&p, 0, cut, y, sets[s]->name);
    multiply(sets[s], &p, cut, padded, y);
    check_guards(&p, 0, padded, y, sets[s]->name);
    expect(memcmp(y, plain, bytes) == 0, names[type], sets[s]->name);
    add_checksum(s, y, bytes);
  }
  free_quantized(&in);
  free_matrix(&m);
  free(x);
  free(bias);
  free(plain);
  free(y);
}

static void check_products(void) {
  for (int type = WEIGHT_F32; type <= WEIGHT_INT4; type++) {
    for (size_t n = 1; n <= 20; n++) check_shape(type, 33, 70, n, (int)n % 2, 0, n % 3 == 0);
    for (int i = 0; i < 150; i++) {
      size_t rows = random_from(1, 70), k = random_from(1, 200), n = random_from(1, i % 4 ? 12 : 70);
      check_shape(type, rows, k, n, i % 3, i % 2, i % 5 < 2);
    }
    check_shape(type, 16, 4096, 2, 1, 0, 0);
    check_shape(type, 32, 256, 10, 3, 0, 0);
  }
}

/* ---- activations and axpy ---- */

static double silu_reference(double x) { return x / (1 + exp(-x)); }

static double gelu_reference(double x) { return x * 0.5 * erfc(-x / sqrt(2)); }

static void check_accuracy(void) {
  for (double x = -40; x < 40; x += 0.00137) {
    const float f = (float)x, line[3] = {f, f, f};
    float y[3];
    memcpy(y, line, sizeof y);
    for (int i = 0; i < 3; i++) sets[0]->activate(i + 1, y + i, 1);
    expect(fabs(y[0] - gelu_reference(f)) <= 2e-7 * fmax(1, fabs(x)), "gelu", "scalar");
    expect(y[1] == (f > 0 ? f : 0), "relu", "scalar");
    expect(fabs(y[2] - silu_reference(f)) <= 2e-7 * fmax(1, fabs(x)), "silu", "scalar");
    expect(fabs(erf_real(f) - erf((double)f)) <= 2e-7, "erf", "scalar");
    const float t = f * 2.18f;
    expect(fabs(exp_bounded(t) / exp((double)t) - 1) <= 2e-7, "exp", "scalar");
  }
}

static void check_specials(const edgeml_kernels *set) {
  const float infinite = real_of(INFINITY_BITS);
  for (int kind = ACTIVATION_GELU; kind <= ACTIVATION_SILU; kind++) {
    float y[] = {NAN, infinite, -infinite, 3e38f, -3e38f, -100, 0.0f, 1e-45f, real_of(0xff812345u)};
    set->activate(kind, y, sizeof y / sizeof *y);
    expect(bits_of(y[0]) == NAN_BITS && bits_of(y[8]) == NAN_BITS, "NaN stays NaN", set->name);
    expect(y[1] == infinite && y[3] == 3e38f, "large values pass", set->name);
    expect(kind == ACTIVATION_RELU ? y[2] == 0 : !isfinite(y[2]), "minus infinity", set->name);
    expect(y[4] == 0 && fabsf(y[5]) < 1e-30f && y[6] == 0 && y[7] >= 0, "small values vanish", set->name);
  }
}

static void check_vectors(void) {
  enum { LONGEST = 70, PATTERNS = 1 << 16 };
  float *x = allocate(PATTERNS * sizeof(float)), *plain = allocate(PATTERNS * sizeof(float)), *y = allocate(PATTERNS * sizeof(float));
  for (int kind = ACTIVATION_NONE; kind <= ACTIVATION_SILU; kind++) {
    for (uint32_t i = 0; i < PATTERNS; i++) x[i] = real_of(i << 16 | (random_bits() & 0xffffu));
    memcpy(plain, x, PATTERNS * sizeof(float));
    sets[0]->activate(kind, plain, PATTERNS);
    for (size_t s = 0; s < set_count; s++) {
      memcpy(y, x, PATTERNS * sizeof(float));
      sets[s]->activate(kind, y, PATTERNS);
      expect(memcmp(y, plain, PATTERNS * sizeof(float)) == 0, "activations", sets[s]->name);
      add_checksum(s, y, PATTERNS * sizeof(float));
      for (size_t n = 0; n <= LONGEST; n++) { /* the last value at the end of the block */
        memcpy(y, x + 30000, PATTERNS * sizeof(float) - 30000 * sizeof(float));
        float *start = y + (PATTERNS - n);
        memcpy(start, x, n * sizeof(float));
        sets[s]->activate(kind, start, n);
        expect(memcmp(start, plain, n * sizeof(float)) == 0, "activations of few", sets[s]->name);
      }
    }
  }
  for (size_t n = 0; n <= LONGEST; n++) {
    const float w = n % 9 == 8 ? NAN : random_unit();
    fill(x, 1, LONGEST, 0);
    fill(plain, n + 1, LONGEST, n % 2);
    const float *added = plain + n * LONGEST;
    for (size_t s = 0; s < set_count; s++) {
      memcpy(y, x, LONGEST * sizeof(float));
      sets[s]->axpy(y, w, added, n);
      for (size_t i = 0; i < LONGEST; i++) {
        volatile float step = w * added[i]; /* rounded before it is added */
        float sum = i < n ? canonical(x[i] + step) : x[i];
        expect(bits_of(sum) == bits_of(y[i]), "axpy", sets[s]->name);
      }
      add_checksum(s, y, LONGEST * sizeof(float));
    }
  }
  free(x);
  free(plain);
  free(y);
}

static void check_dispatch(int argc, char **argv) {
  set_count = edgeml_kernels_list(sets, MOST_SETS);
  expect(set_count >= 1 && strcmp(sets[0]->name, "scalar") == 0, "scalar comes first", "list");
  for (size_t s = 0; s < set_count; s++) expect(edgeml_kernels_get(sets[s]->name) == sets[s], "found by name", sets[s]->name);
  expect(edgeml_kernels_get(NULL) == sets[set_count - 1], "the best is the default", "get");
  expect(edgeml_kernels_get("sse9") == NULL && edgeml_kernels_get("") == NULL, "unknown names", "get");
  if (argc > 1) expect(strcmp(edgeml_kernels_get(NULL)->name, argv[1]) == 0, "the expected choice", edgeml_kernels_get(NULL)->name);
  expect(edgeml_matrix_bytes(WEIGHT_INT4, 17, 33) == 4 * 288 && edgeml_matrix_bytes(WEIGHT_F32, 16, 32) == 2048, "sizes", "bytes");
  expect(edgeml_matrix_bytes(0, 1, 1) == 0 && edgeml_matrix_bytes(4, 1, 1) == 0, "unknown types", "bytes");
}

int main(int argc, char **argv) {
  check_dispatch(argc, argv);
  check_products();
  check_accuracy();
  check_vectors();
  for (size_t s = 0; s < set_count; s++) {
    check_specials(sets[s]);
    printf("kernels (%s): %016llx\n", sets[s]->name, (unsigned long long)checksums[s]);
  }
  printf("kernels: %s\n", failures ? "failed" : "ok");
  return failures != 0;
}
