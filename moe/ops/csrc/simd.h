// Vectors of the widest kind the target has, without intrinsics: GCC and Clang vector extensions.
//
// LANES floats per vector: 16 with AVX-512, 8 with AVX, else 4. Numbers are stored as float or
// bfloat16 (uint16_t) and always computed as float.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace gatewise {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int MAX_VECTORS = 4;  // vectors per panel row: 6 x 4 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int MAX_VECTORS = 2;  // 6 x 2 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4;
constexpr int MAX_VECTORS = 4;
#else
constexpr int LANES = 4;
constexpr int MAX_VECTORS = 2;
#endif
constexpr int PANEL = LANES * MAX_VECTORS;  // rows of a panel, at most

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

inline vec broadcast(float x) { return x - vec{}; }  // x - 0 is x for every x; x + 0 is not

inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

inline vec load(const bf16* p) {
  hvec half;
  memcpy(&half, p, sizeof half);
  return (vec)(__builtin_convertvector(half, uvec) << 16);
}

// Round to nearest even; a NaN stays a NaN.
inline hvec to_bf16(vec v) {
  uvec bits = (uvec)v;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  bits = (v != v) ? (uvec{} + 0x7fc00000u) : bits;
  return __builtin_convertvector(bits >> 16, hvec);
}

inline void store(bf16* p, vec v) {
  hvec half = to_bf16(v);
  memcpy(p, &half, sizeof half);
}

// Store past the caches, to an address aligned to the vector; fence() makes it visible.
inline void stream(float* p, vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

inline void stream(bf16* p, vec v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_bf16(v));
#else
  store(p, v);
#endif
}

inline void fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, bf16* p) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *p = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float sum(vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

inline vec pick(ivec mask, vec yes, vec no) { return mask ? yes : no; }

// Swap the off-diagonal blocks of size S in every 2S x 2S block of the rows i and i + S.
template <int S, int... J>
inline void swap_blocks(vec& a, vec& b, std::integer_sequence<int, J...>) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
  vec low = __builtin_shufflevector(a, b, ((J & S) ? LANES + J - S : J)...);
  vec high = __builtin_shufflevector(a, b, ((J & S) ? LANES + J : J + S)...);
#else
  vec low = __builtin_shuffle(a, b, ivec{((J & S) ? LANES + J - S : J)...});
  vec high = __builtin_shuffle(a, b, ivec{((J & S) ? LANES + J : J + S)...});
#endif
  a = low;
  b = high;
}

template <int S>
inline void transpose_step(vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) swap_blocks<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
}

// Transpose LANES x LANES numbers in registers.
inline void transpose(vec* rows) {
  if constexpr (LANES >= 16) transpose_step<8>(rows);
  if constexpr (LANES >= 8) transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

// e^x to about one unit in the last place; x is clamped to where the result is a normal number.
inline vec exponential(vec x) {
  x = pick(x < broadcast(-87.0f), broadcast(-87.0f), x);
  x = pick(x > broadcast(88.0f), broadcast(88.0f), x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vec n = (x * 1.44269504f + magic) - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;  // ln 2 in two parts
  // Taylor series of e^r; |r| <= 0.347, so the first term left out is below 2e-9 of the sum.
  vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return p * (vec)power;
}

// 1 / x for x >= 1, to about one unit in the last place.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
  vec r = (vec)_mm512_rcp14_ps((__m512)x);  // a division takes as long as all the rest
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

inline vec sigmoid(vec x) { return reciprocal(1.0f + exponential(-x)); }

}  // namespace gatewise
