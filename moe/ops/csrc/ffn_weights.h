// Gradients of the two weights: dw[n][k] = sum over the expert's rows of a[row][n] * b[row][k].
//
// The activation does not matter here: the first weight has a = dhidden and b = x, the second
// a = dy and b = inner.
#pragma once

#include "ffn.h"

namespace gatewise {

struct WeightTask {
  int64_t expert, first, last;  // blocks of the expert
  bool is_out;                  // the second weight
  int64_t begin, end;           // rows of the gradient, whole bands
};

constexpr int64_t BAND_STRIPS = (BAND + STRIP - 1) / STRIP;

inline int64_t rows_of(const std::vector<Block>& blocks, int64_t first, int64_t last) {
  return first < last ? blocks[last - 1].row + blocks[last - 1].rows - blocks[first].row : 0;
}

inline std::vector<WeightTask> cut_weights(const FfnCall& call, const std::vector<Block>& blocks,
                                           bool gated) {
  std::vector<WeightTask> tasks;
  for (int64_t e = 0, first = 0; e < call.experts; e++) {
    int64_t last = first;
    while (last < int64_t(blocks.size()) && blocks[last].expert == e) last++;
    // The broadcast side of a task should stay in the second-level cache.
    const int64_t rows = std::max<int64_t>(rows_of(blocks, first, last), 1);
    const int64_t step = std::max<int64_t>(65536 / rows / BAND, 1) * BAND;
    auto add = [&](bool is_out, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n += step)
        tasks.push_back({e, first, last, is_out, n, std::min(n + step, end)});
    };
    add(false, 0, call.expert_width);
    if (gated) add(false, call.expert_width, 2 * call.expert_width);  // bands start anew
    add(true, 0, call.width);
    first = last;
  }
  return tasks;
}

