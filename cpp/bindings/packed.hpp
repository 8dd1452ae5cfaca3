// Stacks of layers, packed for one backend, and the calls that run them.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../core/memory.hpp"
#include "../core/network.hpp"
#include "arrays.hpp"
#include "names.hpp"
#include "schedules.hpp"

namespace gatewise {

// A stack of layers, packed for one backend and never changed afterwards. A layer, its streams and its tapes share it.
struct Packed {
  const Kernels* kernels;
  Size input, hidden, projection, layers, directions;
  std::optional<Formula> formula;
  std::vector<Layer> layer;  // [L*D]
  Buffer memory;

  // Only sizes: `pack` must follow, or `place` in memory that was packed before.
  Packed(const Kernels& kernels, Cell cell, Size input, Size hidden, Size projection, Size layers, Size directions,
         std::optional<Formula> formula = std::nullopt);
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  Size bytes() const;  // of all packed layers
  // Uses weights that are packed already; the address is aligned to 64 bytes.
  void place(const void* packed);
  // Packs weights [L*D] into the given memory, or into memory of its own.
  void pack(const std::vector<Weights>& weights, void* packed);
  void pack(const std::vector<Weights>& weights);

  int type_number() const { return type_number_of(*kernels); }
  Stack stack() const { return {layer.data(), layers, directions}; }
  Size recurrent() const { return projection ? projection : hidden; }
  Size output() const { return directions * recurrent(); }
  Size operations(Size batch) const { return operations_of(stack(), batch); }  // multiply-adds of a step
  int threads(Size steps, Size batch) const { return threads_of(*kernels, stack(), steps, batch); }
  bool has_cell() const { return has_cell_state(layer[0].cell); }
};

// As in arrays.hpp; null for None.
void* flat(const Packed& packed, const Array& array, Size size, bool writeable);
Rows<void*> rows_of(const Packed& packed, const Array& array, Size steps, Size batch, Size units, bool writeable);
Rows<const void*> read_rows(const Packed& packed, const Array& array, Size steps, Size batch, Size units);

// A call that is complete but for its scratch. States [L*D, B, .] are contiguous; x and output have contiguous units.
Forward forward_call(const Packed& packed, const py::array& x, const Array& hidden, const Array& cell,
                     const py::array& output, const py::array& hidden_after, const Array& cell_after,
                     const HeldSchedule* schedule);

// Bytes of the tape of a recorded forward in which every row takes all steps; throws where there cannot be as many.
Size tape_bytes(const Packed& packed, Size steps, Size batch, Size checkpoint_every);

// Run a call that is complete but for its scratch, without Python.
Status compute(const Packed& packed, Forward& call);
Status compute(const Packed& packed, Backward& call);
// The same, called with the GIL held; releases it if the call is long enough.
void run_forward(const Packed& packed, Forward& call);
void run_backward(const Packed& packed, Backward& call);

}  // namespace gatewise
