// Gated recurrent unit (Cho et al. 2014), the reset gate applied after the hidden product, as torch.nn.GRU, and before
// it, as in the paper.
#pragma once

#include "activation.hpp"

namespace gatewise::GATEWISE_KERNEL {

struct Gru {
  using Standard = StandardFunctions;
  static constexpr bool trains = true;          // it has a backward
  static constexpr bool resets_before = false;  // r * h goes into the last gate's product
  static constexpr int gates = 3;               // r z n
  static constexpr int sums = 4;                // n's input sum, r, z, n's hidden sum: r gates only the last
  static constexpr int kept = 4;                // n r z, n's hidden sum
  static constexpr bool carried = true;
  static constexpr bool carries_hidden = true;
  static constexpr int first_input_sum = 0, first_hidden_sum = 1;
  static constexpr int input_gate(int slot) { return (slot + 2) % 3; }  // n r z
  static constexpr int hidden_gate(int slot) { return slot; }           // r z n

  template <class V, class Functions>
  GATEWISE_INLINE static void forward(const Functions& f, const V (&sum)[sums], V (&kept)[Gru::kept]) {
    const V r = f.gate(sum[1]), z = f.gate(sum[2]), n = f.candidate(fused(r, sum[3], sum[0]));
    kept[0] = n;
    kept[1] = r;
    kept[2] = z;
    kept[3] = sum[3];
  }

  template <class V>
  GATEWISE_INLINE static V after(const V (&kept)[Gru::kept], V before) {
    return fused(kept[2], before - kept[0], kept[0]);
  }

  template <class V, class Functions>
  GATEWISE_INLINE static V hidden(const Functions&, const V (&)[Gru::kept], V after) {
    return after;
  }

  template <class V>
  GATEWISE_INLINE static void backward(const V (&kept)[Gru::kept], V before, V, V grad_hidden, V, V (&grad_sum)[sums],
                                       V& grad_before) {
    const V one = V::broadcast(1);
    const V n = kept[0], r = kept[1], z = kept[2];
    const V grad_n = grad_hidden * (one - z) * (one - n * n);
    grad_sum[0] = grad_n;
    grad_sum[1] = grad_n * kept[3] * r * (one - r);
    grad_sum[2] = grad_hidden * (before - n) * z * (one - z);
    grad_sum[3] = grad_n * r;
    grad_before = grad_hidden * z;
  }
};

// Inference only. The hidden product of n is with r * h, and so has to wait for r of all units.
struct GruResetBefore {
  using Standard = StandardFunctions;
  static constexpr bool trains = false;
  static constexpr bool resets_before = true;
  static constexpr int gates = 3;  // r z n
  static constexpr int sums = 3;
  static constexpr int kept = 2;  // n z
  static constexpr bool carried = true;
  static constexpr bool carries_hidden = true;
  static constexpr int first_input_sum = 0, first_hidden_sum = 0;
  static constexpr int input_gate(int slot) { return slot; }
  static constexpr int hidden_gate(int slot) { return slot; }

  // r * h, from r's sum.
  template <class V, class Functions>
  GATEWISE_INLINE static V reset(const Functions& f, V sum, V before) {
    return f.gate(sum) * before;
  }

  template <class V, class Functions>
  GATEWISE_INLINE static void forward(const Functions& f, const V (&sum)[sums], V (&kept)[GruResetBefore::kept]) {
    kept[0] = f.candidate(sum[2]);
    kept[1] = f.gate(sum[1]);
  }

  template <class V>
  GATEWISE_INLINE static V after(const V (&kept)[GruResetBefore::kept], V before) {
    return fused(kept[1], before - kept[0], kept[0]);
  }

  template <class V, class Functions>
  GATEWISE_INLINE static V hidden(const Functions&, const V (&)[GruResetBefore::kept], V after) {
    return after;
  }
};

}  // namespace gatewise::GATEWISE_KERNEL
