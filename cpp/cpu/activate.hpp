// From an activation's name to its function of registers.
#pragma once

#include "../cell/activation.hpp"
#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Calls body(function) with a function from Register to Register, outside of loops. Nothing is called for softmax,
// which is no function of one element.
template <class Body>
GATEWISE_INLINE void with_activation(const Function& of, const Body& body) {
  const Register alpha = Register::broadcast(Real(of.alpha)), beta = Register::broadcast(Real(of.beta));
  switch (of.activation) {
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
      // The slope that most have is no number of the type, and near -3 the line would lose its digits.
      if (of.alpha == 1.0 / 6 && of.beta == 0.5)
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

// The functions of a cell that are known only now. Which one it is costs a jump that is always the same.
struct OfFormula {
  const Formula& of;
  Register most = Register::broadcast(Real(of.clip)), least = Register::broadcast(Real(-of.clip));

  Register gate(Register sum) const { return applied(of.gate, cut(sum)); }
  Register candidate(Register sum) const { return applied(of.candidate, cut(sum)); }
  Register output(Register state) const { return applied(of.output, state); }

 private:
  Register cut(Register sum) const { return minimum(maximum(sum, least), most); }
  [[gnu::noinline]] static Register applied(const Function& function, Register x) {
    Register y = x;
    with_activation(function, [&](const auto& activation) GATEWISE_LAMBDA { y = activation(x); });
    return y;
  }
};

}  // namespace gatewise::GATEWISE_KERNEL
