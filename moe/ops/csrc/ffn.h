// The grouped feed-forward network: forward pass, and the gradient of its rows.
//
// The caller's matrices lie in memory row by row. What only the kernels see (`hidden`, the first
// product, `dhidden`, its gradient, and `inner`, the activations) is cut: the rows into blocks, a
// block's columns into bands, and a band's numbers lie together (`band_of`). So every pass walks
// through memory instead of leaping from row to row, which no cache and no prefetcher likes.
//
// Forward, the weights are the broadcast side of the products (gemm.h): they are contiguous along
// the sum, so they are read where they lie, once per block of rows, and only the few rows are
// transposed. Backward they are the vector side, copied one band of columns at a time.
//
// Letters:  R rows   E experts   D model width   F expert width   G = 2F with a gate, else F
#pragma once

#include <algorithm>
#include <vector>

#include "activation.h"
#include "gemm.h"
#include "parallel.h"

namespace gatewise {

struct FfnCall {
  int64_t experts, width, expert_width, activation, is_bf16, threads;
  int64_t dw_is_bf16, accumulate;
  const int32_t* end;
  const void *x, *w_in, *w_out, *dy;
  void *hidden, *y, *dx, *dhidden, *inner, *dw_in, *dw_out;
};

constexpr int64_t BLOCK = 128;                     // rows per pass over an expert's weights
constexpr int64_t BAND = PANEL > 64 ? PANEL : 64;  // columns that are worked on together
constexpr int64_t LINE = 64;                       // bytes of a cache line
// Results larger than this would only push everything else out of the caches.
constexpr int64_t STREAM_BYTES = int64_t(4) << 20;

struct Block {  // some rows of one expert
  int64_t expert, row, rows;
};

// Where a block's band that starts at column `first` lies in a matrix of `columns`.
template <class T>
T* band_of(T* matrix, int64_t columns, const Block& block, int64_t first) {
  return matrix + block.row * columns + first * block.rows;
}

// Cut every expert's rows into blocks of nearly equal size, whole vectors where possible.
inline std::vector<Block> cut_blocks(const FfnCall& call) {
  std::vector<Block> blocks;
  int64_t row = 0;
  for (int64_t e = 0; e < call.experts; e++) {
    const int64_t units = (call.end[e] - row + LANES - 1) / LANES;
    const int64_t parts = (units * LANES + BLOCK - 1) / BLOCK;
    for (int64_t p = 0; p < parts; p++) {
      const int64_t part = (units / parts + (p < units % parts)) * LANES;
      const int64_t rows = std::min<int64_t>(part, call.end[e] - row);
      blocks.push_back({e, row, rows});
      row += rows;
    }
  }
  return blocks;
}

template <class T, int ACTIVATION>
class Ffn {
 public:
  explicit Ffn(const FfnCall& call)
      : call_(call),
        D_(call.width),
        F_(call.expert_width),
        G_(ACTIVATION == SWIGLU ? 2 * F_ : F_),
        streams_(call.end[call.experts - 1] * F_ * int64_t(sizeof(T)) > STREAM_BYTES &&
                 F_ % (LINE / sizeof(T)) == 0 &&
                 (reinterpret_cast<uintptr_t>(call.inner) |
                  reinterpret_cast<uintptr_t>(call.dhidden)) % LINE == 0) {}

  void forward() const {
    const auto blocks = cut_blocks(call_);
    run_tasks(int64_t(blocks.size()), call_.threads, [&](int64_t i) { forward(blocks[i]); });
  }

  void backward_data() const {
    const auto blocks = cut_blocks(call_);
    run_tasks(int64_t(blocks.size()), call_.threads, [&](int64_t i) { backward(blocks[i]); });
  }

 private:
  static constexpr bool GATED = ACTIVATION == SWIGLU;
  static constexpr int HALVES = GATED ? 2 : 1;
  static constexpr int PANELS = int((BLOCK + PANEL - 1) / PANEL);

  struct Panel {  // rows of a block that are the vectors of one product
    int64_t row;
    int lanes, vectors;
  };

  static int cut_panels(const Block& block, Panel* panels) {
    const int64_t units = (block.rows + LANES - 1) / LANES;
    const int count = int((units + MAX_VECTORS - 1) / MAX_VECTORS);
    int64_t row = 0;
    for (int p = 0; p < count; p++) {
      const int vectors = int(units / count + (p < units % count));
      const int lanes = int(std::min<int64_t>(vectors * LANES, block.rows - row));
      panels[p] = {row, lanes, vectors};
      row += lanes;
    }
    return count;
  }

