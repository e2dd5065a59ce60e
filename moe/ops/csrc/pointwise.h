// Activations of whole row-major matrices, for networks whose products are torch's.
#pragma once

#include <algorithm>

#include "activation.h"
#include "parallel.h"

namespace gatewise {

constexpr int64_t ROWS_PER_TASK = 16;

// Write the activations of `rows` rows.
template <int ACTIVATION, class T>
void activate_rows(const T* hidden, int64_t rows, int64_t width, T* inner, int64_t threads) {
  const int64_t stride = ACTIVATION == SWIGLU ? 2 * width : width;
  run_tasks((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, threads, [&](int64_t task) {
    const int64_t last = std::min((task + 1) * ROWS_PER_TASK, rows);
    for (int64_t r = task * ROWS_PER_TASK; r < last; r++) {
      const T* from = hidden + r * stride;
      auto one = [&](vec x, vec up) {
        if constexpr (ACTIVATION == SWIGLU)
          return swiglu(x, up);
        else
          return activate<ACTIVATION>(x);
      };
      const T* up = ACTIVATION == SWIGLU ? from + width : from;
      int64_t f = 0;
      for (; f + LANES <= width; f += LANES)
        store(inner + r * width + f, one(load(from + f), load(up + f)));
      for (; f < width; f++)
        narrow(one(broadcast(widen(from[f])), broadcast(widen(up[f])))[0], inner + r * width + f);
    }
  });
}

// Write the gradient of `hidden`, and `inner` again.
template <int ACTIVATION, class T>
void activate_rows_backward(const T* dinner, const T* hidden, int64_t rows, int64_t width,
                            T* dhidden, T* inner, int64_t threads) {
  const int64_t stride = ACTIVATION == SWIGLU ? 2 * width : width;
  run_tasks((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, threads, [&](int64_t task) {
    const int64_t last = std::min((task + 1) * ROWS_PER_TASK, rows);
    for (int64_t r = task * ROWS_PER_TASK; r < last; r++) {
      const T* from = hidden + r * stride;
      T* to = dhidden + r * stride;
      auto one = [&](vec d, vec x, vec up, vec* dx, vec* dup) {
        if constexpr (ACTIVATION == SWIGLU)
          return swiglu_backward(d, x, up, dx, dup);
        else
          return activate_backward<ACTIVATION>(d, x, dx);
      };
      const int64_t gate = ACTIVATION == SWIGLU ? width : 0;
      vec dx, dup;
      int64_t f = 0;
      for (; f + LANES <= width; f += LANES) {
        vec a = one(load(dinner + r * width + f), load(from + f), load(from + gate + f), &dx, &dup);
        store(inner + r * width + f, a);
        store(to + f, dx);
        if (gate) store(to + gate + f, dup);
      }
      for (; f < width; f++) {
        vec a = one(broadcast(widen(dinner[r * width + f])), broadcast(widen(from[f])),
                    broadcast(widen(from[gate + f])), &dx, &dup);
        narrow(a[0], inner + r * width + f);
        narrow(dx[0], to + f);
        if (gate) narrow(dup[0], to + gate + f);
      }
    }
  });
}

}  // namespace gatewise
