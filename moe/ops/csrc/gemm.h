// The inner product kernel and the packing around it.
//
// c[i][lane] = sum over k of a(i, k) * b[k][lane]: `a` is broadcast one number at a time, `b` is a
// panel of 1 to MAX_VECTORS vectors per k, packed without gaps. While it computes, it fetches memory that the caller
// will need next into the cache (`Ahead`), because with few rows per expert a network is limited
// by the speed at which its weights arrive.
#pragma once

#include "simd.h"

namespace gatewise {

constexpr int STRIP = 12;  // rows of `a` that are packed together

// Where a(i, k) lies. Rows: data[i * stride + k]. Packed: data[k * STRIP + i].
struct Rows {
  const float* data;
  int64_t stride;
  const float* at(int i) const { return data + i * stride; }
  void next() { data++; }
  Rows from(int64_t i) const { return {data + i * stride, stride}; }
};
struct Packed {
  const float* data;
  const float* at(int i) const { return data + i; }
  void next() { data += STRIP; }
  Packed from(int64_t i) const { return {data + i}; }
};

// Memory to fetch: one cache line at data + k / 2 * stride for each second k. More at a time would
// keep the loads of the product itself waiting.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0;
};

enum class Store { overwrite, accumulate, stream };  // stream: past the cache, c is aligned

// Make the compiler forget what it knows of `x`, so that it computes addresses where they are used
// instead of keeping them in registers through the inner loop.
template <class X>
inline void forget(X& x) {
  asm volatile("" : "+r"(x));
}

template <int M, int V, class A>
void multiply(int64_t depth, A a, const float* b, Ahead ahead, float* c, int64_t stride_c,
              Store mode) {
  vec total[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) total[i][j] = vec{};
  if (mode == Store::accumulate)  // c is added at the end, when it has arrived
#pragma GCC unroll 1
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < V * LANES; j += 16) __builtin_prefetch(c + i * stride_c + j, 1, 3);
  forget(c);
  forget(stride_c);
  const char* fetch = ahead.data ? ahead.data : reinterpret_cast<const char*>(b);
  while (depth > 0) {
    __builtin_prefetch(fetch, 0, 2);
    fetch += ahead.stride;
    const int pair = depth < 2 ? 1 : 2;
    depth -= 2;
#pragma GCC unroll 1
    for (int k = 0; k < pair; k++) {
      vec panel[V];
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) panel[j] = load(b + j * LANES);
      b += V * LANES;
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        vec x = broadcast(*a.at(i));
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) total[i][j] += x * panel[j];
      }
      a.next();
    }
  }
  forget(c);
  forget(stride_c);
  if (mode == Store::accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) total[i][j] += load(c + i * stride_c + j * LANES);
    forget(c);
    forget(stride_c);
  }
  if (mode == Store::stream) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) stream(c + i * stride_c + j * LANES, total[i][j]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) store(c + i * stride_c + j * LANES, total[i][j]);
  }
}

// What a product over many rows fetches: the first `count` blocks of rows from data + n * step, the
// next blocks the same of another stretch.
struct Stretch {
  const void* data = nullptr;
  int64_t stride = 0, step = 0, count = 0;
};
struct Fetch {
  Stretch first, second;
  Ahead at(int64_t n) const {
    const Stretch& from = n < first.count ? first : second;
    if (n >= first.count) n -= first.count;
    if (n >= from.count || !from.data) return {};
    return {static_cast<const char*>(from.data) + n * from.step, from.stride};
  }
};

// Multiply any number of rows, at most STRIP of Packed ones.
template <int V, class A>
void multiply_rows(int64_t rows, int64_t depth, A a, const float* b, Fetch fetch, float* c,
                   int64_t stride_c, Store mode) {
  constexpr int M = V <= MAX_VECTORS / 2 ? STRIP : STRIP / 2;
  int64_t i = 0, n = 0;
  for (; i + M <= rows; i += M)
    multiply<M, V>(depth, a.from(i), b, fetch.at(n++), c + i * stride_c, stride_c, mode);
  for (; i + 3 <= rows; i += 3)
    multiply<3, V>(depth, a.from(i), b, fetch.at(n++), c + i * stride_c, stride_c, mode);
  for (; i < rows; i++)
    multiply<1, V>(depth, a.from(i), b, fetch.at(n++), c + i * stride_c, stride_c, mode);
}

template <class A>
void multiply_rows(int vectors, int64_t rows, int64_t depth, A a, const float* b, Fetch fetch,
                   float* c, int64_t stride_c, Store mode) {
#define GATEWISE_CASE(V)          \
  if constexpr (V <= MAX_VECTORS) \
    if (vectors == V) return multiply_rows<V>(rows, depth, a, b, fetch, c, stride_c, mode);
  GATEWISE_CASE(1)
  GATEWISE_CASE(2)
  GATEWISE_CASE(3)
  GATEWISE_CASE(4)
#undef GATEWISE_CASE
}

