// The grouped feed-forward network and its gradients; rows are sorted by expert.
//
// Rows of one expert are cut into panels of at most PANEL rows. A panel's numbers lie transposed,
// [feature][lane], while they are the vector side of a product, and the weight is the broadcast
// side (gemm.h). `hidden` and `dhidden` keep that layout in memory: panel p starts at
// `offset[p] * G`, so a row index needs no padding but the buffers need LANES - 1 more rows for
// each expert that has any.
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

struct Panel {
  int64_t expert, row, offset;
  int lanes, vectors;
};

struct Group {  // panels first ... last - 1 of one expert share each strip of weights
  int64_t first, last;
};

constexpr int GROUP_PANELS = 128 / PANEL;  // rows per pass over the weights
constexpr int BAND = 4 * STRIP;            // weight columns packed at a time
constexpr int64_t DEPTH = 512;             // of a product whose depth is cut

inline std::vector<Panel> cut_panels(const FfnCall& call) {
  std::vector<Panel> panels;
  int64_t row = 0, offset = 0;
  for (int64_t e = 0; e < call.experts; e++) {
    int64_t rows = call.end[e] - row;
    int64_t units = (rows + LANES - 1) / LANES;
    int64_t parts = (units + MAX_VECTORS - 1) / MAX_VECTORS;
    for (int64_t p = 0; p < parts; p++) {
      int vectors = int(units / parts + (p < units % parts));
      int lanes = int(std::min<int64_t>(vectors * LANES, call.end[e] - row));
      panels.push_back({e, row, offset, lanes, vectors});
      row += lanes;
      offset += vectors * LANES;
    }
  }
  return panels;
}

inline std::vector<Group> cut_groups(const std::vector<Panel>& panels) {
  std::vector<Group> groups;
  for (int64_t p = 0; p < int64_t(panels.size()); p++) {
    if (!groups.empty() && panels[groups.back().first].expert == panels[p].expert &&
        p - groups.back().first < GROUP_PANELS)
      groups.back().last = p + 1;
    else
      groups.push_back({p, p + 1});
  }
  return groups;
}

// Rows of a weight as floats: where they lie, or converted into `buffer`.
inline Rows weight_rows(const float* weight, int64_t depth, int, float*) { return {weight, depth}; }
inline Rows weight_rows(const bf16* weight, int64_t depth, int rows, float* buffer) {
  convert(weight, rows * depth, buffer);
  return {buffer, depth};
}

// A stretch of numbers as floats: where it lies, or converted into `buffer`.
inline const float* as_floats(const float* x, int64_t, float*) { return x; }
inline const float* as_floats(const bf16* x, int64_t count, float* buffer) {
  convert(x, count, buffer);
  return buffer;
}

template <class T, int ACTIVATION>
class Ffn {
 public:
  explicit Ffn(const FfnCall& call)
      : call_(call),
        D_(call.width),
        F_(call.expert_width),
        G_(ACTIVATION == SWIGLU ? 2 * F_ : F_),
        panels_(cut_panels(call)) {}

  void forward() const {
    auto groups = cut_groups(panels_);
    run_tasks(int64_t(groups.size()), call_.threads, [&](int64_t g) { forward(groups[g]); });
  }

  void backward_data() const {
    auto groups = cut_groups(panels_);
    run_tasks(int64_t(groups.size()), call_.threads, [&](int64_t g) { backward(groups[g]); });
  }

  template <class W>
  void backward_weights() const;

 private:
  static constexpr bool GATED = ACTIVATION == SWIGLU;