  void forward(const Block& block) const {
    const int64_t wide = padded(std::max(D_, F_));
    float* x_panels = scratch(PANELS * PANEL * (D_ + F_ + 2 * BAND) + STRIP * wide);
    float* inner = x_panels + PANELS * PANEL * D_;
    float* hidden = inner + PANELS * PANEL * F_;
    float* strip = hidden + PANELS * PANEL * 2 * BAND;
    const T* w_in = static_cast<const T*>(call_.w_in) + block.expert * G_ * D_;
    const T* w_out = static_cast<const T*>(call_.w_out) + block.expert * D_ * F_;
    Panel panels[PANELS];
    const int count = cut_panels(block, panels);

    for (int p = 0; p < count; p++)
      pack_transposed(static_cast<const T*>(call_.x) + (block.row + panels[p].row) * D_, D_,
                      panels[p].lanes, D_, x_panels + p * PANEL * D_);
    for (int64_t f = 0; f < F_; f += BAND) {
      const int64_t band = std::min(BAND, F_ - f);
      for (int half = 0; half < HALVES; half++)
        weight_times_panels(w_in + (half * F_ + f) * D_, band, D_, x_panels, panels, count, strip,
                            hidden + half * BAND * PANEL, 2 * BAND);
      for (int p = 0; p < count; p++) {
        float* own = hidden + p * 2 * BAND * PANEL;
        const int64_t width = panels[p].vectors * LANES;
        for (int64_t at = 0; at < band * width; at += LANES)
          if constexpr (GATED)
            store(inner + p * F_ * PANEL + f * width + at,
                  swiglu(load(own + at), load(own + BAND * PANEL + at)));
          else
            store(inner + p * F_ * PANEL + f * width + at, activate<ACTIVATION>(load(own + at)));
        for (int half = 0; half < HALVES; half++)
          unpack_transposed(own + half * BAND * PANEL, width, panels[p].lanes, band,
                            band_of(static_cast<T*>(call_.hidden), G_, block, half * F_ + f) +
                                panels[p].row * band,
                            band);
      }
    }
    float* y_panels = x_panels;
    weight_times_panels(w_out, D_, F_, inner, panels, count, strip, y_panels, D_);
    for (int p = 0; p < count; p++)
      unpack_transposed(y_panels + p * PANEL * D_, panels[p].vectors * LANES, panels[p].lanes, D_,
                        static_cast<T*>(call_.y) + (block.row + panels[p].row) * D_, D_);
  }

  // c[panel][row of the weight][lane]; room for `stride` rows per panel.
  void weight_times_panels(const T* weight, int64_t rows, int64_t depth, const float* b,
                           const Panel* panels, int count, float* strip, float* c,
                           int64_t stride) const {
    for (int64_t i = 0; i < rows; i += STRIP) {
      const int64_t some = std::min<int64_t>(STRIP, rows - i);
      const Rows a = as_rows(weight + i * depth, depth, some, depth, strip);
      for (int p = 0; p < count; p++) {
        // The first panel fetches the next strip, half of it in each of two blocks of rows.
        const int64_t bytes = STRIP / 2 * int64_t(sizeof(T));
        const Fetch next{{weight + (i + STRIP) * depth, 2 * bytes, bytes * depth, p == 0 ? 2 : 0},
                         {}};
        const int64_t width = panels[p].vectors * LANES;
        multiply_rows(panels[p].vectors, some, depth, a, b + p * depth * PANEL, next,
                      c + p * stride * PANEL + i * width, width, Store::overwrite);
      }
    }
  }

  void backward(const Block& block) const {
    const int64_t stride = padded(D_);
    float* dy_buffer = scratch(BLOCK * (2 * stride + BAND + padded(2 * BAND)) + BAND * (D_ + 2 * BAND));
    float* dx = dy_buffer + BLOCK * stride;
    float* dinner = dx + BLOCK * stride;
    float* dhidden = dinner + BLOCK * BAND;
    float* band_out = dhidden + BLOCK * padded(2 * BAND);
    float* band_in = band_out + BAND * D_;
    const T* w_in = static_cast<const T*>(call_.w_in) + block.expert * G_ * D_;
    const T* w_out = static_cast<const T*>(call_.w_out) + block.expert * D_ * F_;
    const Rows dy = copy_rows(static_cast<const T*>(call_.dy) + block.row * D_, D_, block.rows, D_,
                              dy_buffer);

    for (int64_t f = 0; f < F_; f += BAND) {
      const int64_t band = std::min(BAND, F_ - f);
      // While the columns of the second weight are multiplied, fetch the up rows of the first;
      // the gate rows and the next columns are fetched while the rows of the first are.
      Fetch next;
      if (call_.dx) next.first = lines(w_in + ((HALVES - 1) * F_ + f) * D_, band * D_, D_ / 2);
      for (int64_t at = 0; at < band; at += PANEL) {
        const int width = int(std::min<int64_t>(PANEL, band - at));
        pack_columns(w_out + f + at, F_, width, D_, band_out);
        multiply_rows((width + LANES - 1) / LANES, block.rows, D_, dy, band_out, next, dinner + at,
                      BAND, Store::overwrite);
        next = Fetch{};
      }
      for (int64_t i = 0; i < block.rows; i++) {
        float* packed = dhidden + i * padded(HALVES * band);
        if (streams_)
          activate_backward_row<true>(block, i, f, band, dinner + i * BAND, packed);
        else
          activate_backward_row<false>(block, i, f, band, dinner + i * BAND, packed);
      }
      if (call_.dx)
        add_rows_gradient(block.rows, dhidden, w_in + f * D_, band, band_in, dx, stride,
                          f + BAND < F_ ? w_out + f + BAND : nullptr, f > 0);
    }
    if (streams_) fence();
    if (!call_.dx) return;
    T* to = static_cast<T*>(call_.dx) + block.row * D_;
    for (int64_t i = 0; i < block.rows; i++) copy_row(dx + i * stride, D_, to + i * D_);
  }

