// PyTorch's tensors: weights that are packed once and recognised later, and plain calls without gradients. A step takes
// a few microseconds; asking seven tensors from Python what they are takes several times as long. So they are looked at
// here, through DLPack's exchange interface, without compiling against PyTorch. Python does all other calls.
#include <algorithm>
#include <cstddef>
#include <functional>
#include <new>
#include <numeric>
#include <utility>

#include "../interruption.hpp"
#include "../method.hpp"
#include "../packed.hpp"
#include "dlpack.hpp"

namespace gatewise {
namespace {

// ---- Python -------------------------------------------------------------------------------------------------------

// Takes a new reference; throws the present Python exception if it is null.
py::object taken(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object ask(py::handle function) { return taken(PyObject_CallNoArgs(function.ptr())); }
py::object ask(py::handle function, PyObject* argument) { return taken(PyObject_CallOneArg(function.ptr(), argument)); }

bool is_true(const py::object& answer) {
  const int truth = PyObject_IsTrue(answer.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth;
}

// ---- what PyTorch is asked ----------------------------------------------------------------------------------------

struct TensorLibrary {
  py::capsule exchange;
  py::object tensor_type, parameter_type;
  py::object is_negative;  // of a tensor
  py::object threads;      // how many PyTorch uses
  py::tuple busy;          // functions that tell whether PyTorch is in a mode that a call here would bypass
  py::str version{"_version"};

  const dlpack::ExchangeApi* api() const {
    return static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::capsule_name));
  }

  bool is_busy() const {
    return std::any_of(busy.begin(), busy.end(), [](py::handle question) { return is_true(ask(question)); });
  }

  bool is_tensor(PyObject* object) const {
    const auto* kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return kind == tensor_type.ptr() || kind == parameter_type.ptr();
  }

  // Whether `object` is a tensor whose memory holds its values as they are, not negated. Calls Python, so that other
  // threads may run during it.
  bool is_plain(PyObject* object) const { return is_tensor(object) && !is_true(ask(is_negative, object)); }

  // Whether a plain tensor is a dense one of float32 or float64 in this process's memory; `tensor` then describes it.
  // No other thread runs meanwhile, so the description holds until one does.
  bool locate(PyObject* object, dlpack::Tensor& tensor) const {
    if (api()->look(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (tensor.device.type != dlpack::cpu || tensor.dtype.code != dlpack::floating || tensor.dtype.lanes != 1)
      return false;
    if (tensor.dtype.bits != 32 && tensor.dtype.bits != 64) return false;
    const bool is_empty = std::count(tensor.shape, tensor.shape + tensor.axes, 0) > 0;
    if (!tensor.data && !is_empty) return false;
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return true;
  }

  bool look(PyObject* object, dlpack::Tensor& tensor) const { return is_plain(object) && locate(object, tensor); }

  // -1: PyTorch does not count the changes of this tensor
  std::int64_t version_of(PyObject* tensor_object) const {
    PyObject* number = PyObject_GetAttr(tensor_object, version.ptr());
    if (!number) {
      PyErr_Clear();
      return -1;
    }
    return PyLong_AsLongLong(taken(number).ptr());
  }
};

bool is_contiguous(const dlpack::Tensor& tensor) {
  Size dense = 1;
  for (std::int32_t i = tensor.axes; i-- > 0; dense *= tensor.shape[i])
    if (tensor.shape[i] != 1 && tensor.strides[i] != dense) return false;
  return true;
}

// ---- weights ------------------------------------------------------------------------------------------------------

#ifdef Py_GIL_DISABLED
constexpr bool other_threads_wait = false;
#else
constexpr bool other_threads_wait = true;  // until the GIL is released
#endif

Size elements_of(const dlpack::Tensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.axes, Size(1), std::multiplies<>());
}

// Whether the elements fill the memory from the first to the last one, in any order.
bool is_dense(const dlpack::Tensor& tensor) {
  Size extent = 1;
  for (std::int32_t i = 0; i < tensor.axes; ++i) extent += (tensor.shape[i] - 1) * tensor.strides[i];
  const Size elements = elements_of(tensor);
  return elements == 0 || elements == extent;
}

// Whether the core can read and write it as it is. Weights need not be aligned: packing copies them.
bool is_aligned(const dlpack::Tensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data) % (tensor.dtype.bits / 8) == 0;
}

Memory memory_of(const dlpack::Tensor& dense) { return {dense.data, elements_of(dense) * (dense.dtype.bits / 8)}; }

// What one weight was when it was packed.
class KnownWeight {
 public:
  KnownWeight(const dlpack::Tensor& tensor, std::int64_t version)
      : data_(tensor.data),
        bits_(tensor.dtype.bits),
        shape_(tensor.shape, tensor.shape + tensor.axes),
        strides_(tensor.strides, tensor.strides + tensor.axes),
        version_(version) {}

