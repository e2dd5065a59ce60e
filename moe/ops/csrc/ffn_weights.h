// Gradients of the two weights: dw[n][k] = sum over the expert's rows of a[row][n] * b[row][k].
//
// The activation does not matter here: the first weight has a = dhidden and b = x, the second
// a = dy and b = inner.
#pragma once

#include "ffn.h"

namespace gatewise {

struct WeightTask {
  int64_t expert, row, rows;
  bool is_out;         // the second weight
  int64_t begin, end;  // rows of the gradient
};

inline std::vector<WeightTask> cut_weights(const FfnCall& call, int64_t inner_outputs) {
  std::vector<WeightTask> tasks;
  for (int64_t e = 0, row = 0; e < call.experts; e++) {
    const int64_t rows = call.end[e] - row;
    // The broadcast side of a task should stay in the second-level cache.
    const int64_t share = std::max<int64_t>(65536 / std::max<int64_t>(rows, 1), 4 * STRIP);
    for (bool is_out : {false, true}) {
      const int64_t outputs = is_out ? call.width : inner_outputs;
      const int64_t parts = (outputs + share - 1) / share;
      const int64_t step = ((outputs + parts - 1) / parts + STRIP - 1) / STRIP * STRIP;
      for (int64_t n = 0; n < outputs; n += step)
        tasks.push_back({e, row, rows, is_out, n, std::min(n + step, outputs)});
    }
    row = call.end[e];
  }
  return tasks;
}

template <class W>
void write_tile(const float* tile, int64_t rows, int width, W* to, int64_t stride, Store mode) {
  for (int64_t i = 0; i < rows; i++) {
    W* row = to + i * stride;
    const float* from = tile + i * PANEL;
    int j = 0;
    for (; j + LANES <= width; j += LANES) {
      if (mode == Store::stream)
        stream(row + j, load(from + j));
      else if (mode == Store::accumulate)
        store(row + j, load(row + j) + load(from + j));
      else
        store(row + j, load(from + j));
    }
    for (; j < width; j++)
      narrow(mode == Store::accumulate ? widen(row[j]) + from[j] : from[j], row + j);
  }
}

// T: rows, W: gradients.
template <class T, class W>
void weight_gradient(const FfnCall& call, const WeightTask& task, int64_t inner_outputs,
                     Store mode) {
  const int64_t D = call.width, F = call.expert_width;
  const int64_t all_outputs = task.is_out ? D : inner_outputs;
  const int64_t inputs = task.is_out ? F : D;
  const int64_t outputs = task.end - task.begin;
  W* dw = static_cast<W*>(task.is_out ? call.dw_out : call.dw_in) +
          (task.expert * all_outputs + task.begin) * inputs;
  if (task.rows == 0) {
    if (mode != Store::accumulate) std::fill(dw, dw + outputs * inputs, W{});
    return;
  }
  const T* a_rows = static_cast<const T*>(task.is_out ? call.dy : call.dhidden) +
                    task.row * all_outputs + task.begin;
  const T* b_rows =
      static_cast<const T*>(task.is_out ? call.inner : call.x) + task.row * inputs;
  const int64_t strips = (outputs + STRIP - 1) / STRIP;
  float* b = scratch(task.rows * PANEL + strips * STRIP * task.rows + STRIP * PANEL);
  float* a = b + task.rows * PANEL;
  float* tile = a + strips * STRIP * task.rows;
  pack_strips(a_rows, all_outputs, outputs, task.rows, a);
  for (int64_t k = 0; k < inputs; k += PANEL) {
    const int width = int(std::min<int64_t>(PANEL, inputs - k));
    const int vectors = (width + LANES - 1) / LANES;
    const int64_t stride = vectors * LANES;
    pack_columns(b_rows + k, inputs, width, task.rows, b);
    for (int64_t n = 0; n < outputs; n += STRIP) {
      const int64_t some = std::min<int64_t>(STRIP, outputs - n);
      W* to = dw + n * inputs + k;
      const Packed side{a + n * task.rows};
      if constexpr (sizeof(W) == 4) {
        if (width == stride) {  // straight from the registers
          multiply_rows(vectors, some, task.rows, side, b, Fetch{}, to, inputs, mode);
          continue;
        }
      }
      multiply_rows(vectors, some, task.rows, side, b, Fetch{}, tile, PANEL,
                    Store::overwrite);
      write_tile(tile, some, width, to, inputs, mode);
    }
  }
  if (mode == Store::stream) fence();
}

template <class T, class W>
void weight_gradients(const FfnCall& call, bool gated) {
  const int64_t inner_outputs = (gated ? 2 : 1) * call.expert_width;
  const int64_t bytes = call.experts * inner_outputs * call.width * int64_t(sizeof(W));
  const bool aligned = call.width % 32 == 0 && call.expert_width % 32 == 0 &&
                       (reinterpret_cast<uintptr_t>(call.dw_in) |
                        reinterpret_cast<uintptr_t>(call.dw_out)) % 64 == 0;
  Store mode = aligned && bytes > STREAM_BYTES ? Store::stream : Store::overwrite;
  if (call.accumulate) mode = Store::accumulate;
  const auto tasks = cut_weights(call, inner_outputs);
  run_tasks(int64_t(tasks.size()), call.threads, [&](int64_t i) {
    weight_gradient<T, W>(call, tasks[i], inner_outputs, mode);
  });
}

}  // namespace gatewise
