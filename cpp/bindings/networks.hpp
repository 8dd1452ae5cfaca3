// Networks, and the states that their streams and pools carry from call to call.
#pragma once

#include <memory>
#include <vector>

#include "../core/memory.hpp"
#include "../core/network.hpp"
#include "arrays.hpp"
#include "schedules.hpp"

namespace gatewise {

// A network, and what owns the memory that its nodes point to. It never changes once it is made.
struct HeldNetwork : Network {
  std::vector<StatePart> state_parts;
  std::vector<std::shared_ptr<const void>> owners;

  int type_number() const { return type_number_of(*kernels); }
  // Whether a stream of this network can go on with the other one.
  bool is_like(const HeldNetwork& other) const;
};

// Input and output of a call: x [T, B, I] with contiguous units, or tokens [T, B]; output [., B, units].
struct Sequences {
  Size steps, batch;
  NetworkInput input;
  Rows<void*> output;
};
// Checks x, or tokens of int64, and output.
Sequences sequences_of(const HeldNetwork& network, const py::array& x, Size units, const py::array& output);

// Runs a whole sequence: x and tokens as above; output [T, B, O], or [1, B, O] if the network ends with the last step;
// the parts of the state before, null for zero, and after.
void run_network(const HeldNetwork& network, const py::array& x, const std::vector<const void*>& before,
                 const py::array& output, const std::vector<void*>& after, Size batch, const HeldSchedule* schedule);

// Refuses arrays that a state cannot be copied into or from: there is one for each part, of as many bytes.
void check_parts(const std::vector<py::array>& arrays, const std::vector<Size>& bytes);

// The state of some rows: its parts, [count, B, units] each, one after the other in one block of memory.
class StateBlock {
 public:
  StateBlock() = default;
  StateBlock(const HeldNetwork& network, Size batch);  // all zero

  std::vector<void*> pointers;  // of each part
  std::vector<Size> bytes;

  void copy_from(const StateBlock& other);  // of the same sizes
  void clear();
  void clear_row(const HeldNetwork& network, Size batch, Size row);
  void check(const std::vector<py::array>& arrays) const { check_parts(arrays, bytes); }
  // Copy the block into, or from, one array for each part.
  void copy_out(const std::vector<py::array>& arrays) const;
  void copy_in(const std::vector<py::array>& arrays);

 private:
  Buffer memory_;
};

}  // namespace gatewise