  bool has_layout_of(const dlpack::Tensor& tensor) const {
    return bits_ == tensor.dtype.bits && shape_.size() == static_cast<std::size_t>(tensor.axes) &&
           std::equal(shape_.begin(), shape_.end(), tensor.shape) &&
           std::equal(strides_.begin(), strides_.end(), tensor.strides);
  }
  // Whether PyTorch has neither counted a change since then nor given the tensor other memory.
  bool is_unchanged(const dlpack::Tensor& tensor, std::int64_t version) const {
    return data_ == tensor.data && version_ == version && has_layout_of(tensor);
  }

 private:
  const void* data_;
  std::uint8_t bits_;
  std::vector<std::int64_t> shape_, strides_;
  std::int64_t version_;
};

// A module's packed weights, and the evidence that they are still current: a fingerprint of all their numbers, taken
// again at each call. For a frozen module it is taken only if PyTorch has counted a change, or if tensors were
// replaced.
class TensorWeights {
 public:
  TensorWeights(std::shared_ptr<const TensorLibrary> library, py::tuple names, const py::tuple& tensors,
                const py::function& pack, bool is_frozen)
      : library_(std::move(library)), kernels_(*active_backend().float32), names_(std::move(names)) {
    // Detached tensors, since another thread may give a parameter other memory.
    std::vector<py::object> weights;
    for (const py::handle weight : tensors) {
      const std::int64_t version = library_->version_of(weight.ptr());
      weights.push_back(weight.attr("detach")());
      py::object dense = weights.back();
      dlpack::Tensor tensor;
      require(library_->look(dense.ptr(), tensor), "internal: weights that are not plain");
      if (!is_dense(tensor)) {
        dense = dense.attr("contiguous")();
        require(library_->look(dense.ptr(), tensor), "internal: weights that are not plain");
        tensor.data = nullptr;  // a copy, whose address other weights may get later
      }
      known_.emplace_back(tensor, version);
      bytes_ += memory_of(tensor).bytes;
    }
    fingerprint_ = fingerprint_of(weights);
    packed_ = present(pack(py::tuple(py::cast(weights))).cast<std::shared_ptr<const Packed>>());
    // If another thread or process has written to the weights meanwhile, only some of it may have been packed.
    if (fingerprint_ != fingerprint_of(weights)) fingerprint_.reset();
    if (is_frozen) frozen_ = std::move(weights);
  }

  // Whether a later call can find out that the packed weights are current.
  bool is_cacheable() const { return fingerprint_.has_value(); }

  // Whether `weights` are what was packed.
  bool are_current(const py::tuple& weights) const { return are_current(items(weights)); }
  // The same, from a module's parameters by name; false if one of them is not among these, as with a parametrization.
  bool are_current(PyObject* parameters) const {
    std::vector<py::object> weights;  // owned, since another thread may change the module
    weights.reserve(known_.size());
    for (const py::handle name : names_) {
      PyObject* const weight = PyObject_GetItem(parameters, name.ptr());
      if (!weight && PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
        return false;
      }
      weights.push_back(taken(weight));
    }
    return are_current(std::move(weights));
  }