// Convert `width` numbers.
template <class T>
void convert(const T* x, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i));
  for (; i < width; i++) out[i] = widen(x[i]);
}

// Numbers between the starts of two rows in a buffer of rows: with a power of two, a row's numbers
// would meet the other rows' in the same few places of the cache.
inline int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES + LANES; }

// Copy a block of rows as floats.
template <class T>
Rows copy_rows(const T* x, int64_t stride, int64_t rows, int64_t width, float* buffer) {
  for (int64_t i = 0; i < rows; i++) convert(x + i * stride, width, buffer + i * padded(width));
  return {buffer, padded(width)};
}

// A block of rows as floats: where it lies, or copied. (Copying what is used once does not pay.)
inline Rows as_rows(const float* x, int64_t stride, int64_t, int64_t, float*) { return {x, stride}; }
inline Rows as_rows(const bf16* x, int64_t stride, int64_t rows, int64_t width, float* buffer) {
  return copy_rows(x, stride, rows, width, buffer);
}

// out[k][lane] = x[lane][k], `lanes` of them real, zeros up to the next multiple of LANES.
template <class T>
void pack_transposed(const T* x, int64_t stride, int lanes, int64_t depth, float* out) {
  const int64_t stride_out = (lanes + LANES - 1) / LANES * LANES;
  for (int l0 = 0; l0 < lanes; l0 += LANES) {
    int64_t k0 = 0;
    for (; k0 + LANES <= depth; k0 += LANES) {
      vec rows[LANES];
      for (int l = 0; l < LANES; l++)
        rows[l] = l0 + l < lanes ? load(x + (l0 + l) * stride + k0) : vec{};
      transpose(rows);
      for (int k = 0; k < LANES; k++) store(out + (k0 + k) * stride_out + l0, rows[k]);
    }
    for (; k0 < depth; k0++)
      for (int l = 0; l < LANES; l++)
        out[k0 * stride_out + l0 + l] = l0 + l < lanes ? widen(x[(l0 + l) * stride + k0]) : 0.0f;
  }
}

// out[lane][k] = x[k][lane] for the real lanes.
template <class T>
void unpack_transposed(const float* x, int64_t stride, int lanes, int64_t depth, T* out,
                       int64_t stride_out) {
  for (int l0 = 0; l0 < lanes; l0 += LANES) {
    int64_t k0 = 0;
    int real = lanes - l0 < LANES ? lanes - l0 : LANES;
    for (; k0 + LANES <= depth; k0 += LANES) {
      vec rows[LANES];
      for (int k = 0; k < LANES; k++) rows[k] = load(x + (k0 + k) * stride + l0);
      transpose(rows);
      for (int l = 0; l < real; l++) store(out + (l0 + l) * stride_out + k0, rows[l]);
    }
    for (; k0 < depth; k0++)
      for (int l = 0; l < real; l++)
        narrow(x[k0 * stride + l0 + l], out + (l0 + l) * stride_out + k0);
  }
}

// out[k][i] = x[k][i] for i < width, zeros up to the next multiple of LANES, for `depth` rows.
template <class T>
void pack_columns(const T* x, int64_t stride, int64_t width, int64_t depth, float* out) {
  const int64_t wide = (width + LANES - 1) / LANES * LANES;
  for (int64_t k = 0; k < depth; k++) {
    convert(x + k * stride, width, out + k * wide);
    for (int64_t i = width; i < wide; i++) out[k * wide + i] = 0.0f;
  }
}

// One strip's worth of one row as floats.
inline void copy_strip(const float* x, float* out) { memcpy(out, x, 4 * STRIP); }
inline void copy_strip(const bf16* x, float* out) {
  if constexpr (LANES >= STRIP) {
    hvec half = {};
    memcpy(&half, x, 2 * STRIP);  // not a whole vector: the row may end here
    vec wide = (vec)(__builtin_convertvector(half, uvec) << 16);
    memcpy(out, &wide, 4 * STRIP);
  } else {
    convert(x, STRIP, out);
  }
}

// Split `width` columns into strips: out[strip][k][STRIP]; of the last one only the columns that
// exist are written. Strips are `stride_out` apart.
template <class T>
void pack_strips(const T* x, int64_t stride, int64_t width, int64_t depth, float* out,
                 int64_t stride_out) {
  const int64_t whole = width / STRIP;
  const int64_t rest = width % STRIP;
  for (int64_t k = 0; k < depth; k++) {
    const T* row = x + k * stride;
    for (int64_t s = 0; s < whole; s++)
      copy_strip(row + s * STRIP, out + s * stride_out + k * STRIP);
    for (int64_t i = 0; i < rest; i++)
      out[whole * stride_out + k * STRIP + i] = widen(row[whole * STRIP + i]);
  }
}

}  // namespace gatewise
