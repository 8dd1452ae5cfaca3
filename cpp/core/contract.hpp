// The contract between the bindings and the backends: plain descriptors, and the table of functions that every backend
// fills in for each dtype. Nothing here knows Eigen or Python.
//
// Letters in shapes: T steps, B batch, I input size, H hidden size, P projection size, R the size of h (P if there is a
// projection, else H), G gates, L layers, D directions. All sizes and strides count elements of the table's dtype.
#pragma once

#include <cstddef>
#include <cstdint>

// For functions that must be inlined, so that no object exports them and registers stay registers.
#define GATEWISE_INLINE [[gnu::always_inline]] inline
#define GATEWISE_LAMBDA __attribute__((always_inline))

namespace gatewise {

using Size = std::ptrdiff_t;

// Bytes rounded up to whole cache lines.
GATEWISE_INLINE constexpr Size lines(Size bytes) { return (bytes + 63) / 64 * 64; }

enum class Cell { lstm, gru, gru_reset_before, rnn_tanh, rnn_relu };
enum class Activation {
  linear,
  affine,  // alpha x + beta
  relu,
  leaky_relu,        // alpha: the slope below zero
  thresholded_relu,  // alpha: the input up to which it is zero
  elu,               // -alpha: its limit to the left
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

// A function of one element, and its parameters.
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

// A cell with other functions than the standard ones, and what else Keras and ONNX vary.
struct Formula {
  Function gate;       // LSTM i f o, GRU r z; RNN has none
  Function candidate;  // LSTM g, GRU n, RNN h
  Function output;     // LSTM: applied to c to make h
  double clip;         // bounds the sums before gates and candidate to +-clip; infinity: no bounds
  bool peepholes;      // LSTM: the gates see c
};

// One layer in one direction.
struct Layer {
  Cell cell;
  Size input, hidden;
  Size projection;                   // 0: none
  const void* packed;                // written by Kernels::pack
  const Formula* formula = nullptr;  // null: the standard functions
};

// Whether a layer can be recorded and has a backward.
GATEWISE_INLINE constexpr bool trains(const Layer& layer) { return trains(layer.cell) && !layer.formula; }

GATEWISE_INLINE constexpr Size output_of(const Layer& layer) {
  return layer.projection ? layer.projection : layer.hidden;
}

// The least rows per group of threads for which a forward pass splits the batch. A group computes all hidden units of
// its rows and does not wait for the others, so that nobody waits for a thread that was descheduled (H 256, B 64 on a
// busy machine: 25 % faster). With fewer rows a weight, once loaded, would feed too few sums; threads then split the
// hidden units. (Split batches on a quiet machine: H 200, B 20 equal, H 128, B 16 4 % slower; H 650, B 20 5 % and H
// 512, B 16 4 % slower, since their weights come from L3. In backward it never paid.)
constexpr Size min_rows_per_group(Size hidden) { return hidden <= 256 ? 10 : 16; }

// Weights (or their gradients) of one layer and direction as PyTorch stores them, row by row; gates i f g o or r z n.
template <class Pointer>
struct Canonical {
  Pointer weight_ih;            // [G*H, I]
  Pointer weight_hh;            // [G*H, R]
  Pointer bias_ih;              // [G*H]; null: none
  Pointer bias_hh;              // [G*H]; null: none
  Pointer weight_hr;            // [P, H]; null: none
  Pointer weight_ch = nullptr;  // [3*H], peepholes from c to i f o; null: none
};
using Weights = Canonical<const void*>;
using Gradients = Canonical<void*>;

// Element (t, b, i) of a sequence lies at data + t * step + b * row + i.
template <class Pointer>
struct Rows {
  Pointer data;
  Size step, row;
};

// The distance between consecutive rows of all steps; -1 if it varies.
template <class Pointer>
GATEWISE_INLINE constexpr Size distance_of(Rows<Pointer> rows, Size steps, Size batch) {
  if (batch == 1) return rows.step;
  return steps == 1 || rows.step == batch * rows.row ? rows.row : -1;
}

struct Stack {
  const Layer* layer;  // [L*D], direction running fastest
  Size layers, directions;
};

// Operations around recurrent layers. A row of the output depends only on the same row of the input.
enum class Operation {
  dense,       // activation(weight x + bias)
  activate,    // activation(x)
  normalize,   // (x - mean) * scale + shift, the same three rows for all
  layer_norm,  // (x - mean of the row) / its deviation * scale + shift
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

// Input products, bias included, in place of the input: row b of step t uses row `rows[t * B + b]` of tables made by
// `input_sums`.
struct Lookup {
  const std::int64_t* rows;  // [T, B]; null: no lookup
  const void* sums[2];       // tables of the first layer's directions
};

// Each element of the mask of layer l depends only on (seed, call, l, row, step, unit): see
// python/gatewise/reference.py.
struct Dropout {
  double probability;
  std::uint64_t seed, call;
};

// Which rows of the batch take which steps, and where their state is reset.
struct Schedule {
  const Size* order;           // [B] rows in descending order of their lengths; null: all rows take all steps
  const Size* sorted_lengths;  // [B] number of steps, in that order; the first is T
  const Size* row_lengths;     // [B] number of steps of each row
  const Size* active;          // [T] number of rows that take the step at time t: the first ones of `order`
  const Size* rows_before;     // [T + 1] sum of `active` over the times before t
  const std::uint8_t* resets;  // [T, B] 1: the state of the row is set to zero before the step at time t; null: never
  // Sequences have only the rows that take a step, step after step, as PyTorch packs them: [rows_before[T], units]
  // instead of [T, B, units]. The rows are then in `order`.
  bool packed;
};

// How a call ended. If it is not complete, its results are undefined.
enum class Status { complete, interrupted };

// Asks a call to end early. Its threads look here between steps, and all end after the same step.
struct Interrupt {
  void (*look)(Interrupt&);  // called by the thread that made the call; may set `asked`; null: nothing to call
  std::uint32_t asked;       // 1: the call should end; read and written atomically
  bool others_wait = false;  // whether other threads take part in the call, and wait for the one that looks
};

// Multiply-adds between two looks: less than 1 ms on one thread, or a few ms on the generic level.
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
  Size checkpoint_every;      // the tape keeps the state before every k-th step; 0: it keeps everything
  Rows<const void*> input;    // [T, B, I]
  const void* hidden_before;  // [L*D, B, R]; null: zero
  Dropout dropout;
  void* tape;     // tape_size elements; null: inference, without a tape and without dropout
  void* scratch;  // forward_scratch or backward_scratch elements
  int threads;
  Interrupt* interrupt;  // null: the call runs to its end
};

// Outputs and input gradients after the end of a row become zero.
struct Forward : Call {
  Lookup lookup;            // instead of `input`; for inference only
  Rows<void*> output;       // [T, B, D*R]
  const void* cell_before;  // [L*D, B, H]; null: zero; LSTM only
  void* hidden_after;       // [L*D, B, R]; may be hidden_before
  void* cell_after;         // [L*D, B, H]; may be cell_before
};

// The backward pass of a Forward, with the same input, output, state before and tape.
struct Backward : Call {
  Rows<const void*> output;       // [T, B, D*R]
  Rows<const void*> grad_output;  // [T, B, D*R]; null data: zero
  const void* grad_hidden_after;  // [L*D, B, R]; null: zero
  const void* grad_cell_after;    // [L*D, B, H]; null: zero
  Rows<void*> grad_input;         // [T, B, I]; null data: not wanted
  void* grad_hidden_before;       // [L*D, B, R]
  void* grad_cell_before;         // [L*D, B, H]; LSTM only
  const Gradients* gradients;     // [L*D]; null weight_ih: none of this layer and direction is wanted
};

// What one layer and direction did in a recorded forward whose tape keeps everything; zero after the end of a row.
struct Trace {
  Size layer, direction;
  void* const* kept;  // [T, B, H] each, in the order of the cell's file: LSTM i f g o, GRU n r z, n's hidden sum, RNN h
  void* carried;      // [T, B, H], the cell state after each step; LSTM only
  void* hidden;       // [T, B, R], h after it
};

// Memory of the caller.
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
  // These ask for the memory of a call that is complete without it.
  Size (*tape_size)(const Forward&);
  Size (*forward_scratch)(const Forward&);
  Size (*backward_scratch)(const Backward&);
  Status (*forward)(const Forward&);
  Status (*backward)(const Backward&);
  void (*trace)(const Backward&, const Trace&);
  // Input products, bias included, of rows [rows, I]. Each row of the result has input_sums_size elements.
  Size (*input_sums_size)(const Layer&);
  void (*input_sums)(const Layer&, Size rows, const void* input, Size input_row, void* sums);
  // weights: of dense [output, input] and bias or null; of normalize mean, scale and shift; of layer_norm scale and
  // shift, each or null; of other operations none.
  Size (*rows_packed_size)(const RowFunction&);
  void (*pack_rows)(const RowFunction&, const void* const* weights, void* packed);
  Size (*rows_scratch)(const RowFunction&, Size rows, int threads);  // rows of all steps together
  void (*apply_rows)(const RowFunction&, Size steps, Size batch, Rows<const void*> input, Rows<void*> output,
                     void* scratch, int threads);
  // Any function but softmax, which is not one of single elements.
  void (*evaluate)(const Function&, Size count, const void* x, void* y);
  // Only multiplies and adds in registers: the machine's limit, for benchmarks. Returns the number of operations.
  Size (*multiply_add)(Size repetitions);
  // Only reads `count` elements repeatedly: a cache's bandwidth, for benchmarks. Returns the number of bytes.
  Size (*read)(const void* data, Size count, Size repetitions);
  // A number made of all bits of some pieces of memory. If any bit changes, so does it, but for one case in 2^64.
  std::uint64_t (*fingerprint)(const Memory* pieces, Size count);
};

}  // namespace gatewise
