// Products with weights of 1 to 8 bits, codes as they lie in memory (panels.py describes the
// layout; packed.py has the plain reference). The inner loops exist for AVX-512 VNNI and for AVX2;
// both give the same numbers bit for bit, because codes and rows are integers until a group ends.
//
// A vector of 64 bytes holds 4 neighbouring columns of the 16 rows of a panel, row after row, and
// each byte holds one code (8 bits) or 2, 4 or 8 codes whose columns are 4 apart.
#pragma once

#include <algorithm>
#include <vector>

#include "activation.h"
#include "parallel.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GATEWISE_PACKED 1
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define GATEWISE_PACKED_VNNI 1
#endif

namespace gatewise {

constexpr int64_t PANEL_ROWS = 16;
constexpr int64_t TASK_PANELS = 4;  // panels that a thread takes at a time
constexpr int64_t AHEAD = 2048;     // bytes that are asked for ahead of their use; measured

enum PackedSet : int64_t { PACKED_AVX2 = 1, PACKED_VNNI = 2 };

// One matrix; the same struct as in native_packed.py.
struct PackedMatrix {
  const uint8_t* data;
  int64_t rows, columns, group, bits, has_zero;
  double zero;  // of all groups, where has_zero is 0

  int64_t panels() const { return (rows + PANEL_ROWS - 1) / PANEL_ROWS; }
  int64_t groups() const { return (columns + group - 1) / group; }
  int64_t low_bits() const { return bits == 3 ? 2 : bits; }
  int64_t length(int64_t g) const { return std::min(group, columns - g * group); }
  // Vectors of a plane in a group of so many columns.
  static int64_t vectors(int64_t plane, int64_t length) { return (length * plane + 31) / 32; }
  int64_t plane_bytes(int64_t plane) const {
    const int64_t last = groups() - 1;
    return 64 * (last * vectors(plane, group) + vectors(plane, length(last)));
  }
  int64_t grid_bytes() const { return (groups() * (has_zero ? 64 : 32) + 63) / 64 * 64; }
  int64_t panel_bytes() const {
    return grid_bytes() + plane_bytes(low_bits()) + (bits == 3 ? plane_bytes(1) : 0);
  }
};

typedef int8_t bvec __attribute__((vector_size(LANES)));

inline int64_t padded_group(int64_t group) { return (group + 31) / 32 * 32; }

// One row of int8 activations: per group the codes, padded with zeros, their scale and their sum.
struct QuantisedRow {
  float* scale;
  float* sum;
  int8_t* code;

  static int64_t bytes(int64_t columns, int64_t group) {
    const int64_t groups = (columns + group - 1) / group;
    return (groups * (8 + padded_group(group)) + 127) / 64 * 64;
  }
  QuantisedRow(void* memory, int64_t columns, int64_t group) {
    const int64_t groups = (columns + group - 1) / group;
    code = static_cast<int8_t*>(memory);
    scale = reinterpret_cast<float*>(code + (groups * padded_group(group) + 63) / 64 * 64);
    sum = scale + groups;
  }
};

inline ivec round_even(vec v) {
#if defined(__AVX512F__)
  return (ivec)_mm512_cvtps_epi32((__m512)v);
#else
  return (ivec)_mm256_cvtps_epi32((__m256)v);
#endif
}

// scale = largest |x| / 127 of each group, codes to the nearest, ties to even.
inline void quantise_row(const float* x, int64_t columns, int64_t group, QuantisedRow row) {
  const int64_t stride = padded_group(group);
  for (int64_t g = 0, start = 0; start < columns; g++, start += group) {
    const int64_t length = std::min(group, columns - start);
    const float* from = x + start;
    int8_t* to = row.code + g * stride;
    uint32_t top = 0;  // bits of |x| order as the numbers do, and NaN is above them all
    for (int64_t i = 0; i < length; i++) {
      uint32_t bits;
      memcpy(&bits, from + i, 4);
      top = std::max(top, bits & 0x7fffffffu);
    }
    float largest;
    memcpy(&largest, &top, 4);
    if (largest < 1e-30f) {
      memset(to, 0, stride);
      row.scale[g] = row.sum[g] = 0;
      continue;
    }
    const float inverse = 127.0f / largest;
    ivec sum = {};
    for (int64_t i = 0; i < stride; i += LANES) {
      float part[LANES] = {};
      const int64_t here = std::clamp<int64_t>(length - i, 0, LANES);
      if (here < LANES) memcpy(part, from + i, here * 4);
      const ivec code = round_even(load(here < LANES ? part : from + i) * inverse);
      const bvec small = __builtin_convertvector(code, bvec);
      memcpy(to + i, &small, sizeof small);
      sum += code;
    }
    row.scale[g] = largest / 127.0f;
    int32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    row.sum[g] = float(total);
  }
}

#if defined(GATEWISE_PACKED_VNNI)
// Fields above the lowest are not shifted down: their sums are a power of two too large, and are
// divided once per group.
struct Vnni {
  typedef __m512i dots;
  typedef __m512 sums;

