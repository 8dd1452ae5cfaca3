// Handlers that XLA calls inside a compiled program: what gatewise.jax is built on. They run on XLA's threads, without
// Python. JAX raises the errors that they return. Memory stays safe, whatever the program asks for.
#include "xla.hpp"

#include <algorithm>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>

#include "foreign.hpp"

namespace gatewise {
namespace {

struct WrongCall : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

void require_call(bool holds, const char* what) {
  if (!holds) throw WrongCall(std::string("gatewise: internal: ") + what);
}

// ---- attributes and arrays of a call

class Options {
 public:
  explicit Options(const xla::Attributes& attributes) : attributes_(attributes) {}

  std::string text(const char* name) const {
    const auto* string = static_cast<const xla::String*>(value(name, xla::Attribute::string));
    return {string->data, string->size};
  }

  // int64
  const xla::Array& numbers(const char* name) const {
    const auto& array = *static_cast<const xla::Array*>(value(name, xla::Attribute::array));
    require_call(array.dtype == xla::DataType::int64, name);
    return array;
  }

  std::vector<bool> flags(const char* name) const {
    const xla::Array& array = numbers(name);
    const auto* first = static_cast<const std::int64_t*>(array.data);
    return std::vector<bool>(first, first + array.size);
  }

 private:
  const void* value(const char* name, xla::Attribute type) const {
    for (std::int64_t i = 0; i < attributes_.size; ++i) {
      const xla::String& present = *attributes_.names[i];
      if (std::string_view(present.data, present.size) != name) continue;
      require_call(attributes_.types[i] == type, name);
      return attributes_.values[i];
    }
    throw WrongCall(std::string("gatewise: internal: no attribute ") + name);
  }

  const xla::Attributes& attributes_;
};

// Arguments or results, taken one after the other.
class Buffers {
 public:
  explicit Buffers(const xla::Buffers& buffers) : buffers_(buffers) {}

  const xla::Buffer& next() {
    require_call(next_ < buffers_.size, "too few arrays");
    return *buffers_.buffers[next_++];
  }

  const xla::Buffer& next(xla::DataType dtype, Size count) {
    const xla::Buffer& buffer = next();
    require_call(buffer.dtype == dtype && elements(buffer) == count, "an array of the wrong dtype or size");
    return buffer;
  }

  void end() const { require_call(next_ == buffers_.size, "too many arrays"); }

  static Size elements(const xla::Buffer& buffer) {
    Size count = 1;
    for (std::int64_t i = 0; i < buffer.rank; ++i) count *= buffer.dims[i];
    return count;
  }

 private:
  const xla::Buffers& buffers_;
  std::int64_t next_ = 0;
};

Address address(const xla::Buffer& buffer) { return reinterpret_cast<Address>(buffer.data); }
Address address(const xla::Buffer* buffer) { return buffer ? address(*buffer) : 0; }
Address address(const Buffer& memory) { return reinterpret_cast<Address>(memory.data()); }

// ---- what the handlers share

const Backend& backend_named(const std::string& name) {
  for (const Backend& backend : backends())
    if (name == backend.name) return backend;
  throw WrongCall("gatewise: the program was made for backend " + name + ", which this machine cannot run");
}

// Precedes packed weights and tapes, which pass through JAX's transformations: enough to tell them from zeros, and from
// those of another backend or size. If a transformation mixes them up all the same, numbers are wrong, but memory is
// safe.
struct Mark {
  char backend[40];
  std::int64_t sizes[3];  // of a tape: steps, batch and distance of checkpoints; of weights: their bytes
};
constexpr Size mark_bytes = 64;
static_assert(sizeof(Mark) == mark_bytes, "what follows the mark must stay aligned");

// The address after the mark in a buffer of bytes.
Address after_mark(const xla::Buffer& buffer, Size bytes) {
  require_call(buffer.dtype == xla::DataType::uint8 && Buffers::elements(buffer) >= mark_bytes + bytes &&
                   address(buffer) % 64 == 0,
               "bytes of the wrong dtype, size or alignment");
  return address(buffer) + mark_bytes;
}

// As gatewise.jax lists them. Packing reads only the first six.
struct Numbers {
  std::int64_t input_size, hidden_size, proj_size, num_layers, directions, bias;
  std::int64_t batch_first, lengths, resets, checkpoint_every, record;
};

// Refuses sizes whose products overflow: they would fit empty arrays.
void check_sizes(const Numbers& numbers, double sequence_steps) {
  constexpr double most = 1LL << 46, max_size = 1LL << 31;
  for (const std::int64_t size :
       {numbers.input_size, numbers.hidden_size, numbers.proj_size, numbers.num_layers, numbers.directions})
    require_call(size >= 0 && static_cast<double>(size) < max_size, "a size out of range");
  const double sequences = static_cast<double>(numbers.num_layers) * static_cast<double>(numbers.directions);
  const double widest = static_cast<double>(numbers.input_size) + 3.0 * static_cast<double>(numbers.hidden_size);
  require_call(
      sequences * 4 * static_cast<double>(numbers.hidden_size) * widest < most && sequences * widest < 1LL << 31,
      "weights of more bytes than there are");
  if (sequence_steps * sequences * 8 * widest >= most)
    throw WrongCall("x: expected a sequence whose tape fits into memory, got more steps and rows");
}

// What every handler gets: the sizes of the stack, and arrays that have the dtype of the first one.
struct Invocation {
  Options options;
  Buffers arguments, results;
  xla::DataType dtype;
  Numbers numbers;
  std::shared_ptr<Packed> packed;