  const std::shared_ptr<const Packed>& packed() const { return packed_; }
  const TensorLibrary& tensors() const { return *library_; }

 private:
  static std::vector<py::object> items(const py::tuple& tuple) {
    std::vector<py::object> items;
    for (const py::handle item : tuple) items.push_back(py::reinterpret_borrow<py::object>(item));
    return items;
  }

  bool are_current(std::vector<py::object> weights) const {
    const Backend& backend = active_backend();
    if (packed_->kernels != backend.float32 && packed_->kernels != backend.float64) return false;
    if (weights.size() != known_.size() || !is_cacheable()) return false;
    return (!frozen_.empty() && are_unchanged(weights)) || fingerprint_of(std::move(weights)) == fingerprint_;
  }

  bool are_unchanged(const std::vector<py::object>& weights) const {
    for (std::size_t i = 0; i < known_.size(); ++i) {
      dlpack::Tensor tensor;
      if (!library_->look(weights[i].ptr(), tensor)) return false;
      if (!known_[i].is_unchanged(tensor, library_->version_of(weights[i].ptr()))) return false;
    }
    return true;
  }

  // A number made of all bits of the weights; none if their layouts are not those that were packed.
  std::optional<std::uint64_t> fingerprint_of(std::vector<py::object> weights) const {
    const Size operations = bytes_ / 8;
    dlpack::Tensor tensor;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (!library_->look(weights[i].ptr(), tensor)) return std::nullopt;
      if (!known_[i].has_layout_of(tensor))
        weights[i] = weights[i].attr("contiguous")();  // of weights with gaps, such a copy was packed
      else if (operations >= gil_operations || !other_threads_wait)
        weights[i] = weights[i].attr("detach")();  // keeps its memory alive while other threads run
    }
    std::vector<Memory> pieces;
    pieces.reserve(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (!library_->locate(weights[i].ptr(), tensor) || !known_[i].has_layout_of(tensor)) return std::nullopt;
      pieces.push_back(memory_of(tensor));
    }
    std::uint64_t fingerprint = 0;
    without_gil(operations,
                [&] { fingerprint = kernels_.fingerprint(pieces.data(), static_cast<Size>(pieces.size())); });
    return fingerprint;
  }

  std::shared_ptr<const TensorLibrary> library_;
  const Kernels& kernels_;  // that take the fingerprints
  py::tuple names_;
  std::vector<KnownWeight> known_;
  std::vector<py::object> frozen_;  // weights of a frozen module, kept alive so that no other tensor gets their memory
  Size bytes_ = 0;
  std::optional<std::uint64_t> fingerprint_;
  std::shared_ptr<const Packed> packed_;
};

// ---- calls --------------------------------------------------------------------------------------------------------

constexpr int max_axes = 3;

struct Shape {
  std::int32_t axes;
  std::array<std::int64_t, max_axes> sizes;

  // -1: more than memory can hold
  Size elements() const {
    Size count = 1;
    for (std::int32_t i = 0; i < axes; ++i) {
      if (sizes[i] > 0 && count > PTRDIFF_MAX / 8 / sizes[i]) return -1;
      count *= sizes[i];
    }
    return count;
  }
};

// The memory of a tensor to come, which costs half as much as one from PyTorch. Its description precedes it.
class NewTensor {
 public:
  NewTensor(const Shape& shape, dlpack::DataType dtype) {
    if (shape.elements() < 0) throw std::bad_alloc();
    Buffer memory(data_offset + static_cast<std::size_t>(shape.elements() * (dtype.bits / 8)));
    header_.reset(new (memory.data()) Header{});
    header_->memory = std::move(memory);
    header_->shape = shape.sizes;
    Size stride = 1;
    for (std::int32_t i = shape.axes; i-- > 0; stride *= shape.sizes[i]) header_->strides[i] = stride;
    header_->owned.version = {dlpack::version_major, dlpack::version_minor};
    header_->owned.owner = header_.get();
    header_->owned.free = [](dlpack::Owned* self) { Free()(static_cast<Header*>(self->owner)); };
    header_->owned.tensor = {
        data(), {dlpack::cpu, 0}, shape.axes, dtype, header_->shape.data(), header_->strides.data(), 0};
  }