  void forward(Group group) const {
    const int64_t wide = std::max(D_, F_);
    float* x_panels = scratch(GROUP_PANELS * PANEL * (D_ + F_) + 2 * STRIP * (PANEL + wide));
    float* inner = x_panels + GROUP_PANELS * PANEL * D_;
    float* gate = inner + GROUP_PANELS * PANEL * F_;
    float* up = gate + STRIP * PANEL;
    float* strip = up + STRIP * PANEL;
    const int64_t expert = panels_[group.first].expert;
    const T* w_in = static_cast<const T*>(call_.w_in) + expert * G_ * D_;
    const T* w_out = static_cast<const T*>(call_.w_out) + expert * D_ * F_;

    for (int64_t p = group.first; p < group.last; p++)
      pack_transposed(static_cast<const T*>(call_.x) + panels_[p].row * D_, D_, panels_[p].lanes,
                      D_, x_panels + (p - group.first) * PANEL * D_, PANEL);
    for (int64_t f = 0; f < F_; f += STRIP) {
      const int rows = int(std::min<int64_t>(STRIP, F_ - f));
      Rows a_gate = weight_rows(w_in + f * D_, D_, rows, strip);
      Rows a_up = GATED ? weight_rows(w_in + (F_ + f) * D_, D_, rows, strip + STRIP * D_) : a_gate;
      for (int64_t p = group.first; p < group.last; p++) {
        const Panel& panel = panels_[p];
        const float* b = x_panels + (p - group.first) * PANEL * D_;
        multiply_strip(panel.vectors, rows, D_, a_gate, b, PANEL, gate, false);
        if (GATED) multiply_strip(panel.vectors, rows, D_, a_up, b, PANEL, up, false);
        activate_strip(panel, f, rows, gate, up, inner + ((p - group.first) * F_ + f) * PANEL);
      }
    }
    float* y_panels = x_panels;
    for (int64_t d = 0; d < D_; d += STRIP) {
      const int rows = int(std::min<int64_t>(STRIP, D_ - d));
      Rows a = weight_rows(w_out + d * F_, F_, rows, strip);
      for (int64_t p = group.first; p < group.last; p++)
        multiply_strip(panels_[p].vectors, rows, F_, a, inner + (p - group.first) * PANEL * F_,
                       PANEL, y_panels + ((p - group.first) * D_ + d) * PANEL, false);
    }
    for (int64_t p = group.first; p < group.last; p++)
      unpack_transposed(y_panels + (p - group.first) * PANEL * D_, PANEL, panels_[p].lanes, D_,
                        static_cast<T*>(call_.y) + panels_[p].row * D_, D_);
  }

  // Save the first product and write the activations.
  void activate_strip(const Panel& panel, int64_t f, int rows, const float* gate, const float* up,
                      float* inner) const {
    const int64_t lanes = panel.vectors * LANES;
    T* hidden = static_cast<T*>(call_.hidden) + panel.offset * G_ + f * lanes;
    for (int i = 0; i < rows; i++)
      for (int64_t l = 0; l < lanes; l += LANES) {
        vec x = load(gate + i * PANEL + l);
        store(hidden + i * lanes + l, x);
        if constexpr (GATED) {
          vec u = load(up + i * PANEL + l);
          store(hidden + (F_ + i) * lanes + l, u);
          store(inner + i * PANEL + l, swiglu(x, u));
        } else {
          store(inner + i * PANEL + l, activate<ACTIVATION>(x));
        }
      }
  }