  explicit Invocation(const xla::CallFrame& frame)
      : options(frame.attributes), arguments(frame.arguments), results(frame.results), dtype(first_dtype(frame)) {
    const xla::Array& array = options.numbers("numbers");
    require_call(array.size * sizeof(std::int64_t) == sizeof numbers, "numbers");
    std::memcpy(&numbers, array.data, sizeof numbers);
    check_sizes(numbers, 0);
    const Backend& backend = backend_named(options.text("backend"));
    packed = std::make_shared<Packed>(dtype == xla::DataType::float32 ? *backend.float32 : *backend.float64,
                                      cell_of(options.text("cell")), numbers.input_size, numbers.hidden_size,
                                      numbers.proj_size, numbers.num_layers, numbers.directions);
  }

  static xla::DataType first_dtype(const xla::CallFrame& frame) {
    const xla::DataType dtype = Buffers(frame.arguments).next().dtype;
    require_call(dtype == xla::DataType::float32 || dtype == xla::DataType::float64, "an array of the wrong dtype");
    return dtype;
  }

  Mark mark(Size first, Size second, Size third) const {
    Mark mark{};
    std::strncpy(mark.backend, packed->kernels->level, sizeof mark.backend - 1);
    mark.sizes[0] = first;
    mark.sizes[1] = second;
    mark.sizes[2] = third;
    return mark;
  }

  // The five addresses of the weights, or of their gradients, of a layer and direction: take(size) gives one after the
  // other.
  template <class Take>
  std::array<Address, 5> five(std::size_t sequence, const Take& take) const {
    const Layer& layer = packed->layer[sequence];
    const Size gates = gates_of(layer.cell) * layer.hidden;
    std::array<Address, 5> addresses{};
    addresses[0] = take(gates * layer.input);
    addresses[1] = take(gates * packed->recurrent());
    if (numbers.bias) {
      addresses[2] = take(gates);
      addresses[3] = take(gates);
    }
    if (layer.projection) addresses[4] = take(layer.projection * layer.hidden);
    return addresses;
  }
};

// A call on sequences. Order of arguments: x [T, B, I] or with batch_first [B, T, I]; then what each handler adds;
// then, if there are any, lengths int32 [B] and resets bool in the order of x's axes; then packed weights.
struct SequenceCall : Invocation {
  const xla::Buffer& x;
  const bool batch_first;
  Size steps, batch;
  Size used_steps = 0;  // steps of the longest row

  explicit SequenceCall(const xla::CallFrame& frame)
      : Invocation(frame), x(arguments.next()), batch_first(numbers.batch_first) {
    require_call(x.rank == 3 && x.dims[2] == packed->input && numbers.checkpoint_every >= 0, "x of the wrong shape");
    steps = x.dims[batch_first ? 1 : 0];
    batch = x.dims[batch_first ? 0 : 1];
  }

