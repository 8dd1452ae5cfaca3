// The one place that includes Python, NumPy and pybind11, and what the other files of this room share.
#pragma once

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL GATEWISE_ARRAY_API
#ifndef GATEWISE_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numpy/arrayobject.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/memory.hpp"
#include "../core/network.hpp"
#include "../core/registry.hpp"
#include "../core/threads.hpp"
#include "interruption.hpp"

namespace gatewise {

namespace py = pybind11;
using Array = std::optional<py::array>;

inline void require(bool holds, const char* what) {
  if (!holds) throw py::value_error(what);
}

// What pybind11 makes of None is null.
template <class Object>
const std::shared_ptr<Object>& present(const std::shared_ptr<Object>& object) {
  if (!object) throw py::type_error("internal: expected an object of the core, got None");
  return object;
}

inline int type_number_of(const Kernels& kernels) { return kernels.item_bytes == 4 ? NPY_FLOAT : NPY_DOUBLE; }
// A C-contiguous array of `size` elements of the kernels' dtype; null for None.
void* flat(const Kernels& kernels, const Array& array, Size size, bool writeable);
// An array [T, B, units] with contiguous units and any strides else.
Rows<void*> rows_of(const Kernels& kernels, const py::array& array, Size steps, Size batch, Size units, bool writeable);

// A stack of layers, packed for one backend and never changed afterwards. Shared by a layer, its streams and its tapes.
struct Packed {
  const Kernels* kernels;
  Size input, hidden, projection, layers, directions;
  std::optional<Formula> formula;
  std::vector<Layer> layer;  // [L*D]
  Buffer memory;

  // The sizes alone; `pack`, or `place` in memory that was packed before, is to follow.
  Packed(const Kernels& kernels, Cell cell, Size input, Size hidden, Size projection, Size layers, Size directions,
         std::optional<Formula> formula = std::nullopt);
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  Size bytes() const;                                            // of all packed layers
  void place(const void* packed);                                // aligned to 64 bytes
  void pack(const std::vector<Weights>& weights, void* packed);  // [L*D]
  void pack(const std::vector<Weights>& weights);                // in memory of its own

  int type_number() const { return type_number_of(*kernels); }
  Stack stack() const { return {layer.data(), layers, directions}; }
  Size recurrent() const { return projection ? projection : hidden; }
  Size output() const { return directions * recurrent(); }
  Size operations(Size batch) const { return operations_of(stack(), batch); }  // multiply-adds of a step
  int threads(Size steps, Size batch) const { return threads_of(*kernels, stack(), steps, batch); }
  bool has_cell() const { return layer[0].cell == Cell::lstm; }
};

Cell cell_of(const std::string& name);

// By its name, with alpha and beta.
using NamedFunction = std::tuple<std::string, double, double>;
Function function_of(const NamedFunction& named);

// Owns what a Schedule points to, for T steps of B rows.
class Plan {
 public:
  // lengths [B], the largest T, or null; resets [T, B], each 0 or 1, or null; packed: sequences have only the rows that
  // take a step, whose lengths must descend
  Plan(Size steps, Size batch, const std::int64_t* lengths, const std::uint8_t* resets, bool packed = false);
  const Schedule& schedule(Size steps, Size batch) const;  // throws unless it was made for these

 private:
  Size steps_, batch_;
  RowSchedule rows_;
  std::vector<std::uint8_t> resets_;
  Schedule schedule_{};
};

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
                 const py::array& output, const std::vector<void*>& after, Size batch, const Plan* plan);

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

// The call on x [T, B, I] and output [T, B, D*R], which may have any strides but the last; the states are to be added.
Forward sequence_call(const Packed& packed, const py::array& x, const py::array& output, const Plan* plan);

// Run a call that is complete but for the scratch. Neither knows of Python.
Status compute(const Packed& packed, Forward& call);
Status compute(const Packed& packed, Backward& call);
// The same from Python: without the GIL where that pays.
void run_forward(const Packed& packed, Forward& call);
void run_backward(const Packed& packed, Backward& call);

void bind_plans(py::module_& module);
void bind_layers(py::module_& module);
void bind_networks(py::module_& module);
void bind_streams(py::module_& module);
void bind_pools(py::module_& module);
void bind_foreign(py::module_& module);
void bind_tensors(py::module_& module);
void bind_xla(py::module_& module);
void bind_settings(py::module_& module);

}  // namespace gatewise