  void* data() const { return reinterpret_cast<char*>(header_.get()) + data_offset; }

  // Makes the tensor: once, after its numbers are written.
  py::object object(const TensorLibrary& library) {
    void* tensor = nullptr;
    if (library.api()->object_of(&header_.release()->owned, &tensor) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
  }

 private:
  // Lies at the beginning of its own memory.
  struct Header {
    dlpack::Owned owned;
    Buffer memory;
    std::array<std::int64_t, max_axes> shape, strides;
  };
  static constexpr std::size_t data_offset = (sizeof(Header) + 63) / 64 * 64;
  struct Free {
    void operator()(Header* header) const {
      const Buffer memory = std::move(header->memory);
      header->~Header();
    }
  };

  std::unique_ptr<Header, Free> header_;
};

// The axes of x: cell [B, I], time_first [T, B, I], batch_first [B, T, I]; unbatched they lack B.
enum class Order { cell, time_first, batch_first };

// What a call is, read from x.
struct Extent {
  Size steps = 1, batch = 1;
  Rows<const void*> x{};
  Shape output{};    // as x, with the units of the output
  Shape state[2]{};  // h and c

  // Returns false if x does not fit the weights.
  bool read(const TensorWeights& weights, PyObject* object, Order order) {
    const Packed& packed = *weights.packed();
    dlpack::Tensor tensor;
    if (!weights.tensors().look(object, tensor) || tensor.dtype.bits != 8 * packed.kernels->item_bytes) return false;
    if (!is_aligned(tensor)) return false;
    const std::int32_t unbatched_axes = order == Order::cell ? 1 : 2, units = tensor.axes - 1;
    if (tensor.axes != unbatched_axes && tensor.axes != unbatched_axes + 1) return false;
    if (tensor.shape[units] != packed.input || (packed.input > 1 && tensor.strides[units] != 1)) return false;
    const bool has_batch = tensor.axes > unbatched_axes;
    x = {tensor.data, 0, 0};
    if (order != Order::cell) {
      const int time = has_batch && order == Order::batch_first;
      steps = tensor.shape[time];
      x.step = tensor.strides[time];
    }
    if (has_batch) {
      const int row = order == Order::time_first;
      batch = tensor.shape[row];
      x.row = tensor.strides[row];
    }
    output.axes = tensor.axes;
    std::copy(tensor.shape, tensor.shape + units, output.sizes.begin());
    output.sizes[units] = packed.output();
    for (int i = 0; i < 2; ++i) {
      std::int32_t& axes = state[i].axes;
      if (order != Order::cell) state[i].sizes[axes++] = packed.layers * packed.directions;
      if (has_batch) state[i].sizes[axes++] = batch;
      state[i].sizes[axes++] = i == 0 ? packed.recurrent() : packed.hidden;
    }
    return steps > 0 && batch > 0 && output.elements() >= 0 && state[0].elements() >= 0 && state[1].elements() >= 0;
  }

