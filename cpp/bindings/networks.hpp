// Networks, and the states that their streams and pools carry from call to call.
#pragma once

#include <memory>
#include <vector>

#include "../core/memory.hpp"
#include "../core/network.hpp"
#include "arrays.hpp"
#include "schedules.hpp"

namespace gatewise {

// A network, and what owns the memory that its nodes point to. Never changed once it is made.
struct HeldNetwork : Network {
  std::vector<StatePart> state_parts;
  std::vector<std::shared_ptr<const void>> owners;

  int type_number() const { return type_number_of(*kernels); }
  // Whether streams of one can go on with the other.
  bool is_like(const HeldNetwork& other) const;
};

// x [T, B, I] with any strides but the last, or tokens [T, B] of int64, checked; output [., B, units].
struct Sequences {
  Size steps, batch;
  NetworkInput input;
  Rows<void*> output;
};
Sequences sequences_of(const HeldNetwork& network, const py::array& x, Size units, const py::array& output);

// A whole sequence: x [T, B, I] with any strides but the last, or tokens [T, B] of int64; output [T, B, O], or [1, B,
// O] where the network ends with the last step; the parts of the state before, null: zero, and after.
void run_network(const HeldNetwork& network, const py::array& x, const std::vector<const void*>& before,
                 const py::array& output, const std::vector<void*>& after, Size batch, const HeldSchedule* schedule);

// What a state is copied into or from: an array a part, of its bytes.
void check_parts(const std::vector<py::array>& arrays, const std::vector<Size>& bytes);

// The parts of the state of some rows, [count, B, units] each, one after the other in one block.
class StateBlock {
 public:
  StateBlock() = default;
  StateBlock(const HeldNetwork& network, Size batch);  // zero

  std::vector<void*> pointers;  // of each part
  std::vector<Size> bytes;

  void copy_from(const StateBlock& other);  // of the same sizes
  void clear();
  void clear_row(const HeldNetwork& network, Size batch, Size row);
  void check(const std::vector<py::array>& arrays) const { check_parts(arrays, bytes); }
  // Between the block and an array a part, of its bytes.
  void copy_out(const std::vector<py::array>& arrays) const;
  void copy_in(const std::vector<py::array>& arrays);

 private:
  Buffer memory_;
};

}  // namespace gatewise
