// Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), as torch.nn.LSTM.
//
// A cell is its numbers, the order of its gates in a panel, and functions of one element V; CONTRIBUTING.md says what
// each means. No loops, no memory.
#pragma once

#include "activation.hpp"

namespace gatewise::GATEWISE_KERNEL {

struct Lstm {
  using Standard = StandardFunctions;            // those of the equations; a formula has others, for inference only
  static constexpr bool trains = true;           // it has a backward
  static constexpr bool resets_before = false;   // r * h goes into the last gate's product
  static constexpr int gates = 4;                // i f g o
  static constexpr int sums = 4;                 // their sums before the activation, input and hidden products together
  static constexpr int kept = 4;                 // i f g o after it
  static constexpr bool carried = true;          // a state other than the h of products goes from step to step
  static constexpr bool carries_hidden = false;  // h itself goes from step to step
  static constexpr int first_input_sum = 0, first_hidden_sum = 0;
  static constexpr int input_gate(int slot) { return slot; }
  static constexpr int hidden_gate(int slot) { return slot; }

  template <class V, class Functions>
  GATEWISE_INLINE static void forward(const Functions& f, const V (&sum)[sums], V (&kept)[Lstm::kept]) {
    kept[0] = f.gate(sum[0]);
    kept[1] = f.gate(sum[1]);
    kept[2] = f.candidate(sum[2]);
    kept[3] = f.gate(sum[3]);
  }

  // Peepholes (Gers and Schmidhuber 2000): i and f see c before the step, o sees c after it. peephole: of i f o.
  template <class V>
  GATEWISE_INLINE static void peep_before(const V (&peephole)[3], V before, V (&sum)[sums]) {
    sum[0] = fused(peephole[0], before, sum[0]);
    sum[1] = fused(peephole[1], before, sum[1]);
  }
  template <class V, class Functions>
  GATEWISE_INLINE static void peep_after(const Functions& f, const V (&peephole)[3], V after, const V (&sum)[sums],
                                         V (&kept)[Lstm::kept]) {
    kept[3] = f.gate(fused(peephole[2], after, sum[3]));
  }

  // The carried state after the step, from what was kept and the one before.
  template <class V>
  GATEWISE_INLINE static V after(const V (&kept)[Lstm::kept], V before) {
    return fused(kept[1], before, kept[0] * kept[2]);
  }

  // The hidden unit, from what was kept and the carried state after the step.
  template <class V, class Functions>
  GATEWISE_INLINE static V hidden(const Functions& f, const V (&kept)[Lstm::kept], V after) {
    return kept[3] * f.output(after);
  }

  // In: what was kept, the carried state before and after, and the gradients of h and of the carried state after the
  // step. Out: those of the sums, and of the carried state before the step.
  template <class V>
  GATEWISE_INLINE static void backward(const V (&kept)[Lstm::kept], V before, V after, V grad_hidden, V grad_after,
                                       V (&grad_sum)[sums], V& grad_before) {
    const V one = V::broadcast(1);
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3];
    const V tanh_c = tanh(after);
    const V grad_c = fused(grad_hidden * o, one - tanh_c * tanh_c, grad_after);
    grad_sum[0] = grad_c * g * i * (one - i);
    grad_sum[1] = grad_c * before * f * (one - f);
    grad_sum[2] = grad_c * i * (one - g * g);
    grad_sum[3] = grad_hidden * tanh_c * o * (one - o);
    grad_before = grad_c * f;
  }
};

}  // namespace gatewise::GATEWISE_KERNEL