  // Rows of the output follow each other step by step, or with batch_first row by row.
  Rows<void*> output_rows(void* data, Size units, Order order) const {
    return order == Order::batch_first ? Rows<void*>{data, units, steps * units}
                                       : Rows<void*>{data, batch * units, units};
  }
};

// The address of a contiguous tensor of this shape; null for anything else.
const void* contiguous_at(const TensorWeights& weights, PyObject* object, const Shape& shape) {
  dlpack::Tensor tensor;
  if (!weights.tensors().look(object, tensor) || tensor.dtype.bits != 8 * weights.packed()->kernels->item_bytes)
    return nullptr;
  const bool has_shape =
      tensor.axes == shape.axes && std::equal(tensor.shape, tensor.shape + tensor.axes, shape.sizes.begin());
  return has_shape && is_contiguous(tensor) && is_aligned(tensor) ? tensor.data : nullptr;
}

// Runs a cell and returns its state, or a layer and returns its output and state. None if it is not the plain case.
py::object run_plainly(const TensorWeights& weights, PyObject* parameters, PyObject* x, PyObject* state, Order order) {
  const TensorLibrary& library = weights.tensors();
  const Packed& packed = *weights.packed();
  const bool is_cell = order == Order::cell, is_pair = packed.has_cell();
  require(!is_cell || (packed.layers == 1 && packed.directions == 1 && !packed.projection), "internal: not a cell");
  if (parameters != Py_None && (!PyDict_CheckExact(parameters) || library.is_busy())) return py::none();
  Extent extent;
  if (!extent.read(weights, x, order)) return py::none();
  const void* before[2] = {};
  if (state != Py_None) {
    if (is_pair && !(PyTuple_CheckExact(state) && PyTuple_GET_SIZE(state) == 2)) return py::none();
    for (int i = 0; i < 1 + is_pair; ++i) {
      before[i] = contiguous_at(weights, is_pair ? PyTuple_GET_ITEM(state, i) : state, extent.state[i]);
      if (!before[i]) return py::none();
    }
  }
  if (parameters != Py_None && !weights.are_current(parameters)) return py::none();

  const dlpack::DataType dtype{dlpack::floating, static_cast<std::uint8_t>(8 * packed.kernels->item_bytes), 1};
  std::optional<NewTensor> output, after[2];
  if (!is_cell) output.emplace(extent.output, dtype);
  for (int i = 0; i < 1 + is_pair; ++i) after[i].emplace(extent.state[i], dtype);
  Forward call{};
  call.stack = packed.stack();
  call.steps = extent.steps;
  call.batch = extent.batch;
  call.input = extent.x;
  call.output = extent.output_rows((is_cell ? after[0] : output)->data(), packed.output(), order);
  call.hidden_before = before[0];
  call.cell_before = before[1];
  call.hidden_after = after[0]->data();
  call.cell_after = is_pair ? after[1]->data() : nullptr;
  const long max_threads = PyLong_AsLong(ask(library.threads).ptr());
  call.threads = static_cast<int>(std::clamp<long>(max_threads, 1, packed.threads(extent.steps, extent.batch)));
  run_forward(packed, call);

  py::object state_after = after[0]->object(library);
  if (is_pair) state_after = py::make_tuple(std::move(state_after), after[1]->object(library));
  return is_cell ? state_after : py::make_tuple(output->object(library), std::move(state_after));
}

// An uninitialised tensor of float32, float64 or bytes.
py::object empty(const TensorLibrary& library, const std::vector<Size>& sizes, Size item_bytes) {
  Shape shape{static_cast<std::int32_t>(sizes.size()), {}};
  require(sizes.size() <= max_axes && (item_bytes == 1 || item_bytes == 4 || item_bytes == 8) &&
              std::all_of(sizes.begin(), sizes.end(), [](Size size) { return size >= 0; }),
          "internal: no such tensor");
  std::copy(sizes.begin(), sizes.end(), shape.sizes.begin());
  const std::uint8_t code = item_bytes == 1 ? dlpack::unsigned_integer : dlpack::floating;
  return NewTensor(shape, {code, static_cast<std::uint8_t>(8 * item_bytes), 1}).object(library);
}

// The memory of a tensor as an array that keeps the tensor alive. PyTorch's numpy() would prevent its storage from
// being resized.
py::array array_of(const TensorLibrary& library, const py::object& tensor) {
  dlpack::Tensor memory;
  require(library.look(tensor.ptr(), memory), "internal: a tensor that is not plain");
  const Size item_bytes = memory.dtype.bits / 8;
  std::vector<py::ssize_t> shape(memory.shape, memory.shape + memory.axes), strides;
  for (std::int32_t i = 0; i < memory.axes; ++i) strides.push_back(memory.strides[i] * item_bytes);
  return py::array(item_bytes == 4 ? py::dtype::of<float>() : py::dtype::of<double>(), shape, strides, memory.data,
                   tensor);
}

// The result of a plain C method, call(weights), if it has been given as many arguments as it expects.
template <class Call>
PyObject* answer(PyObject* self, Py_ssize_t count, Py_ssize_t expected, const Call& call) {
  const auto* weights = object_in<TensorWeights>(self);
  if (!weights || count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  py::object result;
  const bool is_done = without_exceptions([&] { result = call(*weights); });
  return is_done ? result.release().ptr() : nullptr;
}

PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return answer(self, count, 3, [&](const TensorWeights& weights) {
    return run_plainly(weights, arguments[0], arguments[1], arguments[2], Order::cell);
  });
}

PyObject* walk(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return answer(self, count, 4, [&](const TensorWeights& weights) {
    const bool batch_first = is_true(py::reinterpret_borrow<py::object>(arguments[3]));
    return run_plainly(weights, arguments[0], arguments[1], arguments[2],
                       batch_first ? Order::batch_first : Order::time_first);
  });
}

PyMethodDef methods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
     "step($self, parameters, x, state, /)\n--\n\n"
     "The state after one step of a cell; None if it is not the plain case. parameters: those of the module by name, "
     "or\n"
     "None if they are known to be current; x (B, I) or (I,); state (B, H) or (H,), a pair for an LSTM, or None."},
    {"walk", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(walk)), METH_FASTCALL,
     "walk($self, parameters, x, state, batch_first, /)\n--\n\n"
     "Output and state of a layer, likewise. x (T, B, I), (B, T, I) or (T, I); state (L*D, B, .) or (L*D, .)."}};

}  // namespace