  Size states(Size units) const { return packed->layers * packed->directions * batch * units; }
  Size recurrent_states() const { return states(packed->recurrent()); }
  Size cell_states() const { return states(packed->hidden); }
  Size outputs() const { return steps * batch * packed->output(); }
  Mark mark() const { return Invocation::mark(steps, batch, numbers.checkpoint_every); }

  // The rows of a sequence [T, B, units] at an address, in the order of x's axes.
  AddressedRows rows(Address first, Size units) const {
    return batch_first ? AddressedRows{first, units, steps * units} : AddressedRows{first, batch * units, units};
  }

  // Takes the last arguments: lengths, resets and weights.
  ForeignCall prepare() {
    std::vector<std::int64_t> lengths;
    std::vector<std::uint8_t> resets;
    used_steps = steps;
    const bool has_lengths = numbers.lengths, has_resets = numbers.resets;
    if (has_lengths) lengths = read_lengths();
    if (has_resets) resets = read_resets();
    std::shared_ptr<const HeldSchedule> schedule;
    if (has_lengths || has_resets)
      schedule = std::make_shared<const HeldSchedule>(used_steps, batch, has_lengths ? lengths.data() : nullptr,
                                                      has_resets ? resets.data() : nullptr);
    const xla::Buffer& weights = arguments.next();
    arguments.end();
    packed->place(reinterpret_cast<const void*>(after_mark(weights, packed->bytes())));
    const Mark mark = Invocation::mark(packed->bytes(), 0, 0);
    require_call(std::memcmp(weights.data, &mark, sizeof mark) == 0, "weights that were packed for another call");
    return {packed, used_steps, batch, schedule, std::min(numbers.checkpoint_every, used_steps), 0.0, 0, INT_MAX};
  }

  std::vector<std::int64_t> read_lengths() {
    const xla::Buffer& buffer = arguments.next(xla::DataType::int32, batch);
    const auto* first = static_cast<const std::int32_t*>(buffer.data);
    std::vector<std::int64_t> lengths(first, first + batch);
    for (const std::int64_t length : lengths)
      if (length < 0 || length > steps)
        throw WrongCall("lengths: expected numbers from 0 to " + std::to_string(steps) + " (T), got " +
                        std::to_string(length));
    used_steps = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
    return lengths;
  }

  // [used_steps, B]
  std::vector<std::uint8_t> read_resets() {
    const xla::Buffer& buffer = arguments.next(xla::DataType::boolean, steps * batch);
    const auto* from = static_cast<const std::uint8_t*>(buffer.data);
    std::vector<std::uint8_t> resets(static_cast<std::size_t>(used_steps * batch));
    for (Size time = 0; time < used_steps; ++time)
      for (Size row = 0; row < batch; ++row)
        resets[static_cast<std::size_t>(time * batch + row)] =
            from[batch_first ? row * steps + time : time * batch + row] != 0;
    return resets;
  }