  void backward(Group group) const {
    const int64_t depth = std::max(D_, DEPTH);
    float* dy_panels = scratch(GROUP_PANELS * PANEL * (2 * D_ + DEPTH) + BAND * depth +
                               (STRIP + BAND) * PANEL);
    float* dx_panels = dy_panels + GROUP_PANELS * PANEL * D_;
    float* dhidden_panels = dx_panels + GROUP_PANELS * PANEL * D_;
    float* band = dhidden_panels + GROUP_PANELS * PANEL * DEPTH;
    float* dinner = band + BAND * depth;
    float* inner = dinner + STRIP * PANEL;
    const int64_t expert = panels_[group.first].expert;
    const T* w_in = static_cast<const T*>(call_.w_in) + expert * G_ * D_;
    const T* w_out = static_cast<const T*>(call_.w_out) + expert * D_ * F_;

    for (int64_t p = group.first; p < group.last; p++)
      pack_transposed(static_cast<const T*>(call_.dy) + panels_[p].row * D_, D_, panels_[p].lanes,
                      D_, dy_panels + (p - group.first) * PANEL * D_, PANEL);
    for (int64_t f = 0; f < F_; f += BAND) {
      const int width = int(std::min<int64_t>(BAND, F_ - f));
      pack_strips(w_out + f, F_, width, D_, band);
      for (int64_t p = group.first; p < group.last; p++) {
        const Panel& panel = panels_[p];
        for (int i = 0; i < width; i += STRIP) {
          const int rows = std::min(STRIP, width - i);
          multiply_strip(panel.vectors, rows, D_, Packed{band + i * D_},
                         dy_panels + (p - group.first) * PANEL * D_, PANEL, dinner, false);
          activate_backward_strip(panel, f + i, rows, dinner, inner + i * PANEL);
        }
        unpack_transposed(inner, PANEL, panel.lanes, width,
                          static_cast<T*>(call_.inner) + panel.row * F_ + f, F_);
      }
    }
    if (!call_.dx) return;
    for (int64_t g = 0; g < G_; g += DEPTH) {
      const int64_t part = std::min(DEPTH, G_ - g);
      const float* b[GROUP_PANELS];
      for (int64_t p = group.first; p < group.last; p++) {
        const int64_t lanes = panels_[p].vectors * LANES;
        b[p - group.first] = as_floats(
            static_cast<const T*>(call_.dhidden) + panels_[p].offset * G_ + g * lanes, part * lanes,
            dhidden_panels + (p - group.first) * PANEL * DEPTH);
      }
      for (int64_t d = 0; d < D_; d += BAND) {
        const int width = int(std::min<int64_t>(BAND, D_ - d));
        pack_strips(w_in + g * D_ + d, D_, width, part, band);
        for (int i = 0; i < width; i += STRIP)
          for (int64_t p = group.first; p < group.last; p++)
            multiply_strip(panels_[p].vectors, std::min(STRIP, width - i), part,
                           Packed{band + i * part}, b[p - group.first], panels_[p].vectors * LANES,
                           dx_panels + ((p - group.first) * D_ + d + i) * PANEL, g > 0);
      }
    }
    for (int64_t p = group.first; p < group.last; p++)
      unpack_transposed(dx_panels + (p - group.first) * PANEL * D_, PANEL, panels_[p].lanes, D_,
                        static_cast<T*>(call_.dx) + panels_[p].row * D_, D_);
  }

  // Recompute the activations, and write the gradient of the first product.
  void activate_backward_strip(const Panel& panel, int64_t f, int rows, const float* dinner,
                               float* inner) const {
    const int64_t lanes = panel.vectors * LANES;
    const T* hidden = static_cast<const T*>(call_.hidden) + panel.offset * G_ + f * lanes;
    T* dhidden = static_cast<T*>(call_.dhidden) + panel.offset * G_ + f * lanes;
    for (int i = 0; i < rows; i++)
      for (int64_t l = 0; l < lanes; l += LANES) {
        vec d = load(dinner + i * PANEL + l);
        vec dx, a;
        if constexpr (GATED) {
          vec dup;
          a = swiglu_backward(d, load(hidden + i * lanes + l), load(hidden + (F_ + i) * lanes + l),
                              &dx, &dup);
          store(dhidden + (F_ + i) * lanes + l, dup);
        } else {
          a = activate_backward<ACTIVATION>(d, load(hidden + i * lanes + l), &dx);
        }
        store(dhidden + i * lanes + l, dx);
        store(inner + i * PANEL + l, a);
      }
  }

  const FfnCall& call_;
  const int64_t D_, F_, G_;
  const std::vector<Panel> panels_;
};

}  // namespace gatewise