  static sums zero() { return _mm512_setzero_ps(); }
  // into[row] += code[row, 0..3] . x[0..3]. The compiler would load and spread x by an instruction
  // of its own.
  static __m512i add(__m512i into, __m512i code, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(into)
        : "v"(code), "m"(*reinterpret_cast<const int8_t(*)[4]>(x)));
    return into;
  }

  // VECTORS is their number where it is known, else 0.
  template <int PLANE, int VECTORS>
  static inline __attribute__((always_inline)) dots product(const uint8_t* w, const int8_t* x,
                                                            int64_t vectors) {
    constexpr int FIELDS = 8 / PLANE;
    constexpr int CHAINS = FIELDS >= 4 ? 1 : 4 / FIELDS;  // sums that do not wait for each other
    static_assert(VECTORS % CHAINS == 0);
    __m512i part[CHAINS][FIELDS];
    for (auto& chain : part)
      for (auto& field : chain) field = _mm512_setzero_si512();
    auto add_vector = [&](__m512i* into) __attribute__((always_inline)) {
      _mm_prefetch(reinterpret_cast<const char*>(w + AHEAD), _MM_HINT_T0);
      const __m512i code = _mm512_loadu_si512(w);
#pragma GCC unroll 8
      for (int f = 0; f < FIELDS; f++) {
        const __m512i mask = _mm512_set1_epi8(char(((1 << PLANE) - 1) << (PLANE * f)));
        into[f] = add(into[f], PLANE == 8 ? code : _mm512_and_si512(code, mask), x + 4 * f);
      }
      w += 64;
      x += 4 * FIELDS;
    };
    if constexpr (VECTORS > 0) {
#pragma GCC unroll 32
      for (int v = 0; v < VECTORS; v++) add_vector(part[v % CHAINS]);
    } else {
      for (int64_t v = 0; v < vectors; v++) add_vector(part[0]);
    }
    __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int f = FIELDS - 1; f >= 0; f--) {
      __m512i field = part[0][f];
      for (int chain = 1; chain < CHAINS; chain++)
        field = _mm512_add_epi32(field, part[chain][f]);
      total = _mm512_add_epi32(total, _mm512_srai_epi32(field, PLANE * f));
    }
    return total;
  }

  static dots plus_high(dots low, dots high) {
    return _mm512_add_epi32(low, _mm512_slli_epi32(high, 2));
  }

  static __m512 halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static sums fold(sums total, dots dot, const uint8_t* scale, const uint8_t* zero, float constant,
                   float x_scale, float x_sum) {
    const __m512 z = zero ? halves(zero) : _mm512_set1_ps(constant);
    const __m512 centred = _mm512_fnmadd_ps(z, _mm512_set1_ps(x_sum), _mm512_cvtepi32_ps(dot));
    const __m512 s = _mm512_mul_ps(halves(scale), _mm512_set1_ps(x_scale));
    return _mm512_fmadd_ps(s, centred, total);
  }

  static void write(float* y, sums total, int64_t rows) {
    const __mmask16 mask = rows >= 16 ? 0xffff : __mmask16((1u << rows) - 1);
    _mm512_mask_storeu_ps(y, mask, total);
  }
};
#endif

