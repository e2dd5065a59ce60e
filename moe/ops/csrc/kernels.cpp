// The C interface of the kernels: plain pointers, called through ctypes (native.py).
#include "ffn_weights.h"
#include "packed.h"
#include "permute.h"
#include "pointwise.h"

using namespace gatewise;

namespace {

// Call run(ffn) with the network of the call's activation and number type.
template <class T, class Run>
void with_activation(const FfnCall& call, Run run) {
  if (call.activation == SWIGLU) run(Ffn<T, SWIGLU>(call));
  if (call.activation == GELU) run(Ffn<T, GELU>(call));
  if (call.activation == RELU) run(Ffn<T, RELU>(call));
}

template <class Run>
void with_ffn(const FfnCall& call, Run run) {
  if (call.is_bf16)
    with_activation<bf16>(call, run);
  else
    with_activation<float>(call, run);
}

template <class T>
void activate_any(int64_t activation, const void* hidden, int64_t rows, int64_t width, void* inner,
                  int64_t threads) {
  auto* from = static_cast<const T*>(hidden);
  auto* to = static_cast<T*>(inner);
  if (activation == SWIGLU) activate_rows<SWIGLU>(from, rows, width, to, threads);
  if (activation == GELU) activate_rows<GELU>(from, rows, width, to, threads);
  if (activation == RELU) activate_rows<RELU>(from, rows, width, to, threads);
}

template <class T>
void activate_backward_any(int64_t activation, const void* dinner, const void* hidden, int64_t rows,
                           int64_t width, void* dhidden, void* inner, int64_t threads) {
  auto* d = static_cast<const T*>(dinner);
  auto* from = static_cast<const T*>(hidden);
  auto* to = static_cast<T*>(dhidden);
  auto* out = static_cast<T*>(inner);
  if (activation == SWIGLU) activate_rows_backward<SWIGLU>(d, from, rows, width, to, out, threads);
  if (activation == GELU) activate_rows_backward<GELU>(d, from, rows, width, to, out, threads);
  if (activation == RELU) activate_rows_backward<RELU>(d, from, rows, width, to, out, threads);
}

}  // namespace

extern "C" {

void gatewise_use_threads(ParallelRegion region) { parallel_region = region; }

void gatewise_ffn_forward(const FfnCall* call) {
  with_ffn(*call, [](const auto& ffn) { ffn.forward(); });
}

void gatewise_ffn_backward_data(const FfnCall* call) {
  with_ffn(*call, [](const auto& ffn) { ffn.backward_data(); });
}

void gatewise_ffn_backward_weights(const FfnCall* call) {
  const bool gated = call->activation == SWIGLU;
  if (!call->is_bf16)
    WeightGradients<float, float>(*call, gated).run();
  else if (call->dw_is_bf16)
    WeightGradients<bf16, bf16>(*call, gated).run();
  else
    WeightGradients<bf16, float>(*call, gated).run();
}

void gatewise_activate(int64_t is_bf16, int64_t activation, const void* hidden, int64_t rows,
                       int64_t width, void* inner, int64_t threads) {
  (is_bf16 ? activate_any<bf16> : activate_any<float>)(activation, hidden, rows, width, inner,
                                                       threads);
}

void gatewise_activate_backward(int64_t is_bf16, int64_t activation, const void* dinner,
                                const void* hidden, int64_t rows, int64_t width, void* dhidden,
                                void* inner, int64_t threads) {
  (is_bf16 ? activate_backward_any<bf16> : activate_backward_any<float>)(
      activation, dinner, hidden, rows, width, dhidden, inner, threads);
}

int gatewise_sort_pairs(const int64_t* expert, int64_t pairs, int64_t top_k, int64_t experts,
                        int64_t* order, int64_t* token, int64_t* inverse, int64_t* count) {
  return sort_pairs(expert, pairs, top_k, experts, order, token, inverse, count) ? 0 : 1;
}

void gatewise_gather_rows(const char* x, const int64_t* token, int64_t rows, int64_t row_bytes,
                          char* out, int64_t threads) {
  gather_rows(x, token, rows, row_bytes, out, threads);
}

void gatewise_sum_rows(int64_t is_bf16, const void* y, const int64_t* inverse, const float* weight,
                       int64_t tokens, int64_t top_k, int64_t width, void* out, int64_t threads) {
  if (is_bf16)
    sum_rows(static_cast<const bf16*>(y), inverse, weight, tokens, top_k, width,
             static_cast<bf16*>(out), threads);
  else
    sum_rows(static_cast<const float*>(y), inverse, weight, tokens, top_k, width,
             static_cast<float*>(out), threads);
}

void gatewise_combine_backward(int64_t is_bf16, const void* dy, const void* y,
                               const int64_t* inverse, const float* weight, int64_t tokens,
                               int64_t top_k, int64_t width, void* dy_rows, float* dweight,
                               int64_t threads) {
  if (is_bf16)
    combine_backward(static_cast<const bf16*>(dy), static_cast<const bf16*>(y), inverse, weight,
                     tokens, top_k, width, static_cast<bf16*>(dy_rows), dweight, threads);
  else
    combine_backward(static_cast<const float*>(dy), static_cast<const float*>(y), inverse, weight,
                     tokens, top_k, width, static_cast<float*>(dy_rows), dweight, threads);
}

// Bits of the instruction sets that products with packed weights exist for, here and now.
int64_t gatewise_packed_sets() {
  int64_t sets = 0;
#if defined(GATEWISE_PACKED)
  sets |= PACKED_AVX2;
#endif
#if defined(GATEWISE_PACKED_VNNI)
  sets |= PACKED_VNNI;
#endif
  return sets;
}

#if defined(GATEWISE_PACKED)
void gatewise_packed_linear(const PackedMatrix* matrix, const float* x, int64_t rows, float* y,
                            int64_t threads, int64_t set) {
  packed_linear(*matrix, x, rows, y, threads, set);
}

void gatewise_packed_ffn(const PackedFfnCall* call) { packed_ffn(*call); }

void gatewise_packed_unpack(const PackedMatrix* matrix, int64_t is_bf16, void* values,
                            int64_t threads) {
  if (is_bf16)
    unpack(*matrix, static_cast<bf16*>(values), threads);
  else
    unpack(*matrix, static_cast<float*>(values), threads);
}
#endif

}  // extern "C"