template <class W>
void write_tile(const float* tile, int64_t rows, int64_t width, W* to, int64_t stride, Store mode) {
  for (int64_t i = 0; i < rows; i++) {
    W* row = to + i * stride;
    const float* from = tile + i * PANEL;
    int64_t j = 0;
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
class WeightGradients {
 public:
  WeightGradients(const FfnCall& call, bool gated)
      : call_(call),
        gated_(gated),
        G_((gated ? 2 : 1) * call.expert_width),
        blocks_(cut_blocks(call)) {
    static std::atomic<int64_t> calls{0};
    serial_ = ++calls;
    const int64_t bytes = call.experts * G_ * call.width * int64_t(sizeof(W));
    const bool aligned = call.width % 32 == 0 && call.expert_width % 32 == 0 &&
                         (reinterpret_cast<uintptr_t>(call.dw_in) |
                          reinterpret_cast<uintptr_t>(call.dw_out)) % LINE == 0;
    mode_ = call.accumulate                    ? Store::accumulate
            : aligned && bytes > STREAM_BYTES ? Store::stream
                                               : Store::overwrite;
  }

  void run() const {
    const auto tasks = cut_weights(call_, blocks_, gated_);
    run_tasks(int64_t(tasks.size()), call_.threads, [&](int64_t i) { run(tasks[i]); });
  }

 private:
  void run(const WeightTask& task) const {
    const int64_t inputs = task.is_out ? call_.expert_width : call_.width;
    const int64_t all_outputs = task.is_out ? call_.width : G_;
    const int64_t outputs = task.end - task.begin;
    W* dw = static_cast<W*>(task.is_out ? call_.dw_out : call_.dw_in) +
            (task.expert * all_outputs + task.begin) * inputs;
    const int64_t rows = rows_of(blocks_, task.first, task.last);
    if (rows == 0) {
      if (mode_ != Store::accumulate) std::fill(dw, dw + outputs * inputs, W{});
      return;
    }
    const int64_t bands = (outputs + BAND - 1) / BAND;
    float* a = scratch(bands * BAND_STRIPS * STRIP * rows + STRIP * PANEL);
    float* tile = a + bands * BAND_STRIPS * STRIP * rows;
    pack_outputs(task, rows, a);
    const float* b = packed_inputs(task, rows, inputs);
    for (int64_t k = 0; k < inputs; k += PANEL) {
      const int64_t width = std::min<int64_t>(PANEL, inputs - k);
      const int vectors = int((width + LANES - 1) / LANES);
      for (int64_t n = 0; n < outputs; n += BAND)
        for (int64_t i = 0; i < std::min(BAND, outputs - n); i += STRIP) {
          const int64_t some = std::min<int64_t>(STRIP, std::min(BAND, outputs - n) - i);
          const Packed side{a + (n / BAND * BAND_STRIPS * STRIP + i) * rows};
          W* to = dw + (n + i) * inputs + k;
          if constexpr (sizeof(W) == 4) {
            if (width == vectors * LANES) {  // straight from the registers
              multiply_rows(vectors, some, rows, side, b + k * rows, Fetch{}, to, inputs, mode_);
              continue;
            }
          }
          multiply_rows(vectors, some, rows, side, b + k * rows, Fetch{}, tile, PANEL,
                        Store::overwrite);
          write_tile(tile, some, width, to, inputs, mode_);
        }
    }
    if (mode_ == Store::stream) fence();
  }

  // out[band][strip][row][STRIP]
  void pack_outputs(const WeightTask& task, int64_t rows, float* out) const {
    const int64_t columns = task.is_out ? call_.width : G_;
    for (int64_t n = task.begin; n < task.end; n += BAND) {
      const int64_t width = std::min(BAND, task.end - n);
      for (int64_t block = task.first, row = 0; block < task.last; block++) {
        const Block& own = blocks_[block];
        if (task.is_out)
          pack_strips(static_cast<const T*>(call_.dy) + own.row * columns + n, columns, width,
                      own.rows, out + row * STRIP, rows * STRIP);
        else
          pack_strips(band_of(static_cast<const T*>(call_.dhidden), columns, own, n), width, width,
                      own.rows, out + row * STRIP, rows * STRIP);
        row += own.rows;
      }
      out += BAND_STRIPS * STRIP * rows;
    }
  }

  // [panel of columns][row][lane] of all rows of the expert; tasks of one expert follow each other,
  // so a thread mostly finds what it packed for the task before.
  const float* packed_inputs(const WeightTask& task, int64_t rows, int64_t inputs) const {
    struct Key {
      int64_t serial = 0, expert = 0;
      bool is_out = false;
    };
    static thread_local Key held;
    float* out = scratch<1>(rows * (inputs + LANES));
    if (held.serial == serial_ && held.expert == task.expert && held.is_out == task.is_out)
      return out;
    held = {serial_, task.expert, task.is_out};
    for (int64_t block = task.first, row = 0; block < task.last; block++) {
      const Block& own = blocks_[block];
      if (task.is_out) {
        for (int64_t f = 0; f < inputs; f += BAND) {
          const int64_t band = std::min(BAND, inputs - f);
          const T* x = band_of(static_cast<const T*>(call_.inner), inputs, own, f);
          for (int64_t i = 0; i < own.rows; i++)
            pack_row(x + i * band, band, row + i, rows, out + f * rows);
        }
      } else {
        for (int64_t i = 0; i < own.rows; i++)
          pack_row(static_cast<const T*>(call_.x) + (own.row + i) * inputs, inputs, row + i, rows,
                   out);
      }
      row += own.rows;
    }
    return out;
  }

  static void pack_row(const T* x, int64_t width, int64_t row, int64_t rows, float* out) {
    for (int64_t k = 0; k < width; k += PANEL) {
      const int64_t part = std::min<int64_t>(PANEL, width - k);
      const int64_t wide = (part + LANES - 1) / LANES * LANES;
      pack_columns(x + k, 0, part, 1, out + k * rows + row * wide);
    }
  }

  const FfnCall& call_;
  const bool gated_;
  const int64_t G_;
  const std::vector<Block> blocks_;
  int64_t serial_;
  Store mode_;
};

}  // namespace gatewise