struct Avx2 {
  struct dots {
    __m256i half[2];
  };
  struct sums {
    __m256 half[2];
  };

  static sums zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static __m256i spread(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }

  // Pairs of products add up in 16 bits, which saturate: codes of 8 bits go nibble by nibble.
  template <int PLANE, int>
  static dots product(const uint8_t* w, const int8_t* x, int64_t vectors) {
    constexpr int FIELDS = 8 / PLANE;
    constexpr int WIDTH = PLANE == 8 ? 4 : PLANE;
    const __m256i mask = _mm256_set1_epi8((1 << WIDTH) - 1), one = _mm256_set1_epi16(1);
    dots low = {{_mm256_setzero_si256(), _mm256_setzero_si256()}}, high = low;
    for (int64_t v = 0; v < vectors; v++) {
      for (int h = 0; h < 2; h++) {
        const __m256i code =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 64 * v + 32 * h));
        if constexpr (PLANE == 8) {
          const __m256i row = spread(x + v * 4);
          const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(code, 4), mask);
          const __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(code, mask), row);
          const __m256i b = _mm256_maddubs_epi16(upper, row);
          low.half[h] = _mm256_add_epi32(low.half[h], _mm256_madd_epi16(a, one));
          high.half[h] = _mm256_add_epi32(high.half[h], _mm256_madd_epi16(b, one));
        } else {
          __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
          for (int f = 0; f < FIELDS; f++) {
            const __m256i field = _mm256_and_si256(_mm256_srli_epi16(code, WIDTH * f), mask);
            const __m256i row = spread(x + (v * FIELDS + f) * 4);
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(field, row));
          }
          low.half[h] = _mm256_add_epi32(low.half[h], _mm256_madd_epi16(pairs, one));
        }
      }
    }
    if constexpr (PLANE == 8)
      for (int h = 0; h < 2; h++)
        low.half[h] = _mm256_add_epi32(low.half[h], _mm256_slli_epi32(high.half[h], 4));
    return low;
  }

  static dots plus_high(dots low, dots high) {
    for (int h = 0; h < 2; h++)
      low.half[h] = _mm256_add_epi32(low.half[h], _mm256_slli_epi32(high.half[h], 2));
    return low;
  }

  static __m256 halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static sums fold(sums total, dots dot, const uint8_t* scale, const uint8_t* zero, float constant,
                   float x_scale, float x_sum) {
    for (int h = 0; h < 2; h++) {
      const __m256 z = zero ? halves(zero + 16 * h) : _mm256_set1_ps(constant);
      const __m256 centred =
          _mm256_fnmadd_ps(z, _mm256_set1_ps(x_sum), _mm256_cvtepi32_ps(dot.half[h]));
      const __m256 s = _mm256_mul_ps(halves(scale + 16 * h), _mm256_set1_ps(x_scale));
      total.half[h] = _mm256_fmadd_ps(s, centred, total.half[h]);
    }
    return total;
  }

  static void write(float* y, sums total, int64_t rows) {
    float all[16];
    memcpy(all, &total, sizeof all);
    memcpy(y, all, std::min<int64_t>(rows, 16) * 4);
  }
};

constexpr int64_t USUAL_GROUP = 128;  // whose loops are unrolled