  // A stretch of `count` numbers, fetched `slots` lines per block of rows.
  static Stretch lines(const T* data, int64_t count, int64_t slots) {
    const int64_t total = count * int64_t(sizeof(T)) / LINE;
    return {data, LINE, LINE * slots, (total + slots - 1) / std::max<int64_t>(slots, 1)};
  }

  // dx (+)= the gradient of one band of the first product times the band's rows of the weight.
  void add_rows_gradient(int64_t rows, const float* dhidden, const T* w_in, int64_t band,
                         float* band_in, float* dx, int64_t stride, const T* fetch,
                         bool accumulate) const {
    const int64_t depth = HALVES * band;
    for (int64_t d = 0, part = 0; d < D_; d += PANEL, part++) {
      const int width = int(std::min<int64_t>(PANEL, D_ - d));
      const int64_t wide = (width + LANES - 1) / LANES * LANES;
      for (int half = 0; half < HALVES; half++)
        pack_columns(w_in + half * F_ * D_ + d, D_, width, band, band_in + half * band * wide);
      Fetch next;
      if (fetch) {
        const int64_t slots = depth / 2;  // per block of rows
        const int64_t parts = (D_ + PANEL - 1) / PANEL;
        if (part * slots < D_)
          next.first = {fetch + part * slots * F_, F_ * int64_t(sizeof(T)), LINE,
                        BAND * int64_t(sizeof(T)) / LINE};
        if (GATED) {
          const int64_t count = BAND * D_ / parts;  // this part's share of the next gate rows
          next.second = lines(w_in + BAND * D_ + part * count, count, slots);
        }
      }
      multiply_rows(int(wide / LANES), rows, depth, Rows{dhidden, padded(depth)}, band_in, next, dx + d,
                    stride, accumulate ? Store::accumulate : Store::overwrite);
    }
  }

  // Recompute the activations of one row of a band, and write the gradient of the first product:
  // to memory, and as floats to `packed`.
  template <bool STREAM>
  void activate_backward_row(const Block& block, int64_t i, int64_t f, int64_t band,
                             const float* dinner, float* packed) const {
    const T* hidden = band_of(static_cast<T*>(call_.hidden), G_, block, f) + i * band;
    T* dhidden = band_of(static_cast<T*>(call_.dhidden), G_, block, f) + i * band;
    T* inner = band_of(static_cast<T*>(call_.inner), F_, block, f) + i * band;
    const int64_t up = GATED ? F_ * block.rows : 0;  // from a gate's number to its up number
    auto one = [](vec d, vec x, vec up, vec* dx, vec* dup) {
      if constexpr (GATED)
        return swiglu_backward(d, x, up, dx, dup);
      else
        return activate_backward<ACTIVATION>(d, x, dx);
    };
    auto put = [](T* p, vec v) { STREAM ? stream(p, v) : store(p, v); };
    int64_t j = 0;
    vec dx, dup;
    for (; j + LANES <= band; j += LANES) {
      put(inner + j, one(load(dinner + j), load(hidden + j), load(hidden + up + j), &dx, &dup));
      put(dhidden + j, dx);
      store(packed + j, dx);
      if (GATED) put(dhidden + up + j, dup), store(packed + band + j, dup);
    }
    for (; j < band; j++) {
      vec a = one(broadcast(dinner[j]), broadcast(widen(hidden[j])),
                  broadcast(widen(hidden[up + j])), &dx, &dup);
      narrow(a[0], inner + j);
      narrow(dx[0], dhidden + j);
      packed[j] = dx[0];
      if (GATED) narrow(dup[0], dhidden + up + j), packed[band + j] = dup[0];
    }
  }

  static void copy_row(const float* x, int64_t width, T* out) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, load(x + i));
    for (; i < width; i++) narrow(x[i], out + i);
  }

  const FfnCall& call_;
  const int64_t D_, F_, G_;
  const bool streams_;  // large results go past the caches
};

}  // namespace gatewise
