// The inner product kernel and the packing around it.
//
// c[i][lane] (+)= sum over k of a(i, k) * b[k][lane]: `a` is broadcast one number at a time, `b` is
// a panel of 1 to MAX_VECTORS vectors per k. STRIP rows of c are made at a time. Whichever operand
// is a weight is the `a` side wherever it is contiguous in k, so that it is read where it lies,
// once per block of rows, and never repacked: with few rows per expert that is what costs.
#pragma once

#include "simd.h"

namespace gatewise {

constexpr int STRIP = 12;

// Where a(i, k) lies. Rows: data[i * stride + k]. Packed: data[k * STRIP + i].
struct Rows {
  const float* data;
  int64_t stride;
  const float* at(int i, int64_t k) const { return data + i * stride + k; }
  Rows from(int i) const { return {data + i * stride, stride}; }
};
struct Packed {
  const float* data;
  const float* at(int i, int64_t k) const { return data + k * STRIP + i; }
  Packed from(int i) const { return {data + i}; }
};

template <int M, int V, class A>
void multiply(int64_t depth, A a, const float* b, int64_t stride_b, float* c, bool accumulate) {
  vec total[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < V; j++)
      total[i][j] = accumulate ? load(c + i * PANEL + j * LANES) : vec{};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; k++) {
    vec panel[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) panel[j] = load(b + k * stride_b + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      vec x = broadcast(*a.at(i, k));
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) total[i][j] += x * panel[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) store(c + i * PANEL + j * LANES, total[i][j]);
}

// Multiply `rows` (at most STRIP) rows; c has PANEL numbers per row.
template <int V, class A>
void multiply_strip(int rows, int64_t depth, A a, const float* b, int64_t stride_b, float* c,
                    bool accumulate) {
  constexpr int M = V <= 2 && MAX_VECTORS > 2 ? STRIP : V == 1 ? STRIP : STRIP / 2;
  int i = 0;
  for (; i + M <= rows; i += M)
    multiply<M, V>(depth, a.from(i), b, stride_b, c + i * PANEL, accumulate);
  for (; i + 3 <= rows; i += 3)
    multiply<3, V>(depth, a.from(i), b, stride_b, c + i * PANEL, accumulate);
  for (; i < rows; i++)
    multiply<1, V>(depth, a.from(i), b, stride_b, c + i * PANEL, accumulate);
}

template <class A>
void multiply_strip(int vectors, int rows, int64_t depth, A a, const float* b, int64_t stride_b,
                    float* c, bool accumulate) {
  switch (vectors) {
    case 1: return multiply_strip<1>(rows, depth, a, b, stride_b, c, accumulate);
    case 2: return multiply_strip<2>(rows, depth, a, b, stride_b, c, accumulate);
#if !defined(__AVX__) || defined(__AVX512F__)
    case 3:
      if constexpr (MAX_VECTORS > 2)
        return multiply_strip<3>(rows, depth, a, b, stride_b, c, accumulate);
      break;
    case 4:
      if constexpr (MAX_VECTORS > 2)
        return multiply_strip<4>(rows, depth, a, b, stride_b, c, accumulate);
      break;
#endif
  }
}

// out[k][lane] = x[lane][k], `lanes` of them real, zeros up to the next multiple of LANES.
template <class T>
void pack_transposed(const T* x, int64_t stride, int lanes, int64_t depth, float* out,
                     int64_t stride_out) {
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

// Convert `width` numbers.
template <class T>
void convert(const T* x, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i));
  for (; i < width; i++) out[i] = widen(x[i]);
}

// out[k][i] = x[k][i] for i < width, zeros up to `padded`, for `depth` rows.
template <class T>
void pack_columns(const T* x, int64_t stride, int64_t width, int64_t padded, int64_t depth,
                  float* out) {
  for (int64_t k = 0; k < depth; k++) {
    convert(x + k * stride, width, out + k * padded);
    for (int64_t i = width; i < padded; i++) out[k * padded + i] = 0.0f;
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

// Split `width` columns into strips: out[strip][k][STRIP], the last one padded with zeros.
template <class T>
void pack_strips(const T* x, int64_t stride, int width, int64_t depth, float* out) {
  const int whole = width / STRIP;
  for (int64_t k = 0; k < depth; k++)
    for (int s = 0; s < whole; s++)
      copy_strip(x + k * stride + s * STRIP, out + (s * depth + k) * STRIP);
  if (whole * STRIP == width) return;
  for (int64_t k = 0; k < depth; k++)
    for (int i = 0; i < STRIP; i++)
      out[(whole * depth + k) * STRIP + i] =
          whole * STRIP + i < width ? widen(x[k * stride + whole * STRIP + i]) : 0.0f;
}

}  // namespace gatewise