// y[panel's rows] = matrix[panel's rows] . row
template <class Isa, int LOW, bool HIGH>
void panel_product(const PackedMatrix& matrix, int64_t panel, QuantisedRow row, float* y) {
  const uint8_t* scale = matrix.data + panel * matrix.panel_bytes();
  const uint8_t* low = scale + matrix.grid_bytes();
  const uint8_t* high = low + matrix.plane_bytes(LOW);
  const int64_t groups = matrix.groups(), stride = padded_group(matrix.group);
  const uint8_t* zero = matrix.has_zero ? scale + 32 * groups : nullptr;
  const float constant = float(matrix.zero);
  auto total = Isa::zero();
  for (int64_t g = 0; g < groups; g++) {
    const int64_t length = matrix.length(g);
    const int8_t* x = row.code + g * stride;
    const int64_t vectors = PackedMatrix::vectors(LOW, length);
    typename Isa::dots dot;
    if (length == USUAL_GROUP) {
      dot = Isa::template product<LOW, USUAL_GROUP * LOW / 32>(low, x, vectors);
      if (HIGH) dot = Isa::plus_high(dot, Isa::template product<1, USUAL_GROUP / 32>(high, x, 4));
    } else {
      dot = Isa::template product<LOW, 0>(low, x, vectors);
      const int64_t more = PackedMatrix::vectors(1, length);
      if (HIGH) dot = Isa::plus_high(dot, Isa::template product<1, 0>(high, x, more));
    }
    low += 64 * vectors;
    high += 64 * PackedMatrix::vectors(1, length);
    total = Isa::fold(total, dot, scale + 32 * g, zero ? zero + 32 * g : nullptr, constant,
                      row.scale[g], row.sum[g]);
  }
  Isa::write(y, total, matrix.rows - panel * PANEL_ROWS);
}

typedef void (*PanelProduct)(const PackedMatrix&, int64_t, QuantisedRow, float*);

template <class Isa>
PanelProduct product_of_width(int64_t bits) {
  if (bits == 1) return panel_product<Isa, 1, false>;
  if (bits == 2) return panel_product<Isa, 2, false>;
  if (bits == 3) return panel_product<Isa, 2, true>;
  if (bits == 4) return panel_product<Isa, 4, false>;
  return panel_product<Isa, 8, false>;
}

inline PanelProduct product_of(int64_t set, int64_t bits) {
#if defined(GATEWISE_PACKED_VNNI)
  if (set == PACKED_VNNI) return product_of_width<Vnni>(bits);
#endif
  return product_of_width<Avx2>(bits);
}

// Call work(first panel, end) over all panels of a matrix.
template <class Work>
void over_panels(int64_t panels, int64_t threads, const Work& work) {
  const int64_t tasks = (panels + TASK_PANELS - 1) / TASK_PANELS;
  run_tasks(tasks, threads, [&](int64_t task) {
    work(task * TASK_PANELS, std::min(panels, (task + 1) * TASK_PANELS));
  });
}

// Memory of this thread that others may write to while it waits for them.
template <int PURPOSE>
uint8_t* byte_scratch(int64_t bytes) {
  return reinterpret_cast<uint8_t*>(scratch<PURPOSE>((bytes + 3) / 4));
}

// y[M, N] = x[M, K] . matrix^T; every panel is read once for all rows.
inline void packed_linear(const PackedMatrix& matrix, const float* x, int64_t count, float* y,
                          int64_t threads, int64_t set) {
  const int64_t bytes = QuantisedRow::bytes(matrix.columns, matrix.group);
  uint8_t* memory = byte_scratch<20>(count * bytes);
  auto row = [&](int64_t m) {
    return QuantisedRow(memory + m * bytes, matrix.columns, matrix.group);
  };
  for (int64_t m = 0; m < count; m++)
    quantise_row(x + m * matrix.columns, matrix.columns, matrix.group, row(m));
  const PanelProduct product = product_of(set, matrix.bits);
  over_panels(matrix.panels(), threads, [&](int64_t first, int64_t end) {
    for (int64_t panel = first; panel < end; panel++)
      for (int64_t m = 0; m < count; m++)
        product(matrix, panel, row(m), y + m * matrix.rows + panel * PANEL_ROWS);
  });
}

