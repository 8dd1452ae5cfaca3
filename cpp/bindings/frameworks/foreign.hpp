// Calls on memory of other libraries, by address: what gatewise.torch and gatewise.jax are built on. Only the sizes
// that a packed stack knows are checked here; callers check the memory. Nothing here needs Python.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>

#include "../interruption.hpp"
#include "../packed.hpp"

namespace gatewise {

using Address = std::uintptr_t;

// Address of [T, B, units], and the distances of its steps and of its rows in elements.
using AddressedRows = std::tuple<Address, Size, Size>;

// What a call is but for its memory.
struct ForeignCall {
  std::shared_ptr<const Packed> packed;
  Size steps, batch;
  std::shared_ptr<const HeldSchedule> schedule;
  Size checkpoint_every;
  double probability;
  std::uint64_t seed;
  int max_threads;  // as many as the other library would use

  Size tape_bytes() const;
  Size operations() const { return packed->operations(batch) * steps; }

  // Contiguous states [L*D, B, .]; tape: 0 in inference.
  void forward(Interrupt* interrupt, const AddressedRows& x, Address hidden, Address cell, const AddressedRows& output,
               Address hidden_after, Address cell_after, Address tape) const;

  // grad_x: 0 if it is not wanted. gradients: five addresses for each layer and direction; if the first is 0, none of
  // the five is wanted.
  void backward(Interrupt* interrupt, const AddressedRows& x, Address hidden, const AddressedRows& output, Address tape,
                const AddressedRows& grad_output, Address grad_hidden, Address grad_cell, const AddressedRows& grad_x,
                Address grad_hidden_before, Address grad_cell_before,
                const std::vector<std::array<Address, 5>>& gradients) const;

 private:
  template <class SomeCall>
  SomeCall start() const;
};

}  // namespace gatewise