void bind_tensors(py::module_& module) {
  using namespace py::literals;
  py::class_<TensorLibrary, std::shared_ptr<TensorLibrary>>(module, "TensorLibrary", py::is_final())
      .def(py::init([](py::capsule exchange, py::object tensor, py::object parameter, py::object is_negative,
                       py::object threads, py::tuple busy) {
             TensorLibrary library{std::move(exchange),    std::move(tensor),  std::move(parameter),
                                   std::move(is_negative), std::move(threads), std::move(busy)};
             const dlpack::ExchangeApi* api = library.api();
             if (!api) throw py::error_already_set();
             require(api->version.major == dlpack::version_major && api->look && api->object_of,
                     "internal: another DLPack");
             return library;
           }),
           "exchange"_a, "tensor"_a, "parameter"_a, "is_negative"_a, "threads"_a, "busy"_a)
      .def("empty", empty, "shape"_a, "item_bytes"_a)
      .def("array", array_of, "tensor"_a);
  py::class_<TensorWeights> weights(module, "TensorWeights", py::is_final());
  weights
      .def(py::init<std::shared_ptr<const TensorLibrary>, py::tuple, const py::tuple&, const py::function&, bool>(),
           py::arg("library").none(false), "names"_a, "weights"_a, "pack"_a, "is_frozen"_a)
      .def("hold", py::overload_cast<const py::tuple&>(&TensorWeights::are_current, py::const_), "weights"_a)
      .def_property_readonly("is_cacheable", &TensorWeights::is_cacheable)
      .def_property_readonly("packed", &TensorWeights::packed);
  // Plain C methods, as those of a stream.
  for (PyMethodDef& method : methods)
    weights.attr(method.ml_name) =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(weights.ptr()), &method));
}

}  // namespace gatewise
