// From an activation's name to its function of registers, outside of loops.
#pragma once

#include "../cell/activation.hpp"
#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Calls body(function) with a function from Register to Register. alpha is that of elu, and the slope of leaky_relu.
// Nothing is called for softmax, which is no function of one element.
template <class Body>
GATEWISE_INLINE void with_activation(Activation activation, Real alpha, const Body& body) {
  const Register factor = Register::broadcast(alpha);
  switch (activation) {
    case Activation::linear:
      return body([](Register x) GATEWISE_LAMBDA { return x; });
    case Activation::relu:
      return body([](Register x) GATEWISE_LAMBDA { return relu(x); });
    case Activation::tanh:
      return body([](Register x) GATEWISE_LAMBDA { return tanh(x); });
    case Activation::sigmoid:
      return body([](Register x) GATEWISE_LAMBDA { return sigmoid(x); });
    case Activation::softmax:
      return;
    case Activation::hard_sigmoid:
      return body([](Register x) GATEWISE_LAMBDA { return hard_sigmoid(x); });
    case Activation::elu:
      return body([factor](Register x) GATEWISE_LAMBDA { return elu(x, factor); });
    case Activation::leaky_relu:
      return body([factor](Register x) GATEWISE_LAMBDA { return leaky_relu(x, factor); });
    case Activation::gelu:
      return body([](Register x) GATEWISE_LAMBDA { return gelu(x); });
    case Activation::softplus:
      return body([](Register x) GATEWISE_LAMBDA { return softplus(x); });
    case Activation::exp:
      return body([](Register x) GATEWISE_LAMBDA { return exp(x); });
  }
  __builtin_unreachable();  // the compiler warns of an activation that is missing above
}

}  // namespace gatewise::GATEWISE_KERNEL
