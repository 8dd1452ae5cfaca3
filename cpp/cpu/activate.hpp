// From an activation's name to its function of registers.
#pragma once

#include "../cell/activation.hpp"
#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Calls body(activation) with a function from Register to Register, outside of loops. Nothing is called for softmax,
// which is not a function of one element.
template <class Body>
GATEWISE_INLINE void with_activation(const Function& function, const Body& body) {
  const Register alpha = Register::broadcast(Real(function.alpha)), beta = Register::broadcast(Real(function.beta));
  switch (function.activation) {
    case Activation::linear:
      return body([](Register x) GATEWISE_LAMBDA { return x; });
    case Activation::affine:
      return body([=](Register x) GATEWISE_LAMBDA { return fused(alpha, x, beta); });
    case Activation::relu:
      return body([](Register x) GATEWISE_LAMBDA { return relu(x); });
    case Activation::leaky_relu:
      return body([=](Register x) GATEWISE_LAMBDA { return leaky_relu(x, alpha); });
    case Activation::thresholded_relu:
      return body([=](Register x) GATEWISE_LAMBDA { return thresholded_relu(x, alpha); });
    case Activation::elu:
      return body([=](Register x) GATEWISE_LAMBDA { return elu(x, alpha); });
    case Activation::selu:
      return body([](Register x) GATEWISE_LAMBDA { return selu(x); });
    case Activation::tanh:
      return body([](Register x) GATEWISE_LAMBDA { return tanh(x); });
    case Activation::scaled_tanh:
      return body([=](Register x) GATEWISE_LAMBDA { return alpha * tanh(beta * x); });
    case Activation::sigmoid:
      return body([](Register x) GATEWISE_LAMBDA { return sigmoid(x); });
    case Activation::hard_sigmoid:
      // The usual slope, 1/6, is not a number of the type, and near -3 alpha x + beta would lose digits.
      if (function.alpha == 1.0 / 6 && function.beta == 0.5)
        return body([](Register x) GATEWISE_LAMBDA { return hard_sigmoid(x); });
      return body([=](Register x) GATEWISE_LAMBDA { return hard_sigmoid(x, alpha, beta); });
    case Activation::softmax:
      return;
    case Activation::softplus:
      return body([](Register x) GATEWISE_LAMBDA { return softplus(x); });
    case Activation::softsign:
      return body([](Register x) GATEWISE_LAMBDA { return softsign(x); });
    case Activation::silu:
      return body([](Register x) GATEWISE_LAMBDA { return silu(x); });
    case Activation::gelu:
      return body([](Register x) GATEWISE_LAMBDA { return gelu(x); });
    case Activation::exp:
      return body([](Register x) GATEWISE_LAMBDA { return exp(x); });
  }
  __builtin_unreachable();  // the compiler warns of an activation that is missing above
}

// The functions of a formula, which are known only at run time. Choosing one costs a jump that is always the same.
struct FormulaFunctions {
  const Formula& formula;
  Register most = Register::broadcast(Real(formula.clip)), least = Register::broadcast(Real(-formula.clip));

  Register gate(Register sum) const { return applied(formula.gate, bounded(sum)); }
  Register candidate(Register sum) const { return applied(formula.candidate, bounded(sum)); }
  Register output(Register state) const { return applied(formula.output, state); }

 private:
  Register bounded(Register sum) const { return minimum(maximum(sum, least), most); }
  [[gnu::noinline]] static Register applied(const Function& function, Register x) {
    Register y = x;
    with_activation(function, [&](const auto& activation) GATEWISE_LAMBDA { y = activation(x); });
    return y;
  }
};

}  // namespace gatewise::GATEWISE_KERNEL