  // Zeroes the steps after the longest row of a sequence [T, B, units], which the core does not know of.
  void zero_tail(const xla::Buffer& buffer, Size units) const {
    if (used_steps == steps) return;
    const Size item = packed->kernels->item_bytes;
    auto* data = static_cast<char*>(buffer.data);
    const Size rows = batch_first ? batch : 1, width = (batch_first ? 1 : batch) * units * item;
    for (Size row = 0; row < rows; ++row)
      std::memset(data + (row * steps + used_steps) * width, 0, static_cast<std::size_t>((steps - used_steps) * width));
  }
};

// Arguments: weights as PyTorch orders them; result: bytes. A program packs weights once, however often its loops use
// them.
void pack(const xla::CallFrame& frame) {
  Invocation call(frame);
  std::vector<Weights> weights;
  for (std::size_t i = 0; i < call.packed->layer.size(); ++i) {
    const auto addresses = call.five(i, [&](Size count) { return address(call.arguments.next(call.dtype, count)); });
    const auto pointer = [](Address weight) { return reinterpret_cast<const void*>(weight); };
    weights.push_back({pointer(addresses[0]), pointer(addresses[1]), pointer(addresses[2]), pointer(addresses[3]),
                       pointer(addresses[4])});
  }
  call.arguments.end();
  const xla::Buffer& packed = call.results.next();
  call.results.end();
  const Mark mark = call.mark(call.packed->bytes(), 0, 0);
  call.packed->pack(weights, reinterpret_cast<void*>(after_mark(packed, call.packed->bytes())));
  std::memcpy(packed.data, &mark, sizeof mark);
}

// Arguments: x, h, c of an LSTM, ...; results: y, h and c after, and the tape if it is to be recorded.
void forward(const xla::CallFrame& frame) {
  SequenceCall call(frame);
  const bool has_cell = call.packed->has_cell();
  const xla::Buffer& hidden = call.arguments.next(call.dtype, call.recurrent_states());
  const xla::Buffer* cell = has_cell ? &call.arguments.next(call.dtype, call.cell_states()) : nullptr;
  const ForeignCall core_call = call.prepare();
  const xla::Buffer& output = call.results.next(call.dtype, call.outputs());
  const xla::Buffer& hidden_after = call.results.next(call.dtype, call.recurrent_states());
  const xla::Buffer* cell_after = has_cell ? &call.results.next(call.dtype, call.cell_states()) : nullptr;
  Address tape = 0;
  if (call.numbers.record) {
    const xla::Buffer& buffer = call.results.next();
    tape = after_mark(buffer, core_call.tape_bytes());
    const Mark mark = call.mark();
    std::memcpy(buffer.data, &mark, sizeof mark);
  }
  call.results.end();
  core_call.forward(nullptr, call.rows(address(call.x), call.packed->input), address(hidden), address(cell),
                    call.rows(address(output), call.packed->output()), address(hidden_after), address(cell_after),
                    tape);
  call.zero_tail(output, call.packed->output());
}

// The output and tape of a recorded forward, for backward.
struct Recorded {
  Address output, tape;
  Buffer memory[4];

