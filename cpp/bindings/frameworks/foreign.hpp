// Calls on memory of other libraries, given by address: what gatewise.torch and gatewise.jax are built on. Nothing is
// checked here but the sizes that a packed stack knows; who calls has looked at the memory. Nothing here needs Python.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>

#include "../interruption.hpp"
#include "../packed.hpp"

namespace gatewise {

using Address = std::uintptr_t;

// Address, step and row of [T, B, units], in elements.
using Triple = std::tuple<Address, Size, Size>;

// The sizes of a call and what it does between steps.
struct ForeignCall {
  std::shared_ptr<const Packed> packed;
  Size steps, batch;
  std::shared_ptr<const HeldSchedule> schedule;
  Size checkpoint_every;
  double probability;
  std::uint64_t seed;
  int most_threads;  // that the other library would use

  Size tape_bytes() const;
  Size operations() const { return packed->operations(batch) * steps; }

  // Contiguous states [L*D, B, .]; tape: 0 in inference.
  void forward(Interrupt* interrupt, const Triple& x, Address hidden, Address cell, const Triple& output,
               Address hidden_after, Address cell_after, Address tape) const;

  // grad_x 0: not wanted; gradients five addresses a layer and direction, the first 0: none of these is wanted.
  void backward(Interrupt* interrupt, const Triple& x, Address hidden, const Triple& output, Address tape,
                const Triple& grad_output, Address grad_hidden, Address grad_cell, const Triple& grad_x,
                Address grad_hidden_before, Address grad_cell_before,
                const std::vector<std::array<Address, 5>>& gradients) const;

 private:
  template <class SomeCall>
  SomeCall start() const;
};

}  // namespace gatewise
