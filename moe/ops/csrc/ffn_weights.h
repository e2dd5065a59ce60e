// Gradients of the two weights: dw[n][k] = sum over the expert's rows of a[row][n] * b[row][k].
#pragma once

#include "ffn.h"

namespace gatewise {

struct WeightTask {
  int64_t expert, first, last;  // panels of the expert
  bool is_out;                  // the second weight
  int64_t begin, end;           // rows of the gradient
};

template <class W>
void write_tile(const float* tile, int rows, int width, W* to, int64_t stride, bool accumulate) {
  for (int i = 0; i < rows; i++) {
    W* row = to + i * stride;
    const float* from = tile + i * PANEL;
    int j = 0;
    if (accumulate)
      for (; j + LANES <= width; j += LANES) store(row + j, load(row + j) + load(from + j));
    else
      for (; j + LANES <= width; j += LANES) store(row + j, load(from + j));
    for (; j < width; j++) narrow(accumulate ? widen(row[j]) + from[j] : from[j], row + j);
  }
}

template <class T, int ACTIVATION>
template <class W>
void Ffn<T, ACTIVATION>::backward_weights() const {
  std::vector<WeightTask> tasks;
  for (int64_t e = 0, p = 0; e < call_.experts; e++) {
    int64_t last = p;
    int64_t rows = 0;
    for (; last < int64_t(panels_.size()) && panels_[last].expert == e; last++)
      rows += panels_[last].lanes;
    // The broadcast side of a task should stay in the second-level cache.
    const int64_t share = std::max<int64_t>(65536 / std::max<int64_t>(rows, 1), 4 * STRIP);
    for (bool is_out : {false, true}) {
      const int64_t outputs = is_out ? D_ : G_;
      const int64_t parts = (outputs + share - 1) / share;
      const int64_t step = ((outputs + parts - 1) / parts + STRIP - 1) / STRIP * STRIP;
      for (int64_t n = 0; n < outputs; n += step)
        tasks.push_back({e, p, last, is_out, n, std::min(n + step, outputs)});
    }
    p = last;
  }
  run_tasks(int64_t(tasks.size()), call_.threads, [&](int64_t index) {
    const WeightTask& task = tasks[index];
    const int64_t inputs = task.is_out ? F_ : D_;
    W* dw = static_cast<W*>(task.is_out ? call_.dw_out : call_.dw_in) +
            (task.expert * (task.is_out ? D_ : G_) + task.begin) * inputs;
    if (task.first == task.last) {
      if (!call_.accumulate) std::fill(dw, dw + (task.end - task.begin) * inputs, W{});
      return;
    }
    const int64_t first_row = panels_[task.first].row;
    const int64_t rows = panels_[task.last - 1].row + panels_[task.last - 1].lanes - first_row;
    const int64_t first_lane = panels_[task.first].offset;
    const int64_t lanes = panels_[task.last - 1].offset + panels_[task.last - 1].vectors * LANES -
                          first_lane;
    const int64_t outputs = task.end - task.begin;
    const int64_t strips = (outputs + STRIP - 1) / STRIP;
    float* b = scratch(rows * PANEL + strips * STRIP * lanes + STRIP * PANEL);
    float* a = b + rows * PANEL;
    float* tile = a + strips * STRIP * lanes;
    const T* b_rows = task.is_out ? static_cast<const T*>(call_.inner) + first_row * F_
                                  : static_cast<const T*>(call_.x) + first_row * D_;
    // a: [strip][row][STRIP] of dy for the second weight; panels [output][lane] of dhidden for the
    // first, which lie ready in memory if they are floats.
    const float* a_panels[2] = {nullptr, nullptr};
    if (task.is_out) {
      pack_strips(static_cast<const T*>(call_.dy) + first_row * D_ + task.begin, D_, int(outputs),
                  rows, a);
    } else {
      const T* dhidden = static_cast<const T*>(call_.dhidden);
      a_panels[0] = a;
      if constexpr (sizeof(T) == 4) {
        a_panels[0] = reinterpret_cast<const float*>(dhidden);
      } else {
        for (int64_t p = task.first; p < task.last; p++) {
          const int64_t wide = panels_[p].vectors * LANES;
          convert(dhidden + panels_[p].offset * G_ + task.begin * wide, outputs * wide,
                  a + (panels_[p].offset - first_lane) * outputs);
        }
      }
    }
    for (int64_t k = 0; k < inputs; k += PANEL) {
      const int width = int(std::min<int64_t>(PANEL, inputs - k));
      const int vectors = (width + LANES - 1) / LANES;
      const int64_t stride = vectors * LANES;
      pack_columns(b_rows + k, inputs, width, stride, rows, b);
      for (int64_t n = 0; n < outputs; n += STRIP) {
        const int strip = int(std::min<int64_t>(STRIP, outputs - n));
        if (task.is_out) {
          multiply_strip(vectors, strip, rows, Packed{a + n * rows}, b, stride, tile, false);
        } else {
          for (int64_t p = task.first; p < task.last; p++) {
            const Panel& panel = panels_[p];
            const int64_t wide = panel.vectors * LANES;
            const float* at = sizeof(T) == 4
                                  ? a_panels[0] + panel.offset * G_ + (task.begin + n) * wide
                                  : a_panels[0] + (panel.offset - first_lane) * outputs + n * wide;
            multiply_strip(vectors, strip, panel.lanes, Rows{at, wide},
                           b + (panel.row - first_row) * stride, stride, tile, p > task.first);
          }
        }
        write_tile(tile, strip, width, dw + n * inputs + k, inputs, call_.accumulate);
      }
    }
  });
}

}  // namespace gatewise