  // Uses the tape that it was given if that is a real one; otherwise runs forward again to record one. The tape is
  // zeros in two cases: vmap merged its examples into the rows of one call, or vmap mapped a condition, for which JAX
  // also runs the branch that an example did not take.
  Recorded(const SequenceCall& call, const ForeignCall& core_call, const xla::Buffer& hidden, const xla::Buffer* cell,
           const xla::Buffer& output_of_forward, const xla::Buffer& tape_of_forward)
      : output(address(output_of_forward)) {
    const Mark mark = call.mark();
    if (Buffers::elements(tape_of_forward) >= mark_bytes &&
        std::memcmp(tape_of_forward.data, &mark, sizeof mark) == 0) {
      tape = after_mark(tape_of_forward, core_call.tape_bytes());
      return;
    }
    const Size item = call.packed->kernels->item_bytes;
    const Size bytes[] = {core_call.tape_bytes(), item * call.outputs(), item * call.recurrent_states(),
                          item * call.cell_states()};
    for (int i = 0; i < 4; ++i) memory[i] = Buffer(static_cast<std::size_t>(bytes[i]));
    tape = address(memory[0]);
    output = address(memory[1]);
    core_call.forward(nullptr, call.rows(address(call.x), call.packed->input), address(hidden), address(cell),
                      call.rows(output, call.packed->output()), address(memory[2]), cell ? address(memory[3]) : 0,
                      tape);
  }
};

// Arguments: x, h, c of an LSTM, y, tape, the gradients of y, and of h and c after, that `given` flags, ...; results:
// the gradients of x if `wanted` flags it, of h and c, and of the weights of each layer and direction that `wanted`
// flags.
void backward(const xla::CallFrame& frame) {
  SequenceCall call(frame);
  const bool has_cell = call.packed->has_cell();
  const std::vector<bool> is_passed = call.options.flags("given"), is_wanted = call.options.flags("wanted");
  require_call(is_passed.size() == 3 && is_wanted.size() == 1 + call.packed->layer.size(), "flags of the wrong number");
  const auto take = [&](Buffers& buffers, bool exists, Size count) {
    return exists ? &buffers.next(call.dtype, count) : nullptr;
  };
  const xla::Buffer& hidden = call.arguments.next(call.dtype, call.recurrent_states());
  const xla::Buffer* cell = take(call.arguments, has_cell, call.cell_states());
  const xla::Buffer& output = call.arguments.next(call.dtype, call.outputs());
  const xla::Buffer& tape = call.arguments.next();
  const xla::Buffer* grad_output = take(call.arguments, is_passed[0], call.outputs());
  const xla::Buffer* grad_hidden = take(call.arguments, is_passed[1], call.recurrent_states());
  const xla::Buffer* grad_cell = take(call.arguments, has_cell && is_passed[2], call.cell_states());
  const ForeignCall core_call = call.prepare();
  const Size input = call.packed->input, outputs = call.packed->output();
  const xla::Buffer* grad_x = take(call.results, is_wanted[0], call.steps * call.batch * input);
  const xla::Buffer& grad_hidden_before = call.results.next(call.dtype, call.recurrent_states());
  const xla::Buffer* grad_cell_before = take(call.results, has_cell, call.cell_states());
  std::vector<std::array<Address, 5>> gradients(call.packed->layer.size());
  for (std::size_t i = 0; i < gradients.size(); ++i)
    if (is_wanted[1 + i])
      gradients[i] = call.five(i, [&](Size count) { return address(call.results.next(call.dtype, count)); });
  call.results.end();

  const Recorded recorded(call, core_call, hidden, cell, output, tape);
  core_call.backward(nullptr, call.rows(address(call.x), input), address(hidden), call.rows(recorded.output, outputs),
                     recorded.tape, call.rows(address(grad_output), outputs), address(grad_hidden), address(grad_cell),
                     call.rows(address(grad_x), input), address(grad_hidden_before), address(grad_cell_before),
                     gradients);
  if (grad_x) call.zero_tail(*grad_x, input);
}

// ---- handlers

xla::Error* failed(const xla::CallFrame& frame, const char* message) {
  xla::NewError error{sizeof(xla::NewError), nullptr, message, xla::invalid_argument};
  return frame.api->create_error(&error);
}

// XLA first asks which version of the interface a handler uses. It refuses versions newer than its own, and one day
// those that are too old; what is used here is the same in all of them. The oldest do not say which version they are.
bool answer_metadata(xla::CallFrame& frame) {
  if (!frame.extension || frame.extension->type != xla::metadata_extension) return false;
  xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(frame.extension)->metadata;
  const int theirs = frame.api ? frame.api->version.minor : xla::oldest_minor;
  metadata.version = {sizeof(xla::Version), nullptr, xla::version_major, std::min(theirs, xla::newest_minor)};
  metadata.traits = 0;
  return true;
}

template <void (*work)(const xla::CallFrame&)>
xla::Error* handle(xla::CallFrame* frame) {
  if (answer_metadata(*frame)) return nullptr;
  try {
    work(*frame);
    return nullptr;
  } catch (const std::exception& error) {
    return failed(*frame, error.what());
  } catch (...) {
    return failed(*frame, "gatewise: internal: an unknown exception");
  }
}

template <void (*work)(const xla::CallFrame&)>
py::capsule capsule() {
  return py::capsule(reinterpret_cast<void*>(&handle<work>));
}

// Bytes of packed weights, and of a tape.
std::tuple<Size, Size> sizes(const std::string& backend, const std::string& cell, int item_bytes, Size input,
                             Size hidden, Size projection, Size layers, Size directions, Size steps, Size batch,
                             Size checkpoint_every) {
  const Backend& kernels = backend_named(backend);
  check_sizes({input, hidden, projection, layers, directions, 0, 0, 0, 0, 0, 0},
              static_cast<double>(steps) * static_cast<double>(batch));
  const Packed packed(item_bytes == 4 ? *kernels.float32 : *kernels.float64, cell_of(cell), input, hidden, projection,
                      layers, directions);
  return {mark_bytes + packed.bytes(), mark_bytes + tape_bytes(packed, steps, batch, checkpoint_every)};
}

}  // namespace

void bind_xla(py::module_& module) {
  using namespace py::literals;
  module.def("xla_handlers", [] {
    return py::dict("gatewise_pack"_a = capsule<pack>(), "gatewise_forward"_a = capsule<forward>(),
                    "gatewise_backward"_a = capsule<backward>());
  });
  module.def("xla_sizes", sizes, "backend"_a, "cell"_a, "item_bytes"_a, "input"_a, "hidden"_a, "projection"_a,
             "layers"_a, "directions"_a, "steps"_a, "batch"_a, "checkpoint_every"_a);
}

}  // namespace gatewise