// The experts of some tokens in one call; the same struct as in native_packed.py.
struct PackedFfnCall {
  int64_t tokens, top_k, experts, width, expert_width, activation, threads, set;
  const float* x;         // (tokens, width)
  const int64_t* expert;  // (tokens, top_k); -1 is left out
  const float* weight;    // (tokens, top_k)
  const PackedMatrix* w_in;
  const PackedMatrix* w_out;
  float* y;  // (tokens, width)
};

template <int ACTIVATION>
void activate_row(const float* hidden, int64_t width, float* inner) {
  for (int64_t f = 0; f < width; f += LANES) {
    if constexpr (ACTIVATION == SWIGLU)
      store(inner + f, swiglu(load(hidden + f), load(hidden + width + f)));
    else
      store(inner + f, activate<ACTIVATION>(load(hidden + f)));
  }
}

inline void packed_ffn(const PackedFfnCall& call) {
  const int64_t pairs = call.tokens * call.top_k;
  std::vector<int64_t> end(call.experts + 1, 0), pair(pairs), busy;
  for (int64_t i = 0; i < pairs; i++)
    if (call.expert[i] >= 0) end[call.expert[i] + 1]++;
  for (int64_t e = 0; e < call.experts; e++) {
    if (end[e + 1]) busy.push_back(e);
    end[e + 1] += end[e];
  }
  std::vector<int64_t> next(end.begin(), end.end() - 1);
  for (int64_t i = 0; i < pairs; i++)
    if (call.expert[i] >= 0) pair[next[call.expert[i]]++] = i;
  if (busy.empty()) {
    std::fill(call.y, call.y + call.tokens * call.width, 0.0f);
    return;
  }

  const PackedMatrix &any_in = call.w_in[busy[0]], &any_out = call.w_out[busy[0]];
  const int64_t hidden_width = any_in.panels() * PANEL_ROWS + LANES;  // loads may pass the end
  const int64_t x_bytes = QuantisedRow::bytes(call.width, any_in.group);
  const int64_t inner_bytes = QuantisedRow::bytes(call.expert_width, any_out.group);
  uint8_t* x_memory = byte_scratch<20>(call.tokens * x_bytes);
  uint8_t* inner_memory = byte_scratch<21>(pairs * inner_bytes);
  float* hidden = scratch<22>(pairs * hidden_width);
  float* out = scratch<23>(pairs * call.width);
  auto x_row = [&](int64_t token) {
    return QuantisedRow(x_memory + token * x_bytes, call.width, any_in.group);
  };
  auto inner_row = [&](int64_t i) {
    return QuantisedRow(inner_memory + i * inner_bytes, call.expert_width, any_out.group);
  };

  for (int64_t token = 0; token < call.tokens; token++)
    quantise_row(call.x + token * call.width, call.width, any_in.group, x_row(token));
  // rows of all experts as one list of panels
  auto products = [&](const PackedMatrix* table, const auto& row, float* to, int64_t stride) {
    const int64_t panels = table[busy[0]].panels();
    over_panels(panels * int64_t(busy.size()), call.threads, [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; index++) {
        const int64_t e = busy[index / panels], panel = index % panels;
        const PanelProduct product = product_of(call.set, table[e].bits);
        for (int64_t place = end[e]; place < end[e + 1]; place++) {
          const int64_t i = pair[place];
          product(table[e], panel, row(i), to + i * stride + panel * PANEL_ROWS);
        }
      }
    });
  };
  products(call.w_in, [&](int64_t i) { return x_row(i / call.top_k); }, hidden, hidden_width);
  run_tasks(end[call.experts], call.threads, [&](int64_t place) {
    const int64_t i = pair[place];
    const float* from = hidden + i * hidden_width;
    float* inner = scratch<24>(call.expert_width + LANES);
    if (call.activation == SWIGLU) activate_row<SWIGLU>(from, call.expert_width, inner);
    if (call.activation == GELU) activate_row<GELU>(from, call.expert_width, inner);
    if (call.activation == RELU) activate_row<RELU>(from, call.expert_width, inner);
    quantise_row(inner, call.expert_width, any_out.group, inner_row(i));
  });
  products(call.w_out, inner_row, out, call.width);
  for (int64_t token = 0; token < call.tokens; token++) {
    float* y = call.y + token * call.width;
    std::fill(y, y + call.width, 0.0f);
    for (int64_t k = 0; k < call.top_k; k++) {
      const int64_t i = token * call.top_k + k;
      if (call.expert[i] < 0) continue;
      const float weight = call.weight[i], *from = out + i * call.width;
      for (int64_t d = 0; d < call.width; d++) y[d] += weight * from[d];
    }
  }
}

