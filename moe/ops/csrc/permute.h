// Sorting of (token, choice) pairs and moving rows; see permute.py for the meaning of each.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace gatewise {

constexpr int64_t TOKENS_PER_TASK = 64;

// A counting sort: stable, one pass to count and one to place. -1 sorts last. Returns false for an
// index that is out of range.
inline bool sort_pairs(const int64_t* expert, int64_t pairs, int64_t top_k, int64_t experts,
                       int64_t* order, int64_t* token, int64_t* inverse, int64_t* count) {
  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t i = 0; i < pairs; i++) {
    if (expert[i] < -1 || expert[i] >= experts) return false;
    next[expert[i] < 0 ? experts : expert[i]]++;
  }
  for (int64_t e = 0; e < experts; e++) count[e] = next[e];
  int64_t start = 0;
  for (auto& n : next) {
    int64_t here = n;
    n = start;
    start += here;
  }
  for (int64_t t = 0, i = 0; i < pairs; t++)
    for (int64_t k = 0; k < top_k; k++, i++) {
      int64_t position = next[expert[i] < 0 ? experts : expert[i]]++;
      order[position] = i;
      token[position] = t;
      inverse[i] = expert[i] < 0 ? -1 : position;
    }
  return true;
}

inline void gather_rows(const char* x, const int64_t* token, int64_t rows, int64_t row_bytes,
                        char* out, int64_t threads) {
  run_tasks((rows + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, threads, [&](int64_t task) {
    int64_t last = std::min((task + 1) * TOKENS_PER_TASK, rows);
    for (int64_t n = task * TOKENS_PER_TASK; n < last; n++)
      memcpy(out + n * row_bytes, x + token[n] * row_bytes, row_bytes);
  });
}

// out[t] = sum over k, first to last, of weight[t][k] * y[inverse[t][k]]; no weight means one.
template <class T>
void sum_rows(const T* y, const int64_t* inverse, const float* weight, int64_t tokens,
              int64_t top_k, int64_t width, T* out, int64_t threads) {
  run_tasks((tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, threads, [&](int64_t task) {
    int64_t last = std::min((task + 1) * TOKENS_PER_TASK, tokens);
    for (int64_t t = task * TOKENS_PER_TASK; t < last; t++) {
      const int64_t* rows = inverse + t * top_k;
      int64_t d = 0;
      for (; d + 4 * LANES <= width; d += 4 * LANES) {
        vec total[4] = {};
        for (int64_t k = 0; k < top_k; k++) {
          if (rows[k] < 0) continue;
          vec w = broadcast(weight ? weight[t * top_k + k] : 1.0f);
          const T* row = y + rows[k] * width + d;
          for (int j = 0; j < 4; j++) total[j] += w * load(row + j * LANES);
        }
        for (int j = 0; j < 4; j++) store(out + t * width + d + j * LANES, total[j]);
      }
      for (; d < width; d++) {
        float total = 0;
        for (int64_t k = 0; k < top_k; k++)
          if (rows[k] >= 0)
            total += (weight ? weight[t * top_k + k] : 1.0f) * widen(y[rows[k] * width + d]);
        narrow(total, out + t * width + d);
      }
    }
  });
}

// dy_rows[inverse[t][k]] = weight[t][k] * dy[t], dweight[t][k] = dy[t] . y[inverse[t][k]].
template <class T>
void combine_backward(const T* dy, const T* y, const int64_t* inverse, const float* weight,
                      int64_t tokens, int64_t top_k, int64_t width, T* dy_rows, float* dweight,
                      int64_t threads) {
  run_tasks((tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, threads, [&](int64_t task) {
    int64_t last = std::min((task + 1) * TOKENS_PER_TASK, tokens);
    for (int64_t pair = task * TOKENS_PER_TASK * top_k; pair < last * top_k; pair++) {
      int64_t row = inverse[pair];
      dweight[pair] = 0;
      if (row < 0) continue;
      const T* from = dy + pair / top_k * width;
      const T* out = y + row * width;
      T* to = dy_rows + row * width;
      vec w = broadcast(weight[pair]);
      vec dot[2] = {};
      int64_t d = 0;
      for (; d + 2 * LANES <= width; d += 2 * LANES)
        for (int j = 0; j < 2; j++) {
          vec v = load(from + d + j * LANES);
          dot[j] += v * load(out + d + j * LANES);
          store(to + d + j * LANES, w * v);
        }
      float total = sum(dot[0] + dot[1]);
      for (; d < width; d++) {
        float v = widen(from[d]);
        total += v * widen(out[d]);
        narrow(weight[pair] * v, to + d);
      }
      dweight[pair] = total;
    }
  });
}

}  // namespace gatewise
