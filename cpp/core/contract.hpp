// The contract between the bindings and the backends: plain descriptors, and the table of functions that every
// backend fills once for each dtype. Nothing here knows Eigen, Python or CUDA.
//
// Letters in shapes: T steps, B batch, I input size, H hidden size, P projection size, R the size of h (P if there is
// a projection, else H), G gates, L layers, D directions. All sizes and strides count elements of the table's dtype.
#pragma once

#include <cstddef>
#include <cstdint>

// For functions that must vanish into their callers, so that no object exports them and registers stay registers.
#define GATEWISE_INLINE [[gnu::always_inline]] inline
#define GATEWISE_LAMBDA __attribute__((always_inline))

namespace gatewise {

using Size = std::ptrdiff_t;

// Bytes, up to the end of their last cache line.
GATEWISE_INLINE constexpr Size lines(Size bytes) { return (bytes + 63) / 64 * 64; }

enum class Cell { lstm, gru, gru_reset_before, rnn_tanh, rnn_relu };
enum class Activation {
  linear,
  affine,  // alpha x + beta
  relu,
  leaky_relu,        // alpha: the slope to the left
  thresholded_relu,  // alpha: up to there it is zero
  elu,               // alpha: its value far to the left, but for the sign
  selu,
  tanh,
  scaled_tanh,  // alpha tanh(beta x)
  sigmoid,
  hard_sigmoid,  // alpha x + beta, cut off at 0 and 1
  softmax,       // of a row
  softplus,
  softsign,
  silu,
  gelu,
  exp,
};

// A function of one element, with the numbers that it has.
struct Function {
  Activation activation;
  double alpha, beta;
};

GATEWISE_INLINE constexpr Size gates_of(Cell cell) {
  return cell == Cell::lstm ? 4 : cell == Cell::gru || cell == Cell::gru_reset_before ? 3 : 1;
}
// Values of a unit and step that a tape keeps, not counting the carried state.
GATEWISE_INLINE constexpr Size kept_of(Cell cell) {
  return cell == Cell::lstm || cell == Cell::gru ? 4 : cell == Cell::gru_reset_before ? 2 : 1;
}
// Whether the state of a unit goes from step to step beside h as products read it: c of an LSTM, h of a GRU.
GATEWISE_INLINE constexpr bool carries(Cell cell) { return cell != Cell::rnn_tanh && cell != Cell::rnn_relu; }
GATEWISE_INLINE constexpr bool has_cell_state(Cell cell) { return cell == Cell::lstm; }
GATEWISE_INLINE constexpr bool trains(Cell cell) { return cell != Cell::gru_reset_before; }

// Where a cell has other functions than its own, or what else Keras and ONNX vary.
struct Formula {
  Function gate;       // LSTM i f o, GRU r z; RNN has none
  Function candidate;  // LSTM g, GRU n, RNN h
  Function output;     // LSTM: of c, on its way into h
  double clip;         // the sums before gates and candidate are cut off at +-clip; infinity: they are not
  bool peepholes;      // LSTM: the gates see c
};

// One layer in one direction.
struct Layer {
  Cell cell;
  Size input, hidden;
  Size projection;                   // 0: none
  const void* packed;                // what Kernels::pack wrote
  const Formula* formula = nullptr;  // null: the cell's own
};

// Whether it is recorded, and has a backward.
GATEWISE_INLINE constexpr bool trains(const Layer& layer) {
  return trains(layer.cell) && !layer.formula;
}

GATEWISE_INLINE constexpr Size output_of(const Layer& layer) {
  return layer.projection ? layer.projection : layer.hidden;
}

// Forward, a thread with so many rows of the batch to itself does all their units and need not meet the others: none
// waits for one that lost its processor for a while (H 256, B 64 on a busy machine: 25 % faster). With fewer rows each
// weight that it reads serves too few sums, and threads share the units. (Rows apart, on a quiet machine: H 200, B 20
// equal, H 128, B 16 4 % slower; H 650, B 20 5 % and H 512, B 16 4 % slower, whose weights come from the third cache.
// Backward it never paid.)
constexpr Size rows_alone(Size hidden) { return hidden <= 256 ? 10 : 16; }

// Weights (or their gradients) of one layer and direction as PyTorch stores them, row by row; gates i f g o or r z n.
template <class Pointer>
struct Canonical {
  Pointer weight_ih;            // [G*H, I]
  Pointer weight_hh;            // [G*H, R]
  Pointer bias_ih;              // [G*H]; null: none
  Pointer bias_hh;              // [G*H]; null: none
  Pointer weight_hr;            // [P, H]; null: none
  Pointer weight_ch = nullptr;  // [3*H], from c to i f o; null: no peepholes
};
using Weights = Canonical<const void*>;
using Gradients = Canonical<void*>;

// Element (t, b, i) of a sequence lies at data + t * step + b * row + i.
template <class Pointer>
struct Rows {
  Pointer data;
  Size step, row;
};

// The distance of the rows of all steps, one after the other; -1: there is no single one.
template <class Pointer>
GATEWISE_INLINE constexpr Size distance_of(Rows<Pointer> rows, Size steps, Size batch) {
  if (batch == 1) return rows.step;
  return steps == 1 || rows.step == batch * rows.row ? rows.row : -1;
}

struct Stack {
  const Layer* layer;  // [L*D], direction running fastest
  Size layers, directions;
};

// What stands around recurrent layers: a row of the output depends on the same row of the input alone.
enum class Operation {
  dense,       // activation(weight x + bias)
  activate,    // activation(x)
  normalize,   // (x - mean) * scale + shift, the same three rows for all
  layer_norm,  // the same with the mean of the row itself, and its deviation in front of the scale
  add,         // the two halves of a row, unit by unit
  multiply,
  average,
};

struct RowFunction {
  Operation operation;
  Size input, output;  // units of a row
  Function function;   // of dense and activate
  double epsilon;      // layer_norm: added to the variance
  const void* packed;
};

// Sums that the input feeds, bias included, in place of the input: row t, b of the input stands for the row
// `place[t * B + b]` of tables that `input_sums` made.
struct Lookup {
  const std::int64_t* place;  // [T, B]; null: none
  const void* sums[2];        // of the first layer's directions
};

// The mask of layer l is drawn anew from (seed, call, l, row, step, unit); see python/gatewise/reference.py.
struct Dropout {
  double probability;
  std::uint64_t seed, call;
};

// Which rows of the batch take which steps, and where their state starts anew.
struct Schedule {
  const Size* order;           // [B] the rows by their number of steps, most first; null: all rows take all steps
  const Size* lengths;         // [B] these numbers, in that order; the first is T
  const Size* ends;            // [B] the same by row
  const Size* active;          // [T] how many rows take the step at time t: the first ones of `order`
  const Size* taken;           // [T + 1] the sum of `active` over the times before t
  const std::uint8_t* resets;  // [T, B] 1: the state of the row is set to zero before the step at time t; null: never
  // Sequences have the rows that take a step and no others, step after step, as PyTorch packs them: [taken[T], units]
  // instead of [T, B, units]. `order` is then that of the rows.
  bool packed;
};

// How a call ended. One that is not complete has left what it writes to undefined.
enum class Status { complete, interrupted };

// How a call is asked to end early. Its threads look here between steps, and all end after the same one.
struct Interrupt {
  void (*look)(Interrupt&);  // called on the thread that made the call, and may set `asked`; null: nobody looks
  std::uint32_t asked;       // 1: the call is to end; read and written atomically
  bool others_wait = false;  // other threads take part in the call, and wait for the one that looks
};

// Multiply-adds between two looks: below 1 ms on one thread of any level but the generic one, which takes a few.
constexpr Size look_operations = Size(1) << 23;

GATEWISE_INLINE bool is_asked(const Interrupt* interrupt) {
  return interrupt && __atomic_load_n(&interrupt->asked, __ATOMIC_ACQUIRE);
}
// The same, after a look on the thread that made the call.
GATEWISE_INLINE bool look_whether_asked(Interrupt* interrupt) {
  if (interrupt && interrupt->look) interrupt->look(*interrupt);
  return is_asked(interrupt);
}

// What forward and backward have in common.
struct Call {
  Stack stack;
  Size steps, batch;
  Schedule schedule;
  Size checkpoint_every;      // steps between two states that the tape keeps; 0: it keeps everything
  Rows<const void*> input;    // [T, B, I]
  const void* hidden_before;  // [L*D, B, R]; null: zero
  Dropout dropout;
  void* tape;     // tape_size elements; null: inference, nothing is kept and nothing dropped
  void* scratch;  // forward_scratch or backward_scratch elements
  int threads;
  Interrupt* interrupt;  // null: the call runs to its end
};

// Output and input gradient are written for each row as far as it goes; the rest of it becomes zero.
struct Forward : Call {
  Lookup lookup;            // instead of `input`; for inference only
  Rows<void*> output;       // [T, B, D*R]
  const void* cell_before;  // [L*D, B, H]; null: zero; LSTM only
  void* hidden_after;       // [L*D, B, R]; may be hidden_before
  void* cell_after;         // [L*D, B, H]; may be cell_before
};

// What Forward left behind, with the same input, output, state before and tape.
struct Backward : Call {
  Rows<const void*> output;       // [T, B, D*R]
  Rows<const void*> grad_output;  // [T, B, D*R]; null data: zero
  const void* grad_hidden_after;  // [L*D, B, R]; null: zero
  const void* grad_cell_after;    // [L*D, B, H]; null: zero
  Rows<void*> grad_input;         // [T, B, I]; null data: not wanted
  void* grad_hidden_before;       // [L*D, B, R]
  void* grad_cell_before;         // [L*D, B, H]; LSTM only
  const Gradients* gradients;     // [L*D]; without weight_ih: none of this layer and direction is wanted
};

// What one layer and direction did in a recorded forward that kept everything; zero where a row has no step.
struct Trace {
  Size layer, direction;
  void* const* kept;  // [T, B, H] each, in the order of the cell's file: LSTM i f g o, GRU n r z, n's hidden sum, RNN h
  void* carried;      // [T, B, H], the cell state after each step; LSTM only
  void* hidden;       // [T, B, R], h after it
};

// Memory of the caller's.
struct Memory {
  const void* data;
  Size bytes;
};

// One backend and dtype. All memory belongs to the caller and is aligned to 64 bytes. Functions do not throw.
struct Kernels {
  const char* level;
  int item_bytes, lanes;
  Size (*packed_size)(const Layer&);
  void (*pack)(const Layer&, const Weights&, void* packed);
  // Of a call that is complete but for the memory that they ask for.
  Size (*tape_size)(const Forward&);
  Size (*forward_scratch)(const Forward&);
  Size (*backward_scratch)(const Backward&);
  Status (*forward)(const Forward&);
  Status (*backward)(const Backward&);
  void (*trace)(const Backward&, const Trace&);
  // The sums that the input feeds, bias included, of `rows` rows [rows, I]: so many elements a row.
  Size (*input_sums_size)(const Layer&);
  void (*input_sums)(const Layer&, Size rows, const void* input, Size input_row, void* sums);
  // weights: dense weight [output, input] and bias or null; normalize mean, scale, shift; layer_norm scale and shift,
  // or null each; of the others none is read.
  Size (*rows_packed_size)(const RowFunction&);
  void (*pack_rows)(const RowFunction&, const void* const* weights, void* packed);
  Size (*rows_scratch)(const RowFunction&, Size rows, int threads);  // of all steps
  void (*apply_rows)(const RowFunction&, Size steps, Size batch, Rows<const void*> input, Rows<void*> output,
                     void* scratch, int threads);
  // Each element by itself, so not softmax.
  void (*evaluate)(const Function&, Size count, const void* x, void* y);
  // Only multiplies and adds, in registers: the machine's limit, for benchmarks. Returns how many operations it did.
  Size (*multiply_add)(Size repetitions);
  // Only reads `count` elements, again and again: a cache's bandwidth, for benchmarks. Returns how many bytes it read.
  Size (*read)(const void* data, Size count, Size repetitions);
  // A number for all bits of some pieces of memory; another one, but for one case in 2^64, if any of them changes.
  std::uint64_t (*fingerprint)(const Memory* pieces, Size count);
};

}  // namespace gatewise
