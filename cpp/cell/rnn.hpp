// The simple recurrent network (Elman 1990) with tanh or relu, as torch.nn.RNN.
#pragma once

#include "activation.hpp"

namespace gatewise::GATEWISE_KERNEL {

struct RnnShape {
  static constexpr bool trains = true;          // it has a backward
  static constexpr bool resets_before = false;  // r * h goes into the last gate's product
  static constexpr int gates = 1, sums = 1;
  static constexpr int kept = 1;  // h
  static constexpr bool carried = false;
  static constexpr bool carries_hidden = false;
  static constexpr int first_input_sum = 0, first_hidden_sum = 0;
  static constexpr int input_gate(int slot) { return slot; }
  static constexpr int hidden_gate(int slot) { return slot; }

  template <class V, class Functions>
  GATEWISE_INLINE static void forward(const Functions& f, const V (&sum)[sums], V (&kept)[RnnShape::kept]) {
    kept[0] = f.candidate(sum[0]);
  }
  template <class V>
  GATEWISE_INLINE static V after(const V (&)[RnnShape::kept], V before) {
    return before;
  }
  template <class V, class Functions>
  GATEWISE_INLINE static V hidden(const Functions&, const V (&kept)[RnnShape::kept], V) {
    return kept[0];
  }
};

struct RnnTanh : RnnShape {
  using Standard = StandardFunctions;

  template <class V>
  GATEWISE_INLINE static void backward(const V (&kept)[RnnShape::kept], V, V, V grad_hidden, V, V (&grad_sum)[sums],
                                       V&) {
    grad_sum[0] = grad_hidden * (V::broadcast(1) - kept[0] * kept[0]);
  }
};

struct RnnRelu : RnnShape {
  struct Standard {
    template <class V>
    GATEWISE_INLINE static V candidate(V sum) {
      return relu(sum);
    }
  };

  template <class V>
  GATEWISE_INLINE static void backward(const V (&kept)[RnnShape::kept], V, V, V grad_hidden, V, V (&grad_sum)[sums],
                                       V&) {
    const V zero = V::broadcast(0);
    grad_sum[0] = where_less(zero, kept[0], grad_hidden, zero);
  }
};

}  // namespace gatewise::GATEWISE_KERNEL