// Codes of 4 neighbouring columns of LANES rows, a byte each, from a plane of a group.
inline uvec plane_codes(const uint8_t* w, int64_t plane, int64_t column, int64_t row) {
  const int64_t fields = 8 / plane, vector = column / (4 * fields), field = column / 4 % fields;
  uvec code;
  memcpy(&code, w + 64 * vector + 4 * row, sizeof code);
  return (code >> uint32_t(plane * field)) & (((1u << plane) - 1) * 0x01010101u);
}

// Values of a panel in row order: T is float or bf16.
template <class T>
void unpack_panel(const PackedMatrix& matrix, int64_t panel, T* values) {
  const uint8_t* scale = matrix.data + panel * matrix.panel_bytes();
  const int64_t groups = matrix.groups(), plane = matrix.low_bits();
  const uint8_t* zero = scale + 32 * groups;
  const uint8_t* low = scale + matrix.grid_bytes();
  const uint8_t* high = low + matrix.plane_bytes(plane);
  const int64_t rows = std::min(PANEL_ROWS, matrix.rows - panel * PANEL_ROWS);
  for (int64_t g = 0; g < groups; g++) {
    const int64_t length = matrix.length(g);
    float s[16], z[16];
    for (int h = 0; h < 16; h += 8) {
      _mm256_storeu_ps(s + h, Avx2::halves(scale + 32 * g + 2 * h));
      _mm256_storeu_ps(z + h, matrix.has_zero ? Avx2::halves(zero + 32 * g + 2 * h)
                                              : _mm256_set1_ps(float(matrix.zero)));
    }
    for (int64_t start = 0; start < length; start += 16) {
      float tile[16][16];  // (column, row)
      const int64_t width = std::min<int64_t>(16, length - start);
      for (int64_t four = 0; four < width; four += 4)
        for (int64_t r = 0; r < 16; r += LANES) {
          uvec code = plane_codes(low, plane, start + four, r);
          if (matrix.bits == 3) code |= plane_codes(high, 1, start + four, r) << 2;
          for (int c = 0; c < 4; c++) {
            const ivec one = (ivec)((code >> uint32_t(8 * c)) & 255u);
            store(&tile[four + c][r],
                  load(s + r) * (__builtin_convertvector(one, vec) - load(z + r)));
          }
        }
      T* to = values + g * matrix.group + start;
      if (width == 16 && rows == 16) {
        for (int r = 0; r < 16; r += LANES)
          for (int c = 0; c < 16; c += LANES) {
            vec block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = load(&tile[c + i][r]);
            transpose(block);
            for (int i = 0; i < LANES; i++) store(to + (r + i) * matrix.columns + c, block[i]);
          }
      } else {
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < width; c++) narrow(tile[c][r], to + r * matrix.columns + c);
      }
    }
    low += 64 * PackedMatrix::vectors(plane, length);
    high += 64 * PackedMatrix::vectors(1, length);
  }
}

template <class T>
void unpack(const PackedMatrix& matrix, T* values, int64_t threads) {
  over_panels(matrix.panels(), threads, [&](int64_t first, int64_t end) {
    for (int64_t panel = first; panel < end; panel++)
      unpack_panel(matrix, panel, values + panel * PANEL_ROWS * matrix.columns);
  });
}

}  // namespace gatewise
#endif
