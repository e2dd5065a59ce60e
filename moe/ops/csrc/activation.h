// The experts' non-linearities and their derivatives, on vectors.
#pragma once

#include "simd.h"

namespace gatewise {

enum Activation : int64_t { SWIGLU = 0, GELU = 1, RELU = 2 };

// The normal distribution function and its density. The tail beyond |x| is density * Mills ratio,
// and that ratio is a polynomial in t = 1 / (1 + |x| / 4), fitted by us to 2e-8 relative.
inline vec normal(vec x, vec* density) {
  vec a = pick(x < vec{}, -x, x);
  a = pick(a > broadcast(13.0f), broadcast(13.0f), a);
  vec d = exponential(-0.5f * a * a) * 0.398942280f;
  vec t = reciprocal(1.0f + 0.25f * a);
  const float c[10] = {0.25003704f, 0.249278816f, 0.240302216f, 0.176578579f,  0.22796371f,
                       0.012697627f, 0.093423192f, 0.113458351f, -0.150806902f, 0.040381518f};
  vec ratio = broadcast(c[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; i--) ratio = ratio * t + c[i];
  vec tail = d * ratio * t;
  *density = d;
  return pick(x < vec{}, tail, 1.0f - tail);
}

inline vec swiglu(vec gate, vec up) { return gate * sigmoid(gate) * up; }

inline vec swiglu_backward(vec d, vec gate, vec up, vec* dgate, vec* dup) {
  vec s = sigmoid(gate);
  vec silu = gate * s;
  *dup = d * silu;
  *dgate = d * up * (s + silu * (1.0f - s));
  return silu * up;
}

template <int ACTIVATION>
inline vec activate(vec x) {
  if constexpr (ACTIVATION == GELU) {
    vec density;
    return x * normal(x, &density);
  }
  return pick(x <= vec{}, vec{}, x);
}

template <int ACTIVATION>
inline vec activate_backward(vec d, vec x, vec* dx) {
  if constexpr (ACTIVATION == GELU) {
    vec density;
    vec cumulative = normal(x, &density);
    *dx = d * (cumulative + x * density);
    return x * cumulative;
  }
  *dx = pick(x <= vec{}, vec{}, d);
  return pick(x <= vec{}, vec{}, x);
}

}  // namespace gatewise
